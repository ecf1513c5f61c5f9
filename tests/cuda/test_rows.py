"""rows.cu against NumPy."""

import numpy as np
import pytest
from kernels import launches as run

LAYOUTS = pytest.mark.parametrize("layout", run.LAYOUTS.values(), ids=run.LAYOUTS)
SHAPES = [(1, 1, 1), (5, 9, 7), (3, 70, 130), (200, 33, 12)]


@LAYOUTS
@pytest.mark.parametrize(("table_rows", "rows", "cols"), SHAPES)
def test_gather(device, rng, table_rows, rows, cols, layout):
    table = rng.normal(size=(table_rows, cols)).astype(np.float32)
    index = rng.integers(table_rows, size=rows)
    np.testing.assert_array_equal(run.gather(device, table, index, layout), table[index])


def test_gather_outside_the_table_gives_nan(device, rng):
    table = rng.normal(size=(3, 5)).astype(np.float32)
    got = run.gather(device, table, np.array([0, 3, -1, 2]))
    np.testing.assert_array_equal(got[[0, 3]], table[[0, 2]])
    assert np.isnan(got[1:3]).all()


@LAYOUTS
@pytest.mark.parametrize(("table_rows", "rows", "cols"), SHAPES)
def test_scatter_add_is_the_sum_in_the_order_of_rows(device, rng, table_rows, rows, cols, layout):
    source, base = (rng.normal(size=(n, cols)).astype(np.float32) for n in (rows, table_rows))
    index = rng.integers(table_rows, size=rows)
    want = base.copy()
    for n, r in enumerate(index):
        want[r] += source[n]  # float32, in this order: the kernel gives the same bits
    np.testing.assert_array_equal(run.scatter_add(device, source, index, base, layout), want)


@pytest.mark.parametrize(
    "index", [np.zeros(67), np.arange(67), np.arange(67) % 2, np.array([0] * 40 + [1] * 27)]
)
def test_scatter_add_of_extreme_indices(device, rng, index):
    index = index.astype(int)
    source, base = rng.normal(size=(67, 5)).astype(np.float32), np.zeros((67, 5), np.float32)
    want = base.copy()
    for n, r in enumerate(index):
        want[r] += source[n]
    np.testing.assert_array_equal(run.scatter_add(device, source, index, base), want)


def test_scatter_add_leaves_out_what_points_outside(device):
    source, base = np.ones((4, 3), np.float32), np.zeros((2, 3), np.float32)
    got = run.scatter_add(device, source, np.array([-1, 1, 2, 1]), base)
    np.testing.assert_array_equal(got, [[0, 0, 0], [2, 2, 2]])


@pytest.mark.parametrize("rows", [1, 31, 256, 1000])
def test_count_labels(device, rng, rows):
    labels = rng.choice([-100, -1, 0, 7], size=rows)
    assert run.count_labels(device, labels) == (labels >= 0).sum()
