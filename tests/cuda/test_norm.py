"""norm.cu against float64 and finite differences."""

import numpy as np
import pytest
from kernels import launches as run
from kernels import reference

EPS = 1e-5
SHAPES = [(1, 1), (1, 8), (5, 7), (9, 64), (3, 130), (2, 515), (70, 33)]
LAYOUTS = pytest.mark.parametrize("layout", run.LAYOUTS.values(), ids=run.LAYOUTS)


def operands(rng, shape):
    x, dy, residual = (rng.normal(size=shape).astype(np.float32) for _ in range(3))
    weight, bias = (rng.normal(size=shape[1]).astype(np.float32) for _ in range(2))
    return x, dy, residual, weight, bias


@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(device, rng, close, shape, layout):
    x, _, _, weight, bias = operands(rng, shape)
    for b in (bias, None):
        for got, want in zip(
            run.layer_norm(device, x, weight, b, EPS, layout),
            reference.layer_norm(x, weight, b, EPS),
            strict=True,
        ):
            close(got, want)


#: Rows that so many warps have together: whole and partial pieces, teams without a row, rows read again in part.
TEAMS = pytest.mark.parametrize(
    ("shape", "warps"),
    [((9, 65), 1), ((21, 36), 1), ((9, 68), 2), ((3, 1032), 2), ((5, 300), 4), ((2, 516), 8), ((3, 8208), 8)],
    ids=str,
)


@pytest.mark.parametrize("layout", [run.PLAIN, run.Layout(gap=3), run.LAYOUTS["crooked"]], ids=str)
@TEAMS
def test_rows_of_teams(device, rng, close, shape, warps, layout):
    x, dy, residual, weight, bias = operands(rng, shape)
    want = reference.layer_norm(x, weight, bias, EPS)
    for got, value in zip(
        run.layer_norm(device, x, weight, bias, EPS, layout, warps=warps), want, strict=True
    ):
        close(got, value)
    mean, rstd = (z.astype(np.float32) for z in want[1:])
    dx, dweight, dbias = reference.layer_norm_grad(dy, x, weight, mean, rstd)
    for over in ("dy", "residual"):
        got = run.layer_norm_grad(device, dy, x, weight, mean, rstd, residual, layout, over, 5, warps=warps)
        for g, value in zip(got, (dx + residual, dweight, dbias), strict=True):
            close(g, value)


@pytest.mark.parametrize("warps", [1, 2])
def test_a_large_mean_keeps_the_digits_of_the_variance(device, rng, close, warps):
    x = (1000 + rng.normal(size=(4, 257))).astype(np.float32)
    weight = np.ones(257, np.float32)
    got = run.layer_norm(device, x, weight, None, EPS, warps=warps)
    # x itself is rounded to 6e-5 here, and the mean to as much.
    close(got[0], reference.layer_norm(x, weight, None, EPS)[0], 2e-4)


def test_sums_depend_on_shapes_alone(device, rng):
    """A row's results are those of the row alone, and what stands in a chunk decides its sums, not what follows."""
    x, dy, residual, weight, bias = operands(rng, (11, 70))
    _, mean, rstd = (z.astype(np.float32) for z in reference.layer_norm(x, weight, bias, EPS))
    y, means, rstds = run.layer_norm(device, x, weight, bias, EPS)
    got = run.layer_norm_grad(device, dy, x, weight, mean, rstd, residual, chunk=16)
    for r in range(3, 11, 7):
        part = slice(r, r + 1)
        alone = run.layer_norm(device, x[part], weight, bias, EPS)
        for a, b in zip(alone, (y, means, rstds), strict=True):
            np.testing.assert_array_equal(a, b[part])
        alone = run.layer_norm_grad(device, dy[part], x[part], weight, mean[part], rstd[part], residual[part])
        np.testing.assert_array_equal(alone[0], got[0][part])


@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(device, rng, close, shape, layout):
    x, dy, residual, weight, bias = operands(rng, shape)
    _, mean, rstd = (z.astype(np.float32) for z in reference.layer_norm(x, weight, bias, EPS))
    dx, dweight, dbias = reference.layer_norm_grad(dy, x, weight, mean, rstd)
    got = run.layer_norm_grad(device, dy, x, weight, mean, rstd, None, layout, chunk=16)
    for g, want in zip(got, (dx, dweight, dbias), strict=True):
        close(g, want)
    for over in ("", "dy", "residual"):
        got = run.layer_norm_grad(device, dy, x, weight, mean, rstd, residual, layout, over)
        close(got[0], dx + residual)


def test_backward_is_the_derivative(device, rng, close):
    x, dy, _, weight, bias = operands(rng, (3, 6))
    _, mean, rstd = (z.astype(np.float32) for z in reference.layer_norm(x, weight, bias, EPS))
    got = run.layer_norm_grad(device, dy, x, weight, mean, rstd)

    def loss(x, weight, bias):
        return float((reference.layer_norm(x, weight, bias, EPS)[0] * dy).sum())

    close(got[0], reference.numeric_gradient(lambda z: loss(z, weight, bias), x), 1e-5)
    close(got[1], reference.numeric_gradient(lambda z: loss(x, z, bias), weight), 1e-5)
    close(got[2], reference.numeric_gradient(lambda z: loss(x, weight, z), bias), 1e-5)


@pytest.mark.parametrize("shape", [(5, 7), (3, 130)])
def test_without_centring(device, rng, close, shape):
    x, dy, residual, weight, _ = operands(rng, shape)
    x += 3
    y, mean, rstd = reference.layer_norm(x, weight, None, EPS, center=False)
    for got, want in zip(
        run.layer_norm(device, x, weight, None, EPS, center=False), (y, mean, rstd), strict=True
    ):
        close(got, want)
    mean, rstd = mean.astype(np.float32), rstd.astype(np.float32)
    dx, dweight, _ = reference.layer_norm_grad(dy, x, weight, mean, rstd, center=False)
    got = run.layer_norm_grad(device, dy, x, weight, mean, rstd, residual, center=False)
    close(got[0], dx + residual)
    close(got[1], dweight)
    numeric = reference.numeric_gradient(
        lambda z: float((reference.layer_norm(z, weight, None, EPS, center=False)[0] * dy).sum()), x
    )
    close(dx, numeric, 1e-6)
