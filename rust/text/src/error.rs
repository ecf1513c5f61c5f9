//! What can go wrong with text: one enum, each message one sentence with the place and the remedy.

use std::path::{Path, PathBuf};

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read or written.
    #[error("[{op}] {}: {source}", path.display())]
    Io {
        /// The operation that failed.
        op: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A tokenizer.json cannot be understood, or holds a component this crate does not have.
    #[error("[tokenizer.json] {component}: {problem}")]
    Format {
        /// The part of the file: `model`, `normalizer`, `decoder` …
        component: &'static str,
        /// What is wrong and what to do.
        problem: String,
    },
    /// Another file that holds a tokenizer cannot be understood.
    #[error("[load tokenizer] {}: {problem}", path.display())]
    Source {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A GGUF file cannot be read.
    #[error(transparent)]
    File(#[from] pyrformer_files::Error),
    /// An option is out of range, unknown, or contradicts another.
    #[error("[{op}] {option} {problem}")]
    Option {
        /// The operation the option belongs to.
        op: &'static str,
        /// The option's name.
        option: &'static str,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A text cannot be turned into ids.
    #[error("[encode] {0}")]
    Encode(String),
    /// Ids cannot be turned into text.
    #[error("[decode] id {id} is outside the vocabulary of {vocab_size}")]
    UnknownId {
        /// The id.
        id: u32,
        /// Ids are below this.
        vocab_size: usize,
    },
    /// A decoder fails on its tokens.
    #[error("[decode] {0}")]
    Decode(String),
    /// A tokenizer cannot be trained on what was given.
    #[error("[train] {0}")]
    Train(String),
}

impl Error {
    pub(crate) fn io(op: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { op, path, source }
    }

    pub(crate) fn source(path: &Path, problem: impl Into<String>) -> Self {
        Self::Source { path: path.to_owned(), problem: problem.into() }
    }

    pub(crate) fn format(component: &'static str, problem: impl Into<String>) -> Self {
        Self::Format { component, problem: problem.into() }
    }

    pub(crate) fn option(op: &'static str, option: &'static str, problem: impl Into<String>) -> Self {
        Self::Option { op, option, problem: problem.into() }
    }
}
