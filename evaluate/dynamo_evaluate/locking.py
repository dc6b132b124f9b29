"""A lock that a file has for as long as a process writes it; the system takes it away, however the process ends."""

from __future__ import annotations

import contextlib
import os
import sys

_PLACE = 1 << 40  # of the byte that Windows locks: where no content is, so that others may read the file


def lock(descriptor: int) -> bool:
    """Lock an open file until it is closed; returns whether nobody else has.

    A file system that knows no locks grants every one.
    """
    try:
        _lock(descriptor)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        os.lseek(descriptor, _PLACE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:

    def _lock(descriptor: int) -> None:
        with contextlib.suppress(ImportError):  # a Unix without it, as in a browser
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
