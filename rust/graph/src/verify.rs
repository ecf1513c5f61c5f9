//! What a legal graph is.

use std::collections::HashSet;

use crate::error::{Error, Result};
use crate::graph::{Graph, NodeId};
use crate::op::Op;

/// Checks that every operand is computed before it is read, every type is what its operation's rule gives, names are
/// unique, and each update fits its state. Run after every pass in tests and debug builds.
///
/// # Errors
/// [`Error::Internal`] naming the first node that breaks a rule.
pub fn verify(graph: &Graph) -> Result<()> {
    let fail = |i: usize, what: String| Err(Error::Internal(format!("node {i}: {what}")));
    let mut known = HashSet::new();
    let mut names = HashSet::new();
    for (i, node) in graph.nodes().iter().enumerate() {
        if let Some(v) = node.inputs.iter().find(|v| !known.contains(*v)) {
            return fail(i, format!("{} reads %{} before it is computed", node.op.name(), v.0));
        }
        let operands: Vec<_> = node.inputs.iter().map(|&v| graph.ty(v)).collect();
        let types = node.op.infer(&operands, Some(graph.ty(node.outputs[0])))?;
        if types.len() != node.outputs.len() {
            return fail(
                i,
                format!(
                    "{} has {} results, its rule gives {}",
                    node.op.name(),
                    node.outputs.len(),
                    types.len()
                ),
            );
        }
        for (slot, (&v, ty)) in node.outputs.iter().zip(&types).enumerate() {
            let value = graph.value(v);
            if value.ty != *ty || value.node != NodeId(i as u32) || value.slot != slot {
                return fail(
                    i,
                    format!("result {slot} of {} is {}, its rule gives {ty}", node.op.name(), value.ty),
                );
            }
            known.insert(v);
        }
        if let Op::Input { name } | Op::State { name } = &node.op
            && (!names.insert(name.clone()) || graph.leaf(name) != Some(node.outputs[0]))
        {
            return fail(i, format!("{name:?} is declared twice"));
        }
    }
    for (name, v) in graph.outputs() {
        if !known.contains(v) {
            return Err(Error::Internal(format!("output {name:?} is never computed")));
        }
    }
    for (state, v) in graph.updates() {
        if !known.contains(v) || graph.ty(*state) != graph.ty(*v) {
            return Err(Error::Internal(format!("the update of %{} does not fit", state.0)));
        }
    }
    Ok(())
}
