//! Common subexpressions: the same operation on the same operands is computed once. Every operation is a pure function
//! of its operands (random ones of their `rng` operand and stream), so equal nodes have equal results.

use std::collections::HashMap;

use crate::error::Result;
use crate::graph::{Graph, ValueId};

/// Merges equal nodes.
///
/// # Errors
/// Internal errors only.
pub fn cse(graph: &Graph) -> Result<Graph> {
    let mut seen: HashMap<String, Vec<ValueId>> = HashMap::new();
    graph.rewrite(|rw, _, node| {
        if node.op.is_leaf() {
            return Ok(None);
        }
        // Attributes include floats, which have no hash; their printed form is exact.
        let key = format!("{:?} {:?} {}", node.op, rw.operands(node)?, graph.ty(node.outputs[0]));
        if let Some(known) = seen.get(&key) {
            return Ok(Some(known.clone()));
        }
        let new = rw.copy(node)?;
        seen.insert(key, new.clone());
        Ok(Some(new))
    })
}
