"""Forks beside threads: a fork waits until no thread is inside the core.

A child of ``fork`` has the caller's thread alone; a lock that another thread held at that moment stays locked in it for
ever. The core's own locks are held inside its calls only, so those calls pass a gate that a fork closes.
"""

from __future__ import annotations

import os
from threading import Condition, Lock


class Gate:
    """``with gate:`` any number of threads at once; :meth:`close` waits until none is inside and keeps others out."""

    def __init__(self) -> None:
        self._inside = 0
        self._changed = Condition(Lock())

    def __enter__(self) -> None:
        with self._changed:
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Waits for those inside; until :meth:`open`, by the same thread, nobody comes in."""
        self._changed.acquire()
        while self._inside:
            self._changed.wait()

    def open(self) -> None:
        """Lets others in again."""
        self._changed.release()


core = Gate()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=core.close, after_in_parent=core.open, after_in_child=core.open)
