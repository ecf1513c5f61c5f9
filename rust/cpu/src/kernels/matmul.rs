//! Matrix product with its epilogue: bias, activation or its derivative, residual, on each row piece while it is in cache.

use pyrformer_graph::Epilogue;

use crate::gemm::{Factor, PackBuffers, gemm_by, prefetch};
use crate::kernels::elementwise::{add_row, add_row_keeping, copy, unary_grad_row, unary_row};
use crate::real::Real;
use crate::threads::Pool;
use crate::view::{Mat, MatMut};

/// The operands of an epilogue, present as its flags say.
#[derive(Clone, Copy)]
pub(crate) struct Fused<'a, T> {
    pub(crate) epilogue: Epilogue,
    pub(crate) bias: Option<Mat<'a, T>>,
    pub(crate) x: Option<Mat<'a, T>>,
    pub(crate) residual: Option<Mat<'a, T>>,
    pub(crate) pre: Option<MatMut<'a, T>>,
}

/// How many rows before its turn a row of another operand is asked for: the time that memory takes.
const AHEAD: usize = 4;

/// Asks for `cols` elements of row `row + AHEAD`, from column `col`, of a matrix at `data`, which need not exist.
fn ask<T>(data: *const T, stride: usize, row: usize, col: usize, cols: usize) {
    let from = data.wrapping_add((row + AHEAD) * stride + col);
    (0..cols).step_by(64 / size_of::<T>()).for_each(|at| prefetch(from.wrapping_add(at)));
}

/// `y = epilogue(op(a)·b)`. Shapes: a [M, K] or, with `ta`, [K, M]; b [K, N], y [M, N].
pub(crate) fn matmul<T: Real>(
    pool: &Pool,
    packs: &PackBuffers<T>,
    a: (Mat<'_, T>, bool),
    b: Factor<'_, T>,
    y: MatMut<'_, T>,
    f: Fused<'_, T>,
) {
    // The chain of additions of a plain product starts at the residual, whether or not that shares y's memory: no bit
    // depends on where values lie.
    let onto = f.residual.filter(|_| f.epilogue.act.is_none() && f.epilogue.act_grad.is_none());
    if let Some(residual) = onto.filter(|r| !std::ptr::eq(r.as_ptr(), y.as_ptr())) {
        copy(pool, residual, y);
    }
    let residual = f.residual.filter(|_| onto.is_none());
    let finish = |row, col, piece: &mut [T]| {
        let cols = piece.len();
        let bias = f.bias.as_ref().map(|bias| bias.block(0, 1, col, cols).row(0));
        // SAFETY: each element of the result is finished once, by one task.
        let pre = f.pre.as_ref().map(|pre| unsafe { pre.block(row, 1, col, cols).row_mut(0) });
        if let Some(pre) = &f.pre {
            ask(pre.as_ptr(), pre.stride, row, col, cols);
        }
        match (bias, pre) {
            (Some(bias), Some(pre)) => add_row_keeping(bias, piece, pre),
            (Some(bias), None) => add_row(bias, piece),
            (None, Some(pre)) => pre.copy_from_slice(piece),
            (None, None) => {}
        }
        if let Some(act) = f.epilogue.act {
            unary_row(act, piece);
        }
        if let (Some(act), Some(x)) = (f.epilogue.act_grad, &f.x) {
            ask(x.as_ptr(), x.stride, row, col, cols);
            unary_grad_row(act, x.block(row, 1, col, cols).row(0), piece);
        }
        if let Some(residual) = &residual {
            add_row(residual.block(row, 1, col, cols).row(0), piece);
        }
    };
    // SAFETY: the result overlaps no factor; a residual in its place is what the product is added to.
    unsafe { gemm_by(pool, packs, a, b, (y, onto.is_some()), &finish) };
}
