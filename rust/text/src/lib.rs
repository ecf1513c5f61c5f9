//! Tokenizers and their training: text to ids and back, exactly as the `tokenizers` library does it.
//!
//! [`Tokenizer`] runs a pipeline on one of two engines. `native` is ours and fast: a text passes through these files: added tokens are cut out (`added`), the rest is normalized (`normalize`, on the
//! characters and origins of `text`), split into words (`pretokenize`, `split`), each word becomes tokens (`bpe`,
//! `wordpiece` or `unigram`), and a template goes around them (`template`, `encoding` for truncation and padding).
//! `ids` is the same without offsets and with a cache; `decode` and `stream` lead back. `format` reads and writes
//! tokenizer.json, `legacy`, `ranked`, `gguf` and `sentencepiece` read other files, `train` learns vocabularies. A pipeline
//! that these do not know runs on the `tokenizers` library itself (`library`).
//!
//! ```
//! use pyrformer_text::{Preset, Tokenizer, TrainOptions};
//!
//! # fn main() -> pyrformer_text::Result<()> {
//! let documents = ["the cat sat on the mat", "the cat ate the rat"];
//! let tokenizer = Tokenizer::train(&documents, &TrainOptions::new(Preset::Gpt2, 270), &mut |_| {})?;
//! let encoding = tokenizer.encode("the cat", None, true)?;
//! assert_eq!(tokenizer.decode(&encoding.ids, true)?, "the cat");
//! let batch = tokenizer.encode_batch(&documents, true, 0)?;
//! assert_eq!(batch.row(0).len() + batch.row(1).len(), batch.ids.len());
//! # Ok(())
//! # }
//! ```
//!
//! The reference is version 0.23 of the library. It differs in characters that Unicode added after its tables of
//! decompositions were made: NFKC and accent stripping here follow the current ones.

mod added;
mod bpe;
mod bytes;
mod cache;
mod charmap;
mod decode;
mod encoding;
mod error;
mod format;
mod gguf;
mod ids;
mod legacy;
mod library;
mod model;
mod native;
mod normalize;
mod parallel;
mod pattern;
mod presets;
mod pretokenize;
mod ranked;
mod roles;
mod sentencepiece;
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
mod words;

pub use added::AddedToken;
pub use encoding::{Direction, Encoding, Padding, PaddingStrategy, Truncation, TruncationStrategy};
pub use error::{Error, Result};
pub use ids::Ragged;
pub use presets::Preset;
pub use roles::SpecialIds;
pub use stream::StreamDecoder;
pub use tokenizer::Tokenizer;
pub use train::{Progress, TrainOptions, Trainer};
