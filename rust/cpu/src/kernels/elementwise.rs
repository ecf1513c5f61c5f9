//! Functions of one element, and sums over leading axes.

use pyrformer_graph::{Binary, Unary};

use crate::kernels::{for_chunks, for_rows, rows_per_task, sum_chunks};
use crate::real::Real;
use crate::simd_fn;
use crate::threads::Pool;
use crate::view::{Mat, MatMut};

/// Elements of a row that are worked on at a time, so that operands may be the memory of results.
pub(crate) const PIECE: usize = 256;
/// √(2/π), the factor inside GELU's tanh form.
const SQRT_2_OVER_PI: f64 = 0.797_884_560_802_865_4;
/// The cubic coefficient inside GELU's tanh form. Source: Hendrycks and Gimpel 2016, section 2.
const GELU_CUBIC: f64 = 0.044_715;
/// 1/√(2π), the normal density at 0.
const INV_SQRT_2PI: f64 = 0.398_942_280_401_432_7;

#[inline(always)]
fn map<T: Real>(y: &mut [T], f: impl Fn(T) -> T) {
    for y in y.iter_mut() {
        *y = f(*y);
    }
}

#[inline(always)]
fn sigmoid<T: Real, const FUSED: bool>(x: T) -> T {
    T::ONE / (T::ONE + (-x).exp_normal::<FUSED>())
}

/// (1 + tanh u)/2 of GELU's tanh form, u = √(2/π)·(x + 0.044715·x³), as sigmoid(2u): one exponential instead of a
/// hyperbolic tangent.
#[inline(always)]
fn gelu_gate<T: Real, const FUSED: bool>(x: T) -> T {
    let (c, cubic) = (T::from_f64(2.0 * SQRT_2_OVER_PI), T::from_f64(2.0 * SQRT_2_OVER_PI * GELU_CUBIC));
    sigmoid::<T, FUSED>(x * (c + cubic * (x * x)))
}

/// tanh(ln(1 + eˣ)) = n / (n + 2) with n = eˣ(eˣ + 2); beyond 20 it is 1 to the last digit, and eˣ would overflow.
#[inline(always)]
fn mish_gate<T: Real, const FUSED: bool>(x: T) -> T {
    let e = x.min(T::from_f64(20.0)).exp_normal::<FUSED>();
    let n = e * (e + T::from_f64(2.0));
    n / (n + T::from_f64(2.0))
}

/// The derivative of GELU's tanh form.
#[inline(always)]
fn gelu_tanh_slope<T: Real, const FUSED: bool>(x: T) -> T {
    let (c, cubic) = (T::from_f64(2.0 * SQRT_2_OVER_PI), T::from_f64(3.0 * GELU_CUBIC));
    let s = gelu_gate::<T, FUSED>(x);
    s + x * s * (T::ONE - s) * c * (T::ONE + cubic * x * x)
}

/// The derivative of x·sigmoid(c·x).
#[inline(always)]
fn swish_slope<T: Real, const FUSED: bool>(x: T, c: T) -> T {
    let s = sigmoid::<T, FUSED>(c * x);
    s * (T::ONE + c * x * (T::ONE - s))
}

/// −1, 0 or 1; what is no number stays none.
#[inline(always)]
fn sign<T: Real>(x: T) -> T {
    if x > T::ZERO {
        T::ONE
    } else if x < T::ZERO {
        -T::ONE
    } else {
        x
    }
}

/// The slope inside QuickGELU's sigmoid.
const QUICK: f64 = 1.702;

simd_fn! {
    /// `x = f(x)` for one row.
    pub(crate) fn unary_row<T: Real>(f: Unary, x: &mut [T]) {
        let half = T::from_f64(0.5);
        match f {
            Unary::Scale(s) => {
                let s = T::from_f64(s);
                map(x, |x| s * x);
            }
            Unary::Exp => map(x, |x| x.exp::<FUSED>()),
            Unary::Tanh => map(x, |x| x.tanh::<FUSED>()),
            Unary::Sigmoid => map(x, |x| sigmoid::<T, FUSED>(x)),
            Unary::Relu => map(x, |x| x.max(T::ZERO)),
            Unary::Gelu => {
                let s = T::from_f64(std::f64::consts::FRAC_1_SQRT_2);
                map(x, |x| half * x * (T::ONE + (x * s).erf::<FUSED>()));
            }
            Unary::GeluTanh => map(x, |x| x * gelu_gate::<T, FUSED>(x)),
            Unary::Silu => map(x, |x| x * sigmoid::<T, FUSED>(x)),
            Unary::QuickGelu => {
                let c = T::from_f64(QUICK);
                map(x, |x| x * sigmoid::<T, FUSED>(c * x));
            }
            Unary::Relu2 => map(x, |x| {
                let r = x.max(T::ZERO);
                r * r
            }),
            Unary::Mish => map(x, |x| x * mish_gate::<T, FUSED>(x)),
            Unary::Sqrt => map(x, |x| x.sqrt()),
            Unary::Sign => map(x, |x| sign(x)),
        }
    }
}

simd_fn! {
    /// `dy *= f'(x)` for one row.
    pub(crate) fn unary_grad_row<T: Real>(f: Unary, x: &[T], dy: &mut [T]) {
        #[inline(always)]
        fn times<T: Real>(x: &[T], dy: &mut [T], f: impl Fn(T) -> T) {
            for (dy, &x) in dy.iter_mut().zip(x) {
                *dy *= f(x);
            }
        }
        let half = T::from_f64(0.5);
        match f {
            Unary::Scale(s) => {
                let s = T::from_f64(s);
                times(x, dy, |_| s);
            }
            Unary::Exp => times(x, dy, |x| x.exp::<FUSED>()),
            Unary::Tanh => times(x, dy, |x| {
                let t = x.tanh::<FUSED>();
                T::ONE - t * t
            }),
            Unary::Sigmoid => times(x, dy, |x| {
                let s = sigmoid::<T, FUSED>(x);
                s * (T::ONE - s)
            }),
            Unary::Relu => times(x, dy, |x| if x > T::ZERO { T::ONE } else { T::ZERO }),
            Unary::Gelu => {
                // Φ(x) + x·φ(x), in two loops: with two exponentials in one, it is not vectorised.
                let (s, c) = (T::from_f64(std::f64::consts::FRAC_1_SQRT_2), T::from_f64(INV_SQRT_2PI));
                let mut slope = [T::ZERO; 256];
                for (x, dy) in x.chunks(slope.len()).zip(dy.chunks_mut(slope.len())) {
                    let slope = &mut slope[..x.len()];
                    slope.copy_from_slice(x);
                    map(slope, |x| half * (T::ONE + (x * s).erf::<FUSED>()));
                    for ((dy, &x), &gate) in dy.iter_mut().zip(x).zip(slope.iter()) {
                        *dy *= gate + x * c * (-half * x * x).exp_normal::<FUSED>();
                    }
                }
            }
            Unary::GeluTanh => times(x, dy, |x| gelu_tanh_slope::<T, FUSED>(x)),
            Unary::Silu => times(x, dy, |x| swish_slope::<T, FUSED>(x, T::ONE)),
            Unary::QuickGelu => {
                let c = T::from_f64(QUICK);
                times(x, dy, |x| swish_slope::<T, FUSED>(x, c));
            }
            Unary::Relu2 => {
                let two = T::from_f64(2.0);
                times(x, dy, |x| two * x.max(T::ZERO));
            }
            Unary::Mish => {
                // As for GELU.
                let mut gates = [T::ZERO; 256];
                for (x, dy) in x.chunks(gates.len()).zip(dy.chunks_mut(gates.len())) {
                    let gates = &mut gates[..x.len()];
                    gates.copy_from_slice(x);
                    map(gates, |x| mish_gate::<T, FUSED>(x));
                    for ((dy, &x), &g) in dy.iter_mut().zip(x).zip(gates.iter()) {
                        *dy *= g + x * (T::ONE - g * g) * sigmoid::<T, FUSED>(x);
                    }
                }
            }
            Unary::Sqrt => times(x, dy, |x| half / x.sqrt()),
            Unary::Sign => times(x, dy, |_| T::ZERO),
        }
    }
}

simd_fn! {
    /// `y = a ∘ b` for one row.
    fn binary_row<T: Real>(f: Binary, a: &[T], b: &[T], y: &mut [T]) {
        #[inline(always)]
        fn zip<T: Real>(a: &[T], b: &[T], y: &mut [T], f: impl Fn(T, T) -> T) {
            for ((y, &a), &b) in y.iter_mut().zip(a).zip(b) {
                *y = f(a, b);
            }
        }
        match f {
            Binary::Add => zip(a, b, y, |a, b| a + b),
            Binary::Sub => zip(a, b, y, |a, b| a - b),
            Binary::Mul => zip(a, b, y, |a, b| a * b),
            Binary::Div => zip(a, b, y, |a, b| a / b),
        }
    }
}

simd_fn! {
    /// `y ⊙= x` for one row.
    fn mul_row<T: Real>(x: &[T], y: &mut [T]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y *= x;
        }
    }
}

simd_fn! {
    /// `y += x` for one row.
    pub(crate) fn add_row<T: Real>(x: &[T], y: &mut [T]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y += x;
        }
    }
}

simd_fn! {
    /// `y += x`, and a copy of it into `kept`, for one row.
    pub(crate) fn add_row_keeping<T: Real>(x: &[T], y: &mut [T], kept: &mut [T]) {
        for ((y, &x), kept) in y.iter_mut().zip(x).zip(kept) {
            *y += x;
            *kept = *y;
        }
    }
}

/// `y = f(x)`. Shapes: x, y [N, C]; y may be x.
pub(crate) fn unary<T: Real>(pool: &Pool, f: Unary, x: Mat<'_, T>, y: MatMut<'_, T>) {
    for_rows(pool, x.rows, rows_per_task(x.cols), |r| {
        // SAFETY: one task a row; where y is x, the copy below makes the operand the row itself.
        let row = unsafe { y.row_mut(r) };
        in_place(&x, r, row);
        unary_row(f, row);
    });
}

/// Puts row `r` of `x` into `row`, unless it is there already.
pub(crate) fn in_place<T: Real>(x: &Mat<'_, T>, r: usize, row: &mut [T]) {
    let from = x.block(r, 1, 0, x.cols).as_ptr();
    if !std::ptr::eq(from, row.as_ptr()) {
        // SAFETY: `cols` elements each; rows of a plan that are not the same do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from, row.as_mut_ptr(), row.len()) }
    }
}

/// `dx = dy · f'(x)`. Shapes: all [N, C]; dx may be dy or x.
pub(crate) fn unary_grad<T: Real>(pool: &Pool, f: Unary, x: Mat<'_, T>, dy: Mat<'_, T>, dx: MatMut<'_, T>) {
    for_rows(pool, x.rows, rows_per_task(x.cols), |r| {
        let mut piece = [T::ZERO; PIECE];
        let mut column = 0;
        while column < x.cols {
            let cols = piece.len().min(x.cols - column);
            let part = &mut piece[..cols];
            part.copy_from_slice(dy.block(r, 1, column, cols).row(0));
            unary_grad_row(f, x.block(r, 1, column, cols).row(0), part);
            // SAFETY: one task a row, and the operands of this piece have been read.
            unsafe { dx.block(r, 1, column, cols).row_mut(0) }.copy_from_slice(part);
            column += cols;
        }
    });
}

/// `y = f(gate) ⊙ up`. Shapes: all [N, C]; y may be gate or up.
pub(crate) fn gated<T: Real>(pool: &Pool, f: Unary, gate: Mat<'_, T>, up: Mat<'_, T>, y: MatMut<'_, T>) {
    for_rows(pool, y.rows, rows_per_task(2 * y.cols), |r| {
        let mut piece = [T::ZERO; PIECE];
        for column in (0..y.cols).step_by(PIECE) {
            let cols = PIECE.min(y.cols - column);
            let part = &mut piece[..cols];
            part.copy_from_slice(gate.block(r, 1, column, cols).row(0));
            unary_row(f, part);
            mul_row(up.block(r, 1, column, cols).row(0), part);
            // SAFETY: one task a row, and the operands of this piece have been read.
            unsafe { y.block(r, 1, column, cols).row_mut(0) }.copy_from_slice(part);
        }
    });
}

/// `dgate = dy ⊙ up ⊙ f'(gate)`, `dup = dy ⊙ f(gate)`. Shapes: all [N, C]; results may be operands' memory.
pub(crate) fn gated_grad<T: Real>(
    pool: &Pool,
    f: Unary,
    dy: Mat<'_, T>,
    gate: Mat<'_, T>,
    up: Mat<'_, T>,
    [dgate, dup]: [MatMut<'_, T>; 2],
) {
    for_rows(pool, dy.rows, rows_per_task(3 * dy.cols), |r| {
        let (mut first, mut second) = ([T::ZERO; PIECE], [T::ZERO; PIECE]);
        for column in (0..dy.cols).step_by(PIECE) {
            let cols = PIECE.min(dy.cols - column);
            let [dy, gate, up] = [dy, gate, up].map(|x| x.block(r, 1, column, cols).row(0));
            let (first, second) = (&mut first[..cols], &mut second[..cols]);
            first.copy_from_slice(dy);
            mul_row(up, first);
            unary_grad_row(f, gate, first);
            second.copy_from_slice(gate);
            unary_row(f, second);
            mul_row(dy, second);
            // SAFETY: one task a row, and the operands of this piece have been read.
            let [dgate, dup] = [dgate, dup].map(|x| unsafe { x.block(r, 1, column, cols).row_mut(0) });
            dgate.copy_from_slice(first);
            dup.copy_from_slice(second);
        }
    });
}

/// `y = a ∘ b`. Shapes: a, y [N, C]; b [M, C] with M a divisor of N, or a scalar. y may be a.
pub(crate) fn binary<T: Real>(pool: &Pool, f: Binary, a: Mat<'_, T>, b: Mat<'_, T>, y: MatMut<'_, T>) {
    let scalar = b.rows * b.cols == 1 && a.cols > 1;
    for_rows(pool, a.rows, rows_per_task(a.cols), |r| {
        let mut piece = [T::ZERO; PIECE];
        let mut constant = [T::ZERO; PIECE];
        if scalar {
            constant.fill(b.row(0)[0]);
        }
        let mut column = 0;
        while column < a.cols {
            let cols = piece.len().min(a.cols - column);
            let part = &mut piece[..cols];
            part.copy_from_slice(a.block(r, 1, column, cols).row(0));
            let other = if scalar { &constant[..cols] } else { b.block(r % b.rows, 1, column, cols).row(0) };
            // SAFETY: one task a row, and a's piece, which may be the same memory, has been read.
            binary_row(f, part, other, unsafe { y.block(r, 1, column, cols).row_mut(0) });
            column += cols;
        }
    });
}

/// `y = value` everywhere.
pub(crate) fn fill<T: Real>(pool: &Pool, value: f64, y: MatMut<'_, T>) {
    let value = T::from_f64(value);
    // SAFETY: one task a row.
    for_rows(pool, y.rows, rows_per_task(y.cols), |r| unsafe { y.row_mut(r) }.fill(value));
}

/// `y = x`, row by row. Shapes: x, y [N, C].
pub(crate) fn copy<T: Copy + Send + Sync>(pool: &Pool, x: Mat<'_, T>, y: MatMut<'_, T>) {
    // SAFETY: one task a row, and a copy never shares memory.
    for_rows(pool, y.rows, rows_per_task(y.cols), |r| unsafe { y.row_mut(r) }.copy_from_slice(x.row(r)));
}

/// `y[m] = x[m mod M]`: repeats over leading rows. Shapes: x [M, C] or a scalar, y [N, C].
pub(crate) fn broadcast<T: Real>(pool: &Pool, x: Mat<'_, T>, y: MatMut<'_, T>) {
    let scalar = x.rows * x.cols == 1 && y.cols > 1;
    for_rows(pool, y.rows, rows_per_task(y.cols), |r| {
        // SAFETY: one task a row.
        let row = unsafe { y.row_mut(r) };
        if scalar { row.fill(x.row(0)[0]) } else { row.copy_from_slice(x.row(r % x.rows)) }
    });
}

/// Elements of scratch that [`sum_to`] needs for an operand of `rows` rows and a result of `result` elements.
pub(crate) fn sum_to_scratch(rows: usize, result_rows: usize, result: usize) -> usize {
    sum_chunks(rows / result_rows.max(1)) * result
}

/// `y[m] = Σ x[m + i·M]`: sums leading rows away. Shapes: x [N, C], y [M, C] with M a divisor of N, or a scalar;
/// scratch of [`sum_to_scratch`] elements. Chunks of rows are summed on their own, then in order.
pub(crate) fn sum_to<T: Real>(pool: &Pool, x: Mat<'_, T>, y: MatMut<'_, T>, scratch: MatMut<'_, T>) {
    let len = y.rows * y.cols;
    if len == 1 && x.cols > 1 {
        return sum_all(pool, x, y, scratch);
    }
    let blocks = x.rows / y.rows.max(1);
    let chunks = sum_chunks(blocks);
    let per = blocks.div_ceil(chunks);
    for_chunks(pool, blocks, per, |chunk, from, to| {
        // SAFETY: each chunk has a row of scratch of its own.
        let sum = unsafe { scratch.block(0, 1, chunk * len, len).row_mut(0) };
        sum.fill(T::ZERO);
        for r in from * y.rows..to * y.rows {
            let at = (r % y.rows) * y.cols;
            add_row(x.row(r), &mut sum[at..at + y.cols]);
        }
    });
    let used = blocks.div_ceil(per.max(1));
    for r in 0..y.rows {
        // SAFETY: the tasks are done; this thread is alone.
        let row = unsafe { y.row_mut(r) };
        row.fill(T::ZERO);
        for chunk in 0..used {
            // SAFETY: as above.
            let sum = unsafe { scratch.block(0, 1, chunk * len + r * y.cols, y.cols).row_mut(0) };
            add_row(sum, row);
        }
    }
}

fn sum_all<T: Real>(pool: &Pool, x: Mat<'_, T>, y: MatMut<'_, T>, scratch: MatMut<'_, T>) {
    let chunks = sum_chunks(x.rows);
    let per = x.rows.div_ceil(chunks);
    for_chunks(pool, x.rows, per, |chunk, from, to| {
        let mut sum = T::ZERO;
        for r in from..to {
            sum += crate::simd::sum(x.row(r));
        }
        // SAFETY: each chunk has an element of scratch of its own.
        unsafe { scratch.set(0, chunk, sum) };
    });
    let mut sum = T::ZERO;
    for chunk in 0..x.rows.div_ceil(per.max(1)) {
        // SAFETY: the tasks are done; this thread is alone.
        sum += unsafe { scratch.block(0, 1, chunk, 1).row_mut(0) }[0];
    }
    // SAFETY: as above.
    unsafe { y.set(0, 0, sum) };
}
