//! The CPU executor: threads, SIMD, kernels and their naive twins.
//!
//! `view` and `real` are the vocabulary of kernels, `simd` picks the instruction set at run time, `threads` runs tasks,
//! `gemm` and `math` carry most of the arithmetic.

pub mod gemm;
pub mod math;
pub mod real;
pub mod simd;
pub mod threads;
pub mod view;
