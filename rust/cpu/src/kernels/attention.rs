//! Attention forward and backward, in blocks: scores exist for one block of queries against one block of keys at a time.
//!
//! Source: Dao et al. 2022, "FlashAttention", algorithms 1 (forward, online softmax) and 4 (backward, probabilities
//! recomputed from lse). Blocks that the mask hides whole are skipped. A task owns one (sequence, head, query block) of
//! the forward pass and one (sequence, key-value head) of the backward pass, so no sum crosses tasks.

use std::ops::Range;

use pyrformer_graph::AttentionSpec;

use crate::gemm::{Gemm, PackBuffers, Scratch, gemm_serial};
use crate::kernels::dropout::Keep;
use crate::kernels::elementwise::add_row;
use crate::memory::PerWorker;
use crate::real::Real;
use crate::simd::{dot, max, reduce};
use crate::simd_fn;
use crate::threads::Pool;
use crate::view::{Mat, MatMut};

/// Queries in a block.
const BQ: usize = 64;
/// Keys in a block.
const BK: usize = 128;

/// Bytes of work memory a worker needs for heads of width `d`.
pub(crate) fn worker_bytes<T>(d: usize) -> usize {
    (2 * BQ * BK + BQ * d + 2 * BQ) * size_of::<T>()
}

/// Which keys each query sees, beyond the shapes.
#[derive(Clone, Copy)]
pub(crate) struct Mask<'a, T> {
    pub(crate) spec: AttentionSpec,
    /// [B·T].
    pub(crate) segments: Option<&'a [i32]>,
    /// [B·H, T].
    pub(crate) key_bias: Option<Mat<'a, T>>,
    /// [B].
    pub(crate) prefix: Option<&'a [i32]>,
    pub(crate) keep: Option<Keep>,
}

impl<T: Real> Mask<'_, T> {
    /// Keys that query `i` of `t` in sequence `b` may see by position.
    fn seen(&self, b: usize, i: usize, t: usize) -> Range<usize> {
        let open = self.prefix.map_or(0, |p| (p[b].max(0) as usize).min(t));
        let end = if self.spec.causal { (i + 1).max(open) } else { t };
        match self.spec.window {
            None => 0..end,
            Some(w) => (i + 1).saturating_sub(w)..end.min(i + w),
        }
    }

    /// Keys that some query of `from .. to` may see by position.
    fn seen_by_block(&self, b: usize, queries: &Range<usize>, t: usize) -> Range<usize> {
        self.seen(b, queries.start, t).start..self.seen(b, queries.end - 1, t).end
    }

    /// The weight of key `j` for a query that sees nothing: the same for all, but for dropout.
    fn blind(&self, b: usize, head: usize, i: usize, j: usize, t: usize) -> T {
        let index = ((b * self.spec.heads + head) * t + i) * t + j;
        let keep = self.keep.as_ref().map_or(1.0, |k| k.factor(index as u64));
        T::from_f64(keep / t as f64)
    }

    /// Scales the scores of query `i` against keys `from ..` and gives the columns that it sees by position; the others
    /// become 0, those that segments hide among the seen become −∞.
    fn apply(
        &self,
        scores: &mut [T],
        (b, head, i): (usize, usize, usize),
        from: usize,
        t: usize,
    ) -> Range<usize> {
        let seen = self.seen(b, i, t);
        let lo = seen.start.clamp(from, from + scores.len()) - from;
        let hi = seen.end.clamp(from, from + scores.len()) - from;
        scores[..lo].fill(T::ZERO);
        scores[hi..].fill(T::ZERO);
        scale_row(&mut scores[lo..hi], T::from_f64(self.spec.scale));
        if let Some(bias) = &self.key_bias {
            add_row(&bias.row(b * self.spec.heads + head)[from + lo..from + hi], &mut scores[lo..hi]);
        }
        if let Some(segments) = self.segments {
            let own = segments[b * t + i];
            for (s, &segment) in scores[lo..hi].iter_mut().zip(&segments[b * t + from + lo..]) {
                if segment == 0 || (segment != own && own != 0) {
                    *s = T::NEG_INFINITY;
                }
            }
        }
        lo..hi
    }
}

simd_fn! {
    /// `row = exp(row − shift)`; gives the sum.
    fn exp_row<T: Real>(row: &mut [T], shift: T) -> T {
        for x in row.iter_mut() {
            *x = (*x - shift).exp();
        }
        reduce(row, T::ZERO, |x| x, |a, b| a + b)
    }
}

simd_fn! {
    fn scale_row<T: Real>(row: &mut [T], by: T) {
        for x in row.iter_mut() {
            *x *= by;
        }
    }
}

simd_fn! {
    /// `dp = p · (dp − delta) · scale`, the gradient of the scores.
    fn softmax_grad_row<T: Real>(p: &[T], dp: &mut [T], delta: T, scale: T) {
        for (dp, &p) in dp.iter_mut().zip(p) {
            *dp = p * (*dp - delta) * scale;
        }
    }
}

/// Sizes of one attention.
#[derive(Clone, Copy)]
struct Dims {
    b: usize,
    t: usize,
    /// Head width.
    d: usize,
    /// Query heads a key-value head serves.
    group: usize,
}

impl Dims {
    fn of<T>(spec: &AttentionSpec, q: &Mat<'_, T>, b: usize) -> Self {
        Self { b, t: q.rows / b.max(1), d: q.cols / spec.heads, group: spec.heads / spec.kv_heads }
    }
}

/// The work memory of one task, cut into its parts.
struct Work<'a, T> {
    scores: &'a mut [T],
    other: &'a mut [T],
    sum: &'a mut [T],
    rows: &'a mut [T],
}

impl<'a, T: Real> Work<'a, T> {
    /// # Safety
    /// As [`PerWorker::get`].
    unsafe fn of(memory: &'a PerWorker, worker: usize, d: usize) -> Self {
        let elements = worker_bytes::<T>(d) / size_of::<T>();
        // SAFETY: the caller's promise; floats take any bits.
        let all = unsafe { memory.get::<T>(worker, elements) };
        let (scores, all) = all.split_at_mut(BQ * BK);
        let (other, all) = all.split_at_mut(BQ * BK);
        let (sum, rows) = all.split_at_mut(BQ * d);
        Self { scores, other, sum, rows }
    }
}

/// Shapes: q, out [B·T, H·D], k, v [B·T, K·D], lse [B·H, T].
pub(crate) fn attention<T: Real>(
    pool: &Pool,
    memory: &PerWorker,
    packs: &PackBuffers<T>,
    mask: &Mask<'_, T>,
    batch: usize,
    [q, k, v]: [Mat<'_, T>; 3],
    out: MatMut<'_, T>,
    lse: MatMut<'_, T>,
) {
    let dims = Dims::of(&mask.spec, &q, batch);
    let Dims { t, d, .. } = dims;
    let blocks = t.div_ceil(BQ);
    let heads = mask.spec.heads;
    pool.run(dims.b * heads * blocks, &|task, worker| {
        // The last query blocks see the most keys: begin with them.
        let (block, head, b) = (blocks - 1 - task % blocks, task / blocks % heads, task / blocks / heads);
        // SAFETY: this task alone runs as `worker`.
        let work = unsafe { Work::<T>::of(memory, worker, d) };
        let pack = &mut *packs.worker(worker);
        let queries = block * BQ..((block + 1) * BQ).min(t);
        let n = queries.len();
        let qs = q.block(b * t + queries.start, n, head * d, d);
        let kv = head / dims.group * d;
        let (largest, rest) = work.rows.split_at_mut(BQ);
        let denominators = &mut *rest;
        largest.fill(T::NEG_INFINITY);
        denominators.fill(T::ZERO);
        work.sum[..n * d].fill(T::ZERO);
        let seen = mask.seen_by_block(b, &queries, t);
        for from in (seen.start / BK * BK..seen.end).step_by(BK) {
            let m = BK.min(seen.end - from);
            let (ks, vs) = (k.block(b * t + from, m, kv, d), v.block(b * t + from, m, kv, d));
            let scores = MatMut::new(work.scores, n, m);
            // SAFETY: the result is this task's own and no operand overlaps it.
            unsafe {
                gemm_serial(pack, &Gemm { a: qs, ta: false, b: ks, tb: true, c: scores, accumulate: false })
            };
            for r in 0..n {
                // SAFETY: the scores are this task's own.
                let row = unsafe { scores.row_mut(r) };
                let i = queries.start + r;
                let seen = mask.apply(row, (b, head, i), from, t);
                let before = largest[r];
                let now = before.max(max(&row[seen.clone()]));
                if now == T::NEG_INFINITY {
                    row.fill(T::ZERO);
                    continue;
                }
                let correction = (before - now).exp();
                let sum = exp_row(&mut row[seen], now);
                denominators[r] = denominators[r] * correction + sum;
                largest[r] = now;
                if correction != T::ONE {
                    scale_row(&mut work.sum[r * d..(r + 1) * d], correction);
                }
                if let Some(keep) = &mask.keep {
                    keep.apply(row, (((b * heads + head) * t + i) * t + from) as u64);
                }
            }
            // SAFETY: the scores are finished and only read here.
            let p = unsafe { scores.as_mat() };
            let sum = MatMut::new(work.sum, n, d);
            // SAFETY: the result is this task's own and no operand overlaps it.
            unsafe {
                gemm_serial(pack, &Gemm { a: p, ta: false, b: vs, tb: false, c: sum, accumulate: true })
            };
        }
        for r in 0..n {
            let i = queries.start + r;
            let empty = largest[r] == T::NEG_INFINITY;
            if empty {
                let sum = &mut work.sum[r * d..(r + 1) * d];
                for j in 0..t {
                    let p: T = mask.blind(b, head, i, j, t);
                    sum.iter_mut().zip(v.block(b * t + j, 1, kv, d).row(0)).for_each(|(s, &v)| *s += p * v);
                }
            }
            let factor = if empty { T::ONE } else { T::ONE / denominators[r] };
            // SAFETY: rows and columns of this query block and head belong to this task.
            unsafe {
                let row = out.block(b * t + i, 1, head * d, d).row_mut(0);
                row.copy_from_slice(&work.sum[r * d..(r + 1) * d]);
                scale_row(row, factor);
                let value = if empty { T::NEG_INFINITY } else { largest[r] + denominators[r].ln() };
                lse.set(b * heads + head, i, value);
            }
        }
    });
}

/// What the backward pass reads. Shapes: dout, q, out [B·T, H·D], k, v [B·T, K·D], lse [B·H, T].
#[derive(Clone, Copy)]
pub(crate) struct Saved<'a, T> {
    pub(crate) dout: Mat<'a, T>,
    pub(crate) q: Mat<'a, T>,
    pub(crate) k: Mat<'a, T>,
    pub(crate) v: Mat<'a, T>,
    pub(crate) out: Mat<'a, T>,
    pub(crate) lse: Mat<'a, T>,
}

/// Shapes: dq [B·T, H·D], dk, dv [B·T, K·D].
pub(crate) fn attention_grad<T: Real>(
    pool: &Pool,
    memory: &PerWorker,
    packs: &PackBuffers<T>,
    mask: &Mask<'_, T>,
    batch: usize,
    saved: Saved<'_, T>,
    [dq, dk, dv]: [MatMut<'_, T>; 3],
) {
    let dims = Dims::of(&mask.spec, &saved.q, batch);
    pool.run(dims.b * mask.spec.kv_heads, &|task, worker| {
        let (kv, b) = (task % mask.spec.kv_heads, task / mask.spec.kv_heads);
        // SAFETY: this task alone runs as `worker`.
        let mut work = unsafe { Work::<T>::of(memory, worker, dims.d) };
        let pack = &mut *packs.worker(worker);
        let own = |x: &MatMut<'_, T>| {
            for r in b * dims.t..(b + 1) * dims.t {
                // SAFETY: the columns of this key-value head belong to this task.
                unsafe { x.block(r, 1, kv * dims.d, dims.d).row_mut(0) }.fill(T::ZERO);
            }
        };
        own(&dk);
        own(&dv);
        for head in kv * dims.group..(kv + 1) * dims.group {
            for start in (0..dims.t).step_by(BQ) {
                let queries = start..(start + BQ).min(dims.t);
                query_block(&mut work, pack, mask, dims, &saved, (b, head, kv), queries, [&dq, &dk, &dv]);
            }
        }
    });
}

/// What one block of queries of one head adds to dk and dv, and its dq.
fn query_block<T: Real>(
    work: &mut Work<'_, T>,
    pack: &mut Scratch<T>,
    mask: &Mask<'_, T>,
    Dims { t, d, .. }: Dims,
    s: &Saved<'_, T>,
    (b, head, kv): (usize, usize, usize),
    queries: Range<usize>,
    [dq, dk, dv]: [&MatMut<'_, T>; 3],
) {
    let n = queries.len();
    let heads = mask.spec.heads;
    let [qs, douts, outs] = [s.q, s.dout, s.out].map(|x| x.block(b * t + queries.start, n, head * d, d));
    let dqs = dq.block(b * t + queries.start, n, head * d, d);
    for r in 0..n {
        // Σⱼ pᵢⱼ·dpᵢⱼ = doutᵢ·outᵢ (Dao et al. 2022, appendix B.2).
        work.rows[r] = dot(douts.row(r), outs.row(r));
        // SAFETY: this head's columns belong to this task.
        unsafe { dqs.row_mut(r) }.fill(T::ZERO);
        let i = queries.start + r;
        if s.lse.row(b * heads + head)[i] == T::NEG_INFINITY {
            for j in 0..t {
                let p: T = mask.blind(b, head, i, j, t);
                // SAFETY: the columns of this key-value head belong to this task.
                let dv = unsafe { dv.block(b * t + j, 1, kv * d, d).row_mut(0) };
                dv.iter_mut().zip(douts.row(r)).for_each(|(dv, &dout)| *dv += p * dout);
            }
        }
    }
    let seen = mask.seen_by_block(b, &queries, t);
    for from in (seen.start / BK * BK..seen.end).step_by(BK) {
        let m = BK.min(seen.end - from);
        let [ks, vs] = [s.k, s.v].map(|x| x.block(b * t + from, m, kv * d, d));
        let (dks, dvs) = (dk.block(b * t + from, m, kv * d, d), dv.block(b * t + from, m, kv * d, d));
        let p = MatMut::new(work.scores, n, m);
        let dp = MatMut::new(work.other, n, m);
        // SAFETY: the result is this task's own and no operand overlaps it.
        unsafe { gemm_serial(pack, &Gemm { a: qs, ta: false, b: ks, tb: true, c: p, accumulate: false }) };
        // SAFETY: the result is this task's own and no operand overlaps it.
        unsafe {
            gemm_serial(pack, &Gemm { a: douts, ta: false, b: vs, tb: true, c: dp, accumulate: false })
        };
        for r in 0..n {
            let i = queries.start + r;
            let lse = s.lse.row(b * heads + head)[i];
            // SAFETY: p and dp are this task's own.
            let (row, drow) = unsafe { (p.row_mut(r), dp.row_mut(r)) };
            if lse == T::NEG_INFINITY {
                row.fill(T::ZERO);
                drow.fill(T::ZERO);
                continue;
            }
            let seen = mask.apply(row, (b, head, i), from, t);
            exp_row(&mut row[seen.clone()], lse);
            drow[..seen.start].fill(T::ZERO);
            drow[seen.end..].fill(T::ZERO);
            if let Some(keep) = &mask.keep {
                keep.apply(drow, (((b * heads + head) * t + i) * t + from) as u64);
            }
            let scale = T::from_f64(mask.spec.scale);
            softmax_grad_row(&row[seen.clone()], &mut drow[seen], work.rows[r], scale);
            if let Some(keep) = &mask.keep {
                keep.apply(row, (((b * heads + head) * t + i) * t + from) as u64);
            }
        }
        // SAFETY: both are finished and only read from here on.
        let (p, ds) = unsafe { (p.as_mat(), dp.as_mat()) };
        // SAFETY: the result is this task's own and no operand overlaps it.
        unsafe { gemm_serial(pack, &Gemm { a: p, ta: true, b: douts, tb: false, c: dvs, accumulate: true }) };
        // SAFETY: the result is this task's own and no operand overlaps it.
        unsafe { gemm_serial(pack, &Gemm { a: ds, ta: true, b: qs, tb: false, c: dks, accumulate: true }) };
        // SAFETY: the result is this task's own and no operand overlaps it.
        unsafe { gemm_serial(pack, &Gemm { a: ds, ta: false, b: ks, tb: false, c: dqs, accumulate: true }) };
    }
}
