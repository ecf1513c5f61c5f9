//! Rows by index: gather, scatter-add, counting labels; the best of a row.

use crate::error::{Error, Result};
use crate::kernels::elementwise::add_row;
use crate::kernels::{for_rows, rows_per_task};
use crate::real::Real;
use crate::threads::Pool;
use crate::view::{Mat, MatMut};

/// The largest width of a column strip that one task of a scatter-add owns.
const STRIP: usize = 64;

/// Checks that every index points into `rows` rows.
///
/// # Errors
/// Names the first index that does not, and its place.
pub(crate) fn check(op: &'static str, index: &[i32], rows: usize) -> Result<()> {
    match index.iter().position(|&i| i < 0 || i as usize >= rows) {
        None => Ok(()),
        Some(at) => {
            let message = format!("index {} at place {at} is outside 0..{rows}", index[at]);
            Err(Error::Index { op, message })
        }
    }
}

/// `y[n] = table[index[n]]`, from a table of so many rows that `row` writes. Shapes: table [R, C], index [N], y [N, C].
pub(crate) fn gather<T: Copy + Send + Sync>(
    pool: &Pool,
    (rows, row): (usize, impl Fn(usize, &mut [T]) + Sync),
    index: &[i32],
    y: MatMut<'_, T>,
) -> Result<()> {
    check("gather", index, rows)?;
    for_rows(pool, index.len(), rows_per_task(y.cols), |n| {
        // SAFETY: one task a row.
        row(index[n] as usize, unsafe { y.row_mut(n) });
    });
    Ok(())
}

/// `y = base (or 0); y[index[n]] += source[n]` in the order of n. Shapes: source [N, C], index [N], base, y [R, C]; y may
/// be base. Tasks own strips of columns, so the order of additions does not depend on their number.
pub(crate) fn scatter_add<T: Real>(
    pool: &Pool,
    source: Mat<'_, T>,
    index: &[i32],
    base: Option<Mat<'_, T>>,
    y: MatMut<'_, T>,
) -> Result<()> {
    check("scatter_add", index, y.rows)?;
    let shared = base.is_some_and(|b| std::ptr::eq(b.as_ptr(), y.as_ptr()));
    if !shared {
        for_rows(pool, y.rows, rows_per_task(y.cols), |r| {
            // SAFETY: one task a row.
            let row = unsafe { y.row_mut(r) };
            match &base {
                Some(base) => row.copy_from_slice(base.row(r)),
                None => row.fill(T::ZERO),
            }
        });
    }
    let strip = STRIP.min(y.cols.div_ceil(2)).max(1);
    pool.run(y.cols.div_ceil(strip), &|task, _| {
        let from = task * strip;
        let cols = strip.min(y.cols - from);
        for (n, &r) in index.iter().enumerate() {
            // SAFETY: this task alone touches these columns.
            let to = unsafe { y.block(r as usize, 1, from, cols).row_mut(0) };
            add_row(source.block(n, 1, from, cols).row(0), to);
        }
    });
    Ok(())
}

/// How many labels are 0 or more.
pub(crate) fn count_labels<T: Real>(labels: &[i32], y: MatMut<'_, T>) {
    let count = labels.iter().filter(|&&l| l >= 0).count();
    // SAFETY: no other task runs.
    unsafe { y.set(0, 0, T::from_f64(count as f64)) };
}

/// The K greatest of each row, their columns, and what all weigh beside the greatest, as it is and divided by the row's
/// temperature. Shapes: x [R, V], temperature [R], best, tokens [R, K], masses [R, 4].
pub(crate) fn best<T: Real>(
    pool: &Pool,
    x: Mat<'_, T>,
    temperature: &[T],
    best: MatMut<'_, T>,
    tokens: MatMut<'_, i32>,
    masses: MatMut<'_, T>,
) {
    for_rows(pool, x.rows, 1, |r| {
        let row = x.row(r);
        let before = |a: &u32, b: &u32| {
            let (x, y) = (row[*a as usize].to_f64(), row[*b as usize].to_f64());
            y.total_cmp(&x).then(a.cmp(b))
        };
        let mut order: Vec<u32> = (0..row.len() as u32).collect();
        if best.cols < order.len() {
            order.select_nth_unstable_by(best.cols - 1, before);
            order.truncate(best.cols);
        }
        order.sort_unstable_by(before);
        // SAFETY: one task a row.
        let (best, tokens, masses) = unsafe { (best.row_mut(r), tokens.row_mut(r), masses.row_mut(r)) };
        for ((&column, best), token) in order.iter().zip(best).zip(tokens) {
            (*best, *token) = (row[column as usize], column as i32);
        }
        let greatest = row[order[0] as usize];
        for (i, t) in [T::ONE, temperature[r]].into_iter().enumerate() {
            let shift = (greatest / t).to_f64();
            let mass: f64 = row.iter().map(|&x| ((x / t).to_f64() - shift).exp()).sum();
            let high = T::from_f64(mass);
            (masses[2 * i], masses[2 * i + 1]) = (high, T::from_f64(mass - high.to_f64()));
        }
    });
}
