//! Decoding: writing keys and values into the cache, and attention over it.

use pyrformer_graph::AttentionSpec;

use crate::error::{Error, Result};
use crate::kernels::rows::check;
use crate::memory::PerWorker;
use crate::real::Real;
use crate::simd::{LANES, fold_lanes, max, reduce};
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

simd_fn! {
    /// One query against the positions `first ..`, whose cache rows are `rows`: out = softmax(scale·q·K + bias)·V; an
    /// empty bias is none.
    fn one_query<T: Real>(
        q: &[T], k: &Mat<'_, T>, v: &Mat<'_, T>, rows: &[i32], first: usize, slots: usize, col: usize, scale: T,
        bias: &[T], scores: &mut [T], out: &mut [T],
    ) {
        let d = q.len();
        for (i, (score, &row)) in scores.iter_mut().zip(rows).enumerate() {
            let key = k.block(row as usize * slots + first + i, 1, col, d).row(0);
            let mut lanes = [T::ZERO; LANES];
            let ((qs, q_rest), (ks, k_rest)) = (q.as_chunks::<LANES>(), key.as_chunks::<LANES>());
            for (q, k) in qs.iter().zip(ks) {
                for l in 0..LANES {
                    lanes[l] += q[l] * k[l];
                }
            }
            for ((lane, &q), &k) in lanes.iter_mut().zip(q_rest).zip(k_rest) {
                *lane += q * k;
            }
            *score = scale * fold_lanes(lanes, |a, b| a + b);
        }
        for (s, &b) in scores.iter_mut().zip(bias) {
            *s += b;
        }
        let largest = max(scores);
        for s in scores.iter_mut() {
            *s = (*s - largest).exp();
        }
        let factor = T::ONE / reduce(scores, T::ZERO, |x| x, |a, b| a + b);
        out.fill(T::ZERO);
        for (i, (&p, &row)) in scores.iter().zip(rows).enumerate() {
            let p = p * factor;
            let value = v.block(row as usize * slots + first + i, 1, col, d).row(0);
            for (o, &v) in out.iter_mut().zip(value) {
                *o += p * v;
            }
        }
    }
}

/// Shapes: q, out [B·T, H·D], caches [R·S, K·D], rows [B, S], key_bias [H, S].
pub(crate) fn cached_attention<T: Real>(
    pool: &Pool,
    memory: &PerWorker,
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
    let scale = T::from_f64(spec.scale);
    pool.run(batch * spec.heads, &|task, worker| {
        let (head, b) = (task % spec.heads, task / spec.heads);
        // SAFETY: this task alone runs as `worker`.
        let scores = unsafe { memory.get::<T>(worker, slots) };
        for i in 0..tokens {
            // SAFETY: this head's columns of this sequence belong to this task.
            let to = unsafe { out.block(b * tokens + i, 1, head * d, d).row_mut(0) };
            if i >= places.count[b] as usize {
                to.fill(T::ZERO);
                continue;
            }
            let end = places.start[b] as usize + i + 1;
            let first = spec.window.map_or(0, |w| end.saturating_sub(w));
            let query = q.block(b * tokens + i, 1, head * d, d).row(0);
            let from = &rows[b * slots + first..b * slots + end];
            one_query(
                query,
                &k,
                &v,
                from,
                first,
                slots,
                head / group * d,
                scale,
                key_bias.as_ref().map_or(&[][..], |bias| &bias.row(head)[first..end]),
                &mut scores[..end - first],
                to,
            );
        }
    });
    Ok(())
}
