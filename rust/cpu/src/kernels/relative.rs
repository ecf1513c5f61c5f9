//! Attention with relative positions and kinds of tokens. Source: Yang et al. 2019, "XLNet", sections 2.3 and 2.5, with
//! the scores of Dai et al. 2019, equation 5.
//!
//! One query row at a time: its scores against all keys fit in a worker's memory. The forward pass gives each (sequence,
//! head) to a task, the backward pass each head, because all sequences add to the same gradient of the positions.

use pyrformer_graph::RelativeSpec;

use crate::error::{Error, Result};
use crate::kernels::dropout::Keep;
use crate::memory::PerWorker;
use crate::real::Real;
use crate::simd::{dot, max, sum};
use crate::simd_fn;
use crate::threads::Pool;
use crate::view::{Mat, MatMut};

/// Bytes of work memory a worker needs for `keys` keys and heads of width `d`.
pub(crate) fn worker_bytes<T>(keys: usize, d: usize) -> usize {
    (2 * keys + d) * size_of::<T>()
}

/// What both passes read. Shapes: q_k, q_r, q_s [B·T, H·D], k, v [B·S, H·D], r [S + U, H·D], kinds [2, H·D], at [B·T],
/// q_kinds [B·U], k_kinds [B·S], hidden [B·U·U].
#[derive(Clone, Copy)]
pub(crate) struct Relative<'a, T> {
    pub(crate) spec: RelativeSpec,
    pub(crate) batch: usize,
    pub(crate) q: [Mat<'a, T>; 3],
    pub(crate) k: Mat<'a, T>,
    pub(crate) v: Mat<'a, T>,
    pub(crate) r: Mat<'a, T>,
    pub(crate) kinds: Mat<'a, T>,
    pub(crate) at: &'a [i32],
    pub(crate) q_kinds: &'a [i32],
    pub(crate) k_kinds: &'a [i32],
    pub(crate) hidden: Option<&'a [i32]>,
    pub(crate) keep: Option<Keep>,
}

simd_fn! {
    /// `y += a·x`.
    fn axpy<T: Real>(a: T, x: &[T], y: &mut [T]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y += a * x;
        }
    }
}

simd_fn! {
    /// `row = exp(row − shift)`.
    fn exp_row<T: Real>(row: &mut [T], shift: T) {
        for x in row.iter_mut() {
            *x = (*x - shift).exp_normal::<FUSED>();
        }
    }
}

impl<'a, T: Real> Relative<'a, T> {
    /// B, T, S, U, D.
    fn dims(&self) -> [usize; 5] {
        let b = self.batch.max(1);
        [b, self.q[0].rows / b, self.k.rows / b, self.q_kinds.len() / b, self.k.cols / self.spec.heads]
    }

    fn check(&self) -> Result<()> {
        let [_, _, _, u, _] = self.dims();
        match self.at.iter().find(|&&p| p < -1 || p >= u as i32) {
            None => Ok(()),
            Some(p) => {
                let message = format!("a query stands at {p}, outside −1..{u}");
                Err(Error::Index { op: "relative_attention", message })
            }
        }
    }

    /// The parts of one query's row: q_k, q_r, q_s of a head.
    fn query(&self, row: usize, head: usize, d: usize) -> [&'a [T]; 3] {
        self.q.map(|q| q.block(row, 1, head * d, d).row(0))
    }

    /// The row of `r` for key 0 and the rows of `kinds` that a query at `p` meets same and other kinds with.
    fn distance(&self, p: usize) -> usize {
        self.dims()[3] - p
    }

    fn other(&self, b: usize, p: usize, j: usize) -> usize {
        let [_, _, s, u, _] = self.dims();
        usize::from(self.q_kinds[b * u + p] != self.k_kinds[b * s + j])
    }

    /// Probabilities of a query at `p` over all keys into `row`, before dropout.
    fn probabilities(&self, b: usize, head: usize, p: usize, q: [&[T]; 3], row: &mut [T]) {
        let [_, _, s, u, d] = self.dims();
        let scale = T::from_f64(self.spec.scale);
        let by_kind = [0, 1].map(|i| dot(q[2], self.kinds.block(i, 1, head * d, d).row(0)));
        let first = self.distance(p);
        let hidden = self.hidden.map(|h| &h[(b * u + p) * u..(b * u + p + 1) * u]);
        for (j, x) in row.iter_mut().enumerate() {
            let own = self.spec.sees_itself && j == s - u + p;
            if j >= s - u && !own && hidden.is_some_and(|h| h[j - (s - u)] != 0) {
                *x = T::NEG_INFINITY;
                continue;
            }
            let content = dot(q[0], self.k.block(b * s + j, 1, head * d, d).row(0));
            let position = dot(q[1], self.r.block(first + j, 1, head * d, d).row(0));
            *x = scale * (content + position + by_kind[self.other(b, p, j)]);
        }
        let largest = max(row);
        if largest == T::NEG_INFINITY {
            row.fill(T::ONE / T::from_f64(s as f64));
            return;
        }
        exp_row(row, largest);
        let factor = T::ONE / sum(row);
        row.iter_mut().for_each(|x| *x *= factor);
    }

    /// Where the elements of a query's row are counted for dropout.
    fn place(&self, b: usize, head: usize, i: usize) -> u64 {
        let [_, t, s, _, _] = self.dims();
        (((b * self.spec.heads + head) * t + i) * s) as u64
    }
}

/// Shapes: out [B·T, H·D].
pub(crate) fn relative_attention<T: Real>(
    pool: &Pool,
    memory: &PerWorker,
    x: &Relative<'_, T>,
    out: MatMut<'_, T>,
) -> Result<()> {
    x.check()?;
    let [b, t, s, _, d] = x.dims();
    let heads = x.spec.heads;
    pool.run(b * heads, &|task, worker| {
        let (head, b) = (task % heads, task / heads);
        // SAFETY: this task alone runs as `worker`.
        let row = &mut unsafe { memory.get::<T>(worker, 2 * s + d) }[..s];
        for i in 0..t {
            // SAFETY: this head's columns of this sequence belong to this task.
            let to = unsafe { out.block(b * t + i, 1, head * d, d).row_mut(0) };
            to.fill(T::ZERO);
            if let Ok(p) = usize::try_from(x.at[b * t + i]) {
                x.probabilities(b, head, p, x.query(b * t + i, head, d), row);
                if let Some(keep) = &x.keep {
                    keep.apply(row, x.place(b, head, i));
                }
                for (j, &p) in row.iter().enumerate() {
                    axpy(p, x.v.block(b * s + j, 1, head * d, d).row(0), to);
                }
            }
        }
    });
    Ok(())
}

/// Columns `col .. col + d` of row `r`.
///
/// # Safety
/// As [`MatMut::row_mut`].
unsafe fn columns<'a, T>(m: &MatMut<'a, T>, r: usize, col: usize, d: usize) -> &'a mut [T] {
    // SAFETY: the caller's promise.
    unsafe { m.block(r, 1, col, d).row_mut(0) }
}

/// Shapes: dout [B·T, H·D], dq_k, dq_r, dq_s [B·T, H·D], dk, dv [B·S, H·D], dr [S + U, H·D], dkinds [2, H·D].
pub(crate) fn relative_attention_grad<T: Real>(
    pool: &Pool,
    memory: &PerWorker,
    x: &Relative<'_, T>,
    dout: Mat<'_, T>,
    [dq_k, dq_r, dq_s, dk, dv, dr, dkinds]: [MatMut<'_, T>; 7],
) -> Result<()> {
    x.check()?;
    let [batch, t, s, _, d] = x.dims();
    let scale = T::from_f64(x.spec.scale);
    pool.run(x.spec.heads, &|head, worker| {
        // SAFETY: this task alone runs as `worker`.
        let (row, rest) = unsafe { memory.get::<T>(worker, 2 * s + d) }.split_at_mut(s);
        let drow = &mut rest[..s];
        let col = head * d;
        // SAFETY: this head's columns of all results belong to this task.
        let part = |m, r| unsafe { columns(m, r, col, d) };
        for m in [&dq_k, &dq_r, &dq_s, &dk, &dv, &dr, &dkinds] {
            (0..m.rows).for_each(|r| part(m, r).fill(T::ZERO));
        }
        for b in 0..batch {
            for i in 0..t {
                let Ok(p) = usize::try_from(x.at[b * t + i]) else { continue };
                let q = x.query(b * t + i, head, d);
                x.probabilities(b, head, p, q, row);
                let dto = dout.block(b * t + i, 1, col, d).row(0);
                for (j, dp) in drow.iter_mut().enumerate() {
                    *dp = dot(dto, x.v.block(b * s + j, 1, col, d).row(0));
                }
                if let Some(keep) = &x.keep {
                    keep.apply(drow, x.place(b, head, i));
                }
                let delta = dot(row, drow);
                for (dp, &p) in drow.iter_mut().zip(row.iter()) {
                    *dp = scale * p * (*dp - delta);
                }
                if let Some(keep) = &x.keep {
                    keep.apply(row, x.place(b, head, i));
                }
                let first = x.distance(p);
                let mut by_kind = [T::ZERO; 2];
                let (dqk, dqr) = (part(&dq_k, b * t + i), part(&dq_r, b * t + i));
                for j in 0..s {
                    axpy(row[j], dto, part(&dv, b * s + j));
                    let ds = drow[j];
                    if ds == T::ZERO {
                        continue;
                    }
                    axpy(ds, x.k.block(b * s + j, 1, col, d).row(0), dqk);
                    axpy(ds, x.r.block(first + j, 1, col, d).row(0), dqr);
                    axpy(ds, q[0], part(&dk, b * s + j));
                    axpy(ds, q[1], part(&dr, first + j));
                    by_kind[x.other(b, p, j)] += ds;
                }
                let dqs = part(&dq_s, b * t + i);
                for (kind, &ds) in by_kind.iter().enumerate() {
                    axpy(ds, x.kinds.block(kind, 1, col, d).row(0), dqs);
                    axpy(ds, q[2], part(&dkinds, kind));
                }
            }
        }
    });
    Ok(())
}
