//! What can go wrong while a plan runs.

use pyrformer_graph::DType;

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A run that cannot go on. States are untouched where the error comes from an input: indices are checked before any
/// update is written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An index outside its table.
    #[error("[{op}] {message}")]
    Index {
        /// The operation's printed name.
        op: &'static str,
        /// Which index, and the range.
        message: String,
    },
    /// An input that is missing, unknown or of another type.
    #[error("[run] {0}")]
    Input(String),
    /// A state that is missing or of another type.
    #[error("[state] {0}")]
    State(String),
    /// A step that computes in a 16-bit float.
    #[error("[cpu] {0} is in {1}, in which the CPU does not compute; use float32, or device \"cuda\"")]
    Unsupported(&'static str, DType),
    /// Memory that cannot be had.
    #[error("[memory] {0}")]
    Memory(String),
    /// A broken invariant: a fault of this library, not of its user.
    #[error("[cpu] internal error, please report it: {0}")]
    Internal(String),
}

/// An empty vector with room for so many elements: what a caller's sizes ask for is asked for here, since the standard
/// library ends the process where there is no memory.
///
/// # Errors
/// [`Error::Memory`] when it cannot be had.
pub fn room<T>(elements: usize) -> Result<Vec<T>> {
    let mut empty = Vec::new();
    match empty.try_reserve_exact(elements) {
        Ok(()) => Ok(empty),
        Err(_) => Err(Error::no_memory(elements.saturating_mul(size_of::<T>()))),
    }
}

impl Error {
    /// There is no memory for so many bytes.
    pub(crate) fn no_memory(bytes: usize) -> Self {
        Self::Memory(format!("there is no memory for {bytes} more bytes; ask for less at once"))
    }
}
