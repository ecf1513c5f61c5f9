//! Mixed precision: activations, their gradients, and the weights that products read become a narrow type, bfloat16 or
//! float16, where the operations that make and read them have a choice. Sums, statistics, losses, gradients of weights and
//! all that an optimizer computes stay float32, and so do the weights that a program updates. Source: Micikevicius et al.
//! 2018, "Mixed Precision Training", section 3.1. Scaling losses, as float16 asks for, is the program's.
//!
//! A weight that a program only multiplies by, or takes rows of, is a state in the narrow type, and so is a cache of keys or
//! values. A weight that AdamW updates has such a state beside it, with `@bf16` or `@f16` behind its name, which AdamW
//! writes along with it; in bfloat16, where AdamW rounds by chance, the weight is such a state itself. Others are cast when
//! they are first read.
//!
//! The pass comes last: rules of derivatives and fusion are those of one type.

use std::collections::{HashMap, HashSet};

use crate::dtype::{DType, TensorType};
use crate::error::{Error, Result};
use crate::graph::{Graph, Node, NodeId, ValueId};
use crate::op::{AttentionSpec, Op};

/// Keeps in `half` what may be, of a graph in float32. Inputs, outputs and what a run updates keep their types.
///
/// # Errors
/// [`Error::DType`] where `half` is no 16-bit float.
pub fn narrow(graph: &Graph, half: DType) -> Result<Graph> {
    if !half.is_half() {
        let message = format!("activations are kept in bf16 or f16, not {half}");
        return Err(Error::DType { op: "narrow".to_owned(), message });
    }
    let wide = wide(graph);
    let mut casts = Casts { half, known: HashMap::new() };
    let caches = caches(graph);
    let ends: Vec<ValueId> = graph.ends().filter(|v| !matches!(writer(graph, *v), Op::CacheWrite)).collect();
    let mixed = graph.rewrite(|rw, _, node| {
        match &node.op {
            Op::State { name } if caches.contains(&node.outputs[0]) => {
                let shape = graph.ty(node.outputs[0]).shape.clone();
                return Ok(Some(vec![rw.to.state(name, TensorType::new(half, shape))?]));
            }
            op if op.is_leaf() => return Ok(None),
            _ => {}
        }
        let mut x = rw.operands(node)?;
        let (narrow, to) = types(&rw.to, node, &x, wide[node.outputs[0].0 as usize], half);
        for (i, x) in x.iter_mut().enumerate() {
            let dtype = match &node.op {
                // What a product adds is of its result's type; a table is read as it is.
                Op::MatMul { .. } if i > 1 => to,
                Op::Gather if i == 0 => continue,
                _ if narrow.contains(&i) => half,
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
    store(&mixed, half)
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

/// Whether a value is kept in the narrow type, or was cast from such.
fn is_narrow(to: &Graph, v: ValueId) -> bool {
    let from = to.producer(v);
    to.ty(v).dtype.is_half() || matches!(from.op, Op::Cast(_)) && to.ty(from.inputs[0]).dtype.is_half()
}

/// Whether a value has no type of its own: a weight, or a constant.
fn is_neutral(to: &Graph, v: ValueId) -> bool {
    matches!(to.producer(v).op, Op::State { .. } | Op::Fill { .. })
}

/// Which operands of an operation are to be `half`, and the type of its result where there is a choice. `x`: the new
/// operands as they are; `wide`: the result is to be float32.
fn types(to: &Graph, node: &Node, x: &[ValueId], wide: bool, half: DType) -> (Vec<usize>, DType) {
    let narrow = |i: usize| is_narrow(to, x[i]);
    let result = |wide: bool| if wide { DType::F32 } else { half };
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
            if any && all && !wide { ((0..x.len()).collect(), half) } else { (vec![], DType::F32) }
        }
        Op::LayerNorm { .. } | Op::Rope { .. } => (vec![0], half),
        Op::LayerNormGrad { .. } => (vec![0, 1, 5], half),
        Op::CacheWrite => (vec![0, 1], half),
        Op::CachedAttention(_) => (vec![0, 1, 2], half),
        Op::Attention(spec) if fits(to.ty(x[0]), spec, half) => (vec![0, 1, 2], half),
        Op::AttentionGrad(spec) if fits(to.ty(x[0]), spec, half) => (vec![0, 1, 2, 3, 4], half),
        Op::LinearCrossEntropy(_) | Op::LinearCrossEntropyGrad(_) | Op::LinearTokenLosses { .. } => {
            (vec![0, 1], DType::F32)
        }
        _ => (vec![], DType::F32),
    }
}

/// Whether tensor cores take heads of this width: pieces of 128 bits, and results in registers. float16 is for GPUs, too,
/// whose shared memory does not hold wider ones.
fn fits(q: &TensorType, spec: &AttentionSpec, half: DType) -> bool {
    let width = q.shape.cols() / spec.heads;
    width.is_multiple_of(8) && width <= if half == DType::F16 { 128 } else { 256 }
}

/// Values in their other type: each is cast once.
struct Casts {
    half: DType,
    known: HashMap<ValueId, ValueId>,
}

impl Casts {
    fn cast(&mut self, to: &mut Graph, v: ValueId, dtype: DType) -> Result<ValueId> {
        let (has, from) = (to.ty(v).clone(), to.producer(v));
        if has.dtype == dtype || (has.dtype != DType::F32 && has.dtype != self.half) {
            return Ok(v);
        }
        if from.op == Op::Cast(DType::F32) && dtype == self.half {
            return Ok(from.inputs[0]);
        }
        if let Some(known) = self.known.get(&v) {
            return Ok(*known);
        }
        let made = match from.op {
            Op::Fill { .. } => to.add_as(from.op.clone(), &[], TensorType::new(dtype, has.shape))?,
            _ => to.add1(Op::Cast(dtype), &[v])?,
        };
        self.known.insert(v, made);
        Ok(made)
    }
}

/// The name of the state that is a state's copy in the narrow type.
fn copy_of(name: &str, half: DType) -> String {
    format!("{name}@{half}")
}

/// The states that are cast and updated by AdamW, by the node that does.
fn kept_twice(graph: &Graph, half: DType) -> HashMap<NodeId, ValueId> {
    let cast: HashSet<ValueId> =
        graph.nodes().iter().filter(|n| n.op == Op::Cast(half)).map(|n| n.inputs[0]).collect();
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

/// The states that AdamW rounds by chance and that are otherwise only cast, or read by rows, by the node that does. Of
/// those that a program only updates, matrices: what other programs multiply by, or take rows of.
fn rounded(graph: &Graph, half: DType) -> HashMap<NodeId, ValueId> {
    let by_chance = |&(state, v): &(ValueId, ValueId)| {
        let id = graph.value(v).node;
        let node = graph.node(id);
        let rounds = half == DType::Bf16
            && matches!(node.op, Op::AdamW { rounding: Some(_), .. })
            && graph.value(v).slot == 0;
        if !rounds {
            return None;
        }
        let reads = |n: &&Node| n.inputs.contains(&state);
        let mut readers = graph.nodes().iter().filter(reads).filter(|n| !std::ptr::eq(*n, node)).peekable();
        let suits = readers.peek().is_some() || graph.ty(state).shape.rank() > 1;
        let fits = suits && readers.all(|n| reads_narrow(graph, n, state, half));
        let given = graph.outputs().iter().any(|(_, x)| [state, v].contains(x));
        let alone = node.inputs.iter().position(|x| *x == state) == Some(0);
        (alone && fits && !given && graph.ty(state).dtype == DType::F32).then_some((id, state))
    };
    graph.updates().iter().filter_map(by_chance).collect()
}

/// Whether an operation does nothing with a state but what can be done with it in `half`.
fn reads_narrow(graph: &Graph, node: &Node, state: ValueId, half: DType) -> bool {
    node.inputs.iter().enumerate().filter(|(_, v)| **v == state).all(|(i, _)| match node.op {
        Op::Cast(_) => true,
        Op::Gather => i == 0 && graph.ty(node.outputs[0]).dtype == half,
        _ => false,
    })
}

/// Makes states in `half` of those that are not updated and only cast, or read by rows that are, and beside those that
/// AdamW updates, or in their place.
fn store(graph: &Graph, half: DType) -> Result<Graph> {
    let mut narrow = vec![false; graph.value_count()];
    for node in graph.nodes().iter().filter(|n| matches!(n.op, Op::State { .. })) {
        let v = node.outputs[0];
        narrow[v.0 as usize] = graph.ty(v).dtype == DType::F32 && graph.updates().iter().all(|u| u.0 != v);
    }
    for node in graph.nodes() {
        for v in &node.inputs {
            narrow[v.0 as usize] &= reads_narrow(graph, node, *v, half);
        }
    }
    graph.ends().for_each(|v| narrow[v.0 as usize] = false);
    let once = rounded(graph, half);
    let mut twice = kept_twice(graph, half);
    twice.retain(|id, _| !once.contains_key(id));
    let is_once = |v: ValueId| once.values().any(|&state| state == v);
    let mut copies: HashMap<ValueId, ValueId> = HashMap::new();
    let mut updates = Vec::new();
    let mut casts = Casts { half, known: HashMap::new() };
    let mut stored = graph.rewrite(|rw, id, node| match &node.op {
        Op::State { name } if is_once(node.outputs[0]) => {
            let shape = graph.ty(node.outputs[0]).shape.clone();
            Ok(Some(vec![rw.to.state(name, TensorType::new(half, shape))?]))
        }
        Op::Cast(_) if is_once(node.inputs[0]) => Ok(Some(vec![rw.get(node.inputs[0])?])),
        Op::State { name } if twice.values().any(|&v| v == node.outputs[0]) => {
            let made = rw.copy(node)?;
            let shape = graph.ty(node.outputs[0]).shape.clone();
            let copy = rw.to.state(&copy_of(name, half), TensorType::new(half, shape))?;
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
            Ok(Some(vec![rw.to.state(&copy_of(name, half), TensorType::new(half, shape))?]))
        }
        Op::Cast(_) if narrow[node.inputs[0].0 as usize] => Ok(Some(vec![rw.get(node.inputs[0])?])),
        // Who reads the new value, such as an average, computes in float32.
        _ if node.inputs.iter().any(|v| once.contains_key(&graph.value(*v).node)) => {
            let mut operands = rw.operands(node)?;
            for (x, old) in operands.iter_mut().zip(&node.inputs) {
                *x = casts.cast(&mut rw.to, *x, graph.ty(*old).dtype)?;
            }
            Ok(Some(rw.to.add_all_as(node.op.clone(), &operands, graph.ty(node.outputs[0]))?))
        }
        _ => Ok(None),
    })?;
    updates.into_iter().try_for_each(|(copy, value)| stored.update(copy, value))?;
    Ok(stored)
}
