//! The tokenizer: text to ids and back.
//!
//! A text passes through added tokens (cut out first), normalizer, pre-tokenizer, model and template. [`Tokenizer::encode`]
//! keeps track of where everything came from; [`Tokenizer::encode_ids`] and [`Tokenizer::encode_batch`] only make
//! ids, word by word through a cache, and give the same ids.

use std::path::Path;

use pyrformer_files::write_file;
use serde_json::{Map, Value};

use crate::added::{AddedToken, Finder};
use crate::bytes::from_alphabet;
use crate::decode::Stages;
use crate::encoding::{Encoding, Padding, Truncation};
use crate::format::Parts;
use crate::ids::Pool;
use crate::model::Model;
use crate::pretokenize::Words;
use crate::roles::SpecialIds;
use crate::template::Template;
use crate::text::{Origin, Text};
use crate::{Error, Result};

/// A tokenizer. It does not change once made; any number of threads may use it.
pub struct Tokenizer {
    pub(crate) parts: Parts,
    pub(crate) words: Words,
    pub(crate) template: Template,
    stages: Stages,
    /// Added tokens found in the text as it is, and those found once it is normalized.
    pub(crate) raw: Finder,
    pub(crate) normalized: Finder,
    /// By id: the string of an added token as the decoder sees it, and whether it is special.
    added: Vec<Option<(String, bool)>>,
    /// By id: the bytes of each token, where the decoder is byte-level.
    byte_tokens: Vec<Vec<u8>>,
    roles: SpecialIds,
    pub(crate) pool: Pool,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer({}, vocab_size={})", self.kind(), self.vocab_size())
    }
}

impl Clone for Tokenizer {
    fn clone(&self) -> Self {
        let clone = Self::new(self.parts.clone()).expect("the parts made a tokenizer before");
        Self { roles: self.roles.clone(), ..clone }
    }
}

impl Tokenizer {
    /// Puts a tokenizer together, checking that the parts fit.
    pub(crate) fn new(mut parts: Parts) -> Result<Self> {
        parts.added_tokens.sort_by_key(|t| t.id);
        let words = Words::new(parts.pre_tokenizer.as_ref())?;
        let template = Template::new(parts.post_processor.as_ref())?;
        let stages = Stages::new(parts.decoder.as_ref())?;
        let vocab = parts.model.vocab();
        let mut added: Vec<Option<(String, bool)>> = vec![];
        let (mut raw, mut normalized) = (vec![], vec![]);
        for token in &parts.added_tokens {
            let clash = vocab.token(token.id).is_some_and(|t| t != token.content)
                || vocab.id(&token.content).is_some_and(|id| id != token.id);
            let id = token.id as usize;
            if clash || id > vocab.id_bound() + (1 << 20) || added.get(id).is_some_and(Option::is_some) {
                let problem =
                    format!("{:?} cannot have id {id}: the vocabulary says otherwise", token.content);
                return Err(Error::format("added_tokens", problem));
            }
            added.resize(added.len().max(id + 1), None);
            let mut string = token.content.clone();
            if token.normalized {
                if let Some(normalizer) = &parts.normalizer {
                    let mut text = Text::<()>::new(&string, 0);
                    normalizer.apply(&mut text);
                    string = text.to_text();
                }
                normalized.push((string.clone(), token.clone()));
            } else {
                raw.push((string.clone(), token.clone()));
            }
            added[id] = Some((string, token.special));
        }
        let mut tokenizer = Self {
            words,
            template,
            stages,
            raw: Finder::new(raw.into_iter()),
            normalized: Finder::new(normalized.into_iter()),
            added,
            byte_tokens: vec![],
            roles: SpecialIds::default(),
            pool: Pool::default(),
            parts,
        };
        if tokenizer.stages.is_byte_level() {
            let token = |id| tokenizer.decoder_token(id as u32).map(from_alphabet).unwrap_or_default();
            tokenizer.byte_tokens = (0..tokenizer.vocab_size()).map(token).collect();
        }
        tokenizer.roles = SpecialIds::guess(&tokenizer);
        Ok(tokenizer)
    }

    /// Reads the text of a tokenizer.json.
    ///
    /// # Errors
    /// [`Error::Format`] names the component that is malformed or not supported.
    pub fn from_json(text: &str) -> Result<Self> {
        Self::new(Parts::from_json(text)?)
    }

    /// Writes a tokenizer.json that the `tokenizers` library loads to the same ids.
    ///
    /// # Errors
    /// None in practice: the parts of a tokenizer can be written.
    pub fn to_json(&self) -> Result<String> {
        self.parts.to_json()
    }

    /// Loads a tokenizer: a tokenizer.json, a `.tiktoken` file, a `.gguf` file, SentencePiece's `.model`, or `vocab.txt` (BERT), or `vocab.json` with
    /// `merges.txt` beside it (GPT-2, RoBERTa); of a directory, the first of these that it holds, GGUF excepted. A
    /// tokenizer_config.json beside it says which special token has which role; else the usual names do.
    ///
    /// # Errors
    /// [`Error::Io`] if a file cannot be read, [`Error::Format`], [`Error::Source`] or [`Error::File`] if it cannot be
    /// understood.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        Self::load_split(path, None)
    }

    /// The same, with the way a `.tiktoken` file's text falls into words: `"gpt2"`, `"cl100k"`, `"o200k"` or `"qwen2"`. If
    /// none is named, the number of ranks tells the published files.
    ///
    /// # Errors
    /// As [`Tokenizer::load`]; [`Error::Option`] for an unknown name, or one given with another file.
    pub fn load_split(path: impl AsRef<Path>, split: Option<&str>) -> Result<Self> {
        let path = path.as_ref();
        let read = |file: &Path| std::fs::read_to_string(file).map_err(Error::io("load tokenizer", file));
        let file = if path.is_dir() { crate::legacy::find(path)? } else { path.to_owned() };
        let config_file = file.with_file_name("tokenizer_config.json");
        let config: Map<String, Value> = if config_file.is_file() {
            serde_json::from_str(&read(&config_file)?)
                .map_err(|e| Error::format("tokenizer_config.json", e.to_string()))?
        } else {
            Map::new()
        };
        let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let extension = file.extension().and_then(|name| name.to_str()).unwrap_or_default();
        if split.is_some() && extension != "tiktoken" {
            let problem = "is for .tiktoken files; other files say it themselves";
            return Err(Error::option("load tokenizer", "split", problem));
        }
        let mut tokenizer = match (name, extension) {
            (_, "gguf") => return crate::gguf::load(&file),
            (_, "tiktoken") => crate::ranked::load(&file, split)?,
            (_, "model") => crate::sentencepiece::load(&file, &config)?,
            ("vocab.txt", _) => crate::legacy::bert(&read(&file)?, &config)?,
            ("vocab.json" | "merges.txt", _) => {
                let beside = |name| read(&file.with_file_name(name));
                crate::legacy::gpt2(&beside("vocab.json")?, &beside("merges.txt")?)?
            }
            _ => Self::from_json(&read(&file)?)?,
        };
        tokenizer.roles = tokenizer.roles.with_config(&tokenizer, &config);
        Ok(tokenizer)
    }

    /// The same tokenizer with the roles that are filled in `roles`; the others stay.
    pub(crate) fn with_roles(mut self, roles: SpecialIds) -> Self {
        self.roles = roles.or(&self.roles);
        self
    }

    /// Saves as tokenizer.json; into an existing directory, with the tokenizer_config.json that goes with it. Each file
    /// appears whole or not at all.
    ///
    /// # Errors
    /// [`Error::File`] if a file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let file = if path.is_dir() {
            write_file(path.join("tokenizer_config.json"), self.roles.to_config(self).as_bytes())?;
            &path.join("tokenizer.json")
        } else {
            path
        };
        Ok(write_file(file, self.to_json()?.as_bytes())?)
    }

    /// The kind of model: `"bpe"`, `"wordpiece"`, `"unigram"` or `"char"`.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match &self.parts.model {
            Model::Bpe(m) if m.is_characters() => "char",
            Model::Bpe(_) => "bpe",
            Model::WordPiece(_) => "wordpiece",
            Model::Unigram(_) => "unigram",
        }
    }

    /// One more than the highest id: the rows an embedding needs.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.parts.model.vocab().id_bound().max(self.added.len())
    }

    /// The id of a token string, added tokens included.
    #[must_use]
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        let added = self.parts.added_tokens.iter().find(|t| t.content == token).map(|t| t.id);
        added.or_else(|| self.parts.model.vocab().id(token))
    }

    /// The token string of an id, as the vocabulary has it.
    #[must_use]
    pub fn id_to_token(&self, id: u32) -> Option<&str> {
        let at = self.parts.added_tokens.binary_search_by_key(&id, |t| t.id);
        match at {
            Ok(i) => Some(&self.parts.added_tokens[i].content),
            Err(_) => self.parts.model.vocab().token(id),
        }
    }

    /// Which ids have the usual roles.
    #[must_use]
    pub fn special_ids(&self) -> &SpecialIds {
        &self.roles
    }

    /// The added tokens in the order of ids.
    #[must_use]
    pub fn added_tokens(&self) -> &[AddedToken] {
        &self.parts.added_tokens
    }

    /// Whether `id` is a special token.
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        matches!(self.added.get(id as usize), Some(Some((_, true))))
    }

    /// For each id, whether it continues the word of the token before it, for masking whole words: pieces with `##`,
    /// or without the space that starts a word.
    #[must_use]
    pub fn continues_word(&self) -> Vec<bool> {
        let continues = |id: u32| match (&self.parts.model, self.parts.model.vocab().token(id)) {
            (_, None) => false,
            _ if self.is_special(id) => false,
            (Model::WordPiece(m), Some(token)) => token.starts_with(&m.continuing_subword_prefix),
            (_, Some(token)) => {
                // Bytes inside a character are none of the space characters that have their numbers.
                let space = match self.words.byte_level {
                    true => from_alphabet(token).first().map(u8::is_ascii_whitespace),
                    false => token.chars().next().map(|c| c == '▁' || c.is_whitespace()),
                };
                space == Some(false)
            }
        };
        (0..self.vocab_size() as u32).map(continues).collect()
    }

    /// The unknown token of the model, if it has one.
    pub(crate) fn unk_token(&self) -> Option<&str> {
        self.parts.model.unk_token()
    }

    /// The special tokens that the template puts around a single text: (before, after).
    #[must_use]
    pub fn around(&self) -> (Vec<u32>, Vec<u32>) {
        self.template.around()
    }

    /// How long texts are cut, if they are.
    #[must_use]
    pub fn truncation(&self) -> Option<&Truncation> {
        self.parts.truncation.as_ref()
    }

    /// How short texts are padded, if they are.
    #[must_use]
    pub fn padding(&self) -> Option<&Padding> {
        self.parts.padding.as_ref()
    }

    /// The same tokenizer with other truncation.
    ///
    /// # Errors
    /// If `max_length` leaves no more room than `stride`.
    pub fn with_truncation(mut self, truncation: Option<Truncation>) -> Result<Self> {
        if let Some(t) = &truncation
            && t.stride > 0
            && t.stride >= t.max_length.saturating_sub(self.template.n_added(false))
        {
            let problem = format!("is {} but only {} tokens are kept", t.stride, t.max_length);
            return Err(Error::option("truncation", "stride", problem));
        }
        self.parts.truncation = truncation;
        Ok(self)
    }

    /// The same tokenizer with other padding.
    #[must_use]
    pub fn with_padding(mut self, padding: Option<Padding>) -> Self {
        self.parts.padding = padding;
        self
    }

    /// Encodes a text, or two, with everything there is to know about the tokens. Truncation and a fixed padding apply.
    ///
    /// # Errors
    /// [`Error::Encode`] for a character that a vocabulary without unknown token does not have; [`Error::Option`] if the
    /// truncation cannot be carried out.
    pub fn encode(&self, text: &str, pair: Option<&str>, add_special_tokens: bool) -> Result<Encoding> {
        let mut encoding = self.encode_unpadded(text, pair, add_special_tokens)?;
        if let Some(padding) = &self.parts.padding {
            encoding.pad(padding.length(encoding.len()), padding);
        }
        Ok(encoding)
    }

    /// Encodes many texts, each alone or with a second one, padded together.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_all(
        &self,
        inputs: &[(&str, Option<&str>)],
        add_special_tokens: bool,
    ) -> Result<Vec<Encoding>> {
        let mut encodings = inputs
            .iter()
            .map(|(text, pair)| self.encode_unpadded(text, *pair, add_special_tokens))
            .collect::<Result<Vec<_>>>()?;
        if let Some(padding) = &self.parts.padding {
            let length = padding.length(encodings.iter().map(Encoding::len).max().unwrap_or(0));
            encodings.iter_mut().for_each(|e| e.pad(length, padding));
        }
        Ok(encodings)
    }

    fn encode_unpadded(&self, text: &str, pair: Option<&str>, add_special_tokens: bool) -> Result<Encoding> {
        let mut first = self.encode_one(text, 0)?;
        let mut second = pair.map(|pair| self.encode_one(pair, 1)).transpose()?;
        if let Some(truncation) = &self.parts.truncation {
            let n_added = if add_special_tokens { self.template.n_added(pair.is_some()) } else { 0 };
            truncation.apply(&mut first, second.as_mut(), n_added)?;
        }
        Ok(self.template.apply(first, second, add_special_tokens))
    }

    /// One text through everything but the template.
    fn encode_one(&self, text: &str, sequence: u32) -> Result<Encoding> {
        if u32::try_from(text.len()).is_err() {
            return Err(Error::Encode(format!("a text of {} bytes is too long, split it", text.len())));
        }
        let positions = CodePoints::new(text);
        let mut scratch = self.pool.borrow();
        let mut out = Encoding::default();
        let mut word = 0;
        let result = self.pieces::<(u32, u32)>(text, &mut |piece| {
            let (prepared, origin) = match piece {
                Piece::Token { id, start, end } => {
                    let token = self.id_to_token(id).unwrap_or_default();
                    // A token that takes white space along shows it.
                    let shown = if end - start == token.len() { token } else { &text[start..end] };
                    out.push(id, shown, positions.range(start, end), Some(word), Some(sequence), 0);
                    word += 1;
                    return Ok(());
                }
                Piece::Text(prepared, origin) => (prepared, origin),
            };
            let mut failed = Ok(());
            self.words.split(prepared, &mut |start, end| {
                if failed.is_err() {
                    return;
                }
                match self.parts.model.tokenize(&prepared[start..end], &mut scratch) {
                    Ok(pieces) => {
                        let mut at = start;
                        for &(id, len) in pieces {
                            let last = at + len as usize - 1;
                            let (from, to) = origin[at].to(origin[last]);
                            let token = self.parts.model.shown(id, prepared, at..last + 1);
                            out.push(id, token, positions.range(from, to), Some(word), Some(sequence), 0);
                            at = last + 1;
                        }
                        word += 1;
                    }
                    Err(error) => failed = Err(error),
                }
            });
            failed
        });
        result.map(|()| out)
    }

    /// Cuts `text` at added tokens and prepares what lies between for the splitters.
    pub(crate) fn pieces<O: Origin>(
        &self,
        text: &str,
        visit: &mut dyn FnMut(Piece<'_, O>) -> Result<()>,
    ) -> Result<()> {
        for part in self.raw.split(text) {
            if let Some(id) = part.token {
                visit(Piece::Token { id, start: part.start, end: part.end })?;
                continue;
            }
            let mut normalized = Text::<O>::new(&text[part.start..part.end], part.start);
            if let Some(normalizer) = &self.parts.normalizer {
                normalizer.apply(&mut normalized);
            }
            if self.normalized.is_empty() {
                self.prepared(normalized, part.start == 0, visit)?;
                continue;
            }
            let string = normalized.to_text();
            for inner in self.normalized.split(&string) {
                let n_before = string[..inner.start].chars().count();
                let n = string[inner.start..inner.end].chars().count();
                let chars = &normalized.chars[n_before..n_before + n];
                let (start, end) = chars[0].1.to(chars[n - 1].1);
                match inner.token {
                    Some(id) => visit(Piece::Token { id, start, end })?,
                    None => self.prepared(Text { chars: chars.to_vec() }, start == 0, visit)?,
                }
            }
        }
        Ok(())
    }

    fn prepared<O: Origin>(
        &self,
        mut text: Text<O>,
        first: bool,
        visit: &mut dyn FnMut(Piece<'_, O>) -> Result<()>,
    ) -> Result<()> {
        self.words.prepare(&mut text, first);
        let mut origin = Vec::with_capacity(text.chars.len());
        for &(c, o) in &text.chars {
            origin.extend(std::iter::repeat_n(o, c.len_utf8()));
        }
        visit(Piece::Text(&text.to_text(), &origin))
    }

    /// The text of `ids`; without special tokens if so asked.
    ///
    /// # Errors
    /// [`Error::UnknownId`] for an id outside the vocabulary.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        let kept = |id: u32| !(skip_special_tokens && self.is_special(id));
        if !self.byte_tokens.is_empty() {
            let mut bytes = vec![];
            for &id in ids {
                self.checked_token(id)?;
                if kept(id) {
                    bytes.extend_from_slice(&self.byte_tokens[id as usize]);
                }
            }
            return Ok(String::from_utf8(bytes)
                .unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned()));
        }
        let mut stages = self.stages.clone();
        let mut out = String::new();
        for &id in ids {
            let token = self.checked_token(id)?;
            if kept(id) {
                stages.push(token, &mut out);
            }
        }
        stages.finish(&mut out);
        Ok(out)
    }

    /// The stages of the decoder, fresh.
    pub(crate) fn stages(&self) -> Stages {
        self.stages.clone()
    }

    /// The string of `id` as the decoder sees it.
    fn decoder_token(&self, id: u32) -> Option<&str> {
        match self.added.get(id as usize) {
            Some(Some((token, _))) => Some(token),
            _ => self.parts.model.vocab().token(id),
        }
    }

    /// The string of `id` as the decoder sees it, or the error that there is none.
    pub(crate) fn checked_token(&self, id: u32) -> Result<&str> {
        self.decoder_token(id).ok_or(Error::UnknownId { id, vocab_size: self.vocab_size() })
    }
}

/// A part of a text on its way to the model.
pub(crate) enum Piece<'a, O> {
    /// An added token and its byte range.
    Token { id: u32, start: usize, end: usize },
    /// A prepared text and the origin of each byte.
    Text(&'a str, &'a [O]),
}

/// Byte positions to positions in code points.
struct CodePoints(Option<Vec<u32>>);

impl CodePoints {
    fn new(text: &str) -> Self {
        // In ASCII both are the same.
        if text.is_ascii() {
            return Self(None);
        }
        let mut table = vec![0; text.len() + 1];
        let mut n = 0;
        for (i, c) in text.char_indices() {
            table[i..i + c.len_utf8()].fill(n);
            n += 1;
        }
        table[text.len()] = n;
        Self(Some(table))
    }

    fn range(&self, start: usize, end: usize) -> (u32, u32) {
        match &self.0 {
            None => (start as u32, end as u32),
            Some(table) => (table[start], table[end]),
        }
    }
}
