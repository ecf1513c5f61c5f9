//! Decoding: writing keys and values into the cache, of floats or of 8 bits, and attention over it.

use pyrformer_graph::AttentionSpec;

use crate::error::{Error, Result};
use crate::gemm::{Gemm, PackBuffers, gemm_serial};
use crate::kernels::rows::check;
use crate::memory::{Block, PerWorker};
use crate::real::Real;
use crate::simd::{largest_abs, max, reduce};
use crate::simd_fn;
use crate::threads::Pool;
use crate::view::{Mat, MatMut};

/// Where the tokens of each sequence stand. Shapes: all [B].
#[derive(Clone, Copy)]
pub(crate) struct Places<'a> {
    /// Position of the first token.
    pub(crate) start: &'a [i32],
    /// How many of the T tokens count.
    pub(crate) count: &'a [i32],
}

impl Places<'_> {
    fn check(&self, op: &'static str, tokens: usize, slots: usize) -> Result<()> {
        let bad =
            self.start.iter().zip(self.count).position(|(&s, &c)| {
                s < 0 || c < 0 || c as usize > tokens || s as usize + c as usize > slots
            });
        match bad {
            None => Ok(()),
            Some(b) => {
                let (s, c) = (self.start[b], self.count[b]);
                let message =
                    format!("sequence {b}: {c} tokens from position {s} do not fit into {slots} slots");
                Err(Error::Index { op, message })
            }
        }
    }
}

/// Keys or values in 8 bits: of each token and head a scale, `max |x| / 127`, and the integers `round(x / scale)`. So
/// what is kept of a token depends on that token alone.
#[derive(Debug)]
pub(crate) struct Cache8 {
    heads: usize,
    head: usize,
    integers: Block,
    scales: Block,
}

impl Cache8 {
    /// Zeros of `rows` tokens, each of `heads` heads of width `head`.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub(crate) fn new(rows: usize, heads: usize, head: usize) -> Result<Self> {
        let (integers, scales) =
            (Block::new(rows * heads * head)?, Block::new(rows * heads * size_of::<f32>())?);
        Ok(Self { heads, head, integers, scales })
    }

    pub(crate) fn heads(&self) -> usize {
        self.heads
    }

    /// The integers of token `row` from `col` on, and the scale of its head.
    fn at(&self, row: usize, col: usize) -> (*mut i8, *mut f32) {
        let (integers, scales) = (self.integers.as_ptr().cast::<i8>(), self.scales.as_ptr().cast::<f32>());
        let head = col / self.head;
        (
            integers.wrapping_add(row * self.heads * self.head + col),
            scales.wrapping_add(row * self.heads + head),
        )
    }

    /// Rounds a token's values [K·D]. What is not finite makes its head NaN.
    ///
    /// # Safety
    /// The row exists, and nobody else touches it.
    pub(crate) unsafe fn write<T: Real>(&self, row: usize, values: &[T]) {
        for (number, values) in values.chunks_exact(self.head).enumerate() {
            let scale = largest_abs(values).to_f64() as f32 / 127.0;
            let factor = T::from_f64(if scale > 0.0 { 1.0 / f64::from(scale) } else { 0.0 });
            let (integers, place) = self.at(row, number * self.head);
            // SAFETY: the caller's promise; a head has as many integers.
            unsafe {
                *place = scale;
                round(values, factor, std::slice::from_raw_parts_mut(integers, self.head));
            }
        }
    }

    /// A token's values of the head at `col`.
    ///
    /// # Safety
    /// The row exists, and nobody writes to it.
    unsafe fn read<T: Real>(&self, row: usize, col: usize, to: &mut [T]) {
        let (integers, scale) = self.at(row, col);
        // SAFETY: the caller's promise; a head has as many integers.
        unsafe { widen(std::slice::from_raw_parts(integers, to.len()), T::from_f64(f64::from(*scale)), to) };
    }
}

simd_fn! {
    fn round<T: Real>(from: &[T], factor: T, to: &mut [i8]) {
        for (to, &x) in to.iter_mut().zip(from) {
            *to = (x * factor).rounded() as i8;
        }
    }
}

simd_fn! {
    fn widen<T: Real>(from: &[i8], scale: T, to: &mut [T]) {
        for (to, &x) in to.iter_mut().zip(from) {
            *to = T::from_i8(x) * scale;
        }
    }
}

/// A cache `[R·S, K·D]` as attention reads it.
#[derive(Clone, Copy)]
pub(crate) enum Kept<'a, T> {
    Floats(Mat<'a, T>),
    Int8(&'a Cache8),
}

/// A cache `[R·S, K·D]` as it is written to.
#[derive(Clone, Copy)]
pub(crate) enum KeptMut<'a, T> {
    Floats(MatMut<'a, T>),
    Int8(&'a Cache8),
}

/// Puts `new [B·T, C]` into the cache `[R·S, C]`, whose rows are given by `row [B]`.
pub(crate) fn cache_write<T: Real>(
    new: Mat<'_, T>,
    row: &[i32],
    places: Places<'_>,
    (cache_rows, slots): (usize, usize),
    cache: KeptMut<'_, T>,
) -> Result<()> {
    let tokens = new.rows / row.len().max(1);
    check("cache_write", row, cache_rows)?;
    places.check("cache_write", tokens, slots)?;
    for (b, &r) in row.iter().enumerate() {
        for i in 0..places.count[b] as usize {
            let to = r as usize * slots + places.start[b] as usize + i;
            let values = new.row(b * tokens + i);
            // SAFETY: no task runs, and the indices were checked.
            unsafe {
                match &cache {
                    KeptMut::Floats(cache) => cache.row_mut(to).copy_from_slice(values),
                    KeptMut::Int8(cache) => cache.write(to, values),
                }
            }
        }
    }
    Ok(())
}

/// Queries of a task.
const BQ: usize = 64;
/// Keys in a block.
const BK: usize = 128;

/// How a task gets its part of the work memory: scores `[queries, S]`, and a block of keys or values `[BK, D/H]`.
#[derive(Clone, Copy)]
struct Parts {
    scores: usize,
    gathered: usize,
}

impl Parts {
    fn of(spec: &AttentionSpec, slots: usize, d: usize) -> Self {
        Self { scores: BQ.max(spec.heads / spec.kv_heads) * slots, gathered: BK * d }
    }
}

/// Bytes of work memory a worker needs for a cache of `slots` positions and heads of width `d`.
pub(crate) fn worker_bytes<T>(spec: &AttentionSpec, slots: usize, d: usize) -> usize {
    let Parts { scores, gathered } = Parts::of(spec, slots, d);
    (scores + gathered) * size_of::<T>()
}

/// The keys or values of one head at positions `from .. from + rows.len()`, which lie in cache rows `rows`: `cache`
/// `[R·S, K·D]` itself where they are floats in one row, otherwise copied together.
fn block<'a, T: Real>(
    cache: &Kept<'a, T>,
    rows: &[i32],
    (from, slots): (usize, usize),
    (col, d): (usize, usize),
    gathered: &'a mut [T],
) -> Mat<'a, T> {
    let at = |i: usize| rows[i] as usize * slots + from + i;
    if let Kept::Floats(cache) = cache
        && rows.iter().all(|&row| row == rows[0])
    {
        return cache.block(at(0), rows.len(), col, d);
    }
    for (i, to) in gathered.chunks_exact_mut(d).take(rows.len()).enumerate() {
        match cache {
            Kept::Floats(cache) => to.copy_from_slice(cache.block(at(i), 1, col, d).row(0)),
            // SAFETY: the caller checked the rows, and nobody writes while attention reads.
            Kept::Int8(cache) => unsafe { cache.read(at(i), col, to) },
        }
    }
    Mat::new(gathered, rows.len(), d)
}

/// Shapes: q, out [B·T, H·D], caches [R·S, K·D], rows [B, S], key_bias [H, S].
///
/// A task has one block of queries of one head or, where each sequence has one token, the heads that share a key-value
/// head. Sums run over positions from the first on whatever the other queries see, so a token gets the same bits alone
/// as among others.
pub(crate) fn cached_attention<T: Real>(
    pool: &Pool,
    memory: &PerWorker,
    packs: &PackBuffers<T>,
    spec: &AttentionSpec,
    q: Mat<'_, T>,
    [k, v]: [Kept<'_, T>; 2],
    (cache_rows, slots): (usize, usize),
    rows: &[i32],
    places: Places<'_>,
    key_bias: Option<Mat<'_, T>>,
    out: MatMut<'_, T>,
) -> Result<()> {
    let batch = places.start.len();
    let tokens = q.rows / batch.max(1);
    places.check("cached_attention", tokens, slots)?;
    for b in 0..batch {
        let end = (places.start[b] + places.count[b]) as usize;
        check("cached_attention", &rows[b * slots..b * slots + end], cache_rows)?;
    }
    let d = q.cols / spec.heads;
    let group = spec.heads / spec.kv_heads;
    let parts = Parts::of(spec, slots, d);
    let (units, blocks) = if tokens == 1 { (spec.kv_heads, 1) } else { (spec.heads, tokens.div_ceil(BQ)) };
    pool.run(batch * units * blocks, &|task, worker| {
        // The last queries see the most keys: begin with them.
        let (number, unit, b) = (blocks - 1 - task % blocks, task / blocks % units, task / blocks / units);
        let (start, count) = (places.start[b] as usize, places.count[b] as usize);
        let from = number * BQ;
        let asked = BQ.min(tokens - from);
        // Heads of this task, and its queries that count.
        let (head, heads) = if tokens == 1 { (unit * group, group) } else { (unit, 1) };
        let n = asked.min(count.saturating_sub(from));
        let col = head / group * d;
        let places = out.block(b * tokens + from, asked, head * d, heads * d);
        for i in n..asked {
            // SAFETY: these columns of this block belong to this task.
            unsafe { places.row_mut(i) }.fill(T::ZERO);
        }
        if n == 0 {
            return;
        }
        let queries = q.block(b * tokens + from, n, head * d, heads * d);
        // One token's heads lie behind each other, as rows.
        let (m, queries, to) = if tokens == 1 {
            // SAFETY: a row of `heads · d` elements, which belongs to this task.
            let to = unsafe { places.row_mut(0) };
            (heads, Mat::new(queries.row(0), heads, d), MatMut::new(to, heads, d))
        } else {
            (n, queries, places.block(0, n, 0, d))
        };
        let end = |i: usize| start + from + if tokens == 1 { 0 } else { i } + 1;
        let first = |i: usize| spec.window.map_or(0, |w| end(i).saturating_sub(w));
        let (low, high) = (first(0) / BK * BK, end(m - 1));
        // SAFETY: this task alone runs as `worker`.
        let work = unsafe { memory.get::<T>(worker, parts.scores + parts.gathered) };
        let (scores, gathered) = work.split_at_mut(parts.scores);
        let scores = MatMut::new(&mut scores[..m * (high - low)], m, high - low);
        let pack = &mut *packs.worker(worker);
        let lies = |j: usize| &rows[b * slots + j..b * slots + high.min(j + BK)];
        for j in (low..high).step_by(BK) {
            let keys = block(&k, lies(j), (j, slots), (col, d), gathered);
            let c = scores.block(0, m, j - low, keys.rows);
            // SAFETY: the scores are this task's own, and no operand overlaps them.
            unsafe {
                gemm_serial(pack, &Gemm { a: queries, ta: false, b: keys, tb: true, c, accumulate: false })
            };
        }
        for i in 0..m {
            // SAFETY: the scores are this task's own.
            let row = unsafe { scores.row_mut(i) };
            let seen = first(i) - low..end(i) - low;
            row[..seen.start].fill(T::ZERO);
            row[seen.end..].fill(T::ZERO);
            let bias =
                key_bias.as_ref().map_or(&[][..], |bias| &bias.row(head + i % heads)[first(i)..end(i)]);
            softmax(&mut row[seen], T::from_f64(spec.scale), bias);
        }
        // SAFETY: the scores are finished and only read from here on.
        let p = unsafe { scores.as_mat() };
        for j in (low..high).step_by(BK) {
            let values = block(&v, lies(j), (j, slots), (col, d), gathered);
            let a = p.block(0, m, j - low, values.rows);
            // SAFETY: the result is this task's own, and no operand overlaps it.
            unsafe {
                gemm_serial(pack, &Gemm { a, ta: false, b: values, tb: false, c: to, accumulate: j > low })
            };
        }
    });
    Ok(())
}

simd_fn! {
    /// `row = softmax(scale · row + bias)`; an empty bias is none.
    fn softmax<T: Real>(row: &mut [T], scale: T, bias: &[T]) {
        for s in row.iter_mut() {
            *s *= scale;
        }
        for (s, &b) in row.iter_mut().zip(bias) {
            *s += b;
        }
        let largest = max(row);
        for s in row.iter_mut() {
            *s = (*s - largest).exp_normal::<FUSED>();
        }
        let factor = T::ONE / reduce(row, T::ZERO, |x| x, |a, b| a + b);
        for s in row.iter_mut() {
            *s *= factor;
        }
    }
}
