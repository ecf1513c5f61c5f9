//! The update: global gradient norm, clipping, AdamW.

use crate::kernels::elementwise::in_place;
use crate::kernels::rounding::Rounding;
use crate::kernels::{for_rows, rows_per_task};
use crate::real::Real;
use crate::simd::sum_sq;
use crate::simd_fn;
use crate::threads::Pool;
use crate::view::{Mat, MatMut};

/// How many partial sums [`global_norm`] keeps for gradients of these (rows, columns).
pub(crate) fn global_norm_parts(shapes: impl Iterator<Item = (usize, usize)>) -> usize {
    shapes.map(|(rows, cols)| rows.div_ceil(rows_per_task(cols))).sum()
}

/// `√(Σ ‖gᵢ‖²)` of the `count` gradients that `grad` gives, into y []; `parts` holds [`global_norm_parts`] elements.
/// Partial sums of a fixed number of rows, added in `f64` in the order of the gradients.
pub(crate) fn global_norm<'a, T: Real>(
    pool: &Pool,
    count: usize,
    grad: &(dyn Fn(usize) -> Mat<'a, T> + Sync),
    y: MatMut<'_, T>,
    parts: MatMut<'_, f64>,
) {
    pool.run(parts.cols, &|task, _| {
        let mut chunk = task;
        let mut sum = 0.0;
        for g in (0..count).map(grad) {
            let per = rows_per_task(g.cols);
            let chunks = g.rows.div_ceil(per);
            if chunk < chunks {
                sum = square_sum(&g, chunk);
                break;
            }
            chunk -= chunks;
        }
        // SAFETY: one task an element.
        unsafe { parts.set(0, task, sum) };
    });
    // SAFETY: the tasks are done; this thread is alone.
    unsafe {
        let total: f64 = parts.row_mut(0).iter().sum();
        y.row_mut(0)[0] = T::from_f64(total.sqrt());
    }
}

/// The sum of squares of the `chunk`th rows that one task takes.
fn square_sum<T: Real>(g: &Mat<'_, T>, chunk: usize) -> f64 {
    let per = rows_per_task(g.cols);
    (chunk * per..((chunk + 1) * per).min(g.rows)).map(|r| sum_sq(g.row(r)).to_f64()).sum()
}

/// The partial sums of squares of one gradient `x [rows, cols]`, row-major without gaps: what the global norm of several
/// adds up in the order of the gradients, for those who hold a part of them each.
#[must_use]
pub fn norm_parts<T: Real>(x: &[T], cols: usize) -> Vec<f64> {
    let g = Mat::new(x, x.len() / cols.max(1), cols);
    (0..g.rows.div_ceil(rows_per_task(cols))).map(|chunk| square_sum(&g, chunk)).collect()
}

/// Hyper-parameters of one AdamW update.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdamW {
    pub(crate) beta1: f64,
    pub(crate) beta2: f64,
    pub(crate) eps: f64,
    pub(crate) weight_decay: f64,
    /// Factor on the gradient.
    pub(crate) clip: f64,
    pub(crate) lr: f64,
    /// Counts from 1.
    pub(crate) step: i32,
    /// How new values are rounded, if they are.
    pub(crate) rounding: Option<Rounding>,
}

simd_fn! {
    fn adamw_row<T: Real>(h: AdamW, g: &[T], p: &mut [T], m: &mut [T], v: &mut [T]) {
        let real = T::from_f64;
        let (b1, b2, eps, clip) = (real(h.beta1), real(h.beta2), real(h.eps), real(h.clip));
        let (c1, c2) = (real(1.0 - h.beta1), real(1.0 - h.beta2));
        // Bias corrections in f64: 1 − βᵗ loses its digits in f32 for small t.
        let size = real(h.lr / (1.0 - h.beta1.powi(h.step)));
        let root = real(1.0 / (1.0 - h.beta2.powi(h.step)).sqrt());
        let decay = real(1.0 - h.lr * h.weight_decay);
        for (((p, m), v), &g) in p.iter_mut().zip(m).zip(v).zip(g) {
            let g = g * clip;
            *m = b1 * *m + c1 * g;
            *v = b2 * *v + c2 * g * g;
            *p = *p * decay - size * *m / (v.sqrt() * root + eps);
        }
    }
}

/// One update of a tensor. Shapes: all [N, C]; results may share memory with p, m, v. Clipping and update are one pass.
pub(crate) fn adamw<T: Real>(
    pool: &Pool,
    h: AdamW,
    [p, g, m, v]: [Mat<'_, T>; 4],
    [new_p, new_m, new_v]: [MatMut<'_, T>; 3],
) {
    for_rows(pool, p.rows, rows_per_task(4 * p.cols), |r| {
        // SAFETY: one task a row; operands that share memory with a result do so row by row.
        let [np, nm, nv] = [&new_p, &new_m, &new_v].map(|x| unsafe { x.row_mut(r) });
        in_place(&p, r, np);
        in_place(&m, r, nm);
        in_place(&v, r, nv);
        adamw_row(h, g.row(r), np, nm, nv);
        if let Some(rounding) = h.rounding {
            rounding.apply(np, (r * p.cols) as u64);
        }
    });
}
