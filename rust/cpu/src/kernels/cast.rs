//! float32 and bfloat16. A bfloat16 is the upper half of a float32, so it is kept and moved as its 16 bits.

use crate::kernels::{for_rows, rows_per_task};
use crate::simd_fn;
use crate::threads::Pool;
use crate::view::{Mat, MatMut};

/// The bits of the bfloat16 nearest to `x`, ties to even; NaN stays NaN.
#[inline(always)]
#[must_use]
pub fn narrowed(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1));
    // A NaN whose payload carries over would turn into another value: its quiet bit is set instead.
    let kept = if x.is_nan() { bits | 0x0040_0000 } else { rounded };
    (kept >> 16) as u16
}

/// The value of a bfloat16, exact.
#[inline(always)]
#[must_use]
pub fn widened(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// To the nearest bfloat16, ties to even.
#[must_use]
pub fn round_bf16(x: f64) -> f64 {
    f64::from(widened(narrowed(x as f32)))
}

simd_fn! {
    /// `y = x` rounded, for one row.
    pub fn narrow_row(x: &[f32], y: &mut [u16]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = narrowed(x);
        }
    }
}

simd_fn! {
    /// `y = x`, for one row.
    pub fn widen_row(x: &[u16], y: &mut [f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = widened(x);
        }
    }
}

/// `y = x` rounded. Shapes: x, y [N, C].
pub(crate) fn narrow(pool: &Pool, x: Mat<'_, f32>, y: MatMut<'_, u16>) {
    // SAFETY: one task a row, and the types of operand and result differ, so they share no memory.
    for_rows(pool, x.rows, rows_per_task(x.cols), |r| narrow_row(x.row(r), unsafe { y.row_mut(r) }));
}

/// `y = x`. Shapes: x, y [N, C].
pub(crate) fn widen(pool: &Pool, x: Mat<'_, u16>, y: MatMut<'_, f32>) {
    // SAFETY: as above.
    for_rows(pool, x.rows, rows_per_task(x.cols), |r| widen_row(x.row(r), unsafe { y.row_mut(r) }));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every bfloat16 and what lies around it: the nearest by distance, the even one of two.
    #[test]
    fn narrowing_rounds_to_the_nearest() {
        for bits in 0..=u16::MAX {
            let x = widened(bits);
            assert!(narrowed(x) == bits || (x.is_nan() && widened(narrowed(x)).is_nan()), "{bits:#x}");
            if !x.is_finite() || !widened(bits + 1).is_finite() {
                continue;
            }
            let half = (u32::from(bits) << 16) + 0x8000;
            let even = if bits.is_multiple_of(2) { bits } else { bits + 1 };
            let around = [half - 1, half, half + 1].map(|b| narrowed(f32::from_bits(b)));
            assert_eq!(around, [bits, even, bits + 1], "{bits:#x}");
        }
    }

    #[test]
    fn values_beyond_all_finite_ones_become_infinite() {
        assert_eq!(widened(narrowed(f32::MAX)), f32::INFINITY);
        assert_eq!(widened(narrowed(-f32::MAX)), f32::NEG_INFINITY);
        for bits in [0x7F80_0001, 0x7FFF_FFFF, 0xFF80_0001, 0xFFFF_FFFF] {
            assert!(widened(narrowed(f32::from_bits(bits))).is_nan(), "{bits:#x}");
        }
        assert!(round_bf16(f64::NAN).is_nan());
        assert_eq!(round_bf16(1.0 + 3.0 / 512.0), 1.0 + 1.0 / 128.0);
    }

    #[test]
    fn rows_round_as_their_elements_do() {
        let x: Vec<f32> = (0..1003).map(|i| (i as f32 - 500.0) * 0.123_456_7).collect();
        let (mut narrow, mut wide) = (vec![0; x.len()], vec![0.0; x.len()]);
        narrow_row(&x, &mut narrow);
        widen_row(&narrow, &mut wide);
        for (i, &x) in x.iter().enumerate() {
            assert_eq!((narrow[i], wide[i]), (narrowed(x), widened(narrowed(x))));
        }
    }
}
