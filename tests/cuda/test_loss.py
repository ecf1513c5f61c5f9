"""loss.cu against float64 and finite differences."""

import numpy as np
import pytest
from kernels import launches as run
from kernels import reference

LAYOUTS = pytest.mark.parametrize("layout", run.LAYOUTS.values(), ids=run.LAYOUTS)


@LAYOUTS
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (9, 64), (2, 1025), (5, 1100)])
def test_loss_and_gradient(device, rng, close, shape, layout):
    logits, bias = (
        (3 * rng.normal(size=shape)).astype(np.float32),
        rng.normal(size=shape[1]).astype(np.float32),
    )
    labels = rng.integers(shape[1], size=shape[0])
    labels[shape[0] // 2 :: 3] = -100
    for b in (None, bias):
        want, d = reference.cross_entropy(logits if b is None else logits.astype(float) + b, labels)
        close(run.cross_entropy(device, logits, labels, b, None, layout)[0], want)
        loss, got = run.cross_entropy(device, logits, labels, b, 0.37, layout)
        close(loss, want)
        close(got, 0.37 * d)


@LAYOUTS
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.1, 0.0), (0.0, 1e-2), (0.3, 1e-3), (1.0, 0.0)])
def test_smoothing_and_z_loss(device, rng, close, smoothing, z_loss, layout):
    logits, bias = (3 * rng.normal(size=(5, 1030)) + 4).astype(np.float32), rng.normal(size=1030)
    labels = np.array([0, 1029, -100, 513, 7])
    want, d = reference.cross_entropy(logits + bias.astype(np.float32), labels, smoothing, z_loss)
    more = (smoothing, z_loss)
    close(run.cross_entropy(device, logits, labels, bias, None, layout, *more)[0], want)
    loss, got = run.cross_entropy(device, logits, labels, bias, 0.37, layout, *more)
    close(loss, want)
    close(got, 0.37 * d)


def test_huge_and_hidden_logits(device, close):
    logits = np.array(
        [[3e38, 0, -3e38, -np.inf], [-np.inf, -np.inf, 5, 5], [-3e38, -3e38, -3e38, -3e38]], np.float32
    )
    labels = np.array([0, 2, 1])
    loss, d = run.cross_entropy(device, logits, labels, None, 1.0)
    close(loss, np.log([1, 2, 4]))
    close(d, [[0, 0, 0, 0], [0, 0, -0.5, 0.5], [0.25, -0.75, 0.25, 0.25]])


def test_nan_is_not_hidden(device):
    loss, _ = run.cross_entropy(device, np.array([[1, np.nan, 2]], np.float32), np.array([0]), None, None)
    assert np.isnan(loss[0])


def test_a_label_outside_the_classes_reads_nothing_outside(device):
    for dloss in (None, 1.0):
        loss, _ = run.cross_entropy(
            device, np.zeros((2, 3), np.float32), np.array([3, 2**31 - 1]), None, dloss
        )
        assert np.isnan(loss).all()


def test_gradient_is_the_derivative(device, rng, close):
    logits, labels = rng.normal(size=(3, 5)).astype(np.float32), np.array([4, -1, 0])
    for more in ((0.0, 0.0), (0.2, 0.05)):
        _, got = run.cross_entropy(device, logits, labels, None, 1.0, run.PLAIN, *more)
        want = reference.numeric_gradient(
            lambda z, m=more: reference.cross_entropy(z, labels, *m)[0].sum(), logits
        )
        close(got, want, 1e-5)
