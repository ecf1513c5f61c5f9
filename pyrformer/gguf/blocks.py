"""The blocks of GGUF's tensors: some elements in few bits each, with a scale or two, read as float32.

Source: the layouts of ggml's ``ggml-common.h`` and what its ``ggml-quants.c`` makes of them.

Letters: N blocks; q the stored numbers, d and m scales and offsets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pyrformer import bfloat16

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

#: What the four bits of IQ4_NL and IQ4_XS stand for.
UNEVEN = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def _half(raw: Array) -> Floats:
    """Two bytes of each block as float16, ``[N, 1]``."""
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _fields(raw: Array, width: int) -> Array:
    """Bytes ``[.., n]`` taken apart into fields of ``width`` bits, the lowest first: ``[.., 8 / width, n]``."""
    return np.stack([raw >> shift & (1 << width) - 1 for shift in range(0, 8, width)], axis=-2)


def _nibbles(raw: Array) -> Array:
    """Low halves of all bytes, then high halves."""
    return _fields(raw, 4).reshape(len(raw), -1)


def _flat(groups: Array) -> Floats:
    """Groups ``[N, g, n]`` as blocks ``[N, g·n]``."""
    return np.asarray(groups.reshape(len(groups), -1), np.float32)


def _q4_0(raw: Array) -> Floats:
    """d·(q − 8)."""
    return _half(raw[:, :2]) * (_nibbles(raw[:, 2:]).astype(np.float32) - 8)


def _q4_1(raw: Array) -> Floats:
    """d·q + m."""
    return _half(raw[:, :2]) * _nibbles(raw[:, 4:]) + _half(raw[:, 2:4])


def _five(high: Array, low: Array) -> Floats:
    """32 numbers of five bits: the fifth ones, then the others."""
    fifth = np.unpackbits(np.ascontiguousarray(high), axis=1, bitorder="little")
    return np.asarray(_nibbles(low) | fifth << 4, np.float32)


def _q5_0(raw: Array) -> Floats:
    """d·(q − 16)."""
    return _half(raw[:, :2]) * (_five(raw[:, 2:6], raw[:, 6:]) - 16)


def _q5_1(raw: Array) -> Floats:
    """d·q + m."""
    return _half(raw[:, :2]) * _five(raw[:, 4:8], raw[:, 8:]) + _half(raw[:, 2:4])


def _q8_0(raw: Array) -> Floats:
    """d·q."""
    return _half(raw[:, :2]) * raw[:, 2:].view(np.int8).astype(np.float32)


def _pairs(raw: Array) -> Array:
    """256 numbers of two bits in sixteen groups: ``[N, 16, 16]``."""
    return _fields(raw.reshape(-1, 2, 32), 2).reshape(-1, 16, 16)


def _q2_k(raw: Array) -> Floats:
    """256 elements in sixteen groups of 16, each d·s·q − dmin·m with scales s and m of four bits."""
    d, dmin = _half(raw[:, 80:82]), _half(raw[:, 82:84])
    scales, mins = d * (raw[:, :16] & 15), dmin * (raw[:, :16] >> 4)
    return _flat(scales[:, :, None] * _pairs(raw[:, 16:80]) - mins[:, :, None])


def _q3_k(raw: Array) -> Floats:
    """256 elements in sixteen groups of 16, each d·(s − 32)·(q − 4); the third bit of q stands apart."""
    packed = raw[:, 96:108]
    low, high = _nibbles(packed[:, :8]), _fields(packed[:, 8:], 2).reshape(-1, 16)
    scales = (low | high << 4).astype(np.float32) - 32
    q = _pairs(raw[:, 32:96]) | _fields(raw[:, :32], 1).reshape(-1, 16, 16) << 2
    return _flat((_half(raw[:, 108:110]) * scales)[:, :, None] * (q.astype(np.float32) - 4))


def _k_scales(raw: Array) -> tuple[Floats, Floats]:
    """Of Q4_K and Q5_K: d·s and dmin·m of the eight groups, s and m of six bits, ``[N, 8, 1]`` each."""
    d, dmin, packed = _half(raw[:, :2]), _half(raw[:, 2:4]), raw[:, 4:16]
    low, high, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, (rest & 15) | (low >> 6 << 4)], axis=1)
    mins = np.concatenate([high & 63, (rest >> 4) | (high >> 6 << 4)], axis=1)
    return (d * scales)[:, :, None], (dmin * mins)[:, :, None]


def _q4_k(raw: Array) -> Floats:
    """256 elements in eight groups of 32, each d·s·q − dmin·m."""
    scales, mins = _k_scales(raw)
    q = _fields(raw[:, 16:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32).astype(np.float32)
    return _flat(scales * q - mins)


def _q5_k(raw: Array) -> Floats:
    """As Q4_K, with a fifth bit of each q apart."""
    scales, mins = _k_scales(raw)
    low = _fields(raw[:, 48:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
    q = (low | _fields(raw[:, 16:48], 1) << 4).astype(np.float32)
    return _flat(scales * q - mins)


def _q6_k(raw: Array) -> Floats:
    """256 elements in sixteen groups of 16, each d·s·(q − 32); four bits of q in one place, two in another."""
    low, high = raw[:, :128].reshape(-1, 2, 64), raw[:, 128:192].reshape(-1, 2, 32)
    parts = [low[:, :, :32] & 15, low[:, :, 32:] & 15, low[:, :, :32] >> 4, low[:, :, 32:] >> 4]
    q = np.stack([part | ((high >> 2 * i & 3) << 4) for i, part in enumerate(parts)], axis=2)
    scales = raw[:, 192:208].view(np.int8).astype(np.float32)
    groups = (q.reshape(-1, 16, 16).astype(np.float32) - 32) * scales[:, :, None]
    return np.asarray(_half(raw[:, 208:210]) * groups.reshape(-1, 256), np.float32)


def _iq4_nl(raw: Array) -> Floats:
    """d·v, v of ``UNEVEN``."""
    return np.asarray(_half(raw[:, :2]) * UNEVEN[_nibbles(raw[:, 2:])], np.float32)


def _iq4_xs(raw: Array) -> Floats:
    """256 elements in eight groups of 32, each d·(s − 32)·v, v of ``UNEVEN``; two bits of s stand apart."""
    high = _fields(raw[:, 2:4].reshape(-1, 2, 1), 2).reshape(-1, 8)
    low = np.stack([raw[:, 4:8] & 15, raw[:, 4:8] >> 4], axis=-1).reshape(-1, 8)
    scales = _half(raw[:, :2]) * ((low | high << 4).astype(np.float32) - 32)
    values = UNEVEN[_fields(raw[:, 8:].reshape(-1, 8, 16), 4).reshape(-1, 8, 32)]
    return _flat(scales[:, :, None] * values)


def _bf16(raw: Array) -> Floats:
    return bfloat16.widened(np.ascontiguousarray(raw).view(np.uint16))


@dataclass(frozen=True)
class Block:
    """How elements of a type are stored: bytes of a block, and how ``uint8[blocks, nbytes]`` is read."""

    name: str
    nbytes: int
    read: Callable[[Array], Floats]


#: By the numbers of element types.
BLOCKS = {
    0: Block("F32", 4, lambda raw: np.ascontiguousarray(raw).view(np.float32)),
    1: Block("F16", 2, _half),
    2: Block("Q4_0", 18, _q4_0),
    3: Block("Q4_1", 20, _q4_1),
    6: Block("Q5_0", 22, _q5_0),
    7: Block("Q5_1", 24, _q5_1),
    8: Block("Q8_0", 34, _q8_0),
    10: Block("Q2_K", 84, _q2_k),
    11: Block("Q3_K", 110, _q3_k),
    12: Block("Q4_K", 144, _q4_k),
    13: Block("Q5_K", 176, _q5_k),
    14: Block("Q6_K", 210, _q6_k),
    20: Block("IQ4_NL", 18, _iq4_nl),
    23: Block("IQ4_XS", 136, _iq4_xs),
    30: Block("BF16", 2, _bf16),
}
