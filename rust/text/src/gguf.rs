//! The tokenizer inside a GGUF file: llama.cpp's metadata `tokenizer.ggml.*`.
//!
//! Source: ggml `docs/gguf.md` (Tokenizer), llama.cpp `src/llama-vocab.cpp` for what each name of a model (`gpt2`, `llama`,
//! `bert`) and of a pre-tokenizer implies.

use std::path::Path;

use pyrformer_files::{Gguf, GgufValue};

use crate::added::AddedToken;
use crate::bpe::{Bpe, BpeOptions};
use crate::model::Model;
use crate::presets::Preset;
use crate::pretokenize::PreTokenizer;
use crate::ranked::Split;
use crate::roles::SpecialIds;
use crate::sentencepiece::{CONTROL, UNKNOWN, USER_DEFINED, spaces};
use crate::template::PostProcessor;
use crate::vocab::Vocab;
use crate::wordpiece::WordPiece;
use crate::{Error, Result, Tokenizer};

/// The metadata of one file.
struct Source<'a> {
    path: &'a Path,
    file: Gguf,
}

impl Source<'_> {
    fn get(&self, key: &str) -> Option<&GgufValue> {
        self.file.metadata().get(&format!("tokenizer.ggml.{key}"))
    }

    fn string(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    fn flag(&self, key: &str, default: bool) -> bool {
        self.get(key).and_then(GgufValue::as_bool).unwrap_or(default)
    }

    fn strings(&self, key: &str) -> Result<&[String]> {
        let found = self.get(key).and_then(GgufValue::as_strings);
        found.ok_or_else(|| self.refuse(format!("has no list of strings tokenizer.ggml.{key}")))
    }

    fn refuse(&self, problem: String) -> Error {
        Error::source(self.path, problem)
    }
}

/// Loads the tokenizer of a GGUF file.
pub(crate) fn load(path: &Path) -> Result<Tokenizer> {
    let source = Source { path, file: Gguf::open(path)? };
    let tokens = source.strings("tokens")?;
    let kinds: Vec<i64> = match source.get("token_type") {
        None => vec![],
        Some(value) => value.as_array().unwrap_or(&[]).iter().map(|v| v.as_i64().unwrap_or(1)).collect(),
    };
    let mut added = vec![];
    for ((token, kind), id) in tokens.iter().zip(&kinds).zip(0..) {
        match *kind {
            UNKNOWN | CONTROL => added.push(AddedToken::special(token, id)),
            USER_DEFINED => added.push(AddedToken { special: false, ..AddedToken::special(token, id) }),
            _ => {}
        }
    }
    let roles = roles(&source, tokens.len());
    let parts = match source.string("model") {
        Some("gpt2") => {
            let model = bytes(&source, tokens)?;
            let mut parts = Preset::Gpt2.parts(added, Model::Bpe(model));
            parts.pre_tokenizer = Some(pre_tokenizer(&source)?);
            parts
        }
        Some("llama") => {
            let model = sentencepiece(&source, tokens, roles.unk)?;
            let mut parts = Preset::Llama.parts(added, Model::Bpe(model));
            parts.pre_tokenizer = None;
            parts.normalizer = Some(spaces(source.flag("add_space_prefix", true)));
            parts
        }
        Some("bert") => {
            let is_added = |id: usize| kinds.get(id).is_some_and(|&k| k == CONTROL || k == UNKNOWN);
            // The file marks words' starts, WordPiece what is inside them.
            let token = |(id, token): (usize, &String)| match token.strip_prefix('▁') {
                _ if is_added(id) => token.clone(),
                Some(start) => start.to_owned(),
                None => format!("##{token}"),
            };
            let entries = tokens.iter().enumerate().map(token).zip(0..).collect();
            let unk = roles.unk.and_then(|id| tokens.get(id as usize)).map_or("[UNK]", String::as_str);
            let model = WordPiece::new(vocab(&source, entries)?, unk.into(), "##".into(), 100)?;
            Preset::BertUncased.parts(added, Model::WordPiece(model))
        }
        Some(other) => {
            return Err(source
                .refuse(format!("its tokenizer.ggml.model is {other:?}; gpt2, llama and bert are read")));
        }
        None => return Err(source.refuse("it holds no tokenizer".into())),
    };
    let mut parts = parts;
    let is_llama = source.string("model") == Some("llama");
    let role = |add: bool, id: Option<u32>| {
        let id = id.filter(|_| add)?;
        Some((tokens.get(id as usize)?.clone(), id))
    };
    let bos = role(source.flag("add_bos_token", is_llama), roles.bos);
    let eos = role(source.flag("add_eos_token", false), roles.eos);
    if source.string("model") != Some("bert") && (bos.is_some() || eos.is_some()) {
        parts.post_processor = Some(PostProcessor::bos_eos_template(bos.as_ref(), eos.as_ref()));
    }
    let tokenizer = Tokenizer::new(parts).map_err(|e| source.refuse(e.to_string()))?;
    Ok(tokenizer.with_roles(roles))
}

fn roles(source: &Source<'_>, n: usize) -> SpecialIds {
    let id = |key: &str| {
        let id = u32::try_from(source.get(key)?.as_u64()?).ok()?;
        ((id as usize) < n).then_some(id)
    };
    SpecialIds {
        unk: id("unknown_token_id"),
        pad: id("padding_token_id"),
        cls: id("cls_token_id"),
        // The misspelt key is the older one.
        sep: id("separator_token_id").or_else(|| id("seperator_token_id")),
        mask: id("mask_token_id"),
        bos: id("bos_token_id"),
        eos: id("eos_token_id"),
    }
}

fn vocab(source: &Source<'_>, entries: Vec<(String, u32)>) -> Result<Vocab> {
    Vocab::new(&entries).map_err(|e| source.refuse(e.to_string()))
}

/// Byte-level BPE with merges.
fn bytes(source: &Source<'_>, tokens: &[String]) -> Result<Bpe> {
    let vocab = vocab(source, tokens.iter().cloned().zip(0..).collect())?;
    let pair = |line: &String| match line.split_once(' ') {
        Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
        None => Err(source.refuse(format!("its merge {line:?} has no space"))),
    };
    let merges = source.strings("merges")?.iter().map(pair).collect::<Result<Vec<_>>>()?;
    let ignore_merges = source.string("pre") == Some("llama-bpe");
    let options = BpeOptions { ignore_merges, ..BpeOptions::default() };
    Bpe::new(vocab, &merges, options, true).map_err(|e| source.refuse(e.to_string()))
}

/// SentencePiece's BPE, which merges what makes the token of the highest score.
fn sentencepiece(source: &Source<'_>, tokens: &[String], unk: Option<u32>) -> Result<Bpe> {
    let scores = source.get("scores").and_then(GgufValue::as_array).unwrap_or(&[]);
    let scores: Option<Vec<f64>> = scores.iter().map(GgufValue::as_f64).collect();
    let Some(scores) = scores.filter(|s| s.len() == tokens.len() && s.iter().all(|s| !s.is_nan())) else {
        return Err(source.refuse(format!("it has not one score for each of {} tokens", tokens.len())));
    };
    crate::sentencepiece::bpe(tokens, &scores, unk, true).map_err(|e| source.refuse(e.to_string()))
}

/// What the name of a pre-tokenizer stands for.
fn pre_tokenizer(source: &Source<'_>) -> Result<PreTokenizer> {
    let digits = || PreTokenizer::Digits { individual_digits: true };
    Ok(match source.string("pre").unwrap_or("default") {
        "default" | "gpt-2" | "olmo" | "jais" | "phi-2" | "roberta-bpe" | "exaone" | "mpt" | "jina-v1-en"
        | "jina-v2-es" | "jina-v2-de" | "jina-v2-code" | "trillion" => Split::Gpt2.pre_tokenizer(),
        "llama-bpe" | "llama3" | "llama-v3" | "dbrx" | "smaug-bpe" | "falcon3" => {
            Split::Cl100k.pre_tokenizer()
        }
        "qwen2" | "deepseek-r1-qwen" | "stablelm2" | "hunyuan" | "megrez" => Split::Qwen2.pre_tokenizer(),
        "gpt-4o" | "llama4" => Split::O200k.pre_tokenizer(),
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "minerva-7b" => {
            PreTokenizer::Sequence { pretokenizers: vec![digits(), Split::Gpt2.pre_tokenizer()] }
        }
        other => {
            return Err(source.refuse(format!(
                "its tokenizer.ggml.pre is {other:?}, a way of splitting that is not known here"
            )));
        }
    })
}
