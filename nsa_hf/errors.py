"""What goes wrong because of what a user gave: the message says what was expected, what came and what to do."""


class NsaError(ValueError):
    """Wrong input. The command line prints the message without a traceback and exits with 2."""


class NotPlain(NsaError):
    """A family, or a model of it, has a feature that sparse attention does not have; the message names it."""
