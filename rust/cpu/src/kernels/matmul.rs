//! Matrix product with its epilogue: bias, activation or its derivative, residual, on each row piece while it is in cache.

use pyrformer_graph::Epilogue;

use crate::gemm::{Factor, PackBuffers, gemm_by};
use crate::kernels::elementwise::{add_row, copy, unary_grad_row, unary_in_place};
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
        if let Some(bias) = &f.bias {
            add_row(bias.block(0, 1, col, cols).row(0), piece);
        }
        if let Some(pre) = &f.pre {
            // SAFETY: each element of the result is finished once, by one task.
            unsafe { pre.block(row, 1, col, cols).row_mut(0) }.copy_from_slice(piece);
        }
        if let Some(act) = f.epilogue.act {
            unary_in_place(act, piece);
        }
        if let (Some(act), Some(x)) = (f.epilogue.act_grad, &f.x) {
            unary_grad_row(act, x.block(row, 1, col, cols).row(0), piece);
        }
        if let Some(residual) = &residual {
            add_row(residual.block(row, 1, col, cols).row(0), piece);
        }
    };
    // SAFETY: the result overlaps no factor; a residual in its place is what the product is added to.
    unsafe { gemm_by(pool, packs, a, b, (y, onto.is_some()), &finish) };
}
