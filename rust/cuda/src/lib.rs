//! CUDA kernel sources, embedded; launch records for a plan. No driver.
//!
//! The kernels of `cuda/*.cu` travel inside the library as text and are compiled on the user's machine by NVRTC, so
//! kernels and planner are always of one version and no file is looked up at run time. [`sources`] assembles them.

pub mod sources;

pub use sources::{Source, of_kernel};
