"""The exception that ends a run from inside: what it needs has failed, and its message says what to do."""


class RunError(RuntimeError):
    """A disk that is full, a checkpoint that is damaged, gradients that are never finite; no mistake in the program."""
