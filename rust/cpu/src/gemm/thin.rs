//! Products with few rows of A (a decoding step): B is read once, as it lies, at the speed of memory.
//!
//! * B `[K, N]`: `C[i, j] += Σ_p A[i, p]·B[p, j]` in groups of four rows of B, over [`COLUMNS`] columns so that C's
//!   part stays in the first cache.
//! * B `[N, K]`, transposed: `C[i, j]` is the dot product of two rows, with the lanes of a register for sums; several
//!   rows of B at a time give independent sums, which hides the latency of addition.
//!
//! Each element's order of summation depends on K only, so columns may be split at will.

use super::micro::prefetch;
use super::vector::{MAX_LANES, Vector};
use crate::real::Real;

/// The most rows of A for which these kernels are used.
pub(super) const MAX_ROWS: usize = 8;
/// Columns of C worked on at a time.
pub(super) const COLUMNS: usize = 512;
/// Rows of B `[K, N]` per pass over C.
const GROUP: usize = 4;

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
/// * inlined into code compiled for `V`, on a CPU that has it; `rows ≤ MAX_ROWS`;
/// * A and B are readable, C writable and initialised, and nobody else touches C.
#[inline(always)]
pub(super) unsafe fn run<V: Vector>(transposed: bool, thin: &Thin<V::Element>) {
    debug_assert!(thin.rows <= MAX_ROWS && (!transposed || thin.a_step == 1), "{} rows", thin.rows);
    // SAFETY: the caller's promise, in all arms; the constant is the number of rows.
    unsafe {
        match (transposed, thin.rows) {
            (false, 1) => plain::<V, 1>(thin),
            (false, 2) => plain::<V, 2>(thin),
            (false, 3) => plain::<V, 3>(thin),
            (false, 4) => plain::<V, 4>(thin),
            (false, 5) => plain::<V, 5>(thin),
            (false, 6) => plain::<V, 6>(thin),
            (false, 7) => plain::<V, 7>(thin),
            (false, 8) => plain::<V, 8>(thin),
            (true, 1) => dots::<V, 1, 8>(thin),
            (true, 2) => dots::<V, 2, 4>(thin),
            (true, 3) => dots::<V, 3, 4>(thin),
            (true, 4) => dots::<V, 4, 2>(thin),
            (true, 5) => dots::<V, 5, 2>(thin),
            (true, 6) => dots::<V, 6, 2>(thin),
            (true, 7) => dots::<V, 7, 1>(thin),
            (true, 8) => dots::<V, 8, 1>(thin),
            _ => {}
        }
    }
}

/// B `[K, N]`.
///
/// # Safety
/// As [`run`], with `rows = M`.
#[inline(always)]
unsafe fn plain<V: Vector, const M: usize>(thin: &Thin<V::Element>) {
    let Thin { columns, depth, a, a_row, a_step, b, b_stride, c, c_row, add, .. } = *thin;
    let zero = V::Element::ZERO;
    let wide = 2 * V::LANES;
    // SAFETY: indices stay within rows, columns and depth, where the caller vouches for the operands.
    unsafe {
        if !add {
            for i in 0..M {
                std::slice::from_raw_parts_mut(c.add(i * c_row), columns).fill(zero);
            }
        }
        let grouped = depth - depth % GROUP;
        for p in (0..grouped).step_by(GROUP) {
            let mut x = [[zero; GROUP]; M];
            for i in 0..M {
                for q in 0..GROUP {
                    x[i][q] = *a.add(i * a_row + (p + q) * a_step);
                }
            }
            let mut j = 0;
            while j + wide <= columns {
                let mut rows = [[V::splat(zero); 2]; GROUP];
                for (q, row) in rows.iter_mut().enumerate() {
                    let at = b.add((p + q) * b_stride + j);
                    *row = [V::load(at), V::load(at.add(V::LANES))];
                    prefetch(at.wrapping_add(GROUP * b_stride));
                }
                for i in 0..M {
                    let at = c.add(i * c_row + j);
                    let mut sums = [V::load(at), V::load(at.add(V::LANES))];
                    for q in 0..GROUP {
                        let x = V::splat(x[i][q]);
                        sums = [x.mul_add(rows[q][0], sums[0]), x.mul_add(rows[q][1], sums[1])];
                    }
                    sums[0].store(at);
                    sums[1].store(at.add(V::LANES));
                }
                j += wide;
            }
            for j in j..columns {
                for i in 0..M {
                    let sum = c.add(i * c_row + j);
                    for q in 0..GROUP {
                        *sum = V::mul_add_one(x[i][q], *b.add((p + q) * b_stride + j), *sum);
                    }
                }
            }
        }
        for p in grouped..depth {
            for i in 0..M {
                let x = *a.add(i * a_row + p * a_step);
                for j in 0..columns {
                    let sum = c.add(i * c_row + j);
                    *sum = V::mul_add_one(x, *b.add(p * b_stride + j), *sum);
                }
            }
        }
    }
}

/// B `[N, K]`, `R` rows of it at a time.
///
/// # Safety
/// As [`run`], with `rows = M` and `a_step = 1`.
#[inline(always)]
unsafe fn dots<V: Vector, const M: usize, const R: usize>(thin: &Thin<V::Element>) {
    let mut j = 0;
    while j + R <= thin.columns {
        // SAFETY: columns `j..j + R` exist.
        unsafe { dot_rows::<V, M, R>(thin, j) };
        j += R;
    }
    for j in j..thin.columns {
        // SAFETY: column `j` exists.
        unsafe { dot_rows::<V, M, 1>(thin, j) };
    }
}

/// Columns `j..j + R` of all rows.
///
/// # Safety
/// As [`dots`]; these columns exist.
#[inline(always)]
unsafe fn dot_rows<V: Vector, const M: usize, const R: usize>(thin: &Thin<V::Element>, j: usize) {
    let Thin { depth, a, a_row, b, b_stride, c, c_row, add, .. } = *thin;
    let whole = depth - depth % V::LANES;
    // SAFETY: indices stay within rows, columns and depth, where the caller vouches for the operands.
    unsafe {
        let b = b.add(j * b_stride);
        let mut sums = [[V::splat(V::Element::ZERO); R]; M];
        for p in (0..whole).step_by(V::LANES) {
            let mut ys = [V::splat(V::Element::ZERO); R];
            for (r, y) in ys.iter_mut().enumerate() {
                *y = V::load(b.add(r * b_stride + p));
            }
            for i in 0..M {
                let x = V::load(a.add(i * a_row + p));
                for r in 0..R {
                    sums[i][r] = x.mul_add(ys[r], sums[i][r]);
                }
            }
        }
        for i in 0..M {
            for r in 0..R {
                let mut lanes = [V::Element::ZERO; MAX_LANES];
                sums[i][r].store(lanes.as_mut_ptr());
                for (lane, p) in lanes.iter_mut().zip(whole..depth) {
                    *lane = V::mul_add_one(*a.add(i * a_row + p), *b.add(r * b_stride + p), *lane);
                }
                let mut half = V::LANES / 2;
                while half > 0 {
                    for l in 0..half {
                        lanes[l] += lanes[l + half];
                    }
                    half /= 2;
                }
                let c = c.add(i * c_row + j + r);
                *c = if add { *c + lanes[0] } else { lanes[0] };
            }
        }
    }
}
