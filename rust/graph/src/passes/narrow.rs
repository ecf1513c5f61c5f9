//! Mixed precision: activations, their gradients, and the weights that products read become bfloat16, where the operations
//! that make and read them have a choice. Sums, statistics, losses, gradients of weights and all that an optimizer
//! computes stay float32, and so do the weights that a program updates. Source: Micikevicius et al. 2018, "Mixed
//! Precision Training", section 3.1; losses need no scaling here, for bfloat16 has float32's exponents.
//!
//! A weight that a program only multiplies by, or takes rows of, is a state in bfloat16, and so is a cache of keys or
//! values. A weight that AdamW updates has such a state beside it, with `@bf16` behind its name, which AdamW writes along
//! with it. Others are cast when they are first read.
//!
//! The pass comes last: rules of derivatives and fusion are those of one type.

use std::collections::{HashMap, HashSet};

use crate::dtype::{DType, TensorType};
use crate::error::Result;
use crate::graph::{Graph, Node, NodeId, ValueId};
use crate::op::{AttentionSpec, Op};

/// Keeps in bfloat16 what may be, of a graph in float32. Inputs, outputs and what a run updates keep their types.
///
/// # Errors
/// Internal errors only.
pub fn narrow(graph: &Graph) -> Result<Graph> {
    let wide = wide(graph);
    let mut casts = Casts::default();
    let caches = caches(graph);
    let ends: Vec<ValueId> = graph.ends().filter(|v| !matches!(writer(graph, *v), Op::CacheWrite)).collect();
    let mixed = graph.rewrite(|rw, _, node| {
        match &node.op {
            Op::State { name } if caches.contains(&node.outputs[0]) => {
                let shape = graph.ty(node.outputs[0]).shape.clone();
                return Ok(Some(vec![rw.to.state(name, TensorType::new(DType::Bf16, shape))?]));
            }
            op if op.is_leaf() => return Ok(None),
            _ => {}
        }
        let mut x = rw.operands(node)?;
        let (narrow, to) = types(&rw.to, node, &x, wide[node.outputs[0].0 as usize]);
        for (i, x) in x.iter_mut().enumerate() {
            let dtype = match &node.op {
                // What a product adds is of its result's type; a table is read as it is.
                Op::MatMul { .. } if i > 1 => to,
                Op::Gather if i == 0 => continue,
                _ if narrow.contains(&i) => DType::Bf16,
                _ => DType::F32,
            };
            *x = casts.cast(&mut rw.to, *x, dtype)?;
        }
        let first = graph.ty(node.outputs[0]);
        let dtype = if first.dtype == DType::F32 { to } else { first.dtype };
        let ty = TensorType::new(dtype, first.shape.clone());
        let mut made = rw.to.add_all_as(node.op.clone(), &x, &ty)?;
        // Others who read an end get what was cast, see `Casts::cast`.
        for (old, new) in node.outputs.iter().zip(&mut made).filter(|(old, _)| ends.contains(old)) {
            *new = casts.cast(&mut rw.to, *new, graph.ty(*old).dtype)?;
        }
        Ok(Some(made))
    })?;
    store(&mixed)
}

fn writer(graph: &Graph, v: ValueId) -> &Op {
    &graph.producer(v).op
}

/// The states that keys or values are written into, and that nothing else is done with.
fn caches(graph: &Graph) -> Vec<ValueId> {
    let writes = graph.updates().iter().filter(|(_, v)| matches!(writer(graph, *v), Op::CacheWrite));
    writes.map(|(state, _)| *state).collect()
}

/// Whether an operation takes whatever types its operands are kept in.
fn is_flexible(op: &Op) -> bool {
    op.is_layout()
        || matches!(op, Op::Copy | Op::Unary(_) | Op::UnaryGrad(_) | Op::Binary(_) | Op::Dropout(_))
        || matches!(op, Op::Gated(_) | Op::GatedGrad(_))
}

/// Which values are to be float32: ends, what an optimizer's operations read, logits to choose from, and all that leads
/// to one of those or to an update by operations of the flexible kind alone.
fn wide(graph: &Graph) -> Vec<bool> {
    let mut wide = vec![false; graph.value_count()];
    for (_, v) in graph.updates() {
        wide[v.0 as usize] = true;
    }
    for node in graph.nodes().iter().rev() {
        let leads = is_flexible(&node.op) && node.outputs.iter().any(|v| wide[v.0 as usize]);
        let ends =
            matches!(node.op, Op::GlobalNorm | Op::ClipFactor { .. } | Op::AdamW { .. } | Op::Best { .. });
        if leads || ends {
            for v in &node.inputs {
                wide[v.0 as usize] = true;
            }
        }
    }
    for (_, v) in graph.outputs() {
        wide[v.0 as usize] = true;
    }
    wide
}

/// Whether a value is kept in bfloat16, or was cast from such.
fn is_narrow(to: &Graph, v: ValueId) -> bool {
    let from = to.producer(v);
    to.ty(v).dtype == DType::Bf16
        || matches!(from.op, Op::Cast(_)) && to.ty(from.inputs[0]).dtype == DType::Bf16
}

/// Whether a value has no type of its own: a weight, or a constant.
fn is_neutral(to: &Graph, v: ValueId) -> bool {
    matches!(to.producer(v).op, Op::State { .. } | Op::Fill { .. })
}

/// Which operands of an operation are to be bfloat16, and the type of its result where there is a choice. `x`: the new
/// operands as they are; `wide`: the result is to be float32.
fn types(to: &Graph, node: &Node, x: &[ValueId], wide: bool) -> (Vec<usize>, DType) {
    let narrow = |i: usize| is_narrow(to, x[i]);
    let result = |wide: bool| if wide { DType::F32 } else { DType::Bf16 };
    match &node.op {
        // The gradient of a weight: a sum over all rows.
        Op::MatMul { ta, .. } => (vec![0, 1], result(*ta || wide)),
        Op::Gather => {
            let row = to.ty(x[0]).dtype;
            (vec![], if is_neutral(to, x[0]) && row == DType::F32 { result(wide) } else { row })
        }
        Op::ScatterAdd { .. } | Op::SumTo if narrow(0) => (vec![0], DType::F32),
        op if is_flexible(op) => {
            let floats = || (0..x.len()).filter(|&i| to.ty(x[i]).dtype.is_float());
            let all = floats().all(|i| narrow(i) || is_neutral(to, x[i]));
            let any = floats().any(narrow);
            if any && all && !wide { ((0..x.len()).collect(), DType::Bf16) } else { (vec![], DType::F32) }
        }
        Op::LayerNorm { .. } | Op::Rope { .. } => (vec![0], DType::Bf16),
        Op::LayerNormGrad { .. } => (vec![0, 1, 5], DType::Bf16),
        Op::CacheWrite => (vec![0, 1], DType::Bf16),
        Op::CachedAttention(_) => (vec![0, 1, 2], DType::Bf16),
        Op::Attention(spec) if fits(to.ty(x[0]), spec) => (vec![0, 1, 2], DType::Bf16),
        Op::AttentionGrad(spec) if fits(to.ty(x[0]), spec) => (vec![0, 1, 2, 3, 4], DType::Bf16),
        Op::LinearCrossEntropy(_) | Op::LinearCrossEntropyGrad(_) | Op::LinearTokenLosses { .. } => {
            (vec![0, 1], DType::F32)
        }
        _ => (vec![], DType::F32),
    }
}

/// Whether tensor cores take heads of this width: pieces of 128 bits, and results in registers.
fn fits(q: &TensorType, spec: &AttentionSpec) -> bool {
    let width = q.shape.cols() / spec.heads;
    width.is_multiple_of(8) && width <= 256
}

/// Values in their other type: each is cast once.
#[derive(Default)]
struct Casts(HashMap<ValueId, ValueId>);

impl Casts {
    fn cast(&mut self, to: &mut Graph, v: ValueId, dtype: DType) -> Result<ValueId> {
        let (has, from) = (to.ty(v).clone(), to.producer(v));
        if has.dtype == dtype || !matches!(has.dtype, DType::F32 | DType::Bf16) {
            return Ok(v);
        }
        if let (Op::Cast(DType::F32), DType::Bf16) = (&from.op, dtype) {
            return Ok(from.inputs[0]);
        }
        if let Some(known) = self.0.get(&v) {
            return Ok(*known);
        }
        let made = match from.op {
            Op::Fill { .. } => to.add_as(from.op.clone(), &[], TensorType::new(dtype, has.shape))?,
            _ => to.add1(Op::Cast(dtype), &[v])?,
        };
        self.0.insert(v, made);
        Ok(made)
    }
}

/// The name of the state that is a state's copy in bfloat16.
fn copy_of(name: &str) -> String {
    format!("{name}@bf16")
}

/// The states that are cast and updated by AdamW, by the node that does.
fn kept_twice(graph: &Graph) -> HashMap<NodeId, ValueId> {
    let cast: HashSet<ValueId> =
        graph.nodes().iter().filter(|n| n.op == Op::Cast(DType::Bf16)).map(|n| n.inputs[0]).collect();
    let by_adamw = |v: ValueId| {
        let value = graph.value(v);
        (matches!(graph.node(value.node).op, Op::AdamW { .. }) && value.slot == 0).then_some(value.node)
    };
    graph
        .updates()
        .iter()
        .filter(|(state, _)| cast.contains(state))
        .filter_map(|&(state, v)| Some((by_adamw(v)?, state)))
        .collect()
}

/// Makes bfloat16 states of those that are not updated and only cast, or read by rows that are, and beside those that
/// AdamW updates.
fn store(graph: &Graph) -> Result<Graph> {
    let mut narrow = vec![false; graph.value_count()];
    for node in graph.nodes().iter().filter(|n| matches!(n.op, Op::State { .. })) {
        let v = node.outputs[0];
        narrow[v.0 as usize] = graph.ty(v).dtype == DType::F32 && graph.updates().iter().all(|u| u.0 != v);
    }
    for node in graph.nodes() {
        for (i, v) in node.inputs.iter().enumerate() {
            let cast = match node.op {
                Op::Cast(_) => true,
                Op::Gather => i == 0 && graph.ty(node.outputs[0]).dtype == DType::Bf16,
                _ => false,
            };
            narrow[v.0 as usize] &= cast;
        }
    }
    graph.ends().for_each(|v| narrow[v.0 as usize] = false);
    let twice = kept_twice(graph);
    let mut copies: HashMap<ValueId, ValueId> = HashMap::new();
    let mut updates = Vec::new();
    let mut stored = graph.rewrite(|rw, id, node| match &node.op {
        Op::State { name } if twice.values().any(|&v| v == node.outputs[0]) => {
            let made = rw.copy(node)?;
            let shape = graph.ty(node.outputs[0]).shape.clone();
            let copy = rw.to.state(&copy_of(name), TensorType::new(DType::Bf16, shape))?;
            copies.insert(node.outputs[0], copy);
            Ok(Some(made))
        }
        Op::Cast(_) if copies.contains_key(&node.inputs[0]) => Ok(Some(vec![copies[&node.inputs[0]]])),
        Op::AdamW { .. } if twice.contains_key(&id) => {
            let copy = copies[&twice[&id]];
            let mut operands = rw.operands(node)?;
            operands.push(copy);
            let made = rw.to.add(node.op.clone(), &operands)?;
            updates.push((copy, made[3]));
            Ok(Some(made))
        }
        Op::State { name } if narrow[node.outputs[0].0 as usize] => {
            let shape = graph.ty(node.outputs[0]).shape.clone();
            Ok(Some(vec![rw.to.state(&copy_of(name), TensorType::new(DType::Bf16, shape))?]))
        }
        Op::Cast(_) if narrow[node.inputs[0].0 as usize] => Ok(Some(vec![rw.get(node.inputs[0])?])),
        _ => Ok(None),
    })?;
    updates.into_iter().try_for_each(|(copy, value)| stored.update(copy, value))?;
    Ok(stored)
}
