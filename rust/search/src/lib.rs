//! Decoding over slices of logits: processors, filters, greedy search, sampling and the beams.
//!
//! The search knows neither model nor device. A loop outside alternates between the two ([`Search::decode`] is one, for
//! models with a cache):
//!
//! ```
//! # use pyrformer_search::{GenerationOptions, Search};
//! # let model = |tokens: &[u32], _parents: &[u32]| vec![0.0f32; tokens.len() * 10];
//! # let options = GenerationOptions { max_new_tokens: Some(3), ..Default::default() };
//! let mut search = Search::new(options, [vec![1, 2].into(), vec![3].into()], 10)?;
//! while let Some(step) = search.step() {
//!     let logits = model(&step.tokens, &step.parents);
//!     search.advance(&logits)?;
//! }
//! for hypothesis in search.finish() {
//!     println!("{:?} {:?}", hypothesis.ids, hypothesis.finish_reason);
//! }
//! # Ok::<(), pyrformer_search::Error>(())
//! ```
//!
//! A [`Step`] lists the active hypotheses: the token each appends and the row of the previous step it continues. A
//! caller with a key/value cache copies that row's *table* (which cache row holds position t), never its keys, so
//! hypotheses share what they have in common.
//!
//! Options bear Hugging Face's names and follow its arithmetic: processors, then filters when sampling, on raw logits
//! in greedy search and sampling, on log-probabilities in beam search. Each row is treated alone, so a prompt decoded
//! in a batch gives the same bits as by itself.
//!
//! Letters: B prompts, V vocabulary size.

mod beam;
mod constraints;
mod error;
mod filters;
mod independent;
mod options;
mod path;
mod processors;
mod rows;
mod sample;
mod search;
mod speculative;
mod stochastic;
mod turns;

pub use error::{Error, Result};
pub use filters::{Filters, filter_logits};
pub use options::{EarlyStopping, GenerationOptions, MOST_SEQUENCES};
pub use path::{FinishReason, Hypothesis};
pub use processors::{AllowedTokens, Ends, Hooks, Processor};
pub use rows::{Best, Row};
pub use search::{Emitted, Prompt, Search, Step};
pub use speculative::Draft;
pub use turns::{Model, Positions};
