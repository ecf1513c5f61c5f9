"""Event files that TensorBoard reads, written without it.

A file is a sequence of TFRecords: length uint64, masked CRC-32C of it, the bytes, masked CRC-32C of these, all little
endian. The bytes are ``Event`` messages of protocol buffers. Sources: tensorflow's ``core/lib/io/record_writer.cc``,
``core/util/event.proto`` and ``core/framework/summary.proto``; CRC-32C of RFC 3720, appendix B.4.
"""

from __future__ import annotations

import math
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any, BinaryIO

FOLDER = "tensorboard"
#: CRC-32C's polynomial, bits reversed.
_POLYNOMIAL = 0x82F63B78
_START = 1  # SessionLog.START: what was logged from this step on, before it, does not count


def _row(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
    return value


_TABLE = [_row(i) for i in range(256)]


def crc32c(data: bytes) -> int:
    """The CRC-32C of bytes."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def record(data: bytes) -> bytes:
    """A TFRecord."""
    length = struct.pack("<Q", len(data))
    return length + _masked(length) + data + _masked(data)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _bytes(number: int, value: bytes) -> bytes:
    """A field of bytes, text or a message."""
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def event(seconds: float, step: int, content: bytes) -> bytes:
    """An ``Event``: wall_time = 1, step = 2, and one of file_version = 3, summary = 5, session_log = 7."""
    return b"\x09" + struct.pack("<d", seconds) + b"\x10" + _varint(step) + content


def scalars(values: dict[str, float]) -> bytes:
    """The field ``summary`` with a ``Value`` (tag = 1, simple_value = 2) for each."""
    made = (_bytes(1, tag.encode()) + b"\x15" + struct.pack("<f", value) for tag, value in values.items())
    return _bytes(5, b"".join(_bytes(1, value) for value in made))


class TensorBoard:
    """A callback that writes every number of ``metrics.jsonl`` as a scalar: those of updates as ``train/…``, those of
    evaluations as ``valid/…``. Each process of a run adds a file to the folder; TensorBoard reads them as one."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._file: BinaryIO | None = None
        self._last: int | None = None

    def log(self, data: dict[str, Any], step: int) -> None:
        """Appends a row."""
        if self._last is None or step < self._last:
            # The first row, and the one after going back to a checkpoint.
            self._write(step, _bytes(7, b"\x08" + _varint(_START)))
        self._last = step
        kind = "valid" if "valid_loss" in data else "train"
        values = {
            f"{kind}/{name.removeprefix('valid_')}": _float(value)
            for name, value in data.items()
            if name != "step" and isinstance(value, (int, float))
        }
        self._write(step, scalars(values))

    def on_end(self, numbers: dict[str, Any]) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, step: int, content: bytes) -> None:
        now = time.time()
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{now:.6f}.{socket.gethostname()}.{os.getpid()}"
            self._file = (self.folder / name).open("xb", buffering=0)
            self._file.write(record(event(now, 0, _bytes(3, b"brain.Event:2"))))
        self._file.write(record(event(now, step, content)))


def _float(value: float) -> float:
    """A value as float32 holds it, without overflow."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)
