//! Vocabulary files without a tokenizer.json: `vocab.txt` (BERT), `vocab.json` with `merges.txt` (GPT-2, RoBERTa).

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::added::AddedToken;
use crate::bpe::{Bpe, BpeOptions};
use crate::model::Model;
use crate::normalize::Normalizer;
use crate::presets::Preset;
use crate::template::PostProcessor;
use crate::vocab::Vocab;
use crate::wordpiece::WordPiece;
use crate::{Error, Result, Tokenizer};

/// The file of `folder` that holds its tokenizer.
pub(crate) fn find(folder: &Path) -> Result<PathBuf> {
    let wanted = ["tokenizer.json", "vocab.txt", "vocab.json"].map(|name| folder.join(name));
    if let Some(file) = wanted.iter().find(|file| file.is_file()) {
        return Ok(file.clone());
    }
    let entries = std::fs::read_dir(folder).map_err(Error::io("load tokenizer", folder))?;
    let mut ranks: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|file| file.extension().is_some_and(|e| e == "tiktoken"))
        .collect();
    ranks.sort_unstable();
    let model = folder.join("tokenizer.model");
    // The error of reading names the file that is wanted first.
    let [json, ..] = wanted;
    Ok(ranks.into_iter().next().unwrap_or(if model.is_file() { model } else { json }))
}

fn added(vocab: &Vocab, tokens: &[&str]) -> Vec<AddedToken> {
    let token = |content: &&str| Some(AddedToken::special(content, vocab.id(content)?));
    tokens.iter().filter_map(token).collect()
}

/// One token a line, ids in order. Source: google-research/bert `tokenization.py` (`load_vocab`).
pub(crate) fn bert(text: &str, config: &Map<String, Value>) -> Result<Tokenizer> {
    let tokens = text.lines().map(|line| line.trim_end_matches('\r'));
    let vocab = Vocab::new(&tokens.zip(0..).collect::<Vec<_>>())?;
    let flag = |name: &str| config.get(name).and_then(Value::as_bool);
    let added = added(&vocab, Preset::BertUncased.special_tokens());
    let model = WordPiece::new(vocab, "[UNK]".into(), "##".into(), 100)?;
    let mut parts = Preset::BertUncased.parts(added, Model::WordPiece(model));
    parts.normalizer = Some(Normalizer::Bert {
        clean_text: true,
        handle_chinese_chars: flag("tokenize_chinese_chars").unwrap_or(true),
        strip_accents: flag("strip_accents"),
        lowercase: flag("do_lower_case").unwrap_or(true),
    });
    Tokenizer::new(parts)
}

/// Tokens with ids, and merges in order after a version line. Source: openai/gpt-2 `encoder.py` (`get_encoder`).
pub(crate) fn gpt2(vocab: &str, merges: &str) -> Result<Tokenizer> {
    let refuse = |problem: String| Error::format("model", problem);
    let entries: Map<String, Value> =
        serde_json::from_str(vocab).map_err(|e| refuse(format!("vocab.json: {e}")))?;
    let id = |(token, id): (String, Value)| match id.as_u64().and_then(|id| u32::try_from(id).ok()) {
        Some(id) => Ok((token, id)),
        None => Err(refuse(format!("vocab.json: the id of {token:?} is {id}"))),
    };
    let vocab = Vocab::new(&entries.into_iter().map(id).collect::<Result<Vec<_>>>()?)?;
    let lines = merges.lines().filter(|line| !line.starts_with("#version") && !line.is_empty());
    let pair = |line: &str| match line.split_once(' ') {
        Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
        None => Err(refuse(format!("merges.txt: {line:?} has no space"))),
    };
    let merges = lines.map(pair).collect::<Result<Vec<_>>>()?;
    let mut added = added(&vocab, &["<|endoftext|>", "<s>", "<pad>", "</s>", "<unk>", "<mask>"]);
    let model = Bpe::new(vocab, &merges, BpeOptions::default(), true)?;
    let token =
        |content: &str| added.iter().find(|t| t.content == content).map(|t| (t.content.clone(), t.id));
    // Of the two families only RoBERTa has a mask.
    let roberta = token("<mask>").and(token("<s>").zip(token("</s>")));
    if let Some(mask) = added.iter_mut().find(|t| t.content == "<mask>") {
        mask.lstrip = true;
    }
    let mut parts = Preset::Gpt2.parts(added, Model::Bpe(model));
    if let Some((cls, sep)) = roberta {
        parts.post_processor =
            Some(PostProcessor::RobertaProcessing { sep, cls, trim_offsets: true, add_prefix_space: false });
    }
    Tokenizer::new(parts)
}
