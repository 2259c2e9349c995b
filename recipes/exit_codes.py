"""What the program leaves with; 0 is success."""

FAILED = 1  # a check
WRONG_INPUT = 2
INTERRUPTED = 130
