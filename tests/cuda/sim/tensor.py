"""Tensor cores: which lane of a warp holds which element, and the product itself.

Source: NVIDIA, "PTX ISA" 9.x, sections "Matrix Fragments for mma.m16n8k16 with floating point type", the same for
m16n8k8, and "ldmatrix".
Lane 4 g + t holds two neighbouring elements, the first in the lower half of a word. Products are summed in float64 and
rounded once; hardware truncates while it adds.
"""

from __future__ import annotations

import numpy as np

#: Products of 16 columns of either type, and of 8 of float16.
MMA = tuple(
    f"mma.sync.aligned.m16n8k{k}.row.col.f32.{half}.{half}.f32"
    for k, half in ((16, "bf16"), (16, "f16"), (8, "f16"))
)
LDMATRIX = tuple(f"ldmatrix.sync.aligned.m8n8.x4{turned}.shared.b16" for turned in ("", ".trans"))

LANE = np.arange(32)
G, T = LANE // 4, LANE % 4


def halves(words: np.ndarray, f16: bool) -> tuple[np.ndarray, np.ndarray]:
    """The two float16 or bfloat16 of each word, as float32."""
    if f16:
        both = words.view(np.float16).astype(np.float32)
        return both[..., ::2], both[..., 1::2]
    return (words << np.uint32(16)).view(np.float32), (words & np.uint32(0xFFFF0000)).view(np.float32)


def first_factor(a: np.ndarray, f16: bool) -> np.ndarray:
    """The first factor of each warp, [W, 16, K], of its lanes' words a [K / 4, W, 32]."""
    left = np.empty((a.shape[1], 16, 4 * len(a)))
    for n, words in enumerate(np.ascontiguousarray(a)):
        for half, values in enumerate(halves(words, f16)):
            left[:, G + 8 * (n % 2), 2 * T + 8 * (n // 2) + half] = values
    return left


def multiply(a: np.ndarray, b: np.ndarray, c: np.ndarray, opcode: str) -> np.ndarray:
    """a·b + c of each warp: a [K / 4, W, 32] and b [K / 8, W, 32] words, c and the result [4, W, 32] float32."""
    f16 = ".f16." in opcode
    left, right = first_factor(a, f16), np.empty((a.shape[1], 8 * len(b), 8))
    for n, words in enumerate(np.ascontiguousarray(b)):
        for half, values in enumerate(halves(words, f16)):
            right[:, 2 * T + 8 * n + half, G] = values
    product = left @ right
    places = [(G + 8 * (n // 2), 2 * T + n % 2) for n in range(4)]
    return np.stack([c[n] + product[:, row, col] for n, (row, col) in enumerate(places)]).astype(np.float32)


def distribute(rows: np.ndarray, turned: bool) -> np.ndarray:
    """What each lane gets of four 8 × 8 tiles a warp, whose rows are rows [W, 4, 8, 4] words: [4, W, 32] words."""
    if not turned:
        return rows[:, :, G, T].transpose(1, 0, 2)
    elements = np.ascontiguousarray(rows).view(np.uint16)  # [W, 4, 8, 8]
    low, high = (elements[:, :, 2 * T + half, G].astype(np.uint32) for half in (0, 1))
    return (low | high << np.uint32(16)).transpose(1, 0, 2)
