//! Vocabularies whose merges are implied by an order of their tokens: `.tiktoken` files, and SentencePiece's BPE.
//!
//! Such a model merges whatever neighbours make the best token, so that each token stands for as many merges as there are
//! ways to cut it into two tokens. Source: openai/tiktoken `src/lib.rs` (`byte_pair_merge`); the order of the merges of
//! one token is that of transformers' `convert_slow_tokenizer.py` (`TikTokenConverter`, `generate_merges`).

use std::path::Path;

use crate::added::AddedToken;
use crate::bpe::{Bpe, BpeOptions};
use crate::bytes::{byte_to_char, from_base64};
use crate::model::Model;
use crate::pattern::Pattern;
use crate::presets::Preset;
use crate::pretokenize::PreTokenizer;
use crate::split::{Behavior, LLAMA3_PATTERN, O200K_PATTERN, QWEN2_PATTERN};
use crate::vocab::{Index, Vocab};
use crate::{Error, Result, Tokenizer, parallel};

/// Tokens that a thread cuts at a time.
const PART: usize = 1 << 12;

/// Two tokens and what they make.
pub(crate) type Merge = (u32, u32, u32);

/// All ways to cut each token into two, those of one token by the ids of its halves, tokens in the order given.
///
/// Prefixes and suffixes are looked up by polynomial hashes, of which those of all cuts of a token come from one walk
/// over it; what has the hash is compared byte for byte.
pub(crate) fn merges<T: AsRef<[u8]> + Sync>(tokens: &[(u32, T)]) -> Vec<Merge> {
    const BASE: u64 = 0x9E37_79B9_7F4A_7C15;
    let add = |hash: u64, &byte: &u8| hash.wrapping_mul(BASE).wrapping_add(u64::from(byte) + 1);
    // The low bits choose the slot, the high ones are compared: both must depend on all.
    let mix = |hash: u64| (hash ^ hash >> 32).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    let mix = |hash: u64| mix(hash) ^ mix(hash) >> 32;
    let mut index = Index::with_capacity(tokens.len());
    for ((_, token), at) in tokens.iter().zip(0..) {
        index.insert(mix(token.as_ref().iter().fold(0, add)), at);
    }
    let find = |hash: u64, part: &[u8]| {
        let at = index.find(mix(hash), |at| tokens[at as usize].1.as_ref() == part)?;
        Some(tokens[at as usize].0)
    };
    let longest = tokens.iter().map(|(_, token)| token.as_ref().len()).max().unwrap_or(0);
    let powers: Vec<u64> =
        std::iter::successors(Some(1u64), |p| Some(p.wrapping_mul(BASE))).take(longest + 1).collect();
    let parts = parallel::map(
        tokens.len().div_ceil(PART),
        0,
        || (),
        |part, ()| {
            let mut all = vec![];
            for (id, token) in tokens[part * PART..].iter().take(PART) {
                let token = token.as_ref();
                let whole = token.iter().fold(0, add);
                let first = all.len();
                let mut prefix = 0;
                for at in 1..token.len() {
                    prefix = add(prefix, &token[at - 1]);
                    let suffix = whole.wrapping_sub(prefix.wrapping_mul(powers[token.len() - at]));
                    if let Some(left) = find(prefix, &token[..at])
                        && let Some(right) = find(suffix, &token[at..])
                    {
                        all.push((left, right, *id));
                    }
                }
                all[first..].sort_unstable();
            }
            all
        },
    );
    parts.concat()
}

/// How a byte-level vocabulary splits text into words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Split {
    Gpt2,
    Cl100k,
    O200k,
    Qwen2,
}

impl Split {
    const ALL: [(&'static str, Self); 4] =
        [("gpt2", Self::Gpt2), ("cl100k", Self::Cl100k), ("o200k", Self::O200k), ("qwen2", Self::Qwen2)];

    fn parse(name: &str) -> Result<Self> {
        let known = Self::ALL.iter().find(|(known, _)| *known == name).map(|&(_, split)| split);
        known.ok_or_else(|| {
            let names = Self::ALL.map(|(name, _)| name).join(", ");
            Error::option("load tokenizer", "split", format!("is {name:?} but must be one of {names}"))
        })
    }

    /// The pre-tokenizer of tokenizer.json.
    pub(crate) fn pre_tokenizer(self) -> PreTokenizer {
        let byte_level =
            |use_regex| PreTokenizer::ByteLevel { add_prefix_space: false, trim_offsets: true, use_regex };
        let pattern = match self {
            Self::Gpt2 => return byte_level(true),
            Self::Cl100k => LLAMA3_PATTERN,
            Self::O200k => O200K_PATTERN,
            Self::Qwen2 => QWEN2_PATTERN,
        };
        let split = PreTokenizer::Split {
            pattern: Pattern::regex(pattern),
            behavior: Behavior::Isolated,
            invert: false,
        };
        PreTokenizer::Sequence { pretokenizers: vec![split, byte_level(false)] }
    }
}

/// Number of ranks, split, and special tokens with their ids.
type Published = (usize, Split, &'static [(&'static str, u32)]);

/// The published rank files: number of ranks, split, and special tokens, which the files do not hold.
/// Source: openai/tiktoken `tiktoken_ext/openai_public.py`; the tokenizers of Llama 3 and Qwen.
const PUBLISHED: [Published; 6] = [
    (50_256, Split::Gpt2, &[("<|endoftext|>", 50_256)]),
    (50_280, Split::Gpt2, &[("<|endoftext|>", 50_256)]),
    (
        100_256,
        Split::Cl100k,
        &[
            ("<|endoftext|>", 100_257),
            ("<|fim_prefix|>", 100_258),
            ("<|fim_middle|>", 100_259),
            ("<|fim_suffix|>", 100_260),
            ("<|endofprompt|>", 100_276),
        ],
    ),
    (
        128_000,
        Split::Cl100k,
        &[
            ("<|begin_of_text|>", 128_000),
            ("<|end_of_text|>", 128_001),
            ("<|start_header_id|>", 128_006),
            ("<|end_header_id|>", 128_007),
            ("<|eot_id|>", 128_009),
        ],
    ),
    (
        151_643,
        Split::Qwen2,
        &[("<|endoftext|>", 151_643), ("<|im_start|>", 151_644), ("<|im_end|>", 151_645)],
    ),
    (199_998, Split::O200k, &[("<|endoftext|>", 199_999), ("<|endofprompt|>", 200_018)]),
];

/// Reads a file of lines `base64-of-the-token rank`; `split` says how text falls into words where the number of ranks is
/// not that of a published file.
pub(crate) fn load(path: &Path, split: Option<&str>) -> Result<Tokenizer> {
    let text = std::fs::read(path).map_err(Error::io("load tokenizer", path))?;
    let mut ranks: Vec<(u32, Vec<u8>)> = vec![];
    for (line, i) in text.split(|&b| b == b'\n').zip(1..) {
        let line = line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        let entry = line.iter().position(|&b| b == b' ').and_then(|space| {
            let rank = std::str::from_utf8(&line[space + 1..]).ok()?.parse().ok()?;
            Some((rank, from_base64(&line[..space]).filter(|token| !token.is_empty())?))
        });
        ranks.push(entry.ok_or_else(|| {
            Error::source(path, format!("line {i} is not a token in base64, a space and its rank"))
        })?);
    }
    ranks.sort_unstable();
    let published = PUBLISHED.iter().find(|&&(n, ..)| n == ranks.len());
    let split = match (split, published) {
        (Some(name), _) => Split::parse(name)?,
        (None, Some(&(_, split, _))) => split,
        (None, None) => {
            let names = Split::ALL.map(|(name, _)| name).join(", ");
            let problem = format!(
                "{} ranks are those of no known file; say with split ({names}) how text is split",
                ranks.len()
            );
            return Err(Error::source(path, problem));
        }
    };
    let special = published.map_or(&[][..], |&(_, _, special)| special);
    let string = |token: &[u8]| token.iter().map(|&b| byte_to_char(b)).collect::<String>();
    let mut entries: Vec<(String, u32)> = ranks.iter().map(|(id, token)| (string(token), *id)).collect();
    entries.extend(special.iter().map(|&(token, id)| (token.to_owned(), id)));
    let vocab = Vocab::new(&entries).map_err(|e| Error::source(path, e.to_string()))?;
    let merges = merges(&ranks);
    let options = BpeOptions { ignore_merges: true, ..BpeOptions::default() };
    let model = Bpe::with_ids(vocab, merges, options, true)?;
    let added = special.iter().map(|&(token, id)| AddedToken::special(token, id)).collect();
    let mut parts = Preset::Gpt2.parts(added, Model::Bpe(model));
    parts.pre_tokenizer = Some(split.pre_tokenizer());
    Tokenizer::new(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_all_its_merges() {
        let tokens = ["a", "b", "ab", "bb", "abb"];
        let tokens: Vec<_> = (0..).zip(tokens).collect();
        let found = merges(&tokens);
        assert_eq!(found, [(0, 1, 2), (1, 1, 3), (0, 3, 4), (2, 1, 4)]);
    }
}
