"""attention.cu, attention_mma.cu and attention_wgmma.cu against float64 and finite differences."""

import numpy as np
import pytest
import sim
from kernels import launches as run
from kernels import reference
from kernels.checks import attention as check
from kernels.checks import attention_operands as operands

#: What tensors are stored in, and which of the kernels on tensor cores compute with it.
KERNELS = [*((half, "mma") for half in run.HALVES), ("bf16", "wgmma")]
HALVES = pytest.mark.parametrize(("half", "tensor_device"), KERNELS, indirect=["tensor_device"])
LAYOUTS = pytest.mark.parametrize("layout", run.LAYOUTS.values(), ids=run.LAYOUTS)


SHAPES = [(1, 1, 1, 1, 1), (2, 5, 2, 1, 8), (1, 64, 1, 1, 32), (1, 65, 2, 2, 24), (1, 130, 1, 1, 12)]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(device, rng, close, shape, causal):
    check(device, close, *operands(rng, *shape), causal=causal)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 8),
        (2, 150, 2, 1, 40),
        (1, 128, 1, 1, 64),
        (1, 150, 2, 1, 104),
        (1, 33, 1, 1, 128),
        (1, 70, 2, 1, 216),
    ],
    ids=str,
)
@HALVES
def test_tensor_cores(tensor_device, rng, close, shape, causal, half):
    if shape[-1] > max(run.TENSOR_ROWS[half]):
        pytest.skip("heads of float16 have up to 128 columns")
    check(tensor_device, close, *operands(rng, *shape), causal=causal, half=half)


@pytest.mark.parametrize("width", [40, 104, 136])
@HALVES
def test_tensor_cores_with_everything(tensor_device, rng, close, width, half):
    if width > max(run.TENSOR_ROWS[half]):
        pytest.skip("heads of float16 have up to 128 columns")
    with_everything(tensor_device, rng, close, width, half)


def with_everything(device, rng, close, width, half):
    """A window, packed texts with padding, queries that see nothing, biased keys, dropout, shared heads; rows that
    begin on 16 bytes and no more."""
    segments = np.array([[0] * 3 + [1] * 20 + [0] * 2 + [1] * 37 + [2] * 7])
    more = {"segments": segments, "window": 50, "key_bias": rng.normal(size=(1, 2, 69)).astype(np.float32)}
    site, layout = run.Site(np.array([1, 2, 3, 4]), 9, 0.2), run.Layout(gap=8, skew=8)
    x = operands(rng, 1, 69, 2, 1, width)
    check(device, close, *x, causal=True, half=half, site=site, layout=layout, **more)


@pytest.mark.parametrize(("tokens", "window", "causal"), [(200, 1, True), (260, 70, True), (200, 100, False)])
@HALVES
def test_tensor_cores_through_windows(tensor_device, rng, close, tokens, window, causal, half):
    check(tensor_device, close, *operands(rng, 1, tokens, 1, 1, 8), causal=causal, window=window, half=half)


@HALVES
def test_tensor_cores_see_a_prefix(tensor_device, rng, close, half):
    x = operands(rng, 2, 140, 2, 1, 8)
    check(tensor_device, close, *x, causal=True, prefix=np.array([133, 0]), half=half)


@HALVES
def test_tensor_cores_average_for_queries_that_see_nothing(tensor_device, rng, close, half):
    segments = np.array([[0] * 129 + [1] * 4, [0] * 133])
    site = run.Site(np.arange(4), 3, 0.3)
    check(
        tensor_device,
        close,
        *operands(rng, 2, 133, 2, 1, 8),
        causal=True,
        segments=segments,
        site=site,
        half=half,
    )


@HALVES
def test_tensor_cores_bear_huge_scores(tensor_device, rng, half):
    q, k, v, dout = operands(rng, 1, 9, 1, 1, 8)
    huge = {"bf16": 1e15, "f16": 1e4}[half]
    got = run.attention(tensor_device, huge * q, huge * k, v, 1.0, dout=dout, causal=True, half=half)
    for name, x in got.items():
        assert np.isfinite(x).all(), name
    assert np.isin(got["out"], v).all()  # each query sees exactly one key


@HALVES
def test_tensor_cores_round_once(tensor_device, rng, half):
    """Equal weights of whole numbers: exact sums, a result rounded to the type's bits and no further."""
    q, k, v = (rng.integers(-255, 256, size=(1, 16, 1, 8)).astype(np.float32) for _ in range(3))
    got = run.attention(tensor_device, q, k, v, 0.0, half=half)["out"]
    mean = np.broadcast_to(v.mean(1, keepdims=True), got.shape)
    np.testing.assert_array_equal(got, run.rounded(mean, half))


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 8), (2, 150, 2, 1, 40), (1, 128, 1, 1, 64), (1, 150, 2, 1, 104)], ids=str
)
def test_older_tensor_cores(programs_75, rng, close, shape):
    """Without copies that go on by themselves, and by products of half the depth."""
    check(sim.Device(programs_75), close, *operands(rng, *shape), causal=shape[1] < 150, half="f16")


@pytest.mark.parametrize("width", [40, 104])
def test_older_tensor_cores_with_everything(programs_75, rng, close, width):
    with_everything(sim.Device(programs_75), rng, close, width, "f16")


def test_older_tensor_cores_average_for_queries_that_see_nothing(programs_75, rng, close):
    segments = np.array([[0] * 129 + [1] * 4, [0] * 133])
    check(
        sim.Device(programs_75),
        close,
        *operands(rng, 2, 133, 2, 1, 8),
        causal=True,
        segments=segments,
        half="f16",
    )


@pytest.mark.parametrize("width", [7, 100, 130, 256])
def test_widths(device, rng, close, width):
    check(device, close, *operands(rng, 1, 9, 1, 1, width), causal=True)


@LAYOUTS
def test_layouts(device, rng, close, layout):
    check(device, close, *operands(rng, 2, 19, 4, 2, 12), causal=True, layout=layout)


@pytest.mark.parametrize(
    ("tokens", "window", "causal"), [(70, 1, True), (70, 3, False), (135, 64, True), (130, 65, False)]
)
def test_windows(device, rng, close, tokens, window, causal):
    check(device, close, *operands(rng, 1, tokens, 1, 1, 4), causal=causal, window=window)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
def test_segments(device, rng, close, causal):
    segments = np.array([[1] * 20 + [2] * 45 + [0] * 3, [0] * 40 + [3] * 27 + [1]])
    check(device, close, *operands(rng, 2, 68, 1, 1, 4), causal=causal, segments=segments)


def test_queries_that_see_nothing_average_all_values(device, rng, close):
    """Padding first: its queries see nothing, in a tile with others that do; every key's dv has its share of them."""
    segments = np.array([[0] * 66 + [1] * 4, [0] * 70])
    site = run.Site(np.arange(4), 3, 0.3)
    q, k, v, dout = operands(rng, 2, 70, 2, 1, 4)
    check(device, close, q, k, v, dout, causal=True, segments=segments, site=site)
    out = run.attention(device, q, k, v, 1.0, segments=segments)["out"]
    close(out[1], np.broadcast_to(v[1].astype(float).mean(0, keepdims=True), out[1].shape))


@pytest.mark.parametrize("tokens", [5, 6, 7, 8])
def test_dropout(device, rng, close, tokens):
    """By the number of tokens, rows of probabilities begin at each place of a random block of four."""
    site = run.Site(np.array([1, 2, 3, 4]), 9, 0.25)
    check(device, close, *operands(rng, 2, tokens, 2, 1, 4), site=site)


def test_everything_at_once(device, rng, close):
    segments = np.array([[0] * 3 + [1] * 60 + [2] * 7])
    site = run.Site(np.array([-1, 2, 3, 0]), 1, 0.1)
    mask = {"causal": True, "window": 9, "segments": segments}
    check(device, close, *operands(rng, 1, 70, 4, 2, 10), site=site, layout=run.LAYOUTS["crooked"], **mask)


def test_huge_scores_do_not_overflow(device, rng):
    q, k, v, dout = operands(rng, 1, 9, 1, 1, 4)
    got = run.attention(device, 1e15 * q, 1e15 * k, v, 1.0, dout=dout, causal=True)
    for name, x in got.items():
        assert np.isfinite(x).all(), name
    assert np.isin(got["out"], v).all()  # each query sees exactly one key


def test_gradient_is_the_derivative(device, rng, close):
    q, k, v, dout = operands(rng, 1, 4, 2, 1, 3)
    site = run.Site(np.arange(4), 2, 0.3)
    segments = np.array([[1, 1, 2, 2]])
    factors = reference.keep(site.rng, site.stream, site.p, 32).reshape(1, 2, 4, 4)
    got = run.attention(device, q, k, v, 0.7, dout=dout, causal=True, segments=segments, site=site)

    def loss(**changed):
        x = {"q": q, "k": k, "v": v, **changed}
        return float(
            (
                reference.Attention(**x, scale=0.7, causal=True, segments=segments, factors=factors).out
                * dout
            ).sum()
        )

    for name, x in (("q", q), ("k", k), ("v", v)):
        close(got[f"d{name}"], reference.numeric_gradient(lambda z, name=name: loss(**{name: z}), x), 1e-5)


@pytest.mark.parametrize(
    ("tokens", "causal", "window"), [(9, True, None), (70, True, 5), (135, False, 3), (130, True, 70)]
)
def test_key_bias_and_prefix(device, rng, close, tokens, causal, window):
    q, k, v, dout = operands(rng, 2, tokens, 4, 2, 4)
    key_bias = rng.normal(size=(2, 4, tokens)).astype(np.float32)
    prefix = np.array([tokens * 2 // 3, 0])
    check(device, close, q, k, v, dout, causal=causal, window=window, key_bias=key_bias, prefix=prefix)
