//! CUDA kernel sources, embedded; launch records for a plan. No driver.
//!
//! The kernels of `cuda/*.cu` travel inside the library as text and are compiled on the user's machine by NVRTC, so
//! kernels and planner are always of one version and no file is looked up at run time. [`sources`] assembles them.
//! [`launch`] says, for each step of a plan, which of them run, with what geometry and arguments; [`steps`] holds one
//! rule for each operation. What walks the records is Python: `pyrformer/executors`.

mod error;
pub mod launch;
pub mod limits;
pub mod sources;
pub mod steps;

pub use error::{Error, Result};
pub use launch::{Arg, Launch, Matrix, Memory, Place, Product, Program, Record};
pub use sources::{Source, of_kernel};
pub use steps::Cuda;
