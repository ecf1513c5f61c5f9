//! Positions that enter attention: rotations of queries and keys, and a bias on keys.

use crate::kernels::cast::round_bf16;
use crate::kernels::elementwise::in_place;
use crate::kernels::{for_rows, rows_per_task};
use crate::real::Real;
use crate::simd_fn;
use crate::threads::Pool;
use crate::view::{Mat, MatMut};

/// `table[n] = scale · [cos(positions[n] · inv_freq), sin(positions[n] · inv_freq)]`. Shapes: positions [N], table [N, R].
/// Angles are float64: at position 10⁵ a float32 angle is off by 0.004.
pub(crate) fn rope_table<T: Real>(
    pool: &Pool,
    positions: &[i32],
    inv_freq: &[f64],
    scale: f64,
    table: MatMut<'_, T>,
) {
    for_rows(pool, positions.len(), rows_per_task(16 * table.cols), |n| {
        // SAFETY: one task a row.
        let (cos, sin) = unsafe { table.row_mut(n) }.split_at_mut(inv_freq.len());
        for (i, f) in inv_freq.iter().enumerate() {
            let (s, c) = (f64::from(positions[n]) * f).sin_cos();
            (cos[i], sin[i]) = (T::from_f64(scale * c), T::from_f64(scale * s));
        }
    });
}

simd_fn! {
    /// Turns the pairs (a[i], b[i]) by the angles whose cosines and sines are given; `sign` −1 turns backwards.
    fn turn<T: Real>(a: &mut [T], b: &mut [T], cos: &[T], sin: &[T], sign: T) {
        for (((a, b), &c), &s) in a.iter_mut().zip(b.iter_mut()).zip(cos).zip(sin) {
            let s = sign * s;
            (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
        }
    }
}

/// Turns each head of each row. Shapes: x, y [N, H·D], table [N, R]; y may be x.
pub(crate) fn rope<T: Real>(
    pool: &Pool,
    heads: usize,
    inverse: bool,
    x: Mat<'_, T>,
    table: Mat<'_, T>,
    y: MatMut<'_, T>,
) {
    let (d, half) = (x.cols / heads, table.cols / 2);
    let sign = if inverse { -T::ONE } else { T::ONE };
    for_rows(pool, x.rows, rows_per_task(x.cols), |n| {
        // SAFETY: one task a row; where y is x, `in_place` leaves the row as it is.
        let row = unsafe { y.row_mut(n) };
        in_place(&x, n, row);
        let (cos, sin) = table.row(n).split_at(half);
        for head in row.chunks_exact_mut(d) {
            let (a, b) = head[..2 * half].split_at_mut(half);
            turn(a, b, cos, sin, sign);
        }
    });
}

/// `bias[.., h, t] = slopes[h] · positions[.., t] · scale`, with `round` in bfloat16 before scaling. Shapes: positions
/// [N, T], bias [N·H, T].
pub(crate) fn alibi_bias<T: Real>(
    slopes: &[f64],
    scale: f64,
    round: bool,
    positions: &[i32],
    bias: MatMut<'_, T>,
) {
    let keep = |x: f64| if round { round_bf16(x) } else { x };
    for r in 0..bias.rows {
        let (n, slope) = (r / slopes.len(), keep(slopes[r % slopes.len()]));
        let positions = &positions[n * bias.cols..(n + 1) * bias.cols];
        // SAFETY: no task runs.
        let row = unsafe { bias.row_mut(r) };
        for (b, &p) in row.iter_mut().zip(positions) {
            *b = T::from_f64(scale * keep(slope * keep(f64::from(p))));
        }
    }
}
