"""cache.cu against NumPy."""

import numpy as np
import pytest
from kernels import launches as run
from kernels import reference

LAYOUTS = pytest.mark.parametrize("layout", run.LAYOUTS.values(), ids=run.LAYOUTS)


@LAYOUTS
def test_cache_write(device, rng, layout):
    cache, source = (
        rng.normal(size=(5, 7, 10)).astype(np.float32),
        rng.normal(size=(3, 4, 10)).astype(np.float32),
    )
    row, start, count = np.array([4, 0, 2]), np.array([0, 3, 6]), np.array([2, 4, 1])
    want = cache.copy()
    for b in range(3):
        want[row[b], start[b] : start[b] + count[b]] = source[b, : count[b]]
    np.testing.assert_array_equal(run.cache_write(device, cache, source, row, start, count, layout), want)


def test_cache_write_leaves_out_what_lies_outside(device, rng):
    cache, source = rng.normal(size=(2, 3, 5)).astype(np.float32), np.ones((4, 2, 5), np.float32)
    got = run.cache_write(
        device, cache, source, np.array([-1, 2, 0, 1]), np.array([0, 0, 2, -1]), np.array([2, 2, 2, 2])
    )
    want = cache.copy()
    want[0, 2] = want[1, 0] = 1
    np.testing.assert_array_equal(got, want)


@LAYOUTS
@pytest.mark.parametrize("span", [None, 3, 5], ids=["whole", "3", "5"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "window"),
    [(1, 1, 1, None), (2, 1, 20, None), (4, 2, 64, 3), (3, 3, 37, None), (1, 1, 256, 5)],
)
def test_cached_attention(device, rng, close, heads, kv_heads, width, window, span, layout):
    q = rng.normal(size=(3, 2, heads, width)).astype(np.float32)
    k, v = (rng.normal(size=(4, 13, kv_heads, width)).astype(np.float32) for _ in range(2))
    rows = rng.integers(4, size=(3, 13))
    start, count = np.array([0, 11, 5]), np.array([2, 2, 1])
    scale = width**-0.5
    got = run.cached_attention(device, q, k, v, rows, start, count, scale, window, layout, span=span)
    close(got, reference.cached_attention(q, k, v, rows, start, count, scale, window))


@pytest.mark.parametrize("span", [None, 2], ids=["whole", "2"])
def test_cached_attention_with_a_bias_on_keys(device, rng, close, span):
    q = rng.normal(size=(2, 3, 4, 8)).astype(np.float32)
    k, v = (rng.normal(size=(3, 9, 2, 8)).astype(np.float32) for _ in range(2))
    bias = rng.normal(size=(4, 9)).astype(np.float32)
    place = rng.integers(3, size=(2, 9)), np.array([0, 5]), np.array([3, 2])
    got = run.cached_attention(device, q, k, v, *place, 0.3, 4, key_bias=bias, span=span)
    close(got, reference.cached_attention(q, k, v, *place, 0.3, 4, bias))


def test_the_most_spans_and_scores_far_apart(device, rng, close):
    """64 spans of one position, the greatest score in the last: what came before is scaled down to nothing."""
    q, k, v = (rng.normal(size=(1, n, 1, 4)).astype(np.float32) for n in (1, 64, 64))
    bias = np.linspace(-300, 0, 64, dtype=np.float32)[None]
    place = np.zeros((1, 64), int), np.array([63]), np.array([1])
    for key_bias in (bias, bias[:, ::-1].copy(), np.full_like(bias, -np.inf)):
        got = run.cached_attention(device, q, k, v, *place, 1.0, key_bias=key_bias, span=1)
        want = np.zeros(q.shape)
        if np.isfinite(key_bias).all():
            want = reference.cached_attention(q, k, v, *place, 1.0, None, key_bias)
        close(got, want)
