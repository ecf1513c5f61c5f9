//! `pyrformer._core`: the Python bindings, one file a domain, and nothing else. Algorithms live in the other crates;
//! argument policy, defaults and documentation for users live in the Python package.

use pyo3::prelude::*;

mod array;
mod cuda;
mod data;
mod decode;
mod enter;
mod files;
mod graph;
mod random;
mod search;
mod text;

/// The native half of pyrformer.
#[pymodule]
mod _core {
    use super::{PyModule, PyModuleMethods, PyResult};

    #[pymodule_export]
    use super::cuda::{cuda_bars, cuda_dynamic_bytes, cuda_program, cuda_sources};
    #[pymodule_export]
    use super::data::{
        CausalBatches, Cleaner, Corpus, Documents, MaskedBatches, PairBatches, PermutedBatches, write_shard,
        zstd_frame,
    };
    #[pymodule_export]
    use super::files::{AtomicDir, Gguf, SafeTensors, write_file, write_safetensors};
    #[pymodule_export]
    use super::graph::{Executor, Graph, Plan, Store, norm_parts, simd_levels};
    #[pymodule_export]
    use super::random::{normal, uniform};
    #[pymodule_export]
    use super::search::{Search, filter_logits};
    #[pymodule_export]
    use super::text::{StreamDecoder, Tokenizer, Trainer};

    #[pymodule_init]
    fn init(module: &pyo3::Bound<'_, PyModule>) -> PyResult<()> {
        super::enter::quiet_panics();
        module.add("MOST_PAIRS", pyrformer_data::MOST_PAIRS)?;
        module.add("MOST_SEQUENCES", pyrformer_search::MOST_SEQUENCES)?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
