"""Signals during a run: the first asks for an end after the step, the second ends the process at once.

The interpreter runs Python's handlers between its own instructions, hence not while a step computes, and two of a kind
become one there. So a thread reads the wake-up pipe, into which the operating system's handler writes immediately.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Any

NUMBERS = (signal.SIGINT, signal.SIGTERM)
#: What the first and the second one have to say.
FIRST = "stopping after this update; a second time ends at once"
SECOND = "pyrformer: ended at once; --resume goes on from the last checkpoint"
#: Shows a terminal's cursor, which a progress bar may have hidden.
CURSOR = "\x1b[?25h"


def _say(text: str, then: str = "") -> None:
    """Writes a line to standard error, below a progress bar if there is one, past all locks; ``then`` only to a
    terminal."""
    with suppress(OSError):
        os.write(2, (f"\n{text}\n{then}" if os.isatty(2) else f"{text}\n").encode())


class Signals:
    """A context in which SIGINT and SIGTERM are noted. Only the main thread gets signals, so elsewhere nothing changes.

    Attributes:
        first: the number of the first signal; 0: none came.
    """

    def __init__(self) -> None:
        self.first = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in NUMBERS}
        self._thread = threading.Thread(target=self._watch, name="pyrformer-signals", daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while numbers := self._read.recv(16):
            for number in numbers:
                if number not in NUMBERS:
                    continue
                if self.first:
                    _say(SECOND, CURSOR)
                    os._exit(128 + number)
                self.first = number
                _say(FIRST)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._write.close()
        self._thread.join()
        self._read.close()
