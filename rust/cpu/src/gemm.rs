//! Matrix products: `C = A·B` or `C += A·B`, either operand transposed, all three with row strides.
//!
//! [`gemm`] spreads one product over a pool; [`gemm_serial`] is for small products inside a task (attention heads,
//! chunks). The structure is that of BLIS (Van Zee and van de Geijn 2015, figure 1):
//!
//! 1. C is cut into as many parts as there are threads, or a few times as many, each a task of its own: what a thread
//!    packs, it alone reads, so nothing is fetched from another core's cache and nobody waits.
//! 2. A task cuts K into blocks of at most `Kernel::depth` steps, so that a panel of B stays in the first cache (or of
//!    `Kernel::deep`, and the rows of a tile stay there), and packs B into panels, one block at a time.
//! 3. It packs some rows of A for the block (unless they are read too few times to pay for it), and runs the kernel of
//!    [`micro`] over all panels.
//! 4. After the last block, each row segment goes through the epilogue while it is in the second cache.
//!
//! With few rows of A (a decoding step), tasks have columns of C and read B as it lies, once, at the speed of memory:
//! see [`stream`].
//!
//! **Determinism**: every element of C is one chain of multiply-adds over K, from what C held or zero, whatever the
//! blocks, tiles and threads. So its bits depend on its row of A and its column of B alone; they may depend on the SIMD
//! level. A batch thus gives what each of its rows gives alone.

#[cfg(target_arch = "x86_64")]
mod across;
mod blocks;
mod int8;
mod micro;
mod pack;
mod packed;
mod vector;

use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) use blocks::{Blocks, Reach, WIDEST};
pub use int8::Int8;
pub use micro::Kernel;
use micro::{MAX_TILE, Tile};
pub(crate) use micro::{kernel_f32, kernel_f64, prefetch};
use pack::Source;
pub use packed::Packed;

use crate::error::{Error, Result};
use crate::real::Real;
use crate::simd;
use crate::threads::Pool;
use crate::view::{Mat, MatMut};
use crate::zeroed::Zeroed;

/// Rows of A packed by a task at a time: with 384 steps of `f32`, 216 KiB of the second cache.
const ROWS: usize = 144;
/// Columns between two visits of the epilogue.
const EPILOGUE_COLUMNS: usize = 256;
/// Elements of the buffer that threads share, for rows of A packed once: 3 MiB of `f32`.
const SHARED_ELEMENTS: usize = 3 << 18;
/// Elements of a task's buffer for panels of B: 3 MiB of `f32`, of which a task of two threads uses half.
const PANEL_ELEMENTS: usize = 3 << 18;
/// Up to this many rows of A, B is packed by the task that reads it: waiting for others would take longer than reading.
const STREAM_ROWS: usize = 48;
/// Steps of K for which such a task visits its columns: few if they are read once, more if several rows of tiles read
/// them, as each visit has its cost.
const STREAM_STEPS: [usize; 2] = [8, 64];
/// Steps that it packs at a time, where B must be transposed or its last columns fill no tile.
const STREAM_PACKED: usize = 128;
/// Elements of C that such a task works on: half of the first cache.
const STREAM_ELEMENTS: usize = 1 << 12;
/// Tiles that are computed in the time of packing a row of tiles, or a panel.
const PACKING: usize = 2;
/// Below this many multiply-adds, a product runs on one thread: waking another takes longer.
const SMALL: usize = 1 << 17;

/// The operands of `C = op(A)·op(B)`, or `C += op(A)·op(B)`.
///
/// Shapes: op(A) [M, K], op(B) [K, N], C [M, N]; A is [K, M] if `ta`, B is [N, K] if `tb`.
#[derive(Clone, Copy, Debug)]
pub struct Gemm<'a, T> {
    /// A.
    pub a: Mat<'a, T>,
    /// Whether A is transposed.
    pub ta: bool,
    /// B.
    pub b: Mat<'a, T>,
    /// Whether B is transposed.
    pub tb: bool,
    /// C.
    pub c: MatMut<'a, T>,
    /// Whether the product is added to C instead of replacing it.
    pub accumulate: bool,
}

impl<'a, T: Real> Gemm<'a, T> {
    fn product(&self) -> Product<'a, T> {
        let (m, k) = if self.ta { (self.a.cols, self.a.rows) } else { (self.a.rows, self.a.cols) };
        let (k2, n) = if self.tb { (self.b.cols, self.b.rows) } else { (self.b.rows, self.b.cols) };
        check((m, k), (k2, n), &self.c);
        Product {
            m,
            n,
            k,
            left: Source { data: self.a.as_ptr(), stride: self.a.stride, lanes_adjacent: self.ta },
            right: Source { data: self.b.as_ptr(), stride: self.b.stride, lanes_adjacent: !self.tb },
            c: self.c,
            accumulate: self.accumulate,
        }
    }
}

fn check<T>((m, k): (usize, usize), (k2, n): (usize, usize), c: &MatMut<'_, T>) {
    assert!(
        k == k2 && (c.rows, c.cols) == (m, n),
        "gemm: [{m}, {k}] times [{k2}, {n}] does not give [{}, {}]",
        c.rows,
        c.cols
    );
}

/// As [`check`], for a right factor (N, K) that is kept in an order of its own.
fn check_kept<T, U>((a, ta): (&Mat<'_, T>, bool), (n, k): (usize, usize), c: &MatMut<'_, U>) {
    assert!(!ta, "gemm: a transposed factor times one that is packed or of 8 bits");
    check((a.rows, a.cols), (k, n), c);
}

/// A right factor.
#[derive(Clone, Copy)]
pub enum Factor<'a, T> {
    /// `[K, N]` or, if the flag is set, `[N, K]`.
    Floats(Mat<'a, T>, bool),
    /// Either, in the kernel's order.
    Packed(&'a Packed<T>),
    /// Either, in 8 bits.
    Int8(&'a Int8),
}

impl<T: Real> Factor<'_, T> {
    /// Writes row `r` of the matrix.
    pub(crate) fn row(&self, r: usize, to: &mut [T]) {
        match self {
            Self::Floats(matrix, _) => to.copy_from_slice(matrix.row(r)),
            Self::Packed(packed) => packed.row(r, to),
            Self::Int8(int8) => int8.row(r, to),
        }
    }
}

/// What is multiplied: M × K rows as lanes by K × N columns as lanes.
struct Product<'a, T> {
    m: usize,
    n: usize,
    k: usize,
    left: Source<T>,
    right: Source<T>,
    c: MatMut<'a, T>,
    accumulate: bool,
}

impl<T: Real> Product<'_, T> {
    /// Packs columns `first .. first + lanes` and steps `step .. step + depth` of the right factor.
    ///
    /// # Safety
    /// They are inside it, and nobody else touches `to`, which has room for them.
    unsafe fn pack(&self, kernel: &Kernel<T>, lanes: (usize, usize), steps: (usize, usize), to: *mut T) {
        // SAFETY: the caller's promise.
        unsafe { pack::pack(&self.right, kernel.transpose, lanes, steps, kernel.width, to) };
    }
}

/// An epilogue that does nothing.
pub fn no_epilogue<T>(_row: usize, _column: usize, _finished: &mut [T]) {}

/// Memory that products pack their operands into, allocated once. Each product holds parts of it while it runs.
#[derive(Debug)]
pub struct PackBuffers<T: Real> {
    kernel: Kernel<T>,
    /// Rows of A, shared by the threads of one product.
    shared: Mutex<Buffer<T>>,
    workers: Vec<Mutex<Scratch<T>>>,
}

impl<T: Real> PackBuffers<T> {
    /// Buffers for pools of up to `threads` threads, and the kernels of [`simd::level`].
    ///
    /// # Errors
    /// When there is no memory for them.
    pub fn new(threads: usize) -> Result<Self> {
        Self::with_kernel(threads, T::kernel(simd::level()))
    }

    fn with_kernel(threads: usize, kernel: Kernel<T>) -> Result<Self> {
        let workers = (0..threads.max(1)).map(|_| Scratch::with_kernel(kernel).map(Mutex::new));
        let shared = Mutex::new(Buffer::new(SHARED_ELEMENTS)?);
        Ok(Self { kernel, shared, workers: workers.collect::<Result<_>>()? })
    }

    /// The kernels for products of blocks inside a task.
    pub(crate) fn blocks(&self) -> Blocks<T> {
        Blocks { kernel: self.kernel }
    }

    /// The buffer that the threads of one product share.
    fn shared(&self) -> MutexGuard<'_, Buffer<T>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The scratch memory of one worker, for [`gemm_serial`] in its tasks. It waits while that worker's [`gemm`] or
    /// another guard uses it.
    ///
    /// # Panics
    /// If `worker` is not below the number of threads.
    pub fn worker(&self, worker: usize) -> MutexGuard<'_, Scratch<T>> {
        // What a panicked holder has left is as good as anything: every product packs before it reads.
        self.workers[worker].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The pack buffer of one thread.
#[derive(Debug)]
pub struct Scratch<T: Real> {
    kernel: Kernel<T>,
    left: Buffer<T>,
    /// Panels of B of a serial product.
    panels: Buffer<T>,
}

impl<T: Real> Scratch<T> {
    /// Scratch memory for the kernels of [`simd::level`].
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn new() -> Result<Self> {
        Self::with_kernel(T::kernel(simd::level()))
    }

    fn with_kernel(kernel: Kernel<T>) -> Result<Self> {
        Ok(Self {
            kernel,
            left: Buffer::new(ROWS * kernel.deep.unwrap_or(kernel.depth))?,
            panels: Buffer::new(PANEL_ELEMENTS)?,
        })
    }
}

/// Zeroed memory for elements.
#[derive(Debug)]
struct Buffer<T> {
    data: *mut T,
    elements: usize,
    #[expect(dead_code, reason = "held for its drop")]
    memory: Zeroed,
}

// SAFETY: the buffer owns its memory, like a `Vec`.
unsafe impl<T: Send> Send for Buffer<T> {}

impl<T: Real> Buffer<T> {
    /// # Errors
    /// When there is no memory for it.
    fn new(elements: usize) -> Result<Self> {
        let bytes = elements.saturating_mul(size_of::<T>());
        // Zero bits are a valid `f32` or `f64`.
        let memory = Zeroed::new(bytes).ok_or_else(|| Error::no_memory(bytes))?;
        Ok(Self { data: memory.as_ptr().cast(), elements, memory })
    }
}

/// A pointer that tasks share; each uses its own part.
#[derive(Clone, Copy)]
struct Shared<T>(*mut T);

// SAFETY: it is only an address; those who use it promise that their parts are disjoint.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}

/// Panels of B in a buffer: some columns of one block of K.
#[derive(Clone, Copy)]
struct Panels {
    column: usize,
    columns: usize,
    step: usize,
    depth: usize,
    /// Whether these are the first steps of K, and the last.
    first: bool,
    last: bool,
}

/// The rows × columns of C that one task computes, within [`Panels`].
#[derive(Clone, Copy)]
struct Part {
    row: usize,
    rows: usize,
    /// From the first column of the panels.
    column: usize,
    columns: usize,
}

type Epilogue<'a, T> = &'a (dyn Fn(usize, usize, &mut [T]) + Sync);

/// `C = op(A)·op(B)` (or `+=`) on the threads of `pool`.
///
/// `epilogue(row, column, finished)` is called once for every element of C, in segments of a row that start at `column`
/// and are final and not read by others: the place for a bias, an activation, a residual. Segments come in any order,
/// on any thread; their bounds depend on the number of threads, so it must treat elements independently.
///
/// Products on one `PackBuffers` wait for each other; do not start one from an epilogue, or while holding a
/// [`PackBuffers::worker`] guard.
///
/// # Panics
/// If the shapes do not fit together, or `pool` has more threads than `buffers`.
///
/// # Safety
/// While it runs, nobody else touches the elements of C (so A and B do not overlap it).
pub unsafe fn gemm<T: Real>(
    pool: &Pool,
    buffers: &PackBuffers<T>,
    g: &Gemm<'_, T>,
    epilogue: Epilogue<'_, T>,
) {
    let g = &g.product();
    let &Product { m, n, k, .. } = g;
    if m == 0 || n == 0 {
        return;
    }
    let kernel = &buffers.kernel;
    let threads = if m * n * k < SMALL { 1 } else { pool.threads() };
    assert!(threads <= buffers.workers.len(), "{threads} threads, {} buffers", buffers.workers.len());
    if m <= STREAM_ROWS || k == 0 {
        // As many tasks for each thread.
        let most = (STREAM_ELEMENTS / m).max(kernel.width);
        let tasks = n.div_ceil(most).next_multiple_of(threads);
        let columns = n.div_ceil(tasks).next_multiple_of(kernel.width);
        pool.run(n.div_ceil(columns), &|task, worker| {
            let column = task * columns;
            let columns = column..n.min(column + columns);
            let scratch = buffers.worker(worker);
            // SAFETY: tasks have different columns; the rest is the caller's promise.
            unsafe {
                stream(kernel, g, columns.clone(), scratch.panels.data);
                finish(&g.c, 0..m, columns, epilogue);
            }
        });
        return;
    }
    let (rows, columns) = grid(m, n, threads, kernel);
    let row_tasks = m.div_ceil(rows);
    pool.run(row_tasks * n.div_ceil(columns), &|task, worker| {
        let (row, column) = (task % row_tasks * rows, task / row_tasks * columns);
        let part = Part { row, rows: rows.min(m - row), column, columns: columns.min(n - column) };
        // SAFETY: tasks have different parts of C; the rest is the caller's promise.
        unsafe { multiply(&mut buffers.worker(worker), g, part, epilogue) };
    });
}

/// `C = op(A)·B` (or `+=`) as [`gemm`] does, by a factor of floats, a packed one, or one of 8 bits.
///
/// # Panics
/// As [`gemm`]; and if A is transposed and B is packed or of 8 bits.
///
/// # Safety
/// As [`gemm`].
pub unsafe fn gemm_by<T: Real>(
    pool: &Pool,
    buffers: &PackBuffers<T>,
    (a, ta): (Mat<'_, T>, bool),
    b: Factor<'_, T>,
    (c, accumulate): (MatMut<'_, T>, bool),
    epilogue: Epilogue<'_, T>,
) {
    // SAFETY: the caller's promise, in both arms.
    unsafe {
        match b {
            Factor::Floats(b, tb) => gemm(pool, buffers, &Gemm { a, ta, b, tb, c, accumulate }, epilogue),
            Factor::Packed(b) => {
                check_kept((&a, ta), b.shape(), &c);
                packed::multiply(pool, buffers, &a, b, (&c, accumulate), epilogue);
            }
            Factor::Int8(b) => {
                check_kept((&a, ta), b.shape(), &c);
                int8::multiply(pool, buffers, &a, b, (&c, accumulate), epilogue);
            }
        }
    }
}

/// `C = op(A)·op(B)` (or `+=`) on the calling thread; made for small products such as 64 × 64 × 32.
///
/// # Panics
/// If the shapes do not fit together.
///
/// # Safety
/// While it runs, nobody else touches the elements of C (so A and B do not overlap it).
pub unsafe fn gemm_serial<T: Real>(scratch: &mut Scratch<T>, g: &Gemm<'_, T>) {
    let g = &g.product();
    let &Product { m, n, k, .. } = g;
    if m == 0 || n == 0 {
        return;
    }
    let kernel = &scratch.kernel;
    let memory = scratch.panels.data;
    if m <= kernel.height || k == 0 {
        // SAFETY: the caller's promise; the scratch is ours alone.
        unsafe { stream(kernel, g, 0..n, memory) };
        return;
    }
    // SAFETY: the caller's promise.
    unsafe { multiply(scratch, g, Part { row: 0, rows: m, column: 0, columns: n }, &no_epilogue) };
}

/// Computes a part of C on the calling thread, with memory of its own.
///
/// # Safety
/// Nobody else touches this part of C, and A and B do not overlap it.
unsafe fn multiply<T: Real>(
    scratch: &mut Scratch<T>,
    g: &Product<'_, T>,
    part: Part,
    epilogue: Epilogue<'_, T>,
) {
    let (kernel, memory) = (&scratch.kernel, scratch.panels.data);
    for_panels(&part, g.k, kernel, |panels| {
        // SAFETY: the scratch is ours alone, and `for_panels` keeps to its size.
        unsafe { pack_panels(kernel, g, panels, 0, panels.columns, memory) };
        for row in (0..part.rows).step_by(ROWS) {
            let rows = ROWS.min(part.rows - row);
            let part = Part { row: part.row + row, rows, column: 0, columns: panels.columns };
            // SAFETY: the caller's promise; the panels are packed.
            unsafe { run_part(kernel, g, panels, memory, scratch.left.data, part, epilogue) };
        }
    });
}

/// Some columns of C by reading B as it lies, with few rows of A. Several rows of tiles read a few steps of B while they
/// are in the first cache, and the steps behind them are on the way meanwhile.
///
/// # Safety
/// * nobody else touches these columns of C, or `memory`, which has room for a panel.
unsafe fn stream<T: Real>(kernel: &Kernel<T>, g: &Product<'_, T>, columns: Range<usize>, memory: *mut T) {
    let &Product { m, k, .. } = g;
    let &Kernel { height, width, .. } = kernel;
    if k == 0 && !g.accumulate {
        let c = g.c.block(0, m, columns.start, columns.len());
        // SAFETY: the caller's promise.
        (0..m).for_each(|i| unsafe { c.row_mut(i) }.fill(T::ZERO));
    }
    let source = g.left;
    let (a_row, a_step) = source.strides();
    // Tiles of equal height: a low one takes as long as a high one.
    let rows = m.div_ceil(m.div_ceil(height));
    let tiles = |j: usize, step: usize, depth: usize, b: *const T, b_step: usize, ahead: bool| {
        for i in (0..m).step_by(rows) {
            let tile = Tile {
                depth,
                a: source.at(i, step),
                a_row,
                a_step,
                b,
                b_step,
                ahead: b.wrapping_add(depth * b_step),
                ahead_step: b_step,
                c: g.c.as_ptr().wrapping_add(i * g.c.stride + j),
                c_row: g.c.stride,
                add: g.accumulate || step > 0,
            };
            let (rows, columns) = (rows.min(m - i), width.min(columns.end - j));
            // SAFETY: rows inside A; B is the caller's promise below; C is ours.
            unsafe {
                if ahead && i == 0 {
                    (kernel.stream)(rows, &tile);
                } else {
                    run_tile(kernel, rows, columns, tile);
                }
            }
        }
    };
    // Columns that are read as they lie fill tiles; the others are packed.
    let fit = columns.start..columns.start + columns.len() / width * width;
    let b = &g.right;
    let packed_from = match kernel.across {
        _ if b.lanes_adjacent => {
            let depth = STREAM_STEPS[usize::from(m > height)];
            for step in (0..k).step_by(depth) {
                for j in fit.clone().step_by(width) {
                    tiles(j, step, depth.min(k - step), b.at(j, step), b.stride, true);
                }
            }
            fit.end
        }
        Some((most, across)) if m <= most => {
            for j in fit.clone().step_by(width) {
                let tile = Tile {
                    depth: k,
                    a: source.at(0, 0),
                    a_row,
                    a_step,
                    b: b.at(j, 0),
                    b_step: b.stride,
                    ahead: b.at(j, 0),
                    ahead_step: 0,
                    c: g.c.as_ptr().wrapping_add(j),
                    c_row: g.c.stride,
                    add: g.accumulate,
                };
                // SAFETY: rows inside A, columns inside B and C; C is ours.
                unsafe { across(m, &tile) };
            }
            fit.end
        }
        _ => columns.start,
    };
    for j in (packed_from..columns.end).step_by(width) {
        for step in (0..k).step_by(STREAM_PACKED) {
            let (lanes, depth) = (width.min(columns.end - j), STREAM_PACKED.min(k - step));
            // SAFETY: the lanes and the steps are inside B, and `memory` has room for a panel.
            unsafe { g.pack(kernel, (j, lanes), (step, depth), memory) };
            tiles(j, step, depth, memory, width, false);
        }
    }
}

/// Visits the panels of B that a part of C needs, as many at a time as the scratch holds: all blocks of K for some
/// columns, then the next columns. The blocks are as equal as multiples of 8 can be.
fn for_panels<T>(part: &Part, k: usize, kernel: &Kernel<T>, mut visit: impl FnMut(&Panels)) {
    let most = kernel.deep.unwrap_or(kernel.depth);
    let depth = k.div_ceil(k.div_ceil(most)).next_multiple_of(8);
    let columns = PANEL_ELEMENTS / depth / kernel.width * kernel.width;
    debug_assert!(columns > 0, "no room for a panel of {depth} steps");
    for column in (0..part.columns).step_by(columns) {
        for step in (0..k).step_by(depth) {
            visit(&Panels {
                column: part.column + column,
                columns: columns.min(part.columns - column),
                step,
                depth: depth.min(k - step),
                first: step == 0,
                last: step + depth >= k,
            });
        }
    }
}

/// Rows and columns of a task: of all grids one that should end first, if threads take tasks of equal size in turns,
/// and packing a row of tiles, or a panel, costs as much as some tiles do.
fn grid<T>(m: usize, n: usize, threads: usize, kernel: &Kernel<T>) -> (usize, usize) {
    let (tiles, panels) = (m.div_ceil(kernel.height), n.div_ceil(kernel.width));
    let most = if threads == 1 { 1 } else { 4 * threads };
    let all = (1..=most.min(tiles))
        .flat_map(|rows| (1..=(most / rows).min(panels)).map(move |columns| (rows, columns)));
    let cost = |&(rows, columns): &(usize, usize)| {
        let (high, wide) = (tiles.div_ceil(rows), panels.div_ceil(columns));
        (rows * columns).div_ceil(threads) * (high * wide + PACKING * (high + wide))
    };
    let (rows, columns) = all.min_by_key(cost).unwrap_or((1, 1));
    (tiles.div_ceil(rows) * kernel.height, panels.div_ceil(columns) * kernel.width)
}

/// Packs columns `column .. column + columns` of the panels, from a multiple of the width.
///
/// # Safety
/// `memory` has room for `panels`, and nobody else touches these columns there.
unsafe fn pack_panels<T: Real>(
    kernel: &Kernel<T>,
    g: &Product<'_, T>,
    panels: &Panels,
    column: usize,
    columns: usize,
    memory: *mut T,
) {
    let &Panels { step, depth, .. } = panels;
    let lanes = (panels.column + column, columns);
    // SAFETY: the steps and the columns are inside B; the rest is the caller's promise.
    unsafe { g.pack(kernel, lanes, (step, depth), memory.add(column * depth)) };
}

/// Computes a part of C from packed panels, and runs the epilogue if these are the last.
///
/// # Safety
/// * `memory` holds `panels`, and nobody writes to it; `left` has room for `part.rows` rows of the block;
/// * nobody else touches this part of C, or `left`.
unsafe fn run_part<T: Real>(
    kernel: &Kernel<T>,
    g: &Product<'_, T>,
    panels: &Panels,
    memory: *const T,
    left: *mut T,
    part: Part,
    epilogue: Epilogue<'_, T>,
) {
    let &Panels { step, depth, .. } = panels;
    let &Kernel { height, width, .. } = kernel;
    let source = g.left;
    // Reading A as it lies saves packing it, which pays only if it is read for many columns, or lies badly.
    let packed = part.columns > 256 || (source.lanes_adjacent && part.rows * depth > 16384);
    let (a, (a_row, a_step)) = if packed {
        // SAFETY: the rows and the steps are inside A; the rest is the caller's promise.
        unsafe { pack::pack(&source, kernel.transpose, (part.row, part.rows), (step, depth), height, left) };
        (left.cast_const(), (1, height))
    } else {
        (source.at(part.row, step), source.strides())
    };
    let a_tile = if packed { height * depth } else { height * a_row };
    let end = part.column + part.columns;
    for from in (part.column..end).step_by(EPILOGUE_COLUMNS) {
        let to = end.min(from + EPILOGUE_COLUMNS);
        let run = |i: usize, j: usize| {
            let tile = Tile {
                depth,
                a: a.wrapping_add(i / height * a_tile),
                a_row,
                a_step,
                b: memory.wrapping_add(j * depth),
                b_step: width,
                ahead: memory,
                ahead_step: 0,
                c: g.c.as_ptr().wrapping_add((part.row + i) * g.c.stride + panels.column + j),
                c_row: g.c.stride,
                add: g.accumulate || !panels.first,
            };
            // SAFETY: rows inside A (or packed), a packed panel of B, C is ours.
            unsafe { run_tile(kernel, height.min(part.rows - i), width.min(to - j), tile) };
        };
        let (rows, columns) = ((0..part.rows).step_by(height), (from..to).step_by(width));
        if kernel.deep.is_some() {
            rows.for_each(|i| columns.clone().for_each(|j| run(i, j)));
        } else {
            columns.for_each(|j| rows.clone().for_each(|i| run(i, j)));
        }
        if panels.last {
            let columns = panels.column + from..panels.column + to;
            // SAFETY: the part of C is ours, and done.
            unsafe { finish(&g.c, part.row..part.row + part.rows, columns, epilogue) };
        }
    }
}

/// Runs the kernel; where C has fewer columns than a tile, by way of a tile on the stack.
///
/// # Safety
/// As `Kernel::tile`, but that C has only `columns` columns.
#[inline(always)]
unsafe fn run_tile<T: Real>(kernel: &Kernel<T>, rows: usize, columns: usize, mut tile: Tile<T>) {
    if columns == kernel.width {
        // SAFETY: the caller's promise.
        unsafe { (kernel.tile)(rows, &tile) };
        return;
    }
    let mut whole = MaybeUninit::<[T; MAX_TILE]>::uninit();
    let sums = whole.as_mut_ptr().cast::<T>();
    let (c, c_row) = (tile.c, tile.c_row);
    (tile.c, tile.c_row) = (sums, kernel.width);
    if tile.add {
        for i in 0..rows {
            // SAFETY: the tile on the stack is large enough; for C, the caller's promise.
            unsafe {
                std::slice::from_raw_parts_mut(sums.add(i * kernel.width), kernel.width).fill(T::ZERO);
                std::ptr::copy_nonoverlapping(c.add(i * c_row), sums.add(i * kernel.width), columns);
            }
        }
    }
    // SAFETY: the tile on the stack is large enough, and initialised if it is read.
    unsafe { (kernel.tile)(rows, &tile) };
    for i in 0..rows {
        // SAFETY: the kernel has written `rows` rows of `width`; for C, the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(sums.add(i * kernel.width), c.add(i * c_row), columns) };
    }
}

/// Calls the epilogue on a part of C.
///
/// # Safety
/// Nobody else touches that part.
unsafe fn finish<T>(c: &MatMut<'_, T>, rows: Range<usize>, columns: Range<usize>, epilogue: Epilogue<'_, T>) {
    let part = c.block(rows.start, rows.len(), columns.start, columns.len());
    for i in 0..part.rows {
        // SAFETY: the caller's promise.
        epilogue(rows.start + i, columns.start, unsafe { part.row_mut(i) });
    }
}

#[cfg(test)]
mod tests;
