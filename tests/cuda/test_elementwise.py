"""elementwise.cu against float64."""

import numpy as np
import pytest
from kernels import launches as run
from kernels import reference

SHAPES = [(1, 1), (1, 1027), (5, 7), (3, 64), (33, 12), (130, 1)]
LAYOUTS = pytest.mark.parametrize("layout", run.LAYOUTS.values(), ids=run.LAYOUTS)
EXTREMES = np.array(
    [[0, -0.0, 1e-30, -1e-30, 5, -5, 12, -12, 88, -87, 120, -120, 3e38, -3e38, np.inf, -np.inf]], np.float32
)


def inside(name, x):
    """x, moved to where a function has a value and a slope."""
    return np.abs(x) + np.float32(0.1) if name == "sqrt" else x


@LAYOUTS
@pytest.mark.parametrize("name", reference.UNARY)
@pytest.mark.parametrize("shape", [(1, 1027), (5, 7), (33, 12)])
def test_unary_functions_and_gradients(device, rng, close, name, shape, layout):
    x, dy = (2 * rng.normal(size=shape)).astype(np.float32), rng.normal(size=shape).astype(np.float32)
    f, x = reference.UNARY[name], inside(name, x)
    close(run.unary(device, name, x, layout), f(x.astype(float)))
    want = reference.slope(f, x.astype(float)) * dy
    close(run.unary_grad(device, name, x, dy, layout), want)


@pytest.mark.parametrize("name", reference.UNARY)
def test_results_may_lie_over_operands(device, rng, close, name):
    x, dy = (inside(name, rng.normal(size=(5, 9)).astype(np.float32)) for _ in range(2))
    close(run.unary(device, name, x, in_place=True), reference.UNARY[name](x.astype(float)))
    want = reference.slope(reference.UNARY[name], x.astype(float)) * dy
    for over in ("x", "dy"):
        close(run.unary_grad(device, name, x, dy, over=over), want)


@pytest.mark.parametrize("name", reference.UNARY)
def test_extreme_values(device, close, name):
    with np.errstate(all="ignore"):
        want = reference.UNARY[name](EXTREMES.astype(float)).astype(np.float32)
    if name in ("gelu", "gelu_tanh", "silu"):
        want[np.isneginf(EXTREMES)] = np.nan  # −∞ · 0, as in float64
    if name == "gelu_tanh":
        want[np.abs(EXTREMES) == np.float32(3e38)] = [
            np.float32(3e38),
            -0.0,
        ]  # float64 does not overflow in x³
    close(run.unary(device, name, EXTREMES), want)


def test_subnormals_are_flushed(device):
    x = np.array([[1e-40, -1e-40, 1e-20]], np.float32)
    np.testing.assert_array_equal(run.scale(device, x, 1e30), np.array([[0, 0, 1e10]], np.float32))


@LAYOUTS
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
@pytest.mark.parametrize(
    ("shape", "b"), [((6, 5), (6, 5)), ((6, 5), (3, 5)), ((6, 8), (1, 8)), ((4, 7), (1, 1)), ((4, 1), (2, 1))]
)
def test_binary_functions_repeat_the_second_operand(device, rng, close, name, shape, b, layout):
    x, y = rng.normal(size=shape).astype(np.float32), (2 + rng.random(size=b)).astype(np.float32)
    f = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}[name]
    repeated = np.tile(y, (shape[0] // b[0], shape[1] // b[1])).astype(float)
    close(run.binary(device, name, x, y, layout), f(x.astype(float), repeated))
    close(run.binary(device, name, x, y, layout, in_place=True), f(x.astype(float), repeated))


@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES)
def test_scale_fill_broadcast_copy(device, rng, shape, layout):
    x = rng.normal(size=shape).astype(np.float32)
    np.testing.assert_array_equal(run.scale(device, x, -0.3, layout), x * np.float32(-0.3))
    np.testing.assert_array_equal(run.fill(device, shape, 2.5, layout), np.full(shape, 2.5, np.float32))
    np.testing.assert_array_equal(run.broadcast(device, x, shape, layout), x)
    row = x[:1]
    np.testing.assert_array_equal(run.broadcast(device, row, shape, layout), np.broadcast_to(row, shape))
    np.testing.assert_array_equal(run.broadcast(device, x[:1, :1], shape, layout), np.full(shape, x[0, 0]))


def test_a_halted_program_keeps_its_states(device):
    x, y = np.arange(35, dtype=np.float32).reshape(5, 7), np.full((5, 7), 3, np.float32)
    for halt, sums, copies in ((0, x + y, x), (1, x, 0 * x)):
        word = device.array([halt], np.int32)
        np.testing.assert_array_equal(run.binary(device, "add", x, y, in_place=True, halt=word), sums)
        np.testing.assert_array_equal(run.broadcast(device, x, x.shape, halt=word), copies)


def test_a_copy_keeps_the_bits_of_integers(device):
    x = np.array([[1, -1, 2**31 - 1, -(2**31), 8388607]], np.int32)
    np.testing.assert_array_equal(run.broadcast(device, x, x.shape, dtype=np.int32), x)


def test_the_reference_generator_has_known_answers():
    ones = 0xFFFFFFFF
    got = [
        hex(int(w))
        for w in reference.philox((0xA4093822, 0x299F31D0), [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344])
    ]
    assert got == ["0xd16cfe09", "0x94fdcceb", "0x5001e420", "0x24126ea1"]
    assert hex(int(reference.philox((ones, ones), [ones] * 4)[0])) == "0x408f276d"


@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dropout_draws_by_element_number(device, rng, shape, p, layout):
    x = rng.normal(size=shape).astype(np.float32)
    state = np.array([7, -3, 12, 1], np.int32)
    factors = reference.keep(state, 5, p, x.size).reshape(shape)
    np.testing.assert_array_equal(run.dropout(device, x, state, p, 5, layout), x * factors.astype(np.float32))


@LAYOUTS
@pytest.mark.parametrize("shape", [(1, 1027), (5, 7), (33, 12)])
def test_dropout_adds_a_residual(device, rng, close, shape, layout):
    x, residual = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    state = np.array([7, -3, 12, 1], np.int32)
    want = x * reference.keep(state, 5, 0.3, x.size).reshape(shape) + residual
    for over in ("", "x", "residual"):
        close(run.dropout(device, x, state, 0.3, 5, layout, residual, over), want)


def test_dropout_drops_what_is_not_finite(device):
    x = np.full((1, 64), np.inf, np.float32)
    got = run.dropout(device, x, np.arange(4), 0.5, 1)
    assert set(got.reshape(-1).tolist()) == {0.0, np.inf}


@LAYOUTS
@pytest.mark.parametrize("act", reference.UNARY)
def test_gated(device, rng, close, act, layout):
    gate, up, dy = (inside(act, rng.normal(size=(5, 19)).astype(np.float32)) for _ in range(3))
    f = reference.UNARY[act]
    want = f(gate.astype(float)) * up
    for over in ("", "gate", "up"):
        close(run.gated(device, act, gate, up, layout, over), want)
    dgate = reference.slope(f, gate.astype(float)) * dy * up
    dup = f(gate.astype(float)) * dy
    for over in (("", ""), ("dy", "up"), ("gate", "dy"), ("up", "gate")):
        for got, want in zip(
            run.gated_grad(device, act, dy, gate, up, layout, over), (dgate, dup), strict=True
        ):
            close(got, want)


@LAYOUTS
@pytest.mark.parametrize("act", run.FUNCTIONS)
def test_epilogue(device, rng, close, act, layout):
    shape = (5, 19)
    product, x, residual = (inside(act, rng.normal(size=shape).astype(np.float32)) for _ in range(3))
    bias = inside(act, rng.normal(size=19).astype(np.float32))
    f = reference.UNARY.get(act, lambda x: x)
    pre = product.astype(float) + bias
    y, kept = run.epilogue(device, product, bias, act, True, "none", None, residual, layout)
    close(y, f(pre) + residual)
    close(kept, pre)
    y, kept = run.epilogue(device, product, None, "none", False, act, x, None, layout)
    close(y, product * reference.slope(f, x.astype(float)))
    assert kept is None
    for over in ("product", "residual"):
        y, _ = run.epilogue(device, product, bias, act, False, "none", None, residual, layout, over=over)
        close(y, f(pre) + residual)
