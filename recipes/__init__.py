"""Using it: the commands, training, benchmarks."""
