//! Attention forward and backward, in blocks: scores exist for one block of queries against one block of keys at a time.
//!
//! Source: Dao et al. 2022, "FlashAttention", algorithms 1 (forward, online softmax) and 4 (backward, probabilities
//! recomputed from lse). What the mask hides by position is left out, by blocks and by tiles of a product; rows of scores
//! are worked on in whole vectors, with −∞ or zeros where a query does not see. A task owns the queries of some blocks of
//! one head of the forward pass, and one (sequence, key-value head) of the backward pass, so no sum crosses tasks.

use std::ops::Range;

use pyrformer_graph::AttentionSpec;

use crate::gemm::{Blocks, PackBuffers, Reach, WIDEST};
use crate::kernels::dropout::Keep;
use crate::kernels::elementwise::add_row;
use crate::memory::PerWorker;
use crate::real::Real;
use crate::simd::{dot, fold_lanes};
use crate::simd_fn;
use crate::threads::Pool;
use crate::view::{Mat, MatMut};

/// Queries in a block.
const BQ: usize = 64;
/// Keys in a block.
const BK: usize = 128;
/// Elements that rows of scores are worked on at a time; divides [`BK`].
const CHUNK: usize = 16;

/// Bytes of work memory a worker needs for `t` keys and heads of width `d`.
pub(crate) fn worker_bytes<T>(t: usize, d: usize) -> usize {
    let sizes = Sizes::of(t, d);
    sizes.forward().iter().sum::<usize>().max(sizes.backward().iter().sum()) * size_of::<T>()
}

/// What the work memory of a task is cut from, in elements.
struct Sizes {
    /// Keys, to whole blocks.
    t: usize,
    /// Width of a head, and the same to whole tiles.
    d: usize,
    wide: usize,
}

impl Sizes {
    fn of(t: usize, d: usize) -> Self {
        Self { t: t.next_multiple_of(BK), d, wide: d.next_multiple_of(WIDEST) }
    }

    /// Scores, sums of values, largest scores, denominators, packed Kᵀ, packed V.
    fn forward(&self) -> [usize; 6] {
        [BQ * BK, BQ * self.wide, BQ, BQ, self.t * self.d, self.t * self.wide]
    }

    /// Scores, their gradients, doutᵢ·outᵢ, packed Kᵀ, Vᵀ, K of a block of keys, packed dout and Q of a block of queries.
    fn backward(&self) -> [usize; 8] {
        let (keys, wide) = (BK * self.d, self.wide);
        [BQ * BK, BQ * BK, self.t, keys, keys, BK * wide, BQ * wide, BQ * wide]
    }
}

/// The work memory of a worker in parts of these sizes.
///
/// # Safety
/// As [`PerWorker::get`].
#[expect(clippy::mut_from_ref, reason = "as there")]
unsafe fn parts<T: Real, const N: usize>(
    memory: &PerWorker,
    worker: usize,
    sizes: [usize; N],
) -> [&mut [T]; N] {
    // SAFETY: the caller's promise; floats take any bits.
    let mut all = unsafe { memory.get::<T>(worker, sizes.iter().sum()) };
    sizes.map(|size| all.split_off_mut(..size).expect("all is as long as the sizes together"))
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

    /// Whether scores are products times the scale, whatever the keys.
    fn is_plain(&self) -> bool {
        self.key_bias.is_none() && self.segments.is_none()
    }

    /// Makes scores of query `i` against keys `from ..`, which it sees by position, of products: scaled, with the bias of
    /// keys, −∞ where segments hide.
    fn apply(&self, scores: &mut [T], (b, head, i): (usize, usize, usize), from: usize, t: usize) {
        scale_row(scores, T::from_f64(self.spec.scale));
        if let Some(bias) = &self.key_bias {
            add_row(&bias.row(b * self.spec.heads + head)[from..from + scores.len()], scores);
        }
        if let Some(segments) = self.segments {
            let own = segments[b * t + i];
            for (s, &segment) in scores.iter_mut().zip(&segments[b * t + from..]) {
                if segment == 0 || (segment != own && own != 0) {
                    *s = T::NEG_INFINITY;
                }
            }
        }
    }

    /// The number of the pair (query `i`, key `j`), by which dropout decides.
    fn pair(&self, (b, head, i): (usize, usize, usize), j: usize, t: usize) -> u64 {
        (((b * self.spec.heads + head) * t + i) * t + j) as u64
    }
}

/// The columns of a block of scores that each of its queries sees by position. Both ends rise with the query.
struct Seen {
    start: [usize; BQ],
    end: [usize; BQ],
    queries: usize,
}

impl Seen {
    /// Queries against the `keys` keys from `from` on.
    fn of<T: Real>(
        mask: &Mask<'_, T>,
        b: usize,
        queries: &Range<usize>,
        from: usize,
        keys: usize,
        t: usize,
    ) -> Self {
        let mut seen = Self { start: [0; BQ], end: [0; BQ], queries: queries.len() };
        for (r, i) in queries.clone().enumerate() {
            let all = mask.seen(b, i, t);
            seen.start[r] = all.start.clamp(from, from + keys) - from;
            seen.end[r] = all.end.clamp(from, from + keys) - from;
        }
        seen
    }

    fn row(&self, r: usize) -> Range<usize> {
        self.start[r]..self.end[r]
    }

    /// Keys that some of these queries see.
    fn keys(&self, queries: &Range<usize>) -> Range<usize> {
        self.start[queries.start]..self.end[queries.end - 1]
    }

    /// Queries between the first and the last that see some of these keys.
    fn queries(&self, keys: &Range<usize>) -> Range<usize> {
        let from = self.end[..self.queries].partition_point(|&end| end <= keys.start);
        let to = self.start[..self.queries].partition_point(|&start| start < keys.end);
        from..to.max(from)
    }
}

simd_fn! {
    /// Scores of products: scales `row`, puts −∞ where it is not seen in the first and the last chunk, and gives the
    /// largest.
    fn scores_row<T: Real>(row: &mut [T], seen: Range<usize>, scale: T) -> T {
        let (from, to) = (seen.start / CHUNK * CHUNK, seen.end.next_multiple_of(CHUNK));
        for x in row[from..to].iter_mut() {
            *x *= scale;
        }
        row[from..seen.start].fill(T::NEG_INFINITY);
        row[seen.end..to].fill(T::NEG_INFINITY);
        let mut lanes = [T::NEG_INFINITY; CHUNK];
        for chunk in row[from..to].as_chunks::<CHUNK>().0 {
            for l in 0..CHUNK {
                lanes[l] = lanes[l].max(chunk[l]);
            }
        }
        fold_lanes(lanes, T::max)
    }
}

simd_fn! {
    /// `row = exp(row − shift)` in the chunks that are seen, 0 in the others; gives the sum.
    fn exp_row<T: Real>(row: &mut [T], seen: Range<usize>, shift: T) -> T {
        let (from, to) = (seen.start / CHUNK * CHUNK, seen.end.next_multiple_of(CHUNK));
        let mut lanes = [T::ZERO; CHUNK];
        for chunk in row[from..to].as_chunks_mut::<CHUNK>().0 {
            for l in 0..CHUNK {
                chunk[l] = (chunk[l] - shift).exp_normal::<FUSED>();
                lanes[l] += chunk[l];
            }
        }
        row[..from].fill(T::ZERO);
        row[to..].fill(T::ZERO);
        fold_lanes(lanes, |a, b| a + b)
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
    /// Probabilities of scores, which are `s` times the scale: `s = exp(s · scale − lse)`; zeros where it is not seen.
    fn probabilities_row<T: Real>(s: &mut [T], seen: Range<usize>, scale: T, lse: T) {
        let (from, to) = (seen.start / CHUNK * CHUNK, seen.end.next_multiple_of(CHUNK));
        for s in s[from..to].iter_mut() {
            *s = (*s * scale - lse).exp_normal::<FUSED>();
        }
        s[..seen.start].fill(T::ZERO);
        s[seen.end..].fill(T::ZERO);
    }
}

simd_fn! {
    /// `dp = p · (dp − delta) · scale`, the gradient of the scores; zeros where it is not seen.
    fn softmax_grad_row<T: Real>(p: &[T], dp: &mut [T], seen: Range<usize>, delta: T, scale: T) {
        let (from, to) = (seen.start / CHUNK * CHUNK, seen.end.next_multiple_of(CHUNK));
        for (dp, &p) in dp[from..to].iter_mut().zip(&p[from..to]) {
            *dp = p * (*dp - delta) * scale;
        }
        dp[..seen.start].fill(T::ZERO);
        dp[seen.end..].fill(T::ZERO);
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

/// Into how many tasks the `blocks` blocks of queries of a head are cut: one packs its keys once, several keep the
/// threads busy where there are few heads. No bit depends on it.
fn tasks_of_head(heads: usize, blocks: usize, threads: usize) -> usize {
    if threads == 1 { 1 } else { (4 * threads).div_ceil(heads.max(1)).clamp(1, blocks.max(1)) }
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
    let heads = mask.spec.heads;
    let all = t.div_ceil(BQ);
    let per = all.div_ceil(tasks_of_head(dims.b * heads, all, pool.threads())).max(1);
    let tasks = all.div_ceil(per);
    pool.run(dims.b * heads * tasks, &|task, worker| {
        // The last queries see the most keys: begin with them.
        let (part, head, b) = (tasks - 1 - task % tasks, task / tasks % heads, task / tasks / heads);
        // SAFETY: this task alone runs as `worker`.
        let work = unsafe { parts(memory, worker, Sizes::of(t, d).forward()) };
        let queries = part * per * BQ..((part + 1) * per * BQ).min(t);
        let kv = head / dims.group * d;
        let [k, v] = [k, v].map(|x| x.block(b * t, t, kv, d));
        forward_head(packs.blocks(), work, mask, (b, head), queries, q, [k, v], out, lse);
    });
}

/// The queries of one task. Shapes: k, v [T, D] of its head.
fn forward_head<T: Real>(
    blocks: Blocks<T>,
    [scores, sums, largest, denominators, keys, values]: [&mut [T]; 6],
    mask: &Mask<'_, T>,
    (b, head): (usize, usize),
    queries: Range<usize>,
    q: Mat<'_, T>,
    [k, v]: [Mat<'_, T>; 2],
    out: MatMut<'_, T>,
    lse: MatMut<'_, T>,
) {
    let (t, d, heads) = (k.rows, k.cols, mask.spec.heads);
    let plain = mask.is_plain();
    let scale = if plain { T::from_f64(mask.spec.scale) } else { T::ONE };
    let all = mask.seen_by_block(b, &queries, t);
    let first = all.start / BK * BK;
    let [k, v_seen] = [k, v].map(|x| x.block(first, all.end - first, 0, d));
    let (keys, values) = (blocks.pack(k, true, keys), blocks.pack(v_seen, false, values));
    for start in queries.clone().step_by(BQ) {
        let block = start..(start + BQ).min(queries.end);
        let n = block.len();
        let qs = q.block(b * t + start, n, head * d, d);
        let sum = MatMut::new(&mut sums[..n * d], n, d);
        // SAFETY: the sums are this task's own.
        let sum_row = |r: usize| unsafe { sum.row_mut(r) };
        (0..n).for_each(|r| sum_row(r).fill(T::ZERO));
        largest.fill(T::NEG_INFINITY);
        denominators.fill(T::ZERO);
        let seen_by_block = mask.seen_by_block(b, &block, t);
        for from in (seen_by_block.start / BK * BK..seen_by_block.end).step_by(BK) {
            let m = BK.min(seen_by_block.end - from);
            let seen = Seen::of(mask, b, &block, from, m, t);
            // SAFETY: the scores are this task's own, with rows of BK; what is packed above stays as it is.
            unsafe {
                let to = MatMut::from_raw(scores.as_mut_ptr(), n, m, BK);
                let reach = |rows: Range<usize>| Reach { columns: seen.keys(&rows), steps: 0..d };
                blocks.multiply((qs, false), keys.columns(from - first, m), to, (false, true), reach);
            }
            for r in 0..n {
                let row = &mut scores[r * BK..][..m.next_multiple_of(CHUNK)];
                let (place, seen) = ((b, head, start + r), seen.row(r));
                if !plain {
                    mask.apply(&mut row[seen.clone()], place, from + seen.start, t);
                }
                let before = largest[r];
                let now = before.max(scores_row(row, seen.clone(), scale));
                if now == T::NEG_INFINITY {
                    row.fill(T::ZERO);
                    continue;
                }
                let denominator = exp_row(row, seen.clone(), now);
                if before == now {
                    denominators[r] += denominator;
                } else {
                    let correction = (before - now).exp_normal::<false>();
                    denominators[r] = denominators[r] * correction + denominator;
                    scale_row(sum_row(r), correction);
                }
                largest[r] = now;
                if let Some(keep) = &mask.keep {
                    keep.apply(&mut row[seen.clone()], mask.pair(place, from + seen.start, t));
                }
            }
            let values = blocks.steps(values, from - first, m);
            // SAFETY: the scores are finished and only read here; the sums are this task's own.
            unsafe {
                let p = Mat::from_raw(scores.as_ptr(), n, m, BK);
                let reach = |rows: Range<usize>| Reach { columns: 0..d, steps: seen.keys(&rows) };
                blocks.multiply((p, false), values, sum, (true, false), reach);
            }
        }
        for r in 0..n {
            let i = start + r;
            let empty = largest[r] == T::NEG_INFINITY;
            let sum = sum_row(r);
            if empty {
                for j in 0..t {
                    let p: T = mask.blind(b, head, i, j, t);
                    sum.iter_mut().zip(v.row(j)).for_each(|(s, &v)| *s += p * v);
                }
            }
            let factor = if empty { T::ONE } else { T::ONE / denominators[r] };
            // SAFETY: rows and columns of these queries and head belong to this task.
            unsafe {
                let row = out.block(b * t + i, 1, head * d, d).row_mut(0);
                row.copy_from_slice(sum);
                scale_row(row, factor);
                let value = if empty { T::NEG_INFINITY } else { largest[r] + denominators[r].ln() };
                lse.set(b * heads + head, i, value);
            }
        }
    }
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
    let Dims { b, t, d, group } = Dims::of(&mask.spec, &saved.q, batch);
    pool.run(b * mask.spec.kv_heads, &|task, worker| {
        let (kv, b) = (task % mask.spec.kv_heads, task / mask.spec.kv_heads);
        let heads = kv * group..(kv + 1) * group;
        // The columns of this sequence and these heads belong to this task.
        let [dk, dv] = [dk, dv].map(|x| x.block(b * t, t, kv * d, d));
        let dq = dq.block(b * t, t, heads.start * d, group * d);
        for x in [dk, dv, dq] {
            // SAFETY: as said above.
            (0..t).for_each(|r| unsafe { x.row_mut(r) }.fill(T::ZERO));
        }
        for head in heads.clone() {
            let [dout, q, out] = [saved.dout, saved.q, saved.out].map(|x| x.block(b * t, t, head * d, d));
            let [k, v] = [saved.k, saved.v].map(|x| x.block(b * t, t, kv * d, d));
            let lse = saved.lse.block(b * mask.spec.heads + head, 1, 0, t);
            let saved = Saved { dout, q, k, v, out, lse };
            let dq = dq.block(0, t, (head - heads.start) * d, d);
            // SAFETY: this task alone runs as `worker`.
            let work = unsafe { parts(memory, worker, Sizes::of(t, d).backward()) };
            backward_head(packs.blocks(), work, mask, (b, head), &saved, [dq, dk, dv]);
        }
    });
}

/// What one head adds to the gradients. Shapes: dq, dk, dv and all of `s` [T, D] of the head, lse [1, T].
fn backward_head<T: Real>(
    blocks: Blocks<T>,
    [scores, other, deltas, keys, values, keys_as_steps, douts, queries]: [&mut [T]; 8],
    mask: &Mask<'_, T>,
    (b, head): (usize, usize),
    s: &Saved<'_, T>,
    [dq, dk, dv]: [MatMut<'_, T>; 3],
) {
    let (t, d) = (s.q.rows, s.q.cols);
    let lse = s.lse.row(0);
    let plain = mask.is_plain();
    let scale = T::from_f64(mask.spec.scale);
    for i in 0..t {
        // Σⱼ pᵢⱼ·dpᵢⱼ = doutᵢ·outᵢ (Dao et al. 2022, appendix B.2).
        deltas[i] = dot(s.dout.row(i), s.out.row(i));
        if lse[i] == T::NEG_INFINITY {
            for j in 0..t {
                let p: T = mask.blind(b, head, i, j, t);
                // SAFETY: the gradients are the caller's alone.
                let dv = unsafe { dv.row_mut(j) };
                dv.iter_mut().zip(s.dout.row(i)).for_each(|(dv, &dout)| *dv += p * dout);
            }
        }
    }
    for from in (0..t).step_by(BK) {
        let [k, v] = [s.k, s.v].map(|x| x.block(from, BK.min(t - from), 0, d));
        let keys = blocks.pack(k, true, keys);
        let values = blocks.pack(v, true, values);
        let keys_as_steps = blocks.pack(k, false, keys_as_steps);
        for start in (0..t).step_by(BQ) {
            let queries_here = start..(start + BQ).min(t);
            let all = mask.seen_by_block(b, &queries_here, t);
            if all.end <= from || all.start >= from + BK {
                continue;
            }
            let (n, m) = (queries_here.len(), BK.min(all.end - from));
            let seen = Seen::of(mask, b, &queries_here, from, m, t);
            let [qs, dout] = [s.q, s.dout].map(|x| x.block(start, n, 0, d));
            let (queries, douts) = (blocks.pack(qs, false, queries), blocks.pack(dout, false, douts));
            let rows_of_scores = |rows: Range<usize>| Reach { columns: seen.keys(&rows), steps: 0..d };
            let rows_of_queries = |rows: Range<usize>| Reach { columns: 0..d, steps: seen.keys(&rows) };
            let rows_of_keys = |keys: Range<usize>| Reach { columns: 0..d, steps: seen.queries(&keys) };
            // SAFETY: both are this task's own, with rows of BK; what is packed stays as it is while it is read.
            unsafe {
                let (p, dp) = (scores.as_mut_ptr(), other.as_mut_ptr());
                let (p, dp) = (MatMut::from_raw(p, n, m, BK), MatMut::from_raw(dp, n, m, BK));
                blocks.multiply((qs, false), keys.columns(0, m), p, (false, true), rows_of_scores);
                blocks.multiply((dout, false), values.columns(0, m), dp, (false, true), rows_of_scores);
            }
            for r in 0..n {
                let i = start + r;
                let width = m.next_multiple_of(CHUNK);
                let (p, dp) = (&mut scores[r * BK..][..width], &mut other[r * BK..][..width]);
                if lse[i] == T::NEG_INFINITY {
                    p.fill(T::ZERO);
                    dp.fill(T::ZERO);
                    continue;
                }
                let seen = seen.row(r);
                let (place, first) = ((b, head, i), from + seen.start);
                if !plain {
                    mask.apply(&mut p[seen.clone()], place, first, t);
                }
                probabilities_row(p, seen.clone(), if plain { scale } else { T::ONE }, lse[i]);
                if let Some(keep) = &mask.keep {
                    keep.apply(&mut dp[seen.clone()], mask.pair(place, first, t));
                }
                softmax_grad_row(p, dp, seen.clone(), deltas[i], scale);
                if let Some(keep) = &mask.keep {
                    keep.apply(&mut p[seen], mask.pair(place, first, t));
                }
            }
            // SAFETY: scores are finished and only read from here on; the gradients are the caller's alone.
            unsafe {
                let (p, ds) = (scores.as_ptr(), other.as_ptr());
                let (p, ds) = (Mat::from_raw(p, n, m, BK), Mat::from_raw(ds, n, m, BK));
                let (dk, dv) = (dk.block(from, m, 0, d), dv.block(from, m, 0, d));
                let keys = blocks.steps(keys_as_steps, 0, m);
                blocks.multiply((p, true), douts, dv, (true, false), rows_of_keys);
                blocks.multiply((ds, true), queries, dk, (true, false), rows_of_keys);
                blocks.multiply((ds, false), keys, dq.block(start, n, 0, d), (true, false), rows_of_queries);
            }
        }
    }
}
