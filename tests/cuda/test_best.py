"""best.cu against NumPy."""

import numpy as np
import pytest
from kernels import launches as run
from kernels import reference

LAYOUTS = pytest.mark.parametrize("layout", run.LAYOUTS.values(), ids=run.LAYOUTS)


def check(got, x, temperature, count):
    values, tokens, masses = reference.best(x, temperature, count)
    np.testing.assert_array_equal(got[0], values)
    np.testing.assert_array_equal(got[1], tokens)
    np.testing.assert_allclose(got[2], masses, rtol=3e-14)


@LAYOUTS
@pytest.mark.parametrize(
    ("cols", "count", "most"), [(1, 1, 4096), (37, 37, 4096), (517, 256, 4096), (300, 7, 64), (1000, 31, 64)]
)
def test_best(device, rng, cols, count, most, layout):
    x = (4 * rng.normal(size=(2, cols))).astype(np.float32)
    temperature = np.array([0.7, 1.0], np.float32)
    check(run.best(device, x, temperature, count, layout, most), x, temperature, count)


def test_a_vocabulary_in_three_pieces(device, rng):
    x = (4 * rng.normal(size=(1, 8200))).astype(np.float32)
    temperature = np.array([1.3], np.float32)
    check(run.best(device, x, temperature, 256), x, temperature, 256)


def test_of_equal_logits_the_lower_token_is_better(device, rng):
    x = rng.integers(4, size=(3, 150)).astype(np.float32)
    x[2] = 0
    x[2, 1::2] = -0.0
    for count, most in ((1, 4096), (40, 4096), (9, 32)):
        check(run.best(device, x, np.ones(3, np.float32), count, most=most), x, np.ones(3, np.float32), count)


def test_logits_far_apart_and_banned_ones(device):
    x = np.full((3, 100), -np.inf, np.float32)
    x[0, [3, 70]] = 3e38, -3e38
    x[1, [5, 6, 99]] = -1e30, -1e30, np.float32(-1.0000001e30)
    x[2, 64:] = -745.5
    temperature = np.array([1.0, 100.0, 0.5], np.float32)
    for most in (4096, 32):
        check(run.best(device, x, temperature, 4, most=most), x, temperature, 4)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf])
def test_what_is_no_logit_shows_in_the_masses(device, rng, value):
    x = rng.normal(size=(2, 90)).astype(np.float32)
    x[1, 40] = value
    for most in (4096, 32):
        masses = run.best(device, x, np.ones(2, np.float32), 5, most=most)[2]
        assert np.isfinite(masses[0]).all()
        assert np.isnan(masses[1]).all()


def test_nothing_but_banned_logits_weigh_nothing(device):
    x = np.full((1, 70), -np.inf, np.float32)
    for most in (4096, 32):
        assert (run.best(device, x, np.ones(1, np.float32), 5, most=most)[2] == 0).all()
