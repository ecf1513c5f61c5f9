//! Dead code: nodes that no output and no update depends on are dropped. Inputs stay, so that a plan's interface is
//! what the model declared; states that are neither read nor updated go.

use crate::error::Result;
use crate::graph::Graph;
use crate::op::Op;

/// Drops dead nodes.
///
/// # Errors
/// Internal errors only.
pub fn dce(graph: &Graph) -> Result<Graph> {
    let mut live = vec![false; graph.value_count()];
    for (_, v) in graph.outputs() {
        live[v.0 as usize] = true;
    }
    for (state, v) in graph.updates() {
        live[state.0 as usize] = true;
        live[v.0 as usize] = true;
    }
    for node in graph.nodes().iter().rev() {
        if node.outputs.iter().any(|v| live[v.0 as usize]) {
            for v in &node.inputs {
                live[v.0 as usize] = true;
            }
        }
    }
    graph.rewrite(|_, _, node| {
        let keep = matches!(node.op, Op::Input { .. }) || node.outputs.iter().any(|v| live[v.0 as usize]);
        Ok(if keep { None } else { Some(vec![]) })
    })
}
