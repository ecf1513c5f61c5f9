//! What can go wrong with files: one enum, each message one sentence with the place and the remedy.

use std::io;
use std::path::{Path, PathBuf};

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error("[files] cannot {action} {path}: {source}")]
    Io {
        /// What was attempted, as a verb: "open", "write" …
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file as a whole is not what its format promises.
    #[error("[safetensors] {path}: {problem}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// One tensor's entry is wrong.
    #[error("[safetensors] {path}: tensor '{tensor}': {problem}")]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A GGUF file is not what its format promises.
    #[error("[gguf] {path}: {problem}")]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// The target of an atomic directory is taken.
    #[error("[files] {path} already exists; choose another place or ask for it to be replaced")]
    Exists {
        /// The directory that is in the way.
        path: PathBuf,
    },
}

impl Error {
    /// For `map_err`: wraps an I/O error with what was attempted and where.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }

    pub(crate) fn format(path: &Path, problem: impl Into<String>) -> Self {
        Self::Format { path: path.to_owned(), problem: problem.into() }
    }

    pub(crate) fn gguf(path: &Path, problem: impl Into<String>) -> Self {
        Self::Gguf { path: path.to_owned(), problem: problem.into() }
    }

    pub(crate) fn tensor(path: &Path, tensor: &str, problem: impl Into<String>) -> Self {
        Self::Tensor { path: path.to_owned(), tensor: tensor.to_owned(), problem: problem.into() }
    }
}
