"""The exit codes of `nsa-hf`; 0 is success."""

FAILED = 1  # a check failed
WRONG_INPUT = 2
INTERRUPTED = 130
