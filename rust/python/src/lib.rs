//! The Python bindings.
use pyo3::prelude::*;

/// The native half of pyrformer.
#[pymodule]
mod _core {}
