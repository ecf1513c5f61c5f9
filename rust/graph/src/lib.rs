//! The compiler: what a model computes, made into a list of kernels over planned memory. No kernels live here.
//!
//! ```text
//! Graph ──autodiff──▶ Graph ──passes: fold, cse, dce, fuse──▶ Graph ──lower: schedule + memory plan──▶ Plan
//! ```
//!
//! Read in processing order: [`dtype`] and [`op`] are the vocabulary (a closed set of typed operations, one row each for
//! shapes), [`graph`] holds a program in single-assignment form, [`autodiff`] adds its gradient (one rule per
//! operation), [`passes`] rewrite it, [`memory`] gives every buffer an offset, [`lower`](mod@lower) puts the two together into a
//! [`plan`]: data that an executor walks, that can be printed, serialised and costed. [`verify`](mod@verify) states what a legal
//! graph is and runs after every pass in tests; [`print`](mod@print) is the text form that people read and snapshots compare.
//!
//! Dimension letters: B batch, T tokens, S cache slots, C width, H query heads, K key-value heads, D head width,
//! V vocabulary, N = B·T rows.

pub mod autodiff;
pub mod cost;
pub mod dtype;
mod error;
pub mod graph;
pub mod lower;
pub mod memory;
pub mod op;
pub mod passes;
pub mod plan;
pub mod print;
pub mod verify;

pub use dtype::{DType, Shape, TensorType};
pub use error::{Error, Result};
pub use graph::{Graph, NodeId, ValueId};
pub use lower::{Target, lower};
pub use op::{AttentionSpec, Binary, Epilogue, LossSpec, Op, RelativeSpec, Unary};
pub use plan::{Operand, Plan, Space, Step};
