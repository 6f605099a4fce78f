"""The error that stands for a user's mistake."""


class UsageError(ValueError):
    """A setting, a file or a combination of them that cannot be used: the message gives cause and remedy.

    Any other `ValueError` is a fault of this program.
    """
