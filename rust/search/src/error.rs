//! What can go wrong in a search: one enum, each message one sentence with the place and the remedy.

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of this crate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An option is out of range or contradicts another.
    #[error("[search] {option} {problem}")]
    Option {
        /// The option's name.
        option: &'static str,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A prompt cannot be continued.
    #[error("[search] prompt {prompt} {problem}")]
    Prompt {
        /// Position in the batch, from 0.
        prompt: usize,
        /// What is wrong and what to do.
        problem: String,
    },
    /// The model's numbers cannot be searched.
    #[error("[search] step {step}, sequence {sequence}: {problem}")]
    Logits {
        /// Number of tokens every active sequence had got before, hence 0 for the first.
        step: usize,
        /// The sequence, as in [`crate::Step::sequences`].
        sequence: usize,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A function of the caller's failed.
    #[error("[search] {name}: {problem}")]
    Hook {
        /// The option that gave the function.
        name: &'static str,
        /// What it said.
        problem: String,
    },
    /// What was given from outside does not fit the search.
    #[error("[search] {0}")]
    Outside(String),
    /// The slice of logits has the wrong length.
    #[error("[search] step {step} needs logits [{active}, {vocab_size}], {given} numbers came")]
    Shape {
        /// The step.
        step: usize,
        /// Rows expected.
        active: usize,
        /// Columns expected.
        vocab_size: usize,
        /// Length of the slice given.
        given: usize,
    },
}

impl Error {
    pub(crate) fn option<T>(option: &'static str, problem: impl Into<String>) -> Result<T> {
        Err(Self::Option { option, problem: problem.into() })
    }
}
