//! Sums that outlive a run, such as those of gradients over several batches: each is taken as soon as what it adds is
//! there, which then need not be kept.
//!
//! Such an addition is a step of its own, never the beginning of a product's own chain of additions: the sum is then the
//! one that somebody makes who has the addends, to the bit.

use std::collections::HashMap;

use crate::error::Result;
use crate::graph::{Graph, NodeId};
use crate::op::{Binary, Op};

/// Moves each node that only adds to a state behind the node that makes what it adds.
///
/// # Errors
/// Internal errors only.
pub fn early(graph: &Graph) -> Result<Graph> {
    let mut behind: HashMap<usize, Vec<usize>> = HashMap::new();
    let count = graph.nodes().len();
    let mut moved = vec![false; count];
    for (i, node) in graph.nodes().iter().enumerate() {
        let makers = node.inputs.iter().map(|&v| graph.value(v).node.0 as usize);
        let last = makers.filter(|&m| !graph.nodes()[m].op.is_leaf()).max();
        if let Some(maker) = last
            && adds_to_state(graph, NodeId(i as u32))
        {
            behind.entry(maker).or_default().push(i);
            moved[i] = true;
        }
    }
    let (mut order, mut placed) = (Vec::with_capacity(count), vec![false; count]);
    let mut place = |i: usize| {
        if !std::mem::replace(&mut placed[i], true) {
            order.push(NodeId(i as u32));
        }
    };
    for i in (0..count).filter(|&i| !moved[i]) {
        place(i);
        for &sum in behind.get(&i).map_or(&[][..], Vec::as_slice) {
            // The other operand is a leaf, which may stand anywhere.
            graph.nodes()[sum].inputs.iter().for_each(|&v| place(graph.value(v).node.0 as usize));
            place(sum);
        }
    }
    graph.rewrite_in(order, |_, _, _| Ok(None))
}

/// Whether a node is the addition to a state that becomes the state's new value, and nobody else reads the state.
pub(super) fn adds_to_state(graph: &Graph, id: NodeId) -> bool {
    let node = graph.node(id);
    node.op == Op::Binary(Binary::Add)
        && graph.updates().iter().any(|&(state, value)| {
            value == node.outputs[0]
                && node.inputs.contains(&state)
                && graph.nodes().iter().flat_map(|n| &n.inputs).filter(|&&v| v == state).count() == 1
        })
}
