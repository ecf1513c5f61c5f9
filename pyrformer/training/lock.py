"""Whether a process trains in a run folder: it holds a lock on ``metrics.jsonl``, which ends with the process however
that ends, so nothing stale is left by a kill."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

try:
    import fcntl

    LOCKS = True
except ImportError:  # no such locks: no run is seen as running
    LOCKS = False


def hold(file: BinaryIO) -> None:
    """Holds the lock as long as the file is open; does nothing where the file system has none."""
    if LOCKS:
        try:
            fcntl.flock(file, fcntl.LOCK_SH)
        except OSError:
            return


def held(path: Path) -> bool:
    """Whether a process holds the lock on a file; False where that cannot be known."""
    if not LOCKS:
        return False
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
