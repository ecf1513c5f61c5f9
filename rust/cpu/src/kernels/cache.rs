//! Decoding: writing keys and values into the cache, and attention over it.

use pyrformer_graph::AttentionSpec;

use crate::error::{Error, Result};
use crate::gemm::{Gemm, PackBuffers, gemm_serial};
use crate::kernels::rows::check;
use crate::memory::PerWorker;
use crate::real::Real;
use crate::simd::{max, reduce};
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

/// Puts `new [B·T, C]` into the cache `[R·S, C]`, whose rows are given by `row [B]`.
pub(crate) fn cache_write<T: Real>(
    new: Mat<'_, T>,
    row: &[i32],
    places: Places<'_>,
    (cache_rows, slots): (usize, usize),
    cache: MatMut<'_, T>,
) -> Result<()> {
    let tokens = new.rows / row.len().max(1);
    check("cache_write", row, cache_rows)?;
    places.check("cache_write", tokens, slots)?;
    for (b, &r) in row.iter().enumerate() {
        for i in 0..places.count[b] as usize {
            let to = r as usize * slots + places.start[b] as usize + i;
            // SAFETY: no task runs, and the indices were checked.
            unsafe { cache.row_mut(to) }.copy_from_slice(new.row(b * tokens + i));
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
/// `[R·S, K·D]` itself where they are in one row, otherwise copied together.
fn block<'a, T: Real>(
    cache: &Mat<'a, T>,
    rows: &[i32],
    (from, slots): (usize, usize),
    (col, d): (usize, usize),
    gathered: &'a mut [T],
) -> Mat<'a, T> {
    let at = |i: usize| rows[i] as usize * slots + from + i;
    if rows.iter().all(|&row| row == rows[0]) {
        return cache.block(at(0), rows.len(), col, d);
    }
    for (i, to) in gathered.chunks_exact_mut(d).take(rows.len()).enumerate() {
        to.copy_from_slice(cache.block(at(i), 1, col, d).row(0));
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
    [k, v]: [Mat<'_, T>; 2],
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
            *s = (*s - largest).exp();
        }
        let factor = T::ONE / reduce(row, T::ZERO, |x| x, |a, b| a + b);
        for s in row.iter_mut() {
            *s *= factor;
        }
    }
}
