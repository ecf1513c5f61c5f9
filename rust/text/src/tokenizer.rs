//! The tokenizer: text to ids and back.
//!
//! A file whose pipeline this crate knows runs on its own parts (`native`); any other that the `tokenizers` library loads
//! runs on that (`library`). Both give the same ids and offsets; the first is many times faster.

use std::path::Path;

use pyrformer_files::write_file;
use serde_json::{Map, Value};

use crate::added::AddedToken;
use crate::encoding::{Encoding, Padding, Truncation};
use crate::format::Parts;
use crate::library::Library;
use crate::model::Model;
use crate::native::Native;
use crate::roles::SpecialIds;
use crate::{Error, Result};

/// A tokenizer. It does not change once made; any number of threads may use it.
#[derive(Clone)]
pub struct Tokenizer {
    pub(crate) engine: Engine,
    roles: SpecialIds,
}

/// What does the work.
#[derive(Clone)]
pub(crate) enum Engine {
    Native(Box<Native>),
    Library(Box<Library>),
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer({}, vocab_size={})", self.kind(), self.vocab_size())
    }
}

impl Tokenizer {
    /// Puts a tokenizer together, checking that the parts fit.
    pub(crate) fn new(parts: Parts) -> Result<Self> {
        Ok(Self::with_engine(Engine::Native(Box::new(Native::new(parts)?))))
    }

    fn with_engine(engine: Engine) -> Self {
        let mut tokenizer = Self { engine, roles: SpecialIds::default() };
        tokenizer.roles = SpecialIds::guess(&tokenizer);
        tokenizer
    }

    /// Reads the text of a tokenizer.json.
    ///
    /// # Errors
    /// [`Error::Format`] names the component that is malformed, and that the library does not load either.
    pub fn from_json(text: &str) -> Result<Self> {
        Parts::from_json(text).and_then(Self::new).or_else(|error| {
            // What the library cannot load is told in our words, which say where the mistake is.
            let reason = error.to_string().trim_start_matches("[tokenizer.json] ").to_owned();
            let Some(library) = Library::from_json(text, reason) else { return Err(error) };
            Ok(Self::with_engine(Engine::Library(Box::new(library))))
        })
    }

    /// Why the file is not on the fast path but on that of the `tokenizers` library; none if it is.
    #[must_use]
    pub fn fallback(&self) -> Option<&str> {
        match &self.engine {
            Engine::Native(_) => None,
            Engine::Library(library) => Some(library.reason()),
        }
    }

    /// Writes a tokenizer.json that the `tokenizers` library loads to the same ids.
    ///
    /// # Errors
    /// None in practice: the parts of a tokenizer can be written.
    pub fn to_json(&self) -> Result<String> {
        match &self.engine {
            Engine::Native(native) => native.parts.to_json(),
            Engine::Library(library) => library.to_json(),
        }
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

    /// The kind of model: `"bpe"`, `"wordpiece"`, `"unigram"`, `"wordlevel"` or `"char"`.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match &self.engine {
            Engine::Native(native) => match &native.parts.model {
                Model::Bpe(m) if m.is_characters() => "char",
                Model::Bpe(_) => "bpe",
                Model::WordPiece(_) => "wordpiece",
                Model::Unigram(_) => "unigram",
            },
            Engine::Library(library) => library.kind(),
        }
    }

    /// One more than the highest id: the rows an embedding needs.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        match &self.engine {
            Engine::Native(native) => native.vocab_size(),
            Engine::Library(library) => library.vocab_size(),
        }
    }

    /// The id of a token string, added tokens included.
    #[must_use]
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        match &self.engine {
            Engine::Native(native) => native.token_to_id(token),
            Engine::Library(library) => library.token_to_id(token),
        }
    }

    /// The token string of an id, as the vocabulary has it.
    #[must_use]
    pub fn id_to_token(&self, id: u32) -> Option<&str> {
        match &self.engine {
            Engine::Native(native) => native.id_to_token(id),
            Engine::Library(library) => library.id_to_token(id),
        }
    }

    /// The string of `id` as the decoder sees it, or the error that there is none.
    pub(crate) fn checked_token(&self, id: u32) -> Result<&str> {
        let token = match &self.engine {
            Engine::Native(native) => return native.checked_token(id),
            Engine::Library(library) => library.id_to_token(id),
        };
        token.ok_or(Error::UnknownId { id, vocab_size: self.vocab_size() })
    }

    /// Which ids have the usual roles.
    #[must_use]
    pub fn special_ids(&self) -> &SpecialIds {
        &self.roles
    }

    /// The added tokens in the order of ids.
    #[must_use]
    pub fn added_tokens(&self) -> &[AddedToken] {
        match &self.engine {
            Engine::Native(native) => &native.parts.added_tokens,
            Engine::Library(library) => library.added_tokens(),
        }
    }

    /// Whether `id` is a special token.
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        match &self.engine {
            Engine::Native(native) => native.is_special(id),
            Engine::Library(library) => library.is_special(id),
        }
    }

    /// The unknown token of the model, if it has one.
    pub(crate) fn unk_token(&self) -> Option<&str> {
        match &self.engine {
            Engine::Native(native) => native.parts.model.unk_token(),
            Engine::Library(library) => library.unk_token(),
        }
    }

    /// The special tokens that the template puts around a single text: (before, after).
    #[must_use]
    pub fn around(&self) -> (Vec<u32>, Vec<u32>) {
        match &self.engine {
            Engine::Native(native) => native.template.around(),
            Engine::Library(library) => library.around(),
        }
    }

    /// How long texts are cut, if they are.
    #[must_use]
    pub fn truncation(&self) -> Option<&Truncation> {
        match &self.engine {
            Engine::Native(native) => native.parts.truncation.as_ref(),
            Engine::Library(library) => library.truncation(),
        }
    }

    /// How short texts are padded, if they are.
    #[must_use]
    pub fn padding(&self) -> Option<&Padding> {
        match &self.engine {
            Engine::Native(native) => native.parts.padding.as_ref(),
            Engine::Library(library) => library.padding(),
        }
    }

    /// The same tokenizer with other truncation.
    ///
    /// # Errors
    /// If `max_length` leaves no more room than `stride`.
    pub fn with_truncation(mut self, truncation: Option<Truncation>) -> Result<Self> {
        let (before, after) = self.around();
        if let Some(t) = &truncation
            && t.stride > 0
            && t.stride >= t.max_length.saturating_sub(before.len() + after.len())
        {
            let problem = format!("is {} but only {} tokens are kept", t.stride, t.max_length);
            return Err(Error::option("truncation", "stride", problem));
        }
        match &mut self.engine {
            Engine::Native(native) => native.parts.truncation = truncation,
            Engine::Library(library) => library.set_truncation(truncation)?,
        }
        Ok(self)
    }

    /// The same tokenizer with other padding.
    #[must_use]
    pub fn with_padding(mut self, padding: Option<Padding>) -> Self {
        match &mut self.engine {
            Engine::Native(native) => native.parts.padding = padding,
            Engine::Library(library) => library.set_padding(padding),
        }
        self
    }

    /// Encodes a text, or two, with everything there is to know about the tokens. Truncation and a fixed padding apply.
    ///
    /// # Errors
    /// [`Error::Encode`] for a character that a vocabulary without unknown token does not have; [`Error::Option`] if the
    /// truncation cannot be carried out.
    pub fn encode(&self, text: &str, pair: Option<&str>, add_special_tokens: bool) -> Result<Encoding> {
        let mut encoding = self.encode_unpadded(text, pair, add_special_tokens)?;
        if let Some(padding) = self.padding() {
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
        if let Some(padding) = self.padding() {
            let length = padding.length(encodings.iter().map(Encoding::len).max().unwrap_or(0));
            encodings.iter_mut().for_each(|e| e.pad(length, padding));
        }
        Ok(encodings)
    }

    fn encode_unpadded(&self, text: &str, pair: Option<&str>, add_special_tokens: bool) -> Result<Encoding> {
        match &self.engine {
            Engine::Native(native) => native.encode(text, pair, add_special_tokens),
            Engine::Library(library) => library.encode(text, pair, add_special_tokens),
        }
    }

    /// The text of `ids`; without special tokens if so asked.
    ///
    /// # Errors
    /// [`Error::UnknownId`] for an id outside the vocabulary.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        match &self.engine {
            Engine::Native(native) => native.decode(ids, skip_special_tokens),
            Engine::Library(library) => library.decode(ids, skip_special_tokens),
        }
    }
}
