//! What can be wrong with a graph.

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A graph that cannot be built, differentiated or lowered. Each message names the operation and the shapes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Operand shapes that do not fit together.
    #[error("[{op}] {message}")]
    Shape {
        /// The operation's printed name.
        op: String,
        /// What was expected and what came.
        message: String,
    },
    /// Operand element types that do not fit.
    #[error("[{op}] {message}")]
    DType {
        /// The operation's printed name.
        op: String,
        /// What was expected and what came.
        message: String,
    },
    /// A name used twice, or not at all.
    #[error("[graph] {0}")]
    Name(String),
    /// An operation without a derivative lies between the loss and a parameter.
    #[error("[autodiff] {0}")]
    Derivative(String),
    /// A broken invariant: a fault of this library, not of its user.
    #[error("[graph] internal error, please report it: {0}")]
    Internal(String),
}
