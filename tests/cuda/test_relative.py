"""relative.cu against float64 and finite differences."""

import numpy as np
import pytest
from kernels import launches as run
from kernels import reference
from kernels.checks import relative_attention as check
from kernels.checks import relative_operands as operands

LAYOUTS = pytest.mark.parametrize("layout", run.LAYOUTS.values(), ids=run.LAYOUTS)
FLOATS = ("q_k", "q_r", "q_s", "k", "v", "r", "kinds")


@LAYOUTS
@pytest.mark.parametrize("sees_itself", [True, False], ids=["content", "query"])
def test_against_the_definition(device, rng, close, sees_itself, layout):
    x = operands(rng, 2, 5, 9, 7, 2, 6)
    dout = rng.normal(size=x["q_k"].shape).astype(np.float32)
    check(device, close, x, dout, sees_itself=sees_itself, layout=layout)


# One of each; more keys, and more queries, than a tile; a head wider than a block; queries far apart.
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 1, 1, 1),
        (1, 3, 131, 4, 1, 5),
        (1, 130, 3, 2, 1, 4),
        (1, 2, 3, 3, 1, 141),
        (2, 67, 210, 200, 1, 4),
    ],
    ids=str,
)
def test_odd_sizes(device, rng, close, sizes):
    x = operands(rng, *sizes, hidden=sizes[1] != 130)
    dout = rng.normal(size=x["q_k"].shape).astype(np.float32)
    check(device, close, x, dout, layout=run.LAYOUTS["crooked"])


def test_dropout_draws_by_pair(device, rng, close):
    x = operands(rng, 2, 3, 7, 5, 2, 6)
    dout = rng.normal(size=x["q_k"].shape).astype(np.float32)
    check(device, close, x, dout, site=run.Site(np.array([7, -3, 12, 1]), 5, 0.4))


def test_a_query_that_sees_nothing_weighs_all_keys_alike(device, rng, close):
    x = operands(rng, 1, 4, 4, 4, 1, 8)
    x["at"][:] = [[0, 1, 2, 3]]
    x["hidden"][:] = np.ones((1, 4, 4), int)
    dout = rng.normal(size=x["q_k"].shape).astype(np.float32)
    got = run.relative_attention(device, x, 0.3, sees_itself=False)["out"]
    close(got, np.broadcast_to(x["v"].astype(float).mean(1, keepdims=True), got.shape))
    check(device, close, x, dout, sees_itself=False)


def test_the_reference_s_gradient_is_the_derivative(rng):
    x = operands(rng, 1, 3, 4, 3, 2, 2)
    dout = rng.normal(size=x["q_k"].shape)
    found = reference.RelativeAttention(x, 0.5).gradient(dout)
    for name in FLOATS:
        want = reference.numeric_gradient(
            lambda z, n=name: float((reference.RelativeAttention(x | {n: z}, 0.5).out * dout).sum()), x[name]
        )
        np.testing.assert_allclose(found[name], want, atol=1e-8)
