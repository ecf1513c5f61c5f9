//! Model files: safetensors, GGUF, half-precision conversions, atomic files and directories.
//!
//! Two ideas. Reading trusts nothing: a header is checked completely before a byte of data is handed out, so a damaged
//! or hostile file gives an error that names the file, the tensor and the remedy. Writing is all or nothing: what
//! stands under its final name is complete and on disk.

mod atomic;
mod error;
mod gguf;
mod half;
mod safetensors;

pub use atomic::{AtomicDir, write_file, write_file_with};
pub use error::{Error, Result};
pub use gguf::{GgmlType, Gguf, GgufTensor, GgufValue};
pub use half::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
pub use safetensors::{DType, MAX_HEADER_BYTES, SafeTensors, TensorView, write_safetensors};
