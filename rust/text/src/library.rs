//! The other way: a pipeline that this crate does not know, run by the `tokenizers` library itself.
//!
//! It panics on some damaged files and odd texts, so that every call goes through [`guarded`]. Its own threads stay idle (they would not survive a fork); batches are shared out by `ids` as on the fast path.
//! Padding is ours, as it looks at a whole batch. A BPE with dropout encodes without it: tokens are never random here.

use std::panic::{AssertUnwindSafe, catch_unwind};

use serde::{Deserialize, Deserializer};
use serde_json::Value;
use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::BPE;
use tokenizers::{
    EncodeInput, Model, OffsetReferential, OffsetType, PostProcessor, PreTokenizedString, PreTokenizer,
    Token, Tokenizer, TruncationParams,
};

use crate::added::AddedToken;
use crate::encoding::{Encoding, Padding, Truncation};
use crate::{Error, Result};

/// A tokenizer of the library, and what it does not say about itself.
#[derive(Clone)]
pub(crate) struct Library {
    inner: Tokenizer,
    /// What the fast path does not know.
    reason: String,
    /// By id.
    tokens: Vec<Option<String>>,
    added: Vec<AddedToken>,
    around: (Vec<u32>, Vec<u32>),
    truncation: Option<Truncation>,
    padding: Option<Padding>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    byte_level: bool,
}

/// The fields of a tokenizer.json that are read here too.
#[derive(Deserialize)]
struct File {
    truncation: Option<Truncation>,
    padding: Option<Padding>,
    pre_tokenizer: Option<Value>,
    model: ModelFile,
}

#[derive(Deserialize)]
struct ModelFile {
    #[serde(default, deserialize_with = "string")]
    unk_token: Option<String>,
    unk_id: Option<u32>,
    #[serde(default, deserialize_with = "string")]
    continuing_subword_prefix: Option<String>,
    dropout: Option<f32>,
}

/// A string that is not empty.
fn string<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.filter(|s| !s.is_empty()))
}

impl Library {
    /// Reads a tokenizer.json that the fast path refused for `reason`; none if the library cannot load it either.
    pub(crate) fn from_json(text: &str, reason: String) -> Option<Self> {
        let file: File = serde_json::from_str(text).ok()?;
        let mut inner: Tokenizer = guarded(|| text.parse()).ok()?;
        inner.with_padding(None);
        if file.model.dropout.is_some_and(|p| p > 0.0)
            && let ModelWrapper::BPE(bpe) = inner.get_model()
        {
            let mut bpe: BPE = bpe.clone();
            bpe.dropout = None;
            inner.with_model(bpe);
        }
        let bound = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        if bound > 2 * inner.get_vocab_size(true) + (1 << 20) {
            return None;
        }
        let tokens: Vec<_> = (0..bound as u32).map(|id| inner.id_to_token(id)).collect();
        let mut added: Vec<AddedToken> = inner
            .get_added_tokens_decoder()
            .into_iter()
            .map(|(id, token)| AddedToken {
                id,
                content: token.content,
                single_word: token.single_word,
                lstrip: token.lstrip,
                rstrip: token.rstrip,
                normalized: token.normalized,
                special: token.special,
            })
            .collect();
        added.sort_by_key(|token| token.id);
        let unk = file.model.unk_id.and_then(|id| inner.get_model().id_to_token(id));
        let mut library = Self {
            around: around(&inner)?,
            reason,
            tokens,
            added,
            truncation: None,
            padding: file.padding,
            unk_token: file.model.unk_token.or(unk),
            continuing_subword_prefix: file.model.continuing_subword_prefix,
            byte_level: file.pre_tokenizer.is_some_and(|p| p.to_string().contains("\"ByteLevel\"")),
            inner,
        };
        library.set_truncation(file.truncation).ok()?;
        Some(library)
    }

    pub(crate) fn reason(&self) -> &str {
        &self.reason
    }

    pub(crate) fn to_json(&self) -> Result<String> {
        let mut inner = self.inner.clone();
        if let Some(padding) = &self.padding {
            inner.with_padding(Some(convert(padding)?));
        }
        guarded(|| inner.to_string(true)).map_err(|problem| Error::format("file", problem))
    }

    pub(crate) fn kind(&self) -> &'static str {
        match self.inner.get_model() {
            ModelWrapper::BPE(_) => "bpe",
            ModelWrapper::WordPiece(_) => "wordpiece",
            ModelWrapper::WordLevel(_) => "wordlevel",
            ModelWrapper::Unigram(_) => "unigram",
        }
    }

    pub(crate) fn vocab_size(&self) -> usize {
        self.tokens.len()
    }

    pub(crate) fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    pub(crate) fn id_to_token(&self, id: u32) -> Option<&str> {
        self.tokens.get(id as usize)?.as_deref()
    }

    pub(crate) fn added_tokens(&self) -> &[AddedToken] {
        &self.added
    }

    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.added.binary_search_by_key(&id, |token| token.id).is_ok_and(|i| self.added[i].special)
    }

    /// Where the words of a text begin, as the pre-tokenizer cuts it; none where it leaves the text whole.
    pub(crate) fn words(&self, text: &str) -> Option<Vec<usize>> {
        let pre_tokenizer = self.inner.get_pre_tokenizer()?;
        let cut = guarded(|| {
            let mut pieces = PreTokenizedString::from(text);
            pre_tokenizer.pre_tokenize(&mut pieces)?;
            let pieces = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
            tokenizers::Result::Ok(pieces.into_iter().map(|(_, (start, _), _)| start).collect::<Vec<_>>())
        });
        cut.ok().filter(|words| words.len() > 1 && words.is_sorted())
    }

    pub(crate) fn unk_token(&self) -> Option<&str> {
        self.unk_token.as_deref()
    }

    /// What stands before pieces inside a word, if anything does.
    pub(crate) fn continuing_subword_prefix(&self) -> Option<&str> {
        self.continuing_subword_prefix.as_deref()
    }

    /// Whether tokens are written in the byte alphabet.
    pub(crate) fn is_byte_level(&self) -> bool {
        self.byte_level
    }

    pub(crate) fn around(&self) -> (Vec<u32>, Vec<u32>) {
        self.around.clone()
    }

    pub(crate) fn truncation(&self) -> Option<&Truncation> {
        self.truncation.as_ref()
    }

    pub(crate) fn set_truncation(&mut self, truncation: Option<Truncation>) -> Result<()> {
        let params: Option<TruncationParams> = truncation.as_ref().map(convert).transpose()?;
        self.truncation = truncation;
        // The library takes the template's tokens off without looking whether there is room; `encode` does look.
        let room = self.check_room(false, true).is_ok();
        let set = guarded(|| self.inner.with_truncation(params.filter(|_| room)).map(|_| ()));
        set.map_err(|problem| Error::option("truncation", "stride", problem))
    }

    pub(crate) fn padding(&self) -> Option<&Padding> {
        self.padding.as_ref()
    }

    pub(crate) fn set_padding(&mut self, padding: Option<Padding>) {
        self.padding = padding;
    }

    fn check_room(&self, pair: bool, add_special_tokens: bool) -> Result<()> {
        let Some(truncation) = self.truncation.as_ref().filter(|_| add_special_tokens) else { return Ok(()) };
        let n_added = self.inner.get_post_processor().map_or(0, |p| p.added_tokens(pair));
        truncation.room(n_added).map(|_| ())
    }

    /// Encodes one text or two; truncation applies, padding does not.
    pub(crate) fn encode(
        &self,
        text: &str,
        pair: Option<&str>,
        add_special_tokens: bool,
    ) -> Result<Encoding> {
        self.check_room(pair.is_some(), add_special_tokens)?;
        let input: EncodeInput<'_> = match pair {
            Some(pair) => (text, pair).into(),
            None => text.into(),
        };
        let encoding = guarded(|| self.inner.encode_char_offsets(input, add_special_tokens));
        encoding.map(|e| columns(&e)).map_err(Error::Encode)
    }

    /// Appends the ids of a text.
    pub(crate) fn ids(&self, text: &str, add_special_tokens: bool, out: &mut Vec<u32>) -> Result<()> {
        self.check_room(false, add_special_tokens)?;
        let encoding = guarded(|| self.inner.encode_fast(text, add_special_tokens));
        out.extend_from_slice(encoding.map_err(Error::Encode)?.get_ids());
        Ok(())
    }

    /// The text of `ids`, all of which must exist.
    pub(crate) fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        if let Some(&id) = ids.iter().find(|&&id| self.id_to_token(id).is_none()) {
            return Err(Error::UnknownId { id, vocab_size: self.vocab_size() });
        }
        guarded(|| self.inner.decode(ids, skip_special_tokens)).map_err(Error::Decode)
    }
}

/// Runs a call of the library; a panic is an error too.
fn guarded<T, E: std::fmt::Display>(call: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("the tokenizers library cannot do it".into()),
    }
}

/// The library's form of a setting that both write alike.
fn convert<T: serde::Serialize, U: serde::de::DeserializeOwned>(setting: &T) -> Result<U> {
    serde_json::to_value(setting)
        .and_then(serde_json::from_value)
        .map_err(|e| Error::format("file", e.to_string()))
}

/// The ids that the post-processor puts before and after a text, found by giving it a text of one token.
fn around(inner: &Tokenizer) -> Option<(Vec<u32>, Vec<u32>)> {
    let Some(processor) = inner.get_post_processor() else { return Some(Default::default()) };
    let text = tokenizers::Encoding::from_tokens(vec![Token::new(u32::MAX, String::new(), (0, 0))], 0);
    let ids = guarded(|| processor.process(text, None, true)).ok()?.get_ids().to_vec();
    let at = ids.iter().position(|&id| id == u32::MAX)?;
    Some((ids[..at].to_vec(), ids[at + 1..].to_vec()))
}

fn columns(encoding: &tokenizers::Encoding) -> Encoding {
    Encoding {
        ids: encoding.get_ids().to_vec(),
        type_ids: encoding.get_type_ids().to_vec(),
        tokens: encoding.get_tokens().to_vec(),
        offsets: encoding.get_offsets().iter().map(|&(a, b)| (a as u32, b as u32)).collect(),
        special_tokens_mask: encoding.get_special_tokens_mask().to_vec(),
        attention_mask: encoding.get_attention_mask().to_vec(),
        word_ids: encoding.get_word_ids().to_vec(),
        sequence_ids: encoding.get_sequence_ids().into_iter().map(|id| id.map(|id| id as u32)).collect(),
        overflowing: encoding.get_overflowing().iter().map(columns).collect(),
    }
}
