"""positions.cu against float64."""

import numpy as np
import pytest
from kernels import launches as run
from kernels import reference

LAYOUTS = pytest.mark.parametrize("layout", run.LAYOUTS.values(), ids=run.LAYOUTS)
FREQUENCIES = [1.0, 10000.0**-0.25, 10000.0**-0.5, 7.5, 1e-4]


def turned(x, table, heads, sign):
    """Pairs (i, i + R/2) of each head as complex numbers, times e^(±iθ)."""
    half = table.shape[1] // 2
    value = x.astype(float).reshape(len(x), heads, -1).copy()
    factor = (table[:, :half] + sign * 1j * table[:, half:])[:, None]
    pairs = (value[..., :half] + 1j * value[..., half : 2 * half]) * factor
    value[..., :half], value[..., half : 2 * half] = pairs.real, pairs.imag
    return value.reshape(len(x), -1)


@LAYOUTS
def test_rope_table(device, rng, close, layout):
    positions = np.array([0, 1, 2, 77, -1, -300, 4095, 131071, 2**30, -(2**30)])
    angle = positions[:, None] * np.array(FREQUENCIES)
    # Angles of 2^30 radians are exact to 1e-7 in float64 alone.
    got = run.rope_table(device, positions, FREQUENCIES, 1.5, layout)
    close(got, 1.5 * np.concatenate([np.cos(angle), np.sin(angle)], axis=1), 2e-6)


@LAYOUTS
@pytest.mark.parametrize(("heads", "width", "rotated"), [(1, 2, 2), (3, 8, 4), (2, 10, 10), (40, 8, 6)])
def test_rope(device, rng, close, heads, width, rotated, layout):
    x, table = (rng.normal(size=(9, n)).astype(np.float32) for n in (heads * width, rotated))
    for inverse, in_place in ((False, False), (True, True)):
        got = run.rope(device, x, table, heads, inverse, layout, in_place)
        close(got, turned(x, table, heads, -1 if inverse else 1))


@LAYOUTS
@pytest.mark.parametrize("rounded", [False, True])
def test_alibi_bias(device, close, rounded, layout):
    positions = np.array([[0, 1, 2, 300, 517], [9, 8, 7, 0, 1000]])
    slopes = np.array([0.5, 0.0883883, 1 / 256], np.float32)
    got = run.alibi_bias(device, positions, slopes, 0.25, rounded, layout)
    if rounded:
        # 300 and 1000 are whole in bfloat16, 517 is not: its neighbours are 516 and 520.
        assert got[0, 3] == 0.25 * 0.5 * 300
        assert got[0, 4] == 0.25 * 0.5 * 516
    else:
        close(got, 0.25 * (slopes[None, :, None] * positions[:, None].astype(float)).reshape(6, 5))


@pytest.mark.parametrize("rows", [1, 256, 700])
def test_iota(device, rows):
    np.testing.assert_array_equal(run.iota(device, rows, -3, 2), -3 + 2 * np.arange(rows))


def test_inverse_undoes_and_is_the_gradient(device, rng, close):
    x, dy = (rng.normal(size=(5, 12)).astype(np.float32) for _ in range(2))
    table = run.rope_table(device, np.arange(5), [1.0, 0.1], 1.0)
    there = run.rope(device, x, table, 2, False)
    close(run.rope(device, there, table, 2, True), x)
    back = run.rope(device, dy, table, 2, True)
    loss = lambda z: float((turned(z, table, 2, 1) * dy).sum())  # noqa: E731
    close(back, reference.numeric_gradient(loss, x), 1e-5)
