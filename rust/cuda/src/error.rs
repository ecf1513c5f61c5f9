//! Why a plan cannot run on a CUDA device.

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A plan that has no launch records.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An operation, or a form of it, without a kernel.
    #[error("[cuda] step {step}: {op} cannot run on a CUDA device: {why}; use device \"cpu\"")]
    Unsupported {
        /// Its place in the plan.
        step: usize,
        /// The operation's printed name.
        op: String,
        /// What is missing.
        why: String,
    },
    /// A tensor whose elements kernels cannot count with 32 bits.
    #[error(
        "[cuda] step {step}: {op} has a tensor of {elements} elements, kernels count to 2147483647; use smaller batches"
    )]
    TooLarge {
        /// Its place in the plan.
        step: usize,
        /// The operation's printed name.
        op: String,
        /// How many.
        elements: usize,
    },
}
