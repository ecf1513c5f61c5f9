//! The CPU executor: threads, SIMD, kernels and their naive twins.
//!
//! `view` and `real` are the vocabulary of kernels, `simd` picks the instruction set at run time, `threads` runs tasks,
//! `gemm` and `math` carry most of the arithmetic. `kernels` holds one file per family of operations, `executor` walks a
//! plan over `memory`, `nonfinite` looks for the step that spoils a run, and `reference` computes the same from the definitions, for tests.

mod error;
mod executor;
pub mod gemm;
pub mod kernels;
pub mod math;
mod memory;
mod nonfinite;
pub mod real;
pub mod reference;
pub mod simd;
pub mod threads;
pub mod view;
mod weights;
mod zeroed;

pub use error::{Error, Result, room};
pub use executor::{Array, Cpu, CpuExecutor};
pub use kernels::optimizer::norm_parts;
pub use memory::{Owner, Store};
pub use nonfinite::{NonFinite, Summary};
