"""Reading and writing: nothing lost, nothing half-written."""
