//! SentencePiece's `.model` files: BPE and Unigram.
//!
//! Source of the fields: SentencePiece `src/sentencepiece_model.proto`; of what they imply for a tokenizer.json:
//! transformers `convert_slow_tokenizer.py`. The file is one protocol buffer, of which a few fields are needed: each is a
//! varint key (number and wire type), then a varint, 4 or 8 bytes, or a length and as many bytes.

use std::path::Path;

use serde_json::{Map, Value};

use crate::added::AddedToken;
use crate::bpe::{Bpe, BpeOptions};
use crate::charmap::CharMap;
use crate::decode::Decoder;
use crate::model::Model;
use crate::normalize::Normalizer;
use crate::pattern::Pattern;
use crate::presets::Preset;
use crate::pretokenize::{Metaspace, PreTokenizer, Prepend};
use crate::ranked::merges;
use crate::template::PostProcessor;
use crate::unigram::Unigram;
use crate::vocab::Vocab;
use crate::{Error, Result, Tokenizer};

// Types of pieces; llama.cpp's are the same.
pub(crate) const UNKNOWN: i64 = 2;
pub(crate) const CONTROL: i64 = 3;
pub(crate) const USER_DEFINED: i64 = 4;

/// The value of a field.
enum Wire<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Float(f32),
}

/// The fields of a message, in order; `None` where the bytes are no message.
fn fields(mut bytes: &[u8]) -> Option<Vec<(u64, Wire<'_>)>> {
    fn varint(bytes: &mut &[u8]) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = bytes.split_first()?;
            *bytes = rest;
            value |= u64::from(byte & 127) << shift;
            if byte < 128 {
                return Some(value);
            }
        }
        None
    }
    let mut found = vec![];
    while !bytes.is_empty() {
        let key = varint(&mut bytes)?;
        let value = match key & 7 {
            0 => Wire::Number(varint(&mut bytes)?),
            2 => {
                let length = usize::try_from(varint(&mut bytes)?).ok()?;
                let (value, rest) = bytes.split_at_checked(length)?;
                bytes = rest;
                Wire::Bytes(value)
            }
            5 => {
                let (value, rest) = bytes.split_first_chunk()?;
                bytes = rest;
                Wire::Float(f32::from_le_bytes(*value))
            }
            1 => {
                bytes = bytes.get(8..)?;
                continue;
            }
            _ => return None,
        };
        found.push((key >> 3, value));
    }
    Some(found)
}

/// What is needed of a file; the values before reading are the format's defaults.
struct File {
    tokens: Vec<String>,
    scores: Vec<f64>,
    kinds: Vec<i64>,
    /// 1: Unigram, 2: BPE.
    model_type: u64,
    byte_fallback: bool,
    /// Spaces are marked behind words.
    suffix: bool,
    /// The character map, if there is one; none within where it cannot be read.
    map: Option<Option<CharMap>>,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
}

impl File {
    fn read(bytes: &[u8]) -> Option<Self> {
        let mut file = Self {
            tokens: vec![],
            scores: vec![],
            kinds: vec![],
            model_type: 1,
            byte_fallback: false,
            suffix: false,
            map: None,
            add_dummy_prefix: true,
            remove_extra_whitespaces: true,
        };
        for (number, value) in fields(bytes)? {
            let Wire::Bytes(value) = value else { continue };
            match number {
                1 => {
                    let (mut token, mut score, mut kind) = (String::new(), 0.0, 1);
                    for field in fields(value)? {
                        match field {
                            (1, Wire::Bytes(bytes)) => token = String::from_utf8(bytes.to_vec()).ok()?,
                            (2, Wire::Float(value)) => score = f64::from(value),
                            (3, Wire::Number(value)) => kind = i64::try_from(value).ok()?,
                            _ => {}
                        }
                    }
                    file.tokens.push(token);
                    file.scores.push(score);
                    file.kinds.push(kind);
                }
                2 => {
                    for field in fields(value)? {
                        match field {
                            (3, Wire::Number(value)) => file.model_type = value,
                            (24, Wire::Number(value)) => file.suffix = value != 0,
                            (35, Wire::Number(value)) => file.byte_fallback = value != 0,
                            _ => {}
                        }
                    }
                }
                3 => {
                    for field in fields(value)? {
                        match field {
                            (2, Wire::Bytes(map)) if !map.is_empty() => file.map = Some(CharMap::new(map)),
                            (3, Wire::Number(value)) => file.add_dummy_prefix = value != 0,
                            (4, Wire::Number(value)) => file.remove_extra_whitespaces = value != 0,
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        (!file.tokens.is_empty() && file.scores.iter().all(|s| !s.is_nan())).then_some(file)
    }
}

/// Loads a `.model` file. `config` is the tokenizer_config.json beside it: `add_bos_token` and `add_eos_token`; without
/// them a BPE begins texts with `<s>`, as Llama's do, and a Unigram adds nothing.
pub(crate) fn load(path: &Path, config: &Map<String, Value>) -> Result<Tokenizer> {
    let refuse = |problem: String| Error::source(path, problem);
    let bytes = std::fs::read(path).map_err(Error::io("load tokenizer", path))?;
    let file = File::read(&bytes).ok_or_else(|| refuse("it is no model of SentencePiece".into()))?;
    let map = match &file.map {
        Some(None) => return Err(refuse("its character map cannot be read".into())),
        map => map.clone().flatten(),
    };
    if file.suffix {
        return Err(refuse("it marks spaces behind words; convert it to tokenizer.json".into()));
    }
    let added = |(id, (token, kind)): (u32, (&String, &i64))| match *kind {
        UNKNOWN | CONTROL => Some(AddedToken::special(token, id)),
        USER_DEFINED => Some(AddedToken { special: false, ..AddedToken::special(token, id) }),
        _ => None,
    };
    let added: Vec<AddedToken> =
        (0u32..).zip(file.tokens.iter().zip(&file.kinds)).filter_map(added).collect();
    let unk = file.kinds.iter().position(|&kind| kind == UNKNOWN).map(|id| id as u32);
    let model = match file.model_type {
        1 => {
            let entries: Vec<_> = file.tokens.iter().zip(file.scores).collect();
            Unigram::new(&entries, unk, file.byte_fallback).map(Model::Unigram)
        }
        2 => bpe(&file.tokens, &file.scores, unk, file.byte_fallback).map(Model::Bpe),
        _ => return Err(refuse("it is neither BPE nor Unigram".into())),
    }
    .map_err(|e| refuse(e.to_string()))?;
    let token = |content: &str, key: &str, default: bool| {
        let wanted = config.get(key).and_then(Value::as_bool).unwrap_or(default);
        let id = file.tokens.iter().position(|t| t == content).filter(|_| wanted)?;
        Some((content.to_owned(), id as u32))
    };
    let bos = token("<s>", "add_bos_token", file.model_type == 2);
    let eos = token("</s>", "add_eos_token", false);
    let mut parts = Preset::Llama.parts(added, model);
    // Where no token holds a space inside, words are looked up one by one.
    let inner = |token: &String| token.chars().skip(1).any(|c| c == '▁');
    let by_word = file.tokens.iter().any(|t| t == "▁") && !file.tokens.iter().any(inner);
    parts.pre_tokenizer = by_word.then(|| PreTokenizer::Metaspace(Metaspace::new(Prepend::Never)));
    parts.normalizer = Some(normalizer(map, file.remove_extra_whitespaces, file.add_dummy_prefix));
    if !file.add_dummy_prefix
        && let Some(Decoder::Sequence { decoders }) = &mut parts.decoder
    {
        // The last one takes away the space that was put before the text.
        decoders.pop();
    }
    parts.post_processor =
        (bos.is_some() || eos.is_some()).then(|| PostProcessor::bos_eos_template(bos.as_ref(), eos.as_ref()));
    Tokenizer::new(parts).map_err(|e| refuse(e.to_string()))
}

/// What happens to a text: the character map, spaces at the ends and in runs taken away, and what [`spaces`] does.
fn normalizer(map: Option<CharMap>, remove_extra_whitespaces: bool, prefix: bool) -> Normalizer {
    let mut normalizers: Vec<Normalizer> = map
        .into_iter()
        .map(|precompiled_charsmap| Normalizer::Precompiled { precompiled_charsmap })
        .collect();
    if remove_extra_whitespaces {
        let replace = |pattern: &str, content: &str| Normalizer::Replace {
            pattern: Pattern::regex(pattern),
            content: content.into(),
        };
        normalizers.extend([replace(r"\A +| +\z", ""), replace(" {2,}", " ")]);
    }
    normalizers.extend(match spaces(prefix) {
        Normalizer::Sequence { normalizers } => normalizers,
        other => vec![other],
    });
    Normalizer::Sequence { normalizers }
}

/// What happens to spaces, in the text as a whole: tokens may hold several words.
pub(crate) fn spaces(prefix: bool) -> Normalizer {
    let mut normalizers = vec![];
    if prefix {
        normalizers.push(Normalizer::Prepend { prepend: "▁".into() });
    }
    normalizers.push(Normalizer::Replace { pattern: Pattern::String(" ".into()), content: "▁".into() });
    Normalizer::Sequence { normalizers }
}

/// SentencePiece's BPE, which merges what makes the token of the highest score.
pub(crate) fn bpe(tokens: &[String], scores: &[f64], unk: Option<u32>, byte_fallback: bool) -> Result<Bpe> {
    let vocab = Vocab::new(&tokens.iter().zip(0..).collect::<Vec<_>>())?;
    let numbered: Vec<_> = (0..).zip(tokens).collect();
    let mut merges = merges(&numbered);
    let size = |id: u32| tokens[id as usize].chars().count();
    merges.sort_by(|a, b| {
        let by_score = scores[b.2 as usize].total_cmp(&scores[a.2 as usize]);
        by_score.then_with(|| (size(b.0), size(b.1)).cmp(&(size(a.0), size(a.1))))
    });
    let options = BpeOptions {
        unk_token: unk.and_then(|id| tokens.get(id as usize)).cloned(),
        fuse_unk: true,
        byte_fallback,
        ignore_merges: false,
    };
    Bpe::with_ids(vocab, merges, options, false)
}
