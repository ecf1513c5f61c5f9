//! Layer normalisation, with or without centring. Source: Ba et al. 2016, equation 4; RMSNorm: Zhang and Sennrich 2019,
//! equation 4; their gradients by hand from the same.

use crate::kernels::elementwise::{add_row, in_place};
use crate::kernels::{for_chunks, for_rows, rows_per_task, sum_chunks};
use crate::real::Real;
use crate::simd::{dot, sum};
use crate::simd_fn;
use crate::threads::Pool;
use crate::view::{Mat, MatMut};

simd_fn! {
    /// One row: `y = (x − mean) · rstd · weight (+ bias)`; gives (mean, rstd), mean 0 without `center`.
    fn forward_row<T: Real>(eps: T, center: bool, x: &[T], weight: &[T], bias: &[T], y: &mut [T]) -> (T, T) {
        let n = T::from_f64(x.len() as f64);
        let mean = if center { sum(x) / n } else { T::ZERO };
        // Two passes: the variance of centred values keeps its digits where the mean is large.
        for (y, &x) in y.iter_mut().zip(x) {
            *y = x - mean;
        }
        let rstd = T::ONE / (dot(y, y) / n + eps).sqrt();
        if bias.is_empty() {
            for (y, &w) in y.iter_mut().zip(weight) {
                *y *= rstd * w;
            }
        } else {
            for ((y, &w), &b) in y.iter_mut().zip(weight).zip(bias) {
                *y = *y * rstd * w + b;
            }
        }
        (mean, rstd)
    }
}

/// Shapes: x, y [N, C], weight [C], bias [C] or empty, mean, rstd [N].
pub(crate) fn layer_norm<T: Real>(
    pool: &Pool,
    eps: f64,
    center: bool,
    x: Mat<'_, T>,
    weight: &[T],
    bias: &[T],
    y: MatMut<'_, T>,
    mean: MatMut<'_, T>,
    rstd: MatMut<'_, T>,
) {
    let eps = T::from_f64(eps);
    for_rows(pool, x.rows, rows_per_task(4 * x.cols), |r| {
        // SAFETY: one task a row.
        let (m, s) = forward_row(eps, center, x.row(r), weight, bias, unsafe { y.row_mut(r) });
        // SAFETY: element r of the statistics belongs to this row's task.
        unsafe {
            mean.set(0, r, m);
            rstd.set(0, r, s);
        }
    });
}

simd_fn! {
    /// One row of the gradient: dx into `dx` (which holds the residual or zeros), and what the row adds to dweight, dbias.
    fn backward_row<T: Real>(
        dy: &[T], x: &[T], weight: &[T], mean: T, rstd: T, hat: &mut [T], dhat: &mut [T],
        dx: &mut [T], dweight: &mut [T], dbias: &mut [T], center: bool,
    ) {
        let n = x.len();
        let (dy, weight, hat, dhat) = (&dy[..n], &weight[..n], &mut hat[..n], &mut dhat[..n]);
        let (dx, dweight, dbias) = (&mut dx[..n], &mut dweight[..n], &mut dbias[..n]);
        for i in 0..n {
            hat[i] = (x[i] - mean) * rstd;
            dhat[i] = dy[i] * weight[i];
            dweight[i] += dy[i] * hat[i];
            dbias[i] += dy[i];
        }
        let count = T::from_f64(n as f64);
        let average = if center { sum(dhat) / count } else { T::ZERO };
        let along = dot(dhat, hat) / count;
        for i in 0..n {
            dx[i] += rstd * (dhat[i] - average - hat[i] * along);
        }
    }
}

/// Elements of scratch for [`layer_norm_grad`].
pub(crate) fn layer_norm_grad_scratch(rows: usize, cols: usize) -> usize {
    5 * sum_chunks(rows) * cols
}

/// Shapes: dy, x, residual, dx [N, C]; weight, dweight, dbias [C]; mean, rstd [N]; dx may be dy or the residual.
/// Each chunk of rows sums its share of dweight and dbias in scratch; the shares are added in order.
pub(crate) fn layer_norm_grad<T: Real>(
    pool: &Pool,
    center: bool,
    dy: Mat<'_, T>,
    x: Mat<'_, T>,
    weight: &[T],
    mean: &[T],
    rstd: &[T],
    residual: Option<Mat<'_, T>>,
    dx: MatMut<'_, T>,
    dweight: MatMut<'_, T>,
    dbias: MatMut<'_, T>,
    scratch: MatMut<'_, T>,
) {
    let c = x.cols;
    let per = x.rows.div_ceil(sum_chunks(x.rows)).max(1);
    // Five rows of scratch a chunk: dweight, dbias, dy, x̂, dx̂.
    // SAFETY: chunk k alone uses its rows, and each of the five once.
    let part = |k: usize, i: usize| unsafe { scratch.block(0, 1, (5 * k + i) * c, c).row_mut(0) };
    for_chunks(pool, x.rows, per, |k, from, to| {
        let (dw, db, kept, hat, dhat) = (part(k, 0), part(k, 1), part(k, 2), part(k, 3), part(k, 4));
        dw.fill(T::ZERO);
        db.fill(T::ZERO);
        for r in from..to {
            // dx may be dy's memory, so dy is kept aside before dx is begun.
            kept.copy_from_slice(dy.row(r));
            // SAFETY: one task a row.
            let dx = unsafe { dx.row_mut(r) };
            match &residual {
                Some(residual) => in_place(residual, r, dx),
                None => dx.fill(T::ZERO),
            }
            backward_row(kept, x.row(r), weight, mean[r], rstd[r], hat, dhat, dx, dw, db, center);
        }
    });
    for (target, i) in [(dweight, 0), (dbias, 1)] {
        // SAFETY: the tasks are done; this thread is alone.
        let row = unsafe { target.row_mut(0) };
        row.fill(T::ZERO);
        for k in 0..x.rows.div_ceil(per) {
            add_row(part(k, i), row);
        }
    }
}
