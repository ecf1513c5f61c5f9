//! CUDA: launch records of a plan, and the sources of the kernels they name.

use pyo3::prelude::*;
use pyrformer_cuda::sources::{BARS, SOURCES, dynamic_bytes};

use crate::enter::{Failure, enter};
use crate::graph::Plan;

impl From<pyrformer_cuda::Error> for Failure {
    fn from(e: pyrformer_cuda::Error) -> Self {
        Self::new("DeviceError", e)
    }
}

/// The launch records of a plan that was lowered for "cuda", as JSON.
#[pyfunction]
pub(crate) fn cuda_program(py: Python<'_>, plan: &Plan) -> PyResult<String> {
    let plan = plan.shared();
    enter(py, move || {
        pyrformer_cuda::launch::program(&plan)?.to_json().map_err(|e| Failure::new("InternalError", e))
    })
}

/// Each file of kernels: its name, its text for NVRTC, the kernels in it, and the only target it is for, or "".
#[pyfunction]
pub(crate) fn cuda_sources() -> Vec<(String, String, Vec<String>, &'static str)> {
    SOURCES.iter().map(|s| (s.name.clone(), s.unit(), s.kernels.clone(), s.only)).collect()
}

/// Bytes of shared memory that launches of a kernel, for every target or for one, ask for beside what it declares.
#[pyfunction]
pub(crate) fn cuda_dynamic_bytes(kernel: &str, only: &str) -> usize {
    dynamic_bytes(kernel, only)
}

/// Registers and shared memory of each kernel, as TOML.
#[pyfunction]
pub(crate) fn cuda_bars() -> &'static str {
    BARS
}
