"""Speed, memory and quality, on a GPU."""
