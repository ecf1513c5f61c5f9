//! The rewrites between tracing and lowering, each a named pure function Graph → Graph.

mod cse;
mod dce;
mod early;
mod fold;
mod fuse;
mod narrow;
mod recompute;
mod share_loss;
mod stash;

pub use cse::cse;
pub use dce::dce;
pub use early::early;
pub use fold::fold;
pub use fuse::fuse;
pub use narrow::narrow;
pub use recompute::{layers, recompute};
pub use share_loss::share_loss;
pub use stash::stash;

use crate::error::Result;
use crate::graph::Graph;
use crate::verify::verify;

/// A pass and its name.
pub type Pass = (&'static str, fn(&Graph) -> Result<Graph>);

/// The passes in the order they run.
pub const PIPELINE: [Pass; 6] = [
    ("fold", fold),
    ("cse", cse),
    ("dce", dce),
    ("share_loss", share_loss),
    ("early", early),
    ("fuse", fuse),
];

/// Runs the whole pipeline; the result is verified after each pass in debug builds, and once at the end in all.
///
/// # Errors
/// When a pass breaks a rule of the graph: an internal error.
pub fn optimise(graph: &Graph) -> Result<Graph> {
    let mut graph = graph.clone();
    for (_, pass) in PIPELINE {
        graph = pass(&graph)?;
        if cfg!(debug_assertions) {
            verify(&graph)?;
        }
    }
    verify(&graph)?;
    Ok(graph)
}
