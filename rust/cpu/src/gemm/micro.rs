//! The innermost loop: one tile of C, held in registers while k runs; and the table of kernels.
//!
//! A tile is `rows × width` with `rows ≤ height` and a width of two registers. Each k step loads one row of B, broadcasts
//! one element of A per row of C, and does `rows · width` multiply-adds. Tiles fill the register file: AVX2 has 16
//! registers, and 6 rows take 12 for sums, 2 for B and 1 for the broadcast; that is also enough independent sums to hide
//! the latency of two multiply-adds a cycle. Every element of C is one chain of multiply-adds over k, whatever the tile,
//! so edges give the same bits as the inside.

use super::pack::{self, Transpose};
use super::vector::Vector;
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
    /// What `stream` asks memory for, a line at each step, `ahead_step` elements apart.
    pub(super) ahead: *const T,
    pub(super) ahead_step: usize,
    /// C's element (row i, column j) is at `c + i·c_row + j`.
    pub(super) c: *mut T,
    pub(super) c_row: usize,
    pub(super) add: bool,
}

/// Computes a tile of so many rows.
pub(super) type TileFn<T> = unsafe fn(rows: usize, tile: &Tile<T>);

/// The functions of a type at a level, and the sizes that they are made for.
#[derive(Clone, Copy, Debug)]
pub struct Kernel<T> {
    /// Rows of a whole tile.
    pub(super) height: usize,
    /// Columns of a tile.
    pub(super) width: usize,
    /// The most steps of K in a block, chosen so that a panel of B takes three quarters of the first cache.
    pub(super) depth: usize,
    /// If it is better to keep the rows of a tile there, and to read panels of B from the second cache: the most steps
    /// then. Wide tiles have long panels, and few bytes of B for each multiply-add.
    pub(super) deep: Option<usize>,
    /// Computes a tile of `rows ≤ height` rows and exactly `width` columns.
    ///
    /// # Safety
    /// * the CPU has the level;
    /// * `1 ≤ rows ≤ height`; A, B are readable and C is writable (readable if `add`) at the places that [`Tile`] names.
    pub(super) tile: TileFn<T>,
    /// The same, and asks for what is ahead, which need not exist.
    ///
    /// # Safety
    /// As `tile`.
    pub(super) stream: TileFn<T>,
    /// If the level has one: the same for columns that are rows of B in memory, with `b_step` between columns, and the
    /// most rows that it takes.
    pub(super) across: Option<(usize, TileFn<T>)>,
    /// Packs a panel whose lanes are rows of memory; its width is `height` or `width`.
    pub(super) transpose: Transpose<T>,
}

/// The largest `height · width`.
pub(super) const MAX_TILE: usize = 12 * 32;

/// Defines a function that gives a kernel: `heights` rows of two registers, compiled with `features`.
macro_rules! kernel {
    ($name:ident: $element:ty, $register:ty, depth: $depth:literal, deep: $deep:expr, $($features:literal,)?
     heights: $($height:literal)+, transpose: $transpose:path, across: $across:expr) => {
        fn $name() -> Kernel<$element> {
            $(#[target_feature(enable = $features)])?
            unsafe fn run_tile(rows: usize, at: &Tile<$element>) {
                match rows {
                    // SAFETY: the caller's promise; the height is the number of rows.
                    $($height => unsafe { tile::<$register, $height, false>(at) },)+
                    _ => debug_assert!(false, "a tile of {rows} rows"),
                }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn run_stream(rows: usize, at: &Tile<$element>) {
                match rows {
                    // SAFETY: as above.
                    $($height => unsafe { tile::<$register, $height, true>(at) },)+
                    _ => debug_assert!(false, "a tile of {rows} rows"),
                }
            }
            Kernel {
                height: [$($height),+].len(),
                width: 2 * <$register as Vector>::LANES,
                depth: $depth,
                deep: $deep,
                tile: run_tile,
                stream: run_stream,
                across: $across,
                transpose: $transpose,
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{__m128, __m128d, __m256, __m256d, __m512, __m512d};

    use super::super::across;
    use super::*;

    kernel!(f32_sse2: f32, __m128, depth: 384, deep: None, heights: 1 2 3 4 5 6, transpose: pack::transpose, across: None);
    kernel!(f64_sse2: f64, __m128d, depth: 384, deep: None, heights: 1 2 3 4 5 6, transpose: pack::transpose, across: None);
    kernel!(f32_avx2: f32, __m256, depth: 384, deep: None, "avx2,fma", heights: 1 2 3 4 5 6, transpose: pack::x86::transpose,
        across: Some((across::MAX_ROWS, across::tile)));
    kernel!(f64_avx2: f64, __m256d, depth: 384, deep: None, "avx2,fma", heights: 1 2 3 4 5 6, transpose: pack::transpose, across: None);
    kernel!(f32_avx512: f32, __m512, depth: 256, deep: Some(384), "avx2,fma,avx512f", heights: 1 2 3 4 5 6 7 8 9 10 11 12,
        transpose: pack::x86::transpose, across: None);
    kernel!(f64_avx512: f64, __m512d, depth: 256, deep: None, "avx2,fma,avx512f", heights: 1 2 3 4 5 6 7 8 9 10 11 12,
        transpose: pack::transpose, across: None);

    pub(crate) fn kernel_f32(level: Level) -> Kernel<f32> {
        match level {
            Level::Avx512 => f32_avx512(),
            Level::Avx2 => f32_avx2(),
            Level::Baseline => f32_sse2(),
        }
    }

    pub(crate) fn kernel_f64(level: Level) -> Kernel<f64> {
        match level {
            Level::Avx512 => f64_avx512(),
            Level::Avx2 => f64_avx2(),
            Level::Baseline => f64_sse2(),
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{kernel_f32, kernel_f64};

#[cfg(any(not(target_arch = "x86_64"), test))]
pub(super) mod portable {
    use super::super::vector::Lanes;
    use super::*;

    kernel!(f32_lanes: f32, Lanes<f32, 8>, depth: 384, deep: None, heights: 1 2 3 4 5 6, transpose: pack::transpose, across: None);
    kernel!(f64_lanes: f64, Lanes<f64, 4>, depth: 384, deep: None, heights: 1 2 3 4 5 6, transpose: pack::transpose, across: None);

    pub(crate) fn kernel_f32(_level: Level) -> Kernel<f32> {
        f32_lanes()
    }

    pub(crate) fn kernel_f64(_level: Level) -> Kernel<f64> {
        f64_lanes()
    }
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) use portable::{kernel_f32, kernel_f64};

/// Computes a tile of `H` rows of two registers.
///
/// # Safety
/// As [`Kernel::tile`] with `rows = H`; inlined into code compiled for `V`.
#[inline(always)]
unsafe fn tile<V: Vector, const H: usize, const AHEAD: bool>(tile: &Tile<V::Element>) {
    let Tile { a_row, c, c_row, add, .. } = *tile;
    // SAFETY: the caller's promise: C has `H` rows of two registers.
    unsafe {
        let mut sums = [[V::splat(<V::Element as crate::real::Real>::ZERO); 2]; H];
        for i in 0..H {
            let c = c.wrapping_add(i * c_row);
            if add {
                sums[i] = [V::load(c), V::load(c.add(V::LANES))];
            } else {
                prefetch(c);
                prefetch(c.wrapping_add(2 * V::LANES - 1));
            }
        }
        // Rows at distances that are known in packed A need no arithmetic in the loop.
        sums = if a_row == 1 {
            steps::<V, H, AHEAD>(tile, 1, sums)
        } else {
            steps::<V, H, AHEAD>(tile, a_row, sums)
        };
        for i in 0..H {
            for (half, &sum) in sums[i].iter().enumerate() {
                sum.store(c.add(i * c_row + half * V::LANES));
            }
        }
    }
}

/// Adds the products of all steps to `sums`.
///
/// # Safety
/// As [`tile`]; `a_row` is the tile's.
#[inline(always)]
unsafe fn steps<V: Vector, const H: usize, const AHEAD: bool>(
    tile: &Tile<V::Element>,
    a_row: usize,
    mut sums: [[V; 2]; H],
) -> [[V; 2]; H] {
    let Tile { depth, mut a, a_step, mut b, b_step, mut ahead, ahead_step, .. } = *tile;
    for _ in 0..depth {
        // SAFETY: the caller's promise: row `p` of B has two registers, A has `H` rows.
        unsafe {
            let (b0, b1) = (V::load(b), V::load(b.add(V::LANES)));
            if AHEAD {
                prefetch(ahead);
                ahead = ahead.wrapping_add(ahead_step);
            }
            for i in 0..H {
                let x = V::splat(*a.add(i * a_row));
                sums[i][0] = x.mul_add(b0, sums[i][0]);
                sums[i][1] = x.mul_add(b1, sums[i][1]);
            }
        }
        a = a.wrapping_add(a_step);
        b = b.wrapping_add(b_step);
    }
    sums
}

/// Asks for the cache line of `at`, which need not be readable.
#[inline(always)]
pub(crate) fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch never faults, and every x86-64 CPU has it.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
