//! Removes arithmetic that a look at the operands settles: + 0, · 1, − 0, / 1, scale by 1, reshape to the same shape,
//! a reshape of a reshape, and functions of a constant.

use crate::error::Result;
use crate::graph::{Graph, Rewrite, ValueId};
use crate::op::{Binary, Op, Unary};

/// Folds constants and identities.
///
/// # Errors
/// Internal errors only.
pub fn fold(graph: &Graph) -> Result<Graph> {
    graph.rewrite(|rw, _, node| {
        if node.op.is_leaf() {
            return Ok(None);
        }
        let x = rw.operands(node)?;
        let ty = graph.ty(node.outputs[0]).clone();
        Ok(match &node.op {
            Op::Unary(Unary::Scale(s)) if *s == 1.0 => Some(vec![x[0]]),
            Op::Unary(Unary::Scale(s)) => match constant(rw, x[0]) {
                Some(c) => Some(vec![rw.to.add_as(Op::Fill { value: c * s }, &[], ty)?]),
                None => None,
            },
            Op::Reshape if rw.to.ty(x[0]).shape == ty.shape => Some(vec![x[0]]),
            Op::Reshape => {
                let before = rw.to.producer(x[0]);
                match before.op {
                    Op::Reshape => {
                        let source = before.inputs[0];
                        Some(vec![rw.to.add_as(Op::Reshape, &[source], ty)?])
                    }
                    _ => None,
                }
            }
            Op::Binary(f) => match (f, constant(rw, x[0]), constant(rw, x[1])) {
                (_, Some(a), Some(b)) => {
                    let value = match f {
                        Binary::Add => a + b,
                        Binary::Sub => a - b,
                        Binary::Mul => a * b,
                        Binary::Div => a / b,
                    };
                    Some(vec![rw.to.add_as(Op::Fill { value }, &[], ty)?])
                }
                (Binary::Add | Binary::Sub, _, Some(0.0)) => Some(vec![x[0]]),
                (Binary::Add, Some(0.0), _) if rw.to.ty(x[1]).shape == ty.shape => Some(vec![x[1]]),
                (Binary::Mul, _, Some(c)) => Some(vec![scale(rw, x[0], c)?]),
                (Binary::Mul, Some(c), _) if rw.to.ty(x[1]).shape == ty.shape => {
                    Some(vec![scale(rw, x[1], c)?])
                }
                (Binary::Div, _, Some(1.0)) => Some(vec![x[0]]),
                _ => None,
            },
            Op::SumTo if rw.to.ty(x[0]).shape == ty.shape => Some(vec![x[0]]),
            Op::Broadcast => match constant(rw, x[0]) {
                Some(value) => Some(vec![rw.to.add_as(Op::Fill { value }, &[], ty)?]),
                None => None,
            },
            _ => None,
        })
    })
}

fn scale(rw: &mut Rewrite<'_>, x: ValueId, by: f64) -> Result<ValueId> {
    if by == 1.0 { Ok(x) } else { rw.to.add1(Op::Unary(Unary::Scale(by)), &[x]) }
}

fn constant(rw: &Rewrite<'_>, v: ValueId) -> Option<f64> {
    match rw.to.producer(v).op {
        Op::Fill { value } => Some(value),
        _ => None,
    }
}
