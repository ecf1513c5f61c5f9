//! Fusion: work that would be a pass over memory of its own is moved into the kernel that produces its operand.
//!
//! * matmul → + bias → activation | · activation' → + residual become one matmul with an [`Epilogue`];
//! * scatter_add → + base becomes a scatter_add onto base;
//! * dropout → + residual and layer_norm_grad → dx + residual add the residual inside.
//!
//! A chain is taken only if each value inside it has no other reader, but for the value before the activation, which the
//! backward pass reads: it becomes a second result.

use std::collections::{HashMap, HashSet};

use crate::error::Result;
use crate::graph::{Graph, Node, NodeId, ValueId};
use crate::op::{Binary, Epilogue, Op, Unary};
use crate::passes::early::adds_to_state;

/// Fuses chains.
///
/// # Errors
/// Internal errors only.
pub fn fuse(graph: &Graph) -> Result<Graph> {
    let mut readers = Readers::of(graph);
    let mut ends: HashMap<NodeId, Chain> = HashMap::new();
    for i in 0..graph.nodes().len() {
        if let Some(chain) = Chain::from(graph, &readers, NodeId(i as u32)) {
            readers.taken.extend(&chain.nodes);
            ends.insert(chain.nodes[chain.nodes.len() - 1], chain);
        }
    }
    graph.rewrite(|rw, id, _| {
        if let Some(chain) = ends.get(&id) {
            let operands: Result<Vec<_>> = chain.operands.iter().map(|&v| rw.get(v)).collect();
            let new = rw.to.add(chain.op.clone(), &operands?)?;
            for (&old, &new) in chain.results.iter().zip(&new) {
                rw.replace(old, new);
            }
            return Ok(Some(vec![]));
        }
        Ok(if readers.taken.contains(&id) { Some(vec![]) } else { None })
    })
}

/// Who reads each value, and which nodes a chain already holds.
struct Readers {
    nodes: Vec<Vec<NodeId>>,
    counts: Vec<u32>,
    taken: HashSet<NodeId>,
}

impl Readers {
    fn of(graph: &Graph) -> Self {
        let mut nodes = vec![Vec::new(); graph.value_count()];
        for (i, node) in graph.nodes().iter().enumerate() {
            for v in &node.inputs {
                nodes[v.0 as usize].push(NodeId(i as u32));
            }
        }
        Self { nodes, counts: graph.use_counts(), taken: HashSet::new() }
    }

    /// The one reader of a value that is read once and is no result of the graph, if no chain holds it.
    fn only(&self, v: ValueId) -> Option<NodeId> {
        match (&self.nodes[v.0 as usize][..], self.counts[v.0 as usize]) {
            ([reader], 1) if !self.taken.contains(reader) => Some(*reader),
            _ => None,
        }
    }
}

/// A run of nodes that becomes one node in the place of the last of them.
struct Chain {
    op: Op,
    operands: Vec<ValueId>,
    nodes: Vec<NodeId>,
    /// The old values that the new node's results stand for.
    results: Vec<ValueId>,
}

impl Chain {
    fn from(graph: &Graph, readers: &Readers, id: NodeId) -> Option<Self> {
        let node = graph.node(id);
        if readers.taken.contains(&id) {
            return None;
        }
        match &node.op {
            Op::MatMul { ta, tb, epilogue } if epilogue.is_empty() => {
                Self::matmul(graph, readers, id, node, *ta, *tb)
            }
            Op::ScatterAdd { .. } | Op::Dropout(_) if node.inputs.len() == 2 => {
                Self::plus(graph, readers, id, node)
            }
            Op::LayerNormGrad { .. } if node.inputs.len() == 5 => Self::plus(graph, readers, id, node),
            _ => None,
        }
    }

    /// `node`'s first result + something of the same shape, added by the node itself as its last operand.
    fn plus(graph: &Graph, readers: &Readers, id: NodeId, node: &Node) -> Option<Self> {
        let (sum, other) = added(graph, readers, node.outputs[0])?;
        if !early_enough(readers, &node.outputs[1..], sum) {
            return None;
        }
        let mut operands = node.inputs.clone();
        operands.push(other);
        let mut results = node.outputs.clone();
        results[0] = graph.node(sum).outputs[0];
        Some(Self { op: node.op.clone(), operands, nodes: vec![id, sum], results })
    }

    fn matmul(graph: &Graph, readers: &Readers, id: NodeId, node: &Node, ta: bool, tb: bool) -> Option<Self> {
        let mut e = Epilogue::default();
        let mut nodes = vec![id];
        let (mut bias, mut x, mut residual) = (None, None, None);
        let mut value = node.outputs[0];
        let mut pre = None;
        let dims = &graph.ty(value).shape;
        if let Some(next) = readers.only(value)
            && let Node { op: Op::Binary(Binary::Add), inputs, outputs, .. } = graph.node(next)
            && inputs[0] == value
            && dims.rank() > 1
            && graph.ty(inputs[1]).shape.0 == [dims.cols()]
        {
            (e.bias, bias, value) = (true, Some(inputs[1]), outputs[0]);
            nodes.push(next);
        }
        if let Some((next, f)) = activation(graph, readers, value) {
            let single = readers.only(value).is_some();
            if single || early_enough(readers, &[value], next) {
                e.act = Some(f);
                e.keep_pre = !single;
                pre = (!single).then_some(value);
                value = graph.node(next).outputs[0];
                nodes.push(next);
            }
        } else if let Some(next) = readers.only(value)
            && let Node { op: Op::UnaryGrad(f), inputs, outputs, .. } = graph.node(next)
            && inputs[1] == value
            && inputs[0] != value
        {
            (e.act_grad, x, value) = (Some(*f), Some(inputs[0]), outputs[0]);
            nodes.push(next);
        }
        if let Some((sum, other)) = added(graph, readers, value)
            && pre.is_none_or(|pre| early_enough(readers, &[pre], sum))
        {
            (e.residual, residual, value) = (true, Some(other), graph.node(sum).outputs[0]);
            nodes.push(sum);
        }
        if nodes.len() == 1 {
            return None;
        }
        let mut operands = node.inputs.clone();
        operands.extend([bias, x, residual].into_iter().flatten());
        let mut results = vec![value];
        results.extend(pre);
        Some(Self { op: Op::MatMul { ta, tb, epilogue: e }, operands, nodes, results })
    }
}

/// The addition of `value` (read nowhere else) to another value of the same shape, and that other value; none that is the
/// sum of several runs.
fn added(graph: &Graph, readers: &Readers, value: ValueId) -> Option<(NodeId, ValueId)> {
    let sum = readers.only(value)?;
    let Node { op: Op::Binary(Binary::Add), inputs, .. } = graph.node(sum) else { return None };
    let other = if inputs[0] == value { inputs[1] } else { inputs[0] };
    let same = graph.ty(other).shape == graph.ty(value).shape && other != value;
    (same && !adds_to_state(graph, sum)).then_some((sum, other))
}

/// The first activation applied to `value`.
fn activation(graph: &Graph, readers: &Readers, value: ValueId) -> Option<(NodeId, Unary)> {
    readers.nodes[value.0 as usize].iter().find_map(|&id| match graph.node(id).op {
        // A scaled product may end in place on a state or residual; fused as an activation it could not.
        Op::Unary(Unary::Scale(_)) => None,
        Op::Unary(f) if !readers.taken.contains(&id) => Some((id, f)),
        _ => None,
    })
}

/// Whether all readers of `values` come at or after node `end`, so that the values may be computed there.
fn early_enough(readers: &Readers, values: &[ValueId], end: NodeId) -> bool {
    values.iter().all(|v| readers.nodes[v.0 as usize].iter().all(|&r| r >= end))
}
