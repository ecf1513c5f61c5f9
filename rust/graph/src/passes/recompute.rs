//! Activation checkpointing: what the layers of a model computed is computed again in the backward pass instead of being
//! kept until then. Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 3.
//!
//! A layer is what shares a scope up to its first number: `h.3.attn` and `h.3.mlp` are layer `h.3`. What other parts of
//! the model read of a layer (the residual stream) is kept; each operation behind the rest is repeated just before the
//! first gradient that needs it. Operations are pure functions, dropout included, so results keep their bits. The earliest
//! layers come first: theirs is kept the longest.

use crate::error::Result;
use crate::graph::{Graph, Node, Rewrite, ValueId};
use crate::op::Op;

/// The layer that a scope belongs to.
fn layer(scope: &str) -> Option<&str> {
    let mut end = 0;
    for part in scope.split('.') {
        end += part.len();
        if !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()) {
            return Some(&scope[..end]);
        }
        end += 1;
    }
    None
}

/// Where the backward pass begins: the first gradient of a loss.
pub(super) fn backward(graph: &Graph) -> usize {
    let nodes = graph.nodes();
    nodes.iter().position(|n| matches!(n.op, Op::LinearCrossEntropyGrad(_))).unwrap_or(nodes.len())
}

/// The layers of the forward pass, in order; none where the graph has no backward pass.
#[must_use]
pub fn layers(graph: &Graph) -> Vec<&str> {
    let begin = backward(graph);
    let mut found: Vec<&str> = Vec::new();
    if begin < graph.nodes().len() {
        for name in graph.nodes()[..begin].iter().filter_map(|n| layer(&n.scope)) {
            if !found.contains(&name) {
                found.push(name);
            }
        }
    }
    found
}

/// Recomputes the first `count` layers in the backward pass. It runs after fusion, so that what is repeated is exactly
/// what ran before.
///
/// # Errors
/// Internal errors only.
pub fn recompute(graph: &Graph, count: usize) -> Result<Graph> {
    let names = layers(graph);
    let names = &names[..count.min(names.len())];
    let begin = backward(graph);
    let owner = |at: usize| {
        let node: &Node = &graph.nodes()[at];
        layer(&node.scope).filter(|l| names.contains(l) && !node.op.is_leaf())
    };
    // Forward nodes of the layers all of whose results are read by their own layer only, until the backward pass.
    let mut dropped: Vec<bool> = (0..begin).map(|at| owner(at).is_some()).collect();
    for (at, node) in graph.nodes()[..begin].iter().enumerate() {
        for &v in &node.inputs {
            let from = graph.value(v).node.0 as usize;
            if dropped[from] && owner(at) != owner(from) {
                dropped[from] = false;
            }
        }
    }
    for v in graph.ends() {
        if let Some(slot) = dropped.get_mut(graph.value(v).node.0 as usize) {
            *slot = false;
        }
    }
    graph.rewrite(|rw, id, node| {
        if id.0 as usize >= begin {
            let scope = node.scope.clone();
            for &v in &node.inputs {
                again(graph, rw, &mut dropped, v)?;
            }
            rw.to.set_scope(scope);
        }
        Ok(None)
    })
}

/// Repeats what leads to a value that was dropped; from here on, the repetition stands for the value.
fn again(graph: &Graph, rw: &mut Rewrite<'_>, dropped: &mut [bool], value: ValueId) -> Result<()> {
    let at = graph.value(value).node.0 as usize;
    if !dropped.get(at).copied().unwrap_or(false) {
        return Ok(());
    }
    dropped[at] = false;
    let node = &graph.nodes()[at];
    for &v in &node.inputs {
        again(graph, rw, dropped, v)?;
    }
    rw.to.set_scope(node.scope.clone());
    let new = rw.copy(node)?;
    for (&old, new) in node.outputs.iter().zip(new) {
        rw.replace(old, new);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::layer;

    #[test]
    fn a_layer_ends_at_the_first_number() {
        assert_eq!(layer("h.3.attn"), Some("h.3"));
        assert_eq!(layer("encoder.layer.12"), Some("encoder.layer.12"));
        assert_eq!(layer("0.1.mlp"), Some("0"));
        assert_eq!(layer("ln_f"), None);
        assert_eq!(layer(""), None);
    }
}
