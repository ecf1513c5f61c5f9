//! Reverse-mode differentiation: a pass over the same graph, one rule per operation.
//!
//! [`gradients`] walks the nodes backwards. Each rule gets the cotangents of a node's results and adds nodes for the
//! cotangents of its operands; where a value is read more than once they are summed. Source of the scheme: Griewank and
//! Walther 2008, "Evaluating Derivatives", section 3.2.

use crate::dtype::{Shape, TensorType};
use crate::error::{Error, Result};
use crate::graph::{Graph, Node, ValueId};
use crate::op::{Binary, Op, Unary};

/// Adds to `graph` the gradients of the scalar `loss` with respect to the values `wrt`, in their order.
///
/// A value that the loss does not depend on gets zeros.
///
/// # Errors
/// When `loss` is not a scalar, or an operation on the way has no derivative.
pub fn gradients(graph: &mut Graph, loss: ValueId, wrt: &[ValueId]) -> Result<Vec<ValueId>> {
    if graph.ty(loss).shape != Shape::scalar() {
        return Err(Error::Derivative(format!("the loss must be a scalar, got {}", graph.ty(loss))));
    }
    let end = graph.nodes().len();
    let needs = depends_on(graph, wrt);
    let mut cotangent: Vec<Option<ValueId>> = vec![None; graph.value_count()];
    let ty = graph.ty(loss).clone();
    cotangent[loss.0 as usize] = Some(graph.add_as(Op::Fill { value: 1.0 }, &[], ty)?);
    for i in (0..end).rev() {
        let node = graph.nodes()[i].clone();
        let dys: Vec<_> = node.outputs.iter().map(|v| cotangent[v.0 as usize]).collect();
        if dys.iter().all(Option::is_none) || !node.inputs.iter().any(|v| needs[v.0 as usize]) {
            continue;
        }
        graph.set_scope(node.scope.clone());
        for (&x, dx) in node.inputs.iter().zip(vjp(graph, &node, &dys)?) {
            let (Some(dx), true) = (dx, needs[x.0 as usize]) else { continue };
            let slot = &mut cotangent[x.0 as usize];
            *slot = Some(match *slot {
                Some(before) => graph.sum(before, dx)?,
                None => dx,
            });
        }
    }
    graph.set_scope("");
    wrt.iter().map(|&x| cotangent[x.0 as usize].map_or_else(|| graph.zeros_like(x), Ok)).collect()
}

/// Which values depend on one of `wrt`.
fn depends_on(graph: &Graph, wrt: &[ValueId]) -> Vec<bool> {
    let mut needs = vec![false; graph.value_count()];
    for v in wrt {
        needs[v.0 as usize] = true;
    }
    for node in graph.nodes() {
        if node.inputs.iter().any(|v| needs[v.0 as usize]) {
            for v in &node.outputs {
                needs[v.0 as usize] = true;
            }
        }
    }
    needs
}

/// The vector-Jacobian product of one node: cotangents of its results → cotangents of its operands.
fn vjp(g: &mut Graph, node: &Node, dys: &[Option<ValueId>]) -> Result<Vec<Option<ValueId>>> {
    let x = &node.inputs;
    let matmul = |ta, tb| Op::MatMul { ta, tb, epilogue: crate::op::Epilogue::default() };
    // All but Split have one differentiable result; statistics (mean, rstd, lse) feed only gradient operations.
    let dy = match (&node.op, dys[0]) {
        (Op::Split { .. }, _) => x[0],
        (_, Some(dy)) if dys[1..].iter().all(Option::is_none) => dy,
        _ => {
            return Err(Error::Derivative(format!(
                "only the first result of {} has a derivative, and the loss depends on another",
                node.op.name()
            )));
        }
    };
    Ok(match &node.op {
        Op::Input { .. }
        | Op::State { .. }
        | Op::Fill { .. }
        | Op::Iota { .. }
        | Op::RopeTable { .. }
        | Op::AlibiBias { .. }
        | Op::CountLabels { .. } => vec![None; x.len()],
        Op::Copy => vec![Some(dy)],
        Op::Cast(_) => {
            let from = g.ty(x[0]).dtype;
            vec![Some(g.add1(Op::Cast(from), &[dy])?)]
        }
        Op::Reshape => {
            let ty = g.ty(x[0]).clone();
            vec![Some(g.add_as(Op::Reshape, &[dy], ty)?)]
        }
        Op::Split { .. } => {
            let parts: Result<Vec<_>> =
                node.outputs.iter().zip(dys).map(|(&y, dy)| dy.map_or_else(|| g.zeros_like(y), Ok)).collect();
            vec![Some(g.add1(Op::Concat, &parts?)?)]
        }
        Op::Concat => {
            let sizes = x.iter().map(|&v| g.ty(v).shape.cols()).collect();
            g.add(Op::Split { sizes }, &[dy])?.into_iter().map(Some).collect()
        }
        Op::Gather => {
            let rows = g.ty(x[0]).shape.0[0];
            vec![Some(g.add1(Op::ScatterAdd { rows }, &[dy, x[1]])?), None]
        }
        Op::ScatterAdd { .. } => {
            let mut dx = vec![Some(g.add1(Op::Gather, &[dy, x[1]])?), None];
            dx.extend((x.len() == 3).then_some(Some(dy)));
            dx
        }
        Op::Unary(f @ Unary::Scale(_)) => vec![Some(g.add1(Op::Unary(*f), &[dy])?)],
        Op::Unary(f) => vec![Some(g.add1(Op::UnaryGrad(*f), &[x[0], dy])?)],
        Op::Gated(f) => g.add(Op::GatedGrad(*f), &[dy, x[0], x[1]])?.into_iter().map(Some).collect(),
        Op::Binary(f) => {
            let (a, b) = (x[0], x[1]);
            let mut binary = |f, a, b| g.add1(Op::Binary(f), &[a, b]);
            let (da, db) = match f {
                Binary::Add => (dy, dy),
                Binary::Sub => (dy, g.add1(Op::Unary(Unary::Scale(-1.0)), &[dy])?),
                Binary::Mul => (binary(Binary::Mul, dy, b)?, binary(Binary::Mul, dy, a)?),
                Binary::Div => {
                    // d(a/b) = da/b − (a/b)·db/b
                    let da = binary(Binary::Div, dy, b)?;
                    let db = binary(Binary::Mul, da, node.outputs[0])?;
                    (da, g.add1(Op::Unary(Unary::Scale(-1.0)), &[db])?)
                }
            };
            vec![Some(da), Some(sum_to(g, db, b)?)]
        }
        Op::SumTo => {
            let ty = g.ty(x[0]).clone();
            vec![Some(g.add_as(Op::Broadcast, &[dy], ty)?)]
        }
        Op::Broadcast => vec![Some(sum_to(g, dy, x[0])?)],
        // The mask is a function of (rng, stream, element), so the transpose is the operation itself.
        Op::Dropout(spec) => {
            let mut dx = vec![Some(g.add1(Op::Dropout(*spec), &[dy, x[1]])?), None];
            dx.extend((x.len() == 3).then_some(Some(dy)));
            dx
        }
        Op::MatMul { ta, tb, epilogue } => {
            if !epilogue.is_empty() {
                return Err(Error::Derivative("differentiate before fusing".to_owned()));
            }
            let (a, b) = (x[0], x[1]);
            let (da, db) = match (ta, tb) {
                (false, false) => {
                    (g.add1(matmul(false, true), &[dy, b])?, g.add1(matmul(true, false), &[a, dy])?)
                }
                (false, true) => {
                    (g.add1(matmul(false, false), &[dy, b])?, g.add1(matmul(true, false), &[dy, a])?)
                }
                _ => {
                    let (da, db) =
                        (g.add1(matmul(false, true), &[b, dy])?, g.add1(matmul(false, false), &[a, dy])?);
                    (reshape_as(g, da, a)?, reshape_as(g, db, b)?)
                }
            };
            vec![Some(da), Some(db)]
        }
        Op::LayerNorm { center, .. } => {
            let (mean, rstd) = (node.outputs[1], node.outputs[2]);
            let d = g.add(Op::LayerNormGrad { center: *center }, &[dy, x[0], x[1], mean, rstd])?;
            d.into_iter().take(x.len()).map(Some).collect()
        }
        // A rotation's transpose turns back.
        Op::Rope { heads, inverse } => {
            vec![Some(g.add1(Op::Rope { heads: *heads, inverse: !inverse }, &[dy, x[1]])?), None]
        }
        Op::Attention(spec) => {
            let mut operands = vec![dy, x[0], x[1], x[2], node.outputs[0], node.outputs[1]];
            operands.extend(&x[3..]);
            let d = g.add(Op::AttentionGrad(*spec), &operands)?;
            let mut dx: Vec<_> = d.into_iter().map(Some).collect();
            dx.resize(x.len(), None);
            dx
        }
        Op::RelativeAttention(spec) => {
            let mut operands = vec![dy];
            operands.extend(x);
            let d = g.add(Op::RelativeAttentionGrad(*spec), &operands)?;
            let mut dx: Vec<_> = d.into_iter().map(Some).collect();
            dx.resize(x.len(), None);
            dx
        }
        Op::LinearCrossEntropy(spec) => {
            let mut operands = x.clone();
            operands.push(dy);
            let d = g.add(Op::LinearCrossEntropyGrad(*spec), &operands)?;
            let mut dx: Vec<_> = d.into_iter().skip(1).map(Some).collect();
            dx.push(None);
            dx
        }
        Op::UnaryGrad(_)
        | Op::GatedGrad(_)
        | Op::LayerNormGrad { .. }
        | Op::AttentionGrad(_)
        | Op::RelativeAttentionGrad(_)
        | Op::LinearCrossEntropyGrad(_)
        | Op::LinearTokenLosses { .. }
        | Op::Best { .. }
        | Op::CacheWrite
        | Op::CachedAttention(_)
        | Op::GlobalNorm
        | Op::ClipFactor { .. }
        | Op::AdamW { .. } => {
            return Err(Error::Derivative(format!("{} has no derivative here", node.op.name())));
        }
    })
}

/// Sums leading axes of `dy` away until it has the shape of `like`.
fn sum_to(g: &mut Graph, dy: ValueId, like: ValueId) -> Result<ValueId> {
    if g.ty(dy).shape == g.ty(like).shape {
        return Ok(dy);
    }
    let ty: TensorType = g.ty(like).clone();
    g.add_as(Op::SumTo, &[dy], ty)
}

fn reshape_as(g: &mut Graph, v: ValueId, like: ValueId) -> Result<ValueId> {
    if g.ty(v).shape == g.ty(like).shape {
        return Ok(v);
    }
    let ty = g.ty(like).clone();
    g.add_as(Op::Reshape, &[v], ty)
}
