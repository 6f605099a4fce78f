"""The error raised for a user's mistake."""


class UsageError(ValueError):
    """A setting, a file or a combination of them cannot be used; the message says why and what to do.

    Any other `ValueError` is a bug.
    """
