//! Dropout: which element falls out is a pure function of (rng, stream, element), so the backward pass recomputes the mask
//! instead of reading it.

use pyrformer_graph::op::DropoutSpec;
use pyrformer_random::{philox, unit_f32};

use crate::kernels::elementwise::{PIECE, add_row};
use crate::kernels::{for_rows, rows_per_task};
use crate::real::Real;
use crate::threads::Pool;
use crate::view::{Mat, MatMut};

/// The keep rule of one dropout site in one step.
#[derive(Clone, Copy, Debug)]
pub struct Keep {
    key: [u32; 2],
    step: [u32; 2],
    p: f32,
    scale: f64,
}

impl Keep {
    /// The rule of site `spec.stream` under `rng` = seed (low, high), step (low, high).
    #[must_use]
    pub fn new(spec: &DropoutSpec, rng: [i32; 4]) -> Self {
        let [low, high, step_low, step_high] = rng.map(i32::cast_unsigned);
        // Odd multiplier: neighbouring streams get unrelated keys.
        let key = [low, high ^ spec.stream.wrapping_mul(0x9E37_79B9).wrapping_add(0xD0D0)];
        Self { key, step: [step_low, step_high], p: spec.p as f32, scale: 1.0 / (1.0 - spec.p) }
    }

    /// What element `index` is multiplied by: 0 or 1 / (1 − p).
    #[must_use]
    pub fn factor(&self, index: u64) -> f64 {
        let words = self.words(index / 4);
        if unit_f32(words[(index % 4) as usize]) < self.p { 0.0 } else { self.scale }
    }

    /// Multiplies `row`, whose first element has number `first`, in place.
    pub fn apply<T: Real>(&self, row: &mut [T], first: u64) {
        let scale = T::from_f64(self.scale);
        let mut at = 0;
        while at < row.len() {
            let index = first + at as u64;
            let words = self.words(index / 4);
            let from = (index % 4) as usize;
            let end = (at + 4 - from).min(row.len());
            for (x, &word) in row[at..end].iter_mut().zip(&words[from..]) {
                *x = if unit_f32(word) < self.p { T::ZERO } else { *x * scale };
            }
            at = end;
        }
    }

    fn words(&self, block: u64) -> [u32; 4] {
        philox(self.key, [block as u32, (block >> 32) as u32, self.step[0], self.step[1]])
    }
}

/// `y = x · mask / (1 − p) (+ residual)`, the product rounded before the sum. Shapes: all [N, C]; y may be x or the
/// residual.
pub(crate) fn dropout<T: Real>(
    pool: &Pool,
    keep: &Keep,
    x: Mat<'_, T>,
    residual: Option<Mat<'_, T>>,
    y: MatMut<'_, T>,
) {
    for_rows(pool, x.rows, rows_per_task(x.cols), |r| {
        let mut piece = [T::ZERO; PIECE];
        for column in (0..x.cols).step_by(PIECE) {
            let cols = PIECE.min(x.cols - column);
            let part = &mut piece[..cols];
            part.copy_from_slice(x.block(r, 1, column, cols).row(0));
            keep.apply(part, (r * x.cols + column) as u64);
            if let Some(residual) = &residual {
                add_row(residual.block(r, 1, column, cols).row(0), part);
            }
            // SAFETY: one task a row, and the operands of this piece have been read.
            unsafe { y.block(r, 1, column, cols).row_mut(0) }.copy_from_slice(part);
        }
    });
}
