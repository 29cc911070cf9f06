"""The one exception that stands for bad input."""


class InputError(ValueError):
    """A file, option or config that can't be used: says what, where, and what to do, in one line."""
