//! The innermost loop: one tile of C, held in registers while k runs.
//!
//! A tile is `rows × width` with `rows ≤ height`. Each k step loads one row of B (`width` elements), broadcasts one
//! element of A per row of C, and does `rows · width` multiply-adds. Tile sizes fill the register file: AVX2 has 16
//! registers of 8 `f32`, 6 × 16 takes 12 for sums, 2 for B, 1 for the broadcast. Every element of C is one chain of
//! fused multiply-adds over k, whatever the tile, so edges give the same bits as the inside.

use super::pack::{self, Transpose};
use crate::real::Real;
use crate::simd::Level;

/// What a tile kernel works on. `C = A·B`, or `C += A·B` if `add`.
pub(super) struct Tile<T> {
    /// Steps of the inner dimension.
    pub(super) depth: usize,
    /// A's element (row i, step p) is at `a + i·a_row + p·a_step`.
    pub(super) a: *const T,
    pub(super) a_row: usize,
    pub(super) a_step: usize,
    /// B's element (step p, column j) is at `b + p·b_step + j`.
    pub(super) b: *const T,
    pub(super) b_step: usize,
    /// C's element (row i, column j) is at `c + i·c_row + j`.
    pub(super) c: *mut T,
    pub(super) c_row: usize,
    pub(super) add: bool,
}

/// The tile kernel of a type at a level.
#[derive(Clone, Copy, Debug)]
pub struct Kernel<T> {
    /// Rows of a whole tile.
    pub(super) height: usize,
    /// Columns of a tile.
    pub(super) width: usize,
    /// The most steps of K in a block, chosen so that a panel of B takes three quarters of the first cache or less.
    pub(super) depth: usize,
    /// What `tile` was compiled for.
    pub(super) level: Level,
    /// Computes a tile of `rows ≤ height` rows and exactly `width` columns.
    ///
    /// # Safety
    /// * the CPU has `level`;
    /// * `1 ≤ rows ≤ height`; A, B are readable and C is writable (readable if `add`) at the places that [`Tile`] names.
    pub(super) tile: unsafe fn(rows: usize, tile: &Tile<T>),
    /// Packs a panel whose lanes are rows of memory; its `width` is `height` or `width` of the kernel.
    pub(super) transpose: Transpose<T>,
}

/// The largest `height · width`.
pub(super) const MAX_TILE: usize = 12 * 32;

/// The kernel of `f32` at `level`.
pub(crate) fn kernel_f32(level: Level) -> Kernel<f32> {
    #[cfg(target_arch = "x86_64")]
    match level {
        Level::Avx512 => {
            return Kernel {
                height: 12,
                width: 32,
                depth: 256,
                level,
                tile: x86::f32_avx512,
                transpose: pack::x86::transpose,
            };
        }
        Level::Avx2 => {
            return Kernel {
                height: 6,
                width: 16,
                depth: 384,
                level,
                tile: x86::f32_avx2,
                transpose: pack::x86::transpose,
            };
        }
        Level::Baseline => {}
    }
    if cfg!(target_arch = "aarch64") {
        Kernel {
            height: 6,
            width: 16,
            depth: 384,
            level,
            tile: portable::<f32, 6, 16, true>,
            transpose: pack::transpose,
        }
    } else {
        Kernel {
            height: 4,
            width: 8,
            depth: 384,
            level,
            tile: portable::<f32, 4, 8, false>,
            transpose: pack::transpose,
        }
    }
}

/// The kernel of `f64` at `level`.
pub(crate) fn kernel_f64(level: Level) -> Kernel<f64> {
    #[cfg(target_arch = "x86_64")]
    match level {
        Level::Avx512 => {
            return Kernel {
                height: 6,
                width: 16,
                depth: 256,
                level,
                tile: x86::f64_avx512,
                transpose: pack::transpose,
            };
        }
        Level::Avx2 => {
            return Kernel {
                height: 6,
                width: 8,
                depth: 384,
                level,
                tile: x86::f64_avx2,
                transpose: pack::transpose,
            };
        }
        Level::Baseline => {}
    }
    if cfg!(target_arch = "aarch64") {
        Kernel {
            height: 6,
            width: 8,
            depth: 384,
            level,
            tile: portable::<f64, 6, 8, true>,
            transpose: pack::transpose,
        }
    } else {
        Kernel {
            height: 4,
            width: 4,
            depth: 384,
            level,
            tile: portable::<f64, 4, 4, false>,
            transpose: pack::transpose,
        }
    }
}

/// Whether sums at `level` are fused multiply-adds.
pub(super) const fn has_fma(level: Level) -> bool {
    !matches!(level, Level::Baseline) || cfg!(target_arch = "aarch64")
}

/// `a·b + c`, fused where the level has an instruction for it (elsewhere that would be a library call).
#[inline(always)]
pub(super) fn mul_add<T: Real, const FMA: bool>(a: T, b: T, c: T) -> T {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// A tile in plain Rust, for the compiler to vectorise.
///
/// # Safety
/// As [`Kernel::tile`].
#[inline(always)]
unsafe fn portable<T: Real, const H: usize, const W: usize, const FMA: bool>(rows: usize, tile: &Tile<T>) {
    debug_assert!(rows >= 1 && rows <= H, "{rows} rows in a tile of {H}");
    let mut sums = [[T::ZERO; W]; H];
    if rows == H {
        for p in 0..tile.depth {
            // SAFETY: the caller's promise.
            let b = unsafe { tile.b.add(p * tile.b_step).cast::<[T; W]>().read() };
            for i in 0..H {
                // SAFETY: the caller's promise.
                let a = unsafe { *tile.a.add(i * tile.a_row + p * tile.a_step) };
                for j in 0..W {
                    sums[i][j] = mul_add::<T, FMA>(a, b[j], sums[i][j]);
                }
            }
        }
    } else {
        for p in 0..tile.depth {
            // SAFETY: the caller's promise.
            let b = unsafe { tile.b.add(p * tile.b_step).cast::<[T; W]>().read() };
            for (i, sums) in sums.iter_mut().enumerate().take(rows) {
                // SAFETY: the caller's promise.
                let a = unsafe { *tile.a.add(i * tile.a_row + p * tile.a_step) };
                for j in 0..W {
                    sums[j] = mul_add::<T, FMA>(a, b[j], sums[j]);
                }
            }
        }
    }
    for (i, sums) in sums.iter().enumerate().take(rows) {
        // SAFETY: the caller's promise.
        let c = unsafe { &mut *tile.c.add(i * tile.c_row).cast::<[T; W]>() };
        for j in 0..W {
            c[j] = if tile.add { c[j] + sums[j] } else { sums[j] };
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Tile, portable};

    /// # Safety
    /// As [`super::Kernel::tile`].
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn f64_avx2(rows: usize, tile: &Tile<f64>) {
        // SAFETY: the caller's promise.
        unsafe { portable::<f64, 6, 8, true>(rows, tile) }
    }

    /// # Safety
    /// As [`super::Kernel::tile`].
    #[target_feature(enable = "avx2,fma,avx512f")]
    pub(super) unsafe fn f64_avx512(rows: usize, tile: &Tile<f64>) {
        // SAFETY: the caller's promise.
        unsafe { portable::<f64, 6, 16, true>(rows, tile) }
    }

    /// The body of a tile of `$w` vectors in each of `H` rows, by intrinsics.
    macro_rules! tile {
        ($name:ident, $rows:ident, $features:literal, heights: $($h:literal)+,
         $zero:ident $load:ident $store:ident $splat:ident $fma:ident $add:ident, $lanes:literal) => {
            /// # Safety
            /// As [`super::Kernel::tile`].
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $name(rows: usize, tile: &Tile<f32>) {
                match rows {
                    // SAFETY: the caller's promise; `rows` is what the function is for.
                    $($h => unsafe { $rows::<$h>(tile) },)+
                    _ => debug_assert!(false, "{rows} rows"),
                }
            }

            /// # Safety
            /// As [`super::Kernel::tile`] with `rows = H`.
            #[target_feature(enable = $features)]
            unsafe fn $rows<const H: usize>(tile: &Tile<f32>) {
                let Tile { depth, mut a, a_row, a_step, mut b, b_step, c, c_row, add } = *tile;
                let mut sums = [[$zero(); 2]; H];
                for i in 0..H {
                    _mm_prefetch::<_MM_HINT_T0>(c.wrapping_add(i * c_row).cast());
                    _mm_prefetch::<_MM_HINT_T0>(c.wrapping_add(i * c_row + 2 * $lanes - 1).cast());
                }
                for _ in 0..depth {
                    // SAFETY: the caller's promise: row `p` of B has `2·lanes` elements, A has `H` rows.
                    unsafe {
                        let (b0, b1) = ($load(b), $load(b.add($lanes)));
                        for i in 0..H {
                            let x = $splat(*a.add(i * a_row));
                            sums[i][0] = $fma(x, b0, sums[i][0]);
                            sums[i][1] = $fma(x, b1, sums[i][1]);
                        }
                    }
                    a = a.wrapping_add(a_step);
                    b = b.wrapping_add(b_step);
                }
                for i in 0..H {
                    for (half, &sum) in sums[i].iter().enumerate() {
                        // SAFETY: the caller's promise: C has `H` rows of `2·lanes` elements.
                        unsafe {
                            let c = c.add(i * c_row + half * $lanes);
                            $store(c, if add { $add($load(c), sum) } else { sum });
                        }
                    }
                }
            }
        };
    }

    tile!(f32_avx2, f32_avx2_rows, "avx2,fma", heights: 1 2 3 4 5 6,
        _mm256_setzero_ps _mm256_loadu_ps _mm256_storeu_ps _mm256_set1_ps _mm256_fmadd_ps _mm256_add_ps, 8);
    tile!(f32_avx512, f32_avx512_rows, "avx2,fma,avx512f", heights: 1 2 3 4 5 6 7 8 9 10 11 12,
        _mm512_setzero_ps _mm512_loadu_ps _mm512_storeu_ps _mm512_set1_ps _mm512_fmadd_ps _mm512_add_ps, 16);
}
