//! Weights kept in the order in which the tile kernel reads them: packed once, not for every product, and read in a
//! straight line by products of few rows.
//!
//! The chains of multiply-adds are those of [`gemm`](super::gemm), and so are the bits.

use std::ops::Range;

use super::micro::{Kernel, Tile, prefetch};
use super::pack::{self, Source};
use super::{Buffer, EPILOGUE_COLUMNS, Epilogue, PackBuffers, ROWS, SMALL, Shared, finish, run_tile};
use crate::real::Real;
use crate::simd;
use crate::threads::Pool;
use crate::view::{Mat, MatMut};

/// Up to this many rows of tiles read A as it lies; more have it packed first.
const FEW_TILES: usize = 2;
/// Up to this many rows of tiles, memory is slower than arithmetic: they ask for what comes next of B at each step.
const STREAM_TILES: usize = 8;
/// Then blocks of K have at most so many steps: two panels share the first cache.
const STREAM_DEPTH: usize = 128;
/// With one row of tiles, B is read in a straight line, and asked for so many steps before.
const AHEAD: usize = 32;
/// Panels packed by a task.
const GROUP: usize = 8;

/// The right factor of products, `[K, N]` or, `transposed`, `[N, K]`: panels of columns by K steps, step-major, zeros
/// beyond the last column.
#[derive(Debug)]
pub struct Packed<T> {
    transposed: bool,
    n: usize,
    k: usize,
    width: usize,
    data: Buffer<T>,
}

// SAFETY: nothing is written after it was made.
unsafe impl<T: Sync> Sync for Packed<T> {}

impl<T: Real> Packed<T> {
    /// Packs a matrix for the kernels of [`simd::level`]; `None` if there is no memory for it.
    #[must_use]
    pub fn new(pool: &Pool, weight: &Mat<'_, T>, transposed: bool) -> Option<Self> {
        Self::with_kernel(pool, &T::kernel(simd::level()), weight, transposed)
    }

    pub(super) fn with_kernel(
        pool: &Pool,
        kernel: &Kernel<T>,
        weight: &Mat<'_, T>,
        transposed: bool,
    ) -> Option<Self> {
        let (n, k) = if transposed { (weight.rows, weight.cols) } else { (weight.cols, weight.rows) };
        let (width, transpose) = (kernel.width, kernel.transpose);
        let data = Buffer::<T>::new(n.next_multiple_of(width).checked_mul(k)?.max(1)).ok()?;
        let source = Source { data: weight.as_ptr(), stride: weight.stride, lanes_adjacent: !transposed };
        let (to, group) = (Shared(data.data), GROUP * width);
        pool.run(n.div_ceil(group), &|task, _| {
            let first = task * group;
            // SAFETY: the columns are inside the matrix; tasks fill different panels, for which there is room.
            unsafe {
                let to = to.get().add(first * k);
                pack::pack(&source, transpose, (first, group.min(n - first)), (0, k), width, to);
            }
        });
        Some(Self { transposed, n, k, width, data })
    }

    /// (N, K).
    pub(super) fn shape(&self) -> (usize, usize) {
        (self.n, self.k)
    }

    /// Whether the matrix is `[N, K]`.
    pub(crate) fn transposed(&self) -> bool {
        self.transposed
    }

    /// Writes row `r` of the matrix.
    pub(crate) fn row(&self, r: usize, to: &mut [T]) {
        let &Self { transposed, n, k, width, .. } = self;
        let (rows, cols) = if transposed { (n, k) } else { (k, n) };
        assert!(r < rows && to.len() == cols, "row {r} of {rows} into {} of {cols} places", to.len());
        if k == 0 {
            return;
        }
        // SAFETY: the panels hold all columns by all steps, and nobody writes to them.
        let panels = unsafe { std::slice::from_raw_parts(self.data.data, self.data.elements) };
        if transposed {
            let lane = &panels[r / width * width * k + r % width..];
            to.iter_mut().zip(lane.iter().step_by(width)).for_each(|(to, x)| *to = *x);
        } else {
            for (to, panel) in to.chunks_mut(width).zip(panels.chunks_exact(width * k)) {
                to.copy_from_slice(&panel[r * width..][..to.len()]);
            }
        }
    }
}

/// `C = A·B` (or `+=`) by the pool: some rows of A at a time are packed by all threads, then tasks have columns of C.
///
/// # Safety
/// As [`gemm`](super::gemm), whose shapes were checked.
///
/// # Panics
/// If B was packed for another kernel than that of the buffers.
pub(super) unsafe fn multiply<T: Real>(
    pool: &Pool,
    buffers: &PackBuffers<T>,
    a: &Mat<'_, T>,
    b: &Packed<T>,
    (c, accumulate): (&MatMut<'_, T>, bool),
    epilogue: Epilogue<'_, T>,
) {
    let (kernel, (m, n, k)) = (&buffers.kernel, (a.rows, b.n, b.k));
    let &Kernel { height, width, .. } = kernel;
    assert_eq!(b.width, width, "packed for another kernel");
    if m == 0 || n == 0 {
        return;
    }
    let threads = if m * n * k < SMALL { 1 } else { pool.threads() };
    // As many tasks for each thread.
    let tasks = n.div_ceil(EPILOGUE_COLUMNS).next_multiple_of(threads);
    let columns = n.div_ceil(tasks).next_multiple_of(width);
    let shared = buffers.shared();
    let memory = Shared(shared.data);
    // Whole tiles of all of K that fit the shared buffer.
    let room = shared.elements / k.max(1) / height * height;
    let most = if room > 0 { room.min(ROWS) } else { FEW_TILES * height };
    let at_once = m.div_ceil(m.div_ceil(most)).next_multiple_of(height).min(most);
    for row in (0..m).step_by(at_once) {
        let rows = at_once.min(m - row);
        let few = rows <= FEW_TILES * height;
        if !few {
            let left = Source { data: a.as_ptr(), stride: a.stride, lanes_adjacent: false };
            let share = rows.div_ceil(threads).next_multiple_of(height);
            pool.run(rows.div_ceil(share), &|task, _| {
                let first = task * share;
                let lanes = (row + first, share.min(rows - first));
                // SAFETY: the rows are inside A; tasks fill different parts of the buffer, which is locked.
                unsafe {
                    pack::pack(&left, kernel.transpose, lanes, (0, k), height, memory.get().add(first * k))
                };
            });
        }
        pool.run(n.div_ceil(columns), &|task, _| {
            let rows = if few {
                // Tiles of equal height: a low one takes as long as a high one.
                let tall = rows.div_ceil(rows.div_ceil(height));
                let first = a.as_ptr().wrapping_add(row * a.stride);
                Rows { a: first, row: a.stride, step: 1, tile: tall * a.stride, tall, rows }
            } else {
                Rows {
                    a: memory.get().cast_const(),
                    row: 1,
                    step: height,
                    tile: height * k,
                    tall: height,
                    rows,
                }
            };
            let columns = task * columns..n.min((task + 1) * columns);
            let c = c.block(row, rows.rows, 0, n);
            // SAFETY: A is readable, or packed; these columns are this task's.
            unsafe {
                run_columns(kernel, &rows, b, columns.clone(), &c, accumulate);
                finish(&c, 0..rows.rows, columns, &|i, j, piece| epilogue(row + i, j, piece));
            }
        });
    }
}

/// Rows of A, in tiles of `tall`: the element (row i of tile t, step p) is at `a + t·tile + i·row + p·step`.
struct Rows<T> {
    a: *const T,
    row: usize,
    step: usize,
    tile: usize,
    tall: usize,
    rows: usize,
}

/// Computes some columns of C. K is visited in blocks, so that a panel of B stays in the first cache for all rows, and
/// A's block in the second; what comes next of B is on the way meanwhile.
///
/// # Safety
/// The rows of A are readable; nobody else touches these columns of C.
unsafe fn run_columns<T: Real>(
    kernel: &Kernel<T>,
    rows: &Rows<T>,
    b: &Packed<T>,
    columns: Range<usize>,
    c: &MatMut<'_, T>,
    accumulate: bool,
) {
    let (k, width) = (b.k.max(1), b.width);
    let tiles = rows.rows.div_ceil(rows.tall);
    let streams = tiles <= STREAM_TILES;
    let most = if streams { STREAM_DEPTH } else { kernel.depth };
    let depth = if tiles == 1 { k } else { k.div_ceil(k.div_ceil(most)).next_multiple_of(8) };
    let panel = |j: usize, step: usize| b.data.data.cast_const().wrapping_add(j * b.k + step * width);
    for step in (0..k).step_by(depth) {
        let block = depth.min(b.k - step);
        for j in columns.clone().step_by(width) {
            let next = match () {
                () if tiles == 1 => panel(j, step + AHEAD),
                () if j + width < columns.end => panel(j + width, step),
                () => panel(columns.start, step + block),
            };
            // Each row of tiles asks for its share.
            let share = width / tiles.min(width);
            for t in 0..tiles {
                let tile = Tile {
                    depth: block,
                    a: rows.a.wrapping_add(t * rows.tile + step * rows.step),
                    a_row: rows.row,
                    a_step: rows.step,
                    b: panel(j, step),
                    b_step: width,
                    ahead: next.wrapping_add(t * block * share),
                    ahead_step: share,
                    c: c.as_ptr().wrapping_add(t * rows.tall * c.stride + j),
                    c_row: c.stride,
                    add: accumulate || step > 0,
                };
                let (lines, lanes) = (rows.tall.min(rows.rows - t * rows.tall), width.min(columns.end - j));
                // SAFETY: the caller's promise, and a panel of B.
                unsafe {
                    if streams && lanes == width {
                        (kernel.stream)(lines, &tile);
                    } else {
                        for p in t * block / tiles..(t + 1) * block / tiles {
                            prefetch(next.wrapping_add(p * width));
                        }
                        run_tile(kernel, lines, lanes, tile);
                    }
                }
            }
        }
    }
}
