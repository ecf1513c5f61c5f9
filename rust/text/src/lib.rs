//! Tokenizers and their training: text to ids and back, exactly as the `tokenizers` library does it.

mod added;
mod bpe;
mod bytes;
mod cache;
mod decode;
mod encoding;
mod error;
mod format;
mod ids;
mod model;
mod normalize;
mod parallel;
mod pretokenize;
mod roles;
mod split;
mod stream;
mod template;
mod text;
mod tokenizer;
mod train;
mod trie;
mod unicode;
mod unicode_tables;
mod unigram;
mod vocab;
mod wordpiece;

pub use added::AddedToken;
pub use encoding::{Direction, Encoding, Padding, PaddingStrategy, Truncation, TruncationStrategy};
pub use error::{Error, Result};
pub use ids::Ragged;
pub use roles::SpecialIds;
pub use stream::StreamDecoder;
pub use tokenizer::Tokenizer;
pub use train::{Preset, Progress, TrainOptions};
