//! Small products inside a task: a factor is packed once and read by several products, and each row of tiles names the
//! columns and steps that matter to it, so that what a mask hides is neither computed nor read.

use std::ops::Range;

use super::micro::{Kernel, Tile};
use super::pack::{self, Source};
use super::run_tile;
use crate::real::Real;
use crate::view::{Mat, MatMut};

/// The widest tile of any kernel: packed factors and scratch rows of this many columns fit all of them.
pub(crate) const WIDEST: usize = 32;
/// Bytes of a packed factor that stays in the first cache while all rows of tiles read it.
const NEAR: usize = 1 << 14;

/// A packed right factor [depth, columns] in memory of the caller, or a part of one.
#[derive(Clone, Copy)]
pub(crate) struct Panels<T> {
    data: *const T,
    /// Steps of a panel in memory.
    stride: usize,
    depth: usize,
    columns: usize,
}

impl<T: Real> Blocks<T> {
    /// Steps `from .. from + depth` of a packed factor.
    pub(crate) fn steps(&self, b: Panels<T>, from: usize, depth: usize) -> Panels<T> {
        debug_assert!(from + depth <= b.depth);
        Panels { data: b.data.wrapping_add(from * self.kernel.width), depth, ..b }
    }
}

impl<T> Panels<T> {
    /// Columns `from .. from + columns`, `from` a multiple of [`WIDEST`].
    pub(crate) fn columns(&self, from: usize, columns: usize) -> Self {
        debug_assert!(from.is_multiple_of(WIDEST) && from + columns <= self.columns);
        Self { data: self.data.wrapping_add(from * self.stride), columns, ..*self }
    }
}

/// What a row of tiles needs of a product: columns of C, the others stay as they are, and steps of the inner dimension,
/// the others are taken for zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reach {
    pub(crate) columns: Range<usize>,
    pub(crate) steps: Range<usize>,
}

/// The kernels of a type, for products on the calling thread.
#[derive(Clone, Copy)]
pub(crate) struct Blocks<T> {
    pub(super) kernel: Kernel<T>,
}

impl<T: Real> Blocks<T> {
    /// Packs B [K, N], or [N, K] if `transposed`, into `to`, which holds at least N (to the next multiple of
    /// [`WIDEST`]) · K elements. They are valid as long as nobody writes to `to`.
    ///
    /// # Panics
    /// If there is no room.
    pub(crate) fn pack(&self, b: Mat<'_, T>, transposed: bool, to: &mut [T]) -> Panels<T> {
        let (depth, columns) = if transposed { (b.cols, b.rows) } else { (b.rows, b.cols) };
        assert!(to.len() >= columns.next_multiple_of(self.kernel.width) * depth, "no room for packed factor");
        let source = Source { data: b.as_ptr(), stride: b.stride, lanes_adjacent: !transposed };
        let &Kernel { width, transpose, .. } = &self.kernel;
        // SAFETY: B is readable as it says, and `to` has room, as asserted.
        unsafe { pack::pack(&source, transpose, (0, columns), (0, depth), width, to.as_mut_ptr()) };
        Panels { data: to.as_ptr(), stride: depth, depth, columns }
    }

    /// `C = op(A)·B`, or `C += op(A)·B`, where A is [M, K] or, with `ta`, [K, M]. `reach(rows)` says what a row of tiles
    /// needs. Whole tiles are written where C has room for them (`padded`: columns to the next multiple of [`WIDEST`]).
    ///
    /// # Safety
    /// * `b` is valid, K is its depth, N its number of columns, and both are as in A and C;
    /// * nobody else touches C, which overlaps neither A nor B; if `padded`, its rows have as many columns as that says.
    pub(crate) unsafe fn multiply(
        &self,
        (a, ta): (Mat<'_, T>, bool),
        b: Panels<T>,
        c: MatMut<'_, T>,
        (add, padded): (bool, bool),
        reach: impl Fn(Range<usize>) -> Reach,
    ) {
        let &Kernel { height, width, .. } = &self.kernel;
        let m = if ta { a.cols } else { a.rows };
        debug_assert!(m == c.rows && b.columns == c.cols && b.depth == if ta { a.rows } else { a.cols });
        let source = Source { data: a.as_ptr(), stride: a.stride, lanes_adjacent: ta };
        let (a_row, a_step) = source.strides();
        let tile = |i: usize, j: usize, steps: &Range<usize>| {
            if add && steps.is_empty() {
                return;
            }
            let tile = Tile {
                depth: steps.len(),
                a: source.at(i, steps.start),
                a_row,
                a_step,
                b: b.data.wrapping_add(j * b.stride + steps.start * width),
                b_step: width,
                ahead: b.data,
                ahead_step: 0,
                c: c.as_ptr().wrapping_add(i * c.stride + j),
                c_row: c.stride,
                add,
            };
            let columns = if padded { width } else { width.min(b.columns - j) };
            // SAFETY: rows, columns and steps are inside the operands, which are as the caller promises.
            unsafe { run_tile(&self.kernel, height.min(m - i), columns, tile) };
        };
        let rows = |i: usize| reach(i..m.min(i + height));
        let panels = |columns: &Range<usize>| (columns.start / width * width..columns.end).step_by(width);
        if b.depth * b.columns * size_of::<T>() <= NEAR {
            for i in (0..m).step_by(height) {
                let Reach { columns, steps } = rows(i);
                panels(&columns).for_each(|j| tile(i, j, &steps));
            }
        } else {
            for j in (0..b.columns).step_by(width) {
                for i in (0..m).step_by(height) {
                    let Reach { columns, steps } = rows(i);
                    if columns.start < j + width && j < columns.end {
                        tile(i, j, &steps);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::PackBuffers;

    fn numbers(count: usize, seed: usize) -> Vec<f64> {
        (0..count).map(|i| ((i * 37 + seed * 11) % 23) as f64 - 11.0).collect()
    }

    /// Products of small integers are exact, so every element can be compared for equality.
    #[test]
    fn a_row_of_tiles_takes_its_columns_and_steps_alone() {
        let blocks = PackBuffers::<f64>::new(1).unwrap().blocks();
        for (m, n, k) in [(1, 1, 1), (7, 40, 5), (64, 33, 70), (13, 128, 64)] {
            for (ta, tb, add) in [(false, false, false), (true, false, true), (false, true, true)] {
                let (a, b) = (numbers(m * k, 1), numbers(n * k, 2));
                let at = |i: usize, p: usize| if ta { a[p * m + i] } else { a[i * k + p] };
                let bt = |p: usize, j: usize| if tb { b[j * k + p] } else { b[p * n + j] };
                let stride = n.next_multiple_of(WIDEST);
                let mut c = numbers(m * stride, 3);
                let before = c.clone();
                let mut memory = vec![0.0; stride * k];
                let a = if ta { Mat::new(&a, k, m) } else { Mat::new(&a, m, k) };
                let b = if tb { Mat::new(&b, n, k) } else { Mat::new(&b, k, n) };
                let panels = blocks.pack(b, tb, &mut memory);
                let reach = |rows: Range<usize>| Reach {
                    columns: (rows.start / 2).min(n)..n.min(rows.end),
                    steps: (rows.start / 3).min(k)..k.min(rows.end),
                };
                // SAFETY: C has rows of `stride` elements, nobody else has it.
                unsafe {
                    let to = MatMut::from_raw(c.as_mut_ptr(), m, n, stride);
                    blocks.multiply((a, ta), panels, to, (add, false), reach);
                }
                let height = blocks.kernel.height;
                for i in 0..m {
                    let first = i / height * height;
                    let Reach { columns, steps } = reach(first..m.min(first + height));
                    for j in columns {
                        let product: f64 = steps.clone().map(|p| at(i, p) * bt(p, j)).sum();
                        let old = if add { before[i * stride + j] } else { 0.0 };
                        assert_eq!(c[i * stride + j], old + product, "{m} {n} {k} at {i}, {j}");
                    }
                    assert_eq!(c[i * stride + n..(i + 1) * stride], before[i * stride + n..(i + 1) * stride]);
                }
            }
        }
    }
}
