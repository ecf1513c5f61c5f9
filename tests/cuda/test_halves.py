"""The kernels for tensors of bfloat16 and of float16 against float64, from the same rounded operands."""

import numpy as np
import pytest
from kernels import launches as run
from kernels import reference
from kernels.hardware import ON_HARDWARE
from kernels.narrow import Narrow

LAYOUTS = pytest.mark.parametrize("layout", run.LAYOUTS.values(), ids=run.LAYOUTS)
SHAPES = [(1, 1), (1, 1027), (5, 7), (3, 64), (33, 24)]


@pytest.fixture(params=run.HALVES)
def narrow(device, request):
    """A device with tensors of 16-bit floats."""
    return Narrow(device, request.param)


def normal(narrow, rng, *shape, scale=1.0):
    return narrow.rounded(scale * rng.normal(size=shape))


@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES)
def test_casts(narrow, rng, shape, layout):
    x = (10.0 ** rng.integers(-30, 30, size=shape) * rng.normal(size=shape)).astype(np.float32)
    np.testing.assert_array_equal(run.narrow(narrow, x, layout), narrow.rounded(x))
    np.testing.assert_array_equal(run.widen(narrow, narrow.rounded(x), layout), narrow.rounded(x))


def test_casts_of_extreme_values(narrow):
    below, above, bits = {"bf16": (3.3895314e38, 3.4e38, 7), "f16": (65519, 65520, 10)}[narrow.half]
    tie = 1 + 0.5**bits * np.array([0.5, 1.5])
    x = np.array([[0, -0.0, np.inf, -np.inf, np.nan, above, below, *tie, 1e-38, 3e-7]], np.float32)
    got = run.narrow(narrow, x)
    np.testing.assert_array_equal(got, narrow.rounded(x))
    assert got[0, 7:9].tolist() == [1.0, 1 + 2 * 0.5**bits]  # to even
    assert np.isinf(got[0, [2, 5]]).all()
    assert np.isfinite(got[0, 6])
    assert np.signbit(got[0, 1])
    np.testing.assert_array_equal(run.widen(narrow, got), got)


@LAYOUTS
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "relu2", "exp", "mish"])
@pytest.mark.parametrize("shape", [(1, 1027), (5, 7), (33, 24)])
def test_unary_functions_and_gradients(narrow, rng, name, shape, layout):
    x, dy, f = normal(narrow, rng, *shape, scale=2), normal(narrow, rng, *shape), reference.UNARY[name]
    narrow.near(run.unary(narrow, name, x, layout, in_place=shape[0] == 5), f(x.astype(float)))
    over = {1: "", 5: "x", 33: "dy"}[shape[0]]
    narrow.near(run.unary_grad(narrow, name, x, dy, layout, over), reference.slope(f, x.astype(float)) * dy)


@LAYOUTS
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
@pytest.mark.parametrize(
    ("shape", "b"), [((6, 5), (6, 5)), ((6, 24), (3, 24)), ((6, 8), (1, 8)), ((4, 7), (1, 1))]
)
def test_binary_functions_repeat_the_second_operand(narrow, rng, name, shape, b, layout):
    x, y = normal(narrow, rng, *shape), narrow.rounded(2 + rng.random(size=b))
    f = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}[name]
    repeated = np.tile(y, (shape[0] // b[0], shape[1] // b[1])).astype(float)
    narrow.near(run.binary(narrow, name, x, y, layout), f(x.astype(float), repeated))
    narrow.near(run.binary(narrow, name, x, y, layout, in_place=True), f(x.astype(float), repeated))


@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES)
def test_scale_fill_copy_dropout(narrow, rng, shape, layout):
    x, state = normal(narrow, rng, *shape), np.array([7, -3, 12, 1], np.int32)
    narrow.near(run.scale(narrow, x, -0.3, layout), x * np.float32(-0.3))
    assert (run.fill(narrow, shape, 2.5, layout) == 2.5).all()
    np.testing.assert_array_equal(run.broadcast(narrow, x, shape, layout), x)
    np.testing.assert_array_equal(run.broadcast(narrow, x[:1], shape, layout), np.broadcast_to(x[:1], shape))
    factors = reference.keep(state, 5, 0.3, x.size).reshape(shape)
    narrow.near(run.dropout(narrow, x, state, 0.3, 5, layout), x * factors.astype(np.float32))
    # Rounded once: the sum, not what is added.
    residual = normal(narrow, rng, *shape)
    got = run.dropout(narrow, x, state, 0.3, 5, layout, residual, "residual")
    narrow.near(got, x * factors + residual)


@LAYOUTS
@pytest.mark.parametrize("act", ["none", "gelu_tanh", "silu"])
def test_epilogue(narrow, rng, act, layout):
    product, x, residual = (normal(narrow, rng, 5, 19) for _ in range(3))
    f = reference.UNARY.get(act, lambda x: x)
    for over in ("", "product", "residual"):
        y, _ = run.epilogue(narrow, product, None, act, False, "none", None, residual, layout, over=over)
        narrow.near(y, f(product.astype(float)) + residual)
    y, _ = run.epilogue(narrow, product, None, "none", False, act, x, None, layout)
    narrow.near(y, product * reference.slope(f, x.astype(float)))


@LAYOUTS
def test_gated_activations(narrow, rng, layout):
    dy, gate, up = (normal(narrow, rng, 5, 19) for _ in range(3))
    f, z = reference.UNARY["silu"], gate.astype(float)
    narrow.near(run.gated(narrow, "silu", gate, up, layout, "up"), f(z) * up)
    got = run.gated_grad(narrow, "silu", dy, gate, up, layout, ("dy", "gate"))
    narrow.near(got[0], reference.slope(f, z) * dy * up)
    narrow.near(got[1], f(z) * dy)


@LAYOUTS
@pytest.mark.parametrize("shape", [(1, 1), (5, 69), (9, 256), (6, 1030)])
@pytest.mark.parametrize("center", [True, False])
def test_layer_norm(narrow, rng, close, shape, center, layout):
    x, w, b = (
        normal(narrow, rng, *shape) + narrow.rounded(3),
        *rng.normal(size=(2, shape[1])).astype(np.float32),
    )
    x = narrow.rounded(x)
    got = run.layer_norm(narrow, x, w, b, 1e-5, layout, center)
    want = reference.layer_norm(x, w, b, 1e-5, center)
    narrow.near(got[0], want[0])
    close(got[1], want[1])
    close(got[2], want[2], 1e-5)


@LAYOUTS
@pytest.mark.parametrize("shape", [(35, 41), (21, 296)])
@pytest.mark.parametrize("center", [True, False])
def test_layer_norm_gradient(narrow, rng, close, center, shape, layout):
    dy, x, r = (normal(narrow, rng, *shape) for _ in range(3))
    w = rng.normal(size=shape[1]).astype(np.float32)
    _, mean, rstd = (z.astype(np.float32) for z in reference.layer_norm(x, w, None, 1e-5, center))
    dx, dw, db = reference.layer_norm_grad(dy, x, w, mean, rstd, center)
    for over, residual in (("", None), ("dy", None), ("residual", r)):
        got = run.layer_norm_grad(narrow, dy, x, w, mean, rstd, residual, layout, over, 16, center)
        narrow.near(got[0], dx + (0 if residual is None else r))
        close(got[1], dw, 1e-5)
        close(got[2], db, 1e-5)


@LAYOUTS
@pytest.mark.parametrize("cols", [8, 10])
def test_cache_write(narrow, rng, cols, layout):
    cache, source = normal(narrow, rng, 5, 7, cols), normal(narrow, rng, 3, 4, cols)
    row, start, count = np.array([4, 0, 2]), np.array([0, 3, 6]), np.array([2, 4, 1])
    want = cache.copy()
    for b in range(3):
        want[row[b], start[b] : start[b] + count[b]] = source[b, : count[b]]
    np.testing.assert_array_equal(run.cache_write(narrow, cache, source, row, start, count, layout), want)


@LAYOUTS
@pytest.mark.parametrize("span", [None, 3], ids=["whole", "3"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"), [(1, 1, 1), (4, 2, 64), (3, 3, 37), (2, 1, 136), (1, 1, 256)]
)
def test_cached_attention(narrow, rng, heads, kv_heads, width, span, layout):
    q = normal(narrow, rng, 3, 2, heads, width)
    k, v = (normal(narrow, rng, 4, 13, kv_heads, width) for _ in range(2))
    place = rng.integers(4, size=(3, 13)), np.array([0, 11, 5]), np.array([2, 2, 1])
    bias = rng.normal(size=(heads, 13)).astype(np.float32)
    for window, key_bias in ((None, bias), (3, None)):
        got = run.cached_attention(
            narrow, q, k, v, *place, width**-0.5, window, layout, key_bias=key_bias, span=span
        )
        narrow.near(got, reference.cached_attention(q, k, v, *place, width**-0.5, window, key_bias))


@LAYOUTS
@pytest.mark.parametrize("cols", [1, 7, 64])
def test_gather(narrow, rng, cols, layout):
    table, index = rng.normal(size=(5, cols)).astype(np.float32), np.array([4, 0, 3, 3, 5, -1])
    for got in (
        run.gather(narrow, narrow.rounded(table), index, layout),
        run.gather_narrow(narrow, table, index, layout),
    ):
        np.testing.assert_array_equal(got[:4], narrow.rounded(table)[index[:4]])
        assert np.isnan(got[4:]).all()


@LAYOUTS
@pytest.mark.parametrize("cols", [1, 7, 264])
def test_scatter_add(narrow, rng, cols, layout):
    source, base, index = (
        normal(narrow, rng, 40, cols),
        rng.normal(size=(9, cols)).astype(np.float32),
        rng.integers(9, size=40),
    )
    want = base.copy()
    for n, r in enumerate(index):
        want[r] += source[n]
    np.testing.assert_array_equal(run.scatter_add(narrow, source, index, base, layout), want)


@LAYOUTS
@pytest.mark.parametrize("classes", [1, 33, 2600])
@pytest.mark.parametrize("extras", [(0.0, 0.0), (0.2, 0.01)], ids=["plain", "smoothed"])
def test_cross_entropy(narrow, rng, close, classes, extras, layout):
    z, bias = normal(narrow, rng, 5, classes, scale=4), rng.normal(size=classes).astype(np.float32)
    labels = np.array([0, classes - 1, classes // 2, -1, -100])
    for b in (None, bias):
        loss, d = reference.cross_entropy(z if b is None else z + b.astype(float), labels, *extras)
        close(run.cross_entropy(narrow, z, labels, b, None, layout, *extras)[0], loss, 1e-5)
        got, gradient = run.cross_entropy(narrow, z, labels, b, 0.5, layout, *extras)
        close(got, loss, 1e-5)
        narrow.near(gradient, 0.5 * d)


@LAYOUTS
def test_sums_are_float32(narrow, rng, close, layout):
    x = normal(narrow, rng, 36, 40)
    for rows in (1, 4):
        close(run.sum_to(narrow, x, rows, 3, layout), x.astype(float).reshape(-1, rows, 40).sum(0))
    close(np.array(run.sum_all(narrow, x, 100, layout)), x.astype(float).sum())


@LAYOUTS
@pytest.mark.parametrize("inverse", [False, True])
def test_rope(narrow, rng, inverse, layout):
    x, angle = normal(narrow, rng, 5, 3 * 10), rng.normal(size=(5, 3))
    table = np.concatenate([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    a, b, rest = np.split(x.astype(float).reshape(5, 3, 10), [3, 6], axis=2)
    cosine, sine = (t[:, None].astype(float) for t in np.split(table, 2, axis=1))
    sine = -sine if inverse else sine
    want = np.concatenate([a * cosine - b * sine, b * cosine + a * sine, rest], axis=2).reshape(5, 30)
    narrow.near(run.rope(narrow, x, table, 3, inverse, layout), want)
    narrow.near(run.rope(narrow, x, table, 3, inverse, layout, in_place=True), want)


@pytest.mark.skipif(ON_HARDWARE, reason="the instruction is compute capability 8.0's")
@pytest.mark.parametrize("half", run.HALVES)
def test_older_architectures_round_alike(rng, half):
    """Without the instruction for two; nobody launches those for bfloat16 there."""
    import sim
    from kernels import nvrtc

    text = nvrtc.unit(f"elementwise_{half}")
    text = (
        text[: text.index("// <f>_forward_f32: y = f(x)")]
        + text[text.index("#ifdef HALF\n// y = x in 16 bits") :]
    )
    text = text[: text.index("// ---- Functions of two arguments")]
    device = Narrow(sim.Device(sim.load(nvrtc.ptx(text, "elementwise", 75)), 1 << 14), half)
    x = (10.0 ** rng.integers(-30, 30, size=(3, 21)) * rng.normal(size=(3, 21))).astype(np.float32)
    x[0, :4] = [np.inf, -np.inf, np.nan, 3.4e38]
    np.testing.assert_array_equal(run.narrow(device, x), device.rounded(x))
