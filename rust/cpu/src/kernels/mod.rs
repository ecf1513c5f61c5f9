//! The kernels, by what they compute. Each takes views and a pool, is generic over `f32` and `f64`, and gives the same bits
//! for any number of threads: work is cut by shape alone, and partial sums are combined in a fixed order.

pub(crate) mod attention;
pub(crate) mod cache;
pub mod cast;
pub mod dropout;
pub(crate) mod elementwise;
pub(crate) mod loss;
pub(crate) mod matmul;
pub(crate) mod norm;
pub(crate) mod optimizer;
pub(crate) mod positions;
pub(crate) mod relative;
pub mod rounding;
pub(crate) mod rows;

use crate::threads::Pool;

/// Elements that one task should touch: long enough to pay for its start, short enough to share out evenly.
const ELEMENTS_PER_TASK: usize = 16 * 1024;

/// How many rows of `cols` elements make a task.
pub(crate) fn rows_per_task(cols: usize) -> usize {
    (ELEMENTS_PER_TASK / cols.max(1)).max(1)
}

/// Runs `f(row)` for all rows, `chunk` consecutive rows a task.
pub(crate) fn for_rows(pool: &Pool, rows: usize, chunk: usize, f: impl Fn(usize) + Sync) {
    for_chunks(pool, rows, chunk, |_, from, to| (from..to).for_each(&f));
}

/// Runs `f(chunk number, first row, end row)` for all chunks of `chunk` consecutive rows.
pub(crate) fn for_chunks(pool: &Pool, rows: usize, chunk: usize, f: impl Fn(usize, usize, usize) + Sync) {
    pool.run(rows.div_ceil(chunk), &|task, _| f(task, task * chunk, ((task + 1) * chunk).min(rows)));
}

/// Into how many chunks a sum over `rows` is cut: a function of the shape, so that the order of additions is fixed.
pub(crate) fn sum_chunks(rows: usize) -> usize {
    rows.div_ceil(64).clamp(1, 32)
}
