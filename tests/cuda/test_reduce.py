"""reduce.cu against float64."""

import numpy as np
import pytest
from kernels import launches as run

LAYOUTS = pytest.mark.parametrize("layout", run.LAYOUTS.values(), ids=run.LAYOUTS)


@LAYOUTS
@pytest.mark.parametrize(
    ("copies", "result_rows", "cols"), [(1, 1, 1), (70, 1, 33), (9, 3, 5), (130, 2, 20), (17, 1, 300)]
)
def test_sum_to(device, rng, close, copies, result_rows, cols, layout):
    x = rng.normal(size=(copies * result_rows, cols)).astype(np.float32)
    want = x.astype(float).reshape(copies, result_rows, cols).sum(0)
    for chunk in (64, 16):
        close(run.sum_to(device, x, result_rows, chunk, layout), want)


@LAYOUTS
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (40, 130)])
@pytest.mark.parametrize("chunk", [37, 4096])
def test_sum_of_all(device, rng, close, shape, chunk, layout):
    x = rng.normal(size=shape).astype(np.float32)
    # An absolute error of some roundings of the largest partial sum.
    assert abs(run.sum_all(device, x, chunk, layout) - x.astype(float).sum()) < 1e-4


@LAYOUTS
def test_global_norm_and_clip_factor(device, rng, close, layout):
    gradients = [rng.normal(size=s).astype(np.float32) for s in ((1, 1), (5, 7), (30, 130))]
    want = np.sqrt(sum((g.astype(float) ** 2).sum() for g in gradients))
    norm = run.global_norm(device, gradients, 1000, layout)
    close(device.read(norm), [want])
    close(device.read(run.clip_factor(device, norm, 1.0)), [1 / (want + 1e-6)])
    close(device.read(run.clip_factor(device, norm, 1e6)), [1.0])


def test_the_norm_of_many_tensors_adds_the_chunks_of_each_in_order(device, rng):
    """More tensors than a block has threads to look for its own."""
    sizes = [1000, *[3] * 300, 257, 12]
    gradients = [rng.normal(size=(1, n)).astype(np.float32) for n in sizes]
    squares = [float(device.read(run.global_norm(device, [g], 2**20))[0]) ** 2 for g in gradients]
    assert device.read(run.global_norm(device, gradients, 256))[0] == pytest.approx(
        np.sqrt(sum(squares)), rel=1e-6
    )


def test_a_norm_that_is_not_finite_is_not_hidden(device):
    for value, want in ((np.inf, 0.0), (np.nan, np.nan)):
        norm = run.global_norm(device, [np.array([[1, value]], np.float32)], 64)
        np.testing.assert_array_equal(device.read(run.clip_factor(device, norm, 1.0)), [want])


@pytest.mark.parametrize("value", [1.0, np.inf, np.nan, 1e30])
def test_a_norm_that_is_not_finite_halts_and_those_behind_it_are_nan(device, value):
    halt = device.array([0], np.int32)
    spoiled = run.global_norm(device, [np.array([[1, value]], np.float32)], 64, halt=halt)
    assert device.read(halt)[0] == (value != 1.0)
    assert np.isfinite(device.read(spoiled)[0]) == (value == 1.0)
    sound = run.global_norm(device, [np.ones((1, 4), np.float32)], 64, halt=halt)
    np.testing.assert_array_equal(device.read(sound), [2.0 if value == 1.0 else np.nan])
