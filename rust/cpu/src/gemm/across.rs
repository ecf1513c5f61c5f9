//! Tiles of few rows whose columns are rows of B in memory (`[N, K]`): B is transposed in registers on its way to the
//! multiply-adds, so that it is read once, at the speed of memory, and nothing is written but C. The chains of
//! multiply-adds are those of [`micro`](super::micro), and so are the bits.

use std::arch::x86_64::*;

use super::micro::{Tile, prefetch};
use super::pack::x86::transpose_8x8;

/// The most rows of A.
pub(super) const MAX_ROWS: usize = 4;
/// How far ahead of what is read the next is asked for.
const AHEAD: usize = 64;

/// Computes a tile of `rows ≤ MAX_ROWS` rows and 16 columns; B's element (step p, column j) is at
/// `b + j·b_step + p`.
///
/// # Safety
/// As `Kernel::tile`, but for B; the CPU has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn tile(rows: usize, at: &Tile<f32>) {
    // SAFETY: the caller's promise, in all arms.
    unsafe {
        match rows {
            1 => columns::<1>(at),
            2 => columns::<2>(at),
            3 => columns::<3>(at),
            4 => columns::<4>(at),
            _ => debug_assert!(false, "a tile of {rows} rows"),
        }
    }
}

/// # Safety
/// As [`tile`] with `rows = M`.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn columns<const M: usize>(tile: &Tile<f32>) {
    let Tile { depth, a, a_row, a_step, b, b_step, c, c_row, add, .. } = *tile;
    let whole = depth - depth % 8;
    // SAFETY: the caller's promise: A has M rows and B 16 columns of `depth` steps, C has M rows of 16.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); 2]; M];
        if add {
            for (i, sums) in sums.iter_mut().enumerate() {
                *sums = [_mm256_loadu_ps(c.add(i * c_row)), _mm256_loadu_ps(c.add(i * c_row + 8))];
            }
        }
        for p in (0..whole).step_by(8) {
            for half in 0..2 {
                let mut lanes = [_mm256_setzero_ps(); 8];
                for (l, lane) in lanes.iter_mut().enumerate() {
                    let from = b.add((8 * half + l) * b_step + p);
                    *lane = _mm256_loadu_ps(from);
                    prefetch(from.wrapping_add(AHEAD));
                }
                let steps = transpose_8x8(lanes);
                for (i, sums) in sums.iter_mut().enumerate() {
                    for (q, &step) in steps.iter().enumerate() {
                        let x = _mm256_broadcast_ss(&*a.add(i * a_row + (p + q) * a_step));
                        sums[half] = _mm256_fmadd_ps(x, step, sums[half]);
                    }
                }
            }
        }
        for p in whole..depth {
            for half in 0..2 {
                let lane = |l: usize| *b.add((8 * half + l) * b_step + p);
                let step =
                    _mm256_setr_ps(lane(0), lane(1), lane(2), lane(3), lane(4), lane(5), lane(6), lane(7));
                for (i, sums) in sums.iter_mut().enumerate() {
                    let x = _mm256_broadcast_ss(&*a.add(i * a_row + p * a_step));
                    sums[half] = _mm256_fmadd_ps(x, step, sums[half]);
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            _mm256_storeu_ps(c.add(i * c_row), sums[0]);
            _mm256_storeu_ps(c.add(i * c_row + 8), sums[1]);
        }
    }
}
