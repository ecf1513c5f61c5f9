//! Products with few rows of A (a decoding step): B is read once, as it lies, at the speed of memory.
//!
//! * B `[K, N]`: `C[i, j] += Σ_p A[i, p]·B[p, j]` in groups of four rows of B, over [`COLUMNS`] columns so that C's
//!   part stays in the first cache.
//! * B `[N, K]`, transposed: `C[i, j]` is the dot product of two rows, in [`LANES`] lanes; several rows of B at a time
//!   give independent sums, which hides the latency of addition.
//!
//! Each element's order of summation depends on K only, so columns may be split at will.

use super::micro::{has_fma, mul_add};
use crate::real::Real;
use crate::simd::Level;

/// The most rows of A for which these kernels are used.
pub(super) const MAX_ROWS: usize = 8;
/// Columns of C worked on at a time.
pub(super) const COLUMNS: usize = 512;
const GROUP: usize = 4;
const LANES: usize = 8;

/// Operands of a thin product over some columns: C `[rows, columns]`, `=` or `+=` if `add`.
#[derive(Clone, Copy)]
pub(super) struct Thin<T> {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) depth: usize,
    /// A's element (i, p) is at `a + i·a_row + p·a_step`.
    pub(super) a: *const T,
    pub(super) a_row: usize,
    pub(super) a_step: usize,
    /// Rows of memory of B are `b_stride` apart.
    pub(super) b: *const T,
    pub(super) b_stride: usize,
    pub(super) c: *mut T,
    pub(super) c_row: usize,
    pub(super) add: bool,
}

/// Runs the product; `transposed` says that B is `[N, K]`, for which A needs `a_step = 1`.
///
/// # Safety
/// * the CPU has `level`, and `rows ≤ MAX_ROWS`;
/// * A and B are readable, C writable and initialised, and nobody else touches C.
pub(super) unsafe fn run<T: Real>(level: Level, transposed: bool, thin: &Thin<T>) {
    // SAFETY: the caller's promise.
    unsafe {
        match level {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Avx2 => avx2(transposed, thin),
            _ => body::<T, { has_fma(Level::Baseline) }>(transposed, thin),
        }
    }
}

/// # Safety
/// As [`run`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<T: Real>(transposed: bool, thin: &Thin<T>) {
    // SAFETY: the caller's promise.
    unsafe { body::<T, true>(transposed, thin) }
}

/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn body<T: Real, const FMA: bool>(transposed: bool, thin: &Thin<T>) {
    // SAFETY: the caller's promise, in all arms.
    unsafe {
        match (transposed, thin.rows) {
            (false, 1) => plain::<T, 1, FMA>(thin),
            (false, 2) => plain::<T, 2, FMA>(thin),
            (false, 3) => plain::<T, 3, FMA>(thin),
            (false, 4) => plain::<T, 4, FMA>(thin),
            (false, 5) => plain::<T, 5, FMA>(thin),
            (false, 6) => plain::<T, 6, FMA>(thin),
            (false, 7) => plain::<T, 7, FMA>(thin),
            (false, 8) => plain::<T, 8, FMA>(thin),
            (true, 1) => dots::<T, 1, 8, FMA>(thin),
            (true, 2) => dots::<T, 2, 4, FMA>(thin),
            (true, 3) => dots::<T, 3, 2, FMA>(thin),
            (true, 4) => dots::<T, 4, 2, FMA>(thin),
            (true, 5) => dots::<T, 5, 1, FMA>(thin),
            (true, 6) => dots::<T, 6, 1, FMA>(thin),
            (true, 7) => dots::<T, 7, 1, FMA>(thin),
            (true, 8) => dots::<T, 8, 1, FMA>(thin),
            _ => debug_assert!(thin.rows == 0, "{} rows", thin.rows),
        }
    }
}

/// # Safety
/// As [`run`], with `rows = M`.
#[inline(always)]
unsafe fn plain<T: Real, const M: usize, const FMA: bool>(thin: &Thin<T>) {
    const WIDE: usize = 16;
    let Thin { columns, depth, a, a_row, a_step, b, b_stride, c, c_row, add, .. } = *thin;
    // SAFETY: here and below, indices stay within rows, columns and depth, as the caller promises.
    let element = |i: usize, p: usize| unsafe { *a.add(i * a_row + p * a_step) };
    if !add {
        for i in 0..M {
            // SAFETY: see above.
            unsafe { std::slice::from_raw_parts_mut(c.add(i * c_row), columns) }.fill(T::ZERO);
        }
    }
    let grouped = depth - depth % GROUP;
    for p in (0..grouped).step_by(GROUP) {
        let x: [[T; GROUP]; M] = std::array::from_fn(|i| std::array::from_fn(|q| element(i, p + q)));
        let mut j = 0;
        while j + WIDE <= columns {
            // SAFETY: see above.
            let rows: [[T; WIDE]; GROUP] =
                std::array::from_fn(|q| unsafe { b.add((p + q) * b_stride + j).cast::<[T; WIDE]>().read() });
            for i in 0..M {
                // SAFETY: see above.
                let sums = unsafe { &mut *c.add(i * c_row + j).cast::<[T; WIDE]>() };
                let mut local = *sums;
                for q in 0..GROUP {
                    for l in 0..WIDE {
                        local[l] = mul_add::<T, FMA>(x[i][q], rows[q][l], local[l]);
                    }
                }
                *sums = local;
            }
            j += WIDE;
        }
        for j in j..columns {
            for i in 0..M {
                // SAFETY: see above.
                unsafe {
                    let sum = c.add(i * c_row + j);
                    for q in 0..GROUP {
                        *sum = mul_add::<T, FMA>(x[i][q], *b.add((p + q) * b_stride + j), *sum);
                    }
                }
            }
        }
    }
    for p in grouped..depth {
        for i in 0..M {
            let x = element(i, p);
            for j in 0..columns {
                // SAFETY: see above.
                unsafe {
                    let sum = c.add(i * c_row + j);
                    *sum = mul_add::<T, FMA>(x, *b.add(p * b_stride + j), *sum);
                }
            }
        }
    }
}

/// # Safety
/// As [`run`], with `rows = M` and `a_step = 1`.
#[inline(always)]
unsafe fn dots<T: Real, const M: usize, const R: usize, const FMA: bool>(thin: &Thin<T>) {
    let mut j = 0;
    while j + R <= thin.columns {
        // SAFETY: columns `j..j + R` exist.
        unsafe { dot_rows::<T, M, R, FMA>(thin, j) };
        j += R;
    }
    for j in j..thin.columns {
        // SAFETY: column `j` exists.
        unsafe { dot_rows::<T, M, 1, FMA>(thin, j) };
    }
}

/// Columns `j..j + R` of all rows.
///
/// # Safety
/// As [`dots`]; these columns exist.
#[inline(always)]
unsafe fn dot_rows<T: Real, const M: usize, const R: usize, const FMA: bool>(thin: &Thin<T>, j: usize) {
    let Thin { depth, a, a_row, b, b_stride, c, c_row, add, .. } = *thin;
    let mut sums = [[[T::ZERO; LANES]; R]; M];
    let whole = depth - depth % LANES;
    for p in (0..whole).step_by(LANES) {
        // SAFETY: eight elements from `p` exist in each row.
        let ys: [[T; LANES]; R] =
            std::array::from_fn(|r| unsafe { b.add((j + r) * b_stride + p).cast::<[T; LANES]>().read() });
        for i in 0..M {
            // SAFETY: as above.
            let x = unsafe { a.add(i * a_row + p).cast::<[T; LANES]>().read() };
            for r in 0..R {
                for l in 0..LANES {
                    sums[i][r][l] = mul_add::<T, FMA>(x[l], ys[r][l], sums[i][r][l]);
                }
            }
        }
    }
    for i in 0..M {
        for r in 0..R {
            let mut lanes = sums[i][r];
            for (lane, p) in lanes.iter_mut().zip(whole..depth) {
                // SAFETY: `p < depth`.
                *lane = unsafe {
                    mul_add::<T, FMA>(*a.add(i * a_row + p), *b.add((j + r) * b_stride + p), *lane)
                };
            }
            let sum = fold(&lanes);
            // SAFETY: element (i, j + r) of C exists.
            unsafe {
                let c = c.add(i * c_row + j + r);
                *c = if add { *c + sum } else { sum };
            }
        }
    }
}

/// The sum of the lanes. Not inlined: seeing lanes that are stored together, the compiler keeps them in vectors.
#[inline(never)]
fn fold<T: Real>(lanes: &[T; LANES]) -> T {
    let [s0, s1, s2, s3, s4, s5, s6, s7] = *lanes;
    ((s0 + s4) + (s2 + s6)) + ((s1 + s5) + (s3 + s7))
}
