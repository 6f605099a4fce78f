"""The error raised for a user's mistake, and errors of the system that mean one."""

import errno

BAD_PATH = {
    getattr(errno, name)
    for name in ("ENOENT", "ENOTDIR", "EISDIR", "EACCES", "EPERM", "EROFS", "ELOOP", "ENAMETOOLONG")
}
"""Error numbers of an `OSError` by which the path is at fault, not the disk or the network."""


class UsageError(ValueError):
    """A setting, a file or a combination of them cannot be used; the message says why and what to do.

    Any other `ValueError` is a bug.
    """
