"""GGUF, llama.cpp's file of a model: metadata, tensors in blocks of few bits, and the tokenizer, in one.

Source: the format's description in ggml's ``docs/gguf.md``. Reading checks every size against the file before anything
is allocated, so a broken file gives one error. What is in a tensor's blocks: :mod:`pyrformer.gguf.blocks`.

Letters: H heads, D head width, C width, N elements.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyrformer import _core
from pyrformer.errors import FileError
from pyrformer.gguf.blocks import BLOCKS

Floats = npt.NDArray[np.float32]

#: Numbers of the metadata types for lists and texts.
STRING, LIST = 8, 9


class Gguf:
    """An open file: ``metadata`` by key, ``shapes`` of tensors by name (outermost axis first), :meth:`tensor` to read
    one as float32."""

    def __init__(self, path: str | Path):
        """
        Raises:
            FileError: the file cannot be read, is cut short, or breaks the format; the message names the place.
        """
        self.path = Path(path)
        self._file = _core.Gguf(self.path)
        self.metadata = self._file.metadata()
        self._tensors = self._file.tensors()
        self.shapes = {name: tuple(shape) for name, (shape, _) in self._tensors.items()}

    def tensor(self, name: str) -> Floats:
        """A tensor as float32, dequantised as llama.cpp does.

        Raises:
            FileError: there is none of this name, or its element type is not known.
        """
        if name not in self._tensors:
            raise FileError(f"[gguf] {self.path} has no tensor {name!r}")
        shape, kind = self._tensors[name]
        if kind not in BLOCKS:
            known = ", ".join(block.name for block in BLOCKS.values())
            raise FileError(
                f"[gguf] {self.path}: tensor {name!r} has element type {kind}; known ones: {known}"
            )
        block = BLOCKS[kind]
        return block.read(self._file.data(name).reshape(-1, block.nbytes)).reshape(shape)


#: Element types that can be written.
KINDS = {"float32": 0, "float16": 1, "bfloat16": 30, "q8_0": 8}
#: llama.cpp's own names of some.
ALIASES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def _stored(value: Floats, kind: int) -> bytes:
    """A tensor's bytes in an element type."""
    if kind == 0:
        return value.tobytes()
    if kind == 1:
        return value.astype(np.float16).tobytes()
    if kind == 30:
        bits = value.view(np.uint32)
        # Half a unit of the last place, a little less where the result would be odd: ties go to even.
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes()
    # Q8_0: d is the largest magnitude / 127, rounded to float16 after the division by it.
    blocks = value.reshape(-1, 32)
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    inverse = np.divide(1, d, out=np.zeros_like(d), where=d > 0)
    q = np.trunc(blocks * inverse + np.copysign(np.float32(0.5), blocks)).astype(np.int8)
    return np.concatenate([d.astype(np.float16).view(np.uint8), q.view(np.uint8)], axis=1).tobytes()


def write_gguf(path: str | Path, metadata: dict[str, Any], tensors: dict[str, tuple[Floats, int]]) -> None:
    """Writes a file of version 3 that appears whole or not at all.

    Args:
        metadata: texts, whole numbers (uint32), numbers (float32), truth values, and lists of texts or whole numbers.
        tensors: float32 arrays and the numbers of their element types (``KINDS``).

    Raises:
        FileError: the file cannot be written.
    """
    out = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        out += _text(key) + _tagged(value)
    offset, bodies = 0, []
    for name, (value, kind) in tensors.items():
        body = _stored(value, kind)
        out += _text(name) + struct.pack("<I", value.ndim)
        out += struct.pack(f"<{value.ndim}Q", *reversed(value.shape)) + struct.pack("<IQ", kind, offset)
        bodies.append(body + bytes(-len(body) % 32))
        offset += len(bodies[-1])
    out += bytes(-len(out) % 32)
    _core.write_file(Path(path), bytes(out) + b"".join(bodies))


def _text(value: str) -> bytes:
    raw = value.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _tagged(value: Any) -> bytes:
    """A metadata value after the number of its type."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    texts = bool(value) and isinstance(value[0], str)
    head = struct.pack("<IIQ", LIST, STRING if texts else 5, len(value))
    return head + (b"".join(map(_text, value)) if texts else struct.pack(f"<{len(value)}i", *value))
