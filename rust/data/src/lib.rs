//! From text files to training batches: read documents, clean them, and cut their token ids into rows.
//!
//! Every batch is a pure function of its options and its step number ([`CausalBatches`],
//! [`MaskedBatches`], [`PairBatches`], [`PermutedBatches`]): a run
//! resumes at step `s` by asking for batch `s`, and nothing depends on threads or on what was drawn before.

mod clean;
mod corpus;
mod csv;
mod error;
mod mask;
mod masker;
mod open;
mod order;
mod pack;
mod pairs;
mod permute;
pub mod purpose;
mod read;

pub use clean::{Cleaner, Step, StepReport};
pub use corpus::{Corpus, write_shard};
pub use error::{Error, Result};
pub use mask::{MaskedBatch, MaskedBatches};
pub use masker::{MaskedOptions, Spans, Words};
pub use open::zstd_frame;
pub use pack::{CausalBatch, CausalBatches, CausalOptions};
pub use pairs::{PairBatch, PairBatches};
pub use permute::{MOST_PAIRS, PermutedBatch, PermutedBatches, PermutedOptions};
pub use read::{DecodeErrors, Documents, Form, ReadOptions, Rejected};

/// The label that the loss leaves out (Hugging Face's convention).
pub const IGNORED_LABEL: i32 = -100;
