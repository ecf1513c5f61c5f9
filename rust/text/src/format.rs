//! tokenizer.json: the file of the `tokenizers` library, read into checked components and written back.
//!
//! Every component is one of a closed set of types; a type, pattern or option this crate does not carry out is an error
//! that names it, never skipped.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeOwned, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::added::AddedToken;
use crate::bpe::{Bpe, BpeOptions};
use crate::decode::Decoder;
use crate::encoding::{Padding, Truncation};
use crate::model::Model;
use crate::normalize::Normalizer;
use crate::pretokenize::{PreTokenizer, Words};
use crate::template::PostProcessor;
use crate::unigram::Unigram;
use crate::vocab::Vocab;
use crate::wordpiece::WordPiece;
use crate::{Error, Result};

/// The parts of a tokenizer.json.
#[derive(Clone, Debug)]
pub(crate) struct Parts {
    pub(crate) truncation: Option<Truncation>,
    pub(crate) padding: Option<Padding>,
    pub(crate) added_tokens: Vec<AddedToken>,
    pub(crate) normalizer: Option<Normalizer>,
    pub(crate) pre_tokenizer: Option<PreTokenizer>,
    pub(crate) post_processor: Option<PostProcessor>,
    pub(crate) decoder: Option<Decoder>,
    pub(crate) model: Model,
}

#[derive(Deserialize)]
struct File<'a> {
    #[serde(default)]
    truncation: Value,
    #[serde(default)]
    padding: Value,
    #[serde(default)]
    added_tokens: Value,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    #[serde(borrow)]
    model: ModelFile<'a>,
}

/// All fields of all models; which of them count depends on the type. Strings lie in the text that is read.
#[derive(Deserialize)]
struct ModelFile<'a> {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(borrow)]
    vocab: VocabFile<'a>,
    #[serde(borrow)]
    merges: Option<Vec<Merge<'a>>>,
    unk_token: Option<String>,
    dropout: Option<f64>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    fuse_unk: bool,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
    max_input_chars_per_word: Option<usize>,
    unk_id: Option<u32>,
}

/// A string that need not be copied, unless it holds escapes.
struct Token<'a>(Cow<'a, str>);

impl AsRef<str> for Token<'_> {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Token<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl<'de> Visitor<'de> for Text {
            type Value = Token<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }
            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Token<'de>, E> {
                Ok(Token(Cow::Borrowed(text)))
            }
            fn visit_str<E>(self, text: &str) -> Result<Token<'de>, E> {
                Ok(Token(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(Text)
    }
}

/// A merge as a pair, or as one string with a space in older files.
struct Merge<'a>(Token<'a>, Option<Token<'a>>);

impl<'a> Merge<'a> {
    fn pair(&self) -> Result<(&str, &str)> {
        match (&self.0, &self.1) {
            (left, Some(right)) => Ok((left.as_ref(), right.as_ref())),
            (line, None) => (line.as_ref().split_once(' '))
                .ok_or_else(|| Error::format("model", format!("merge {:?} has no space", line.as_ref()))),
        }
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Merge<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Merge<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("two tokens, as a list or with a space between")
            }
            fn visit_borrowed_str<E>(self, line: &'de str) -> Result<Merge<'de>, E> {
                Ok(Merge(Token(Cow::Borrowed(line)), None))
            }
            fn visit_str<E>(self, line: &str) -> Result<Merge<'de>, E> {
                Ok(Merge(Token(Cow::Owned(line.to_owned())), None))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Merge<'de>, A::Error> {
                let mut next = |n| seq.next_element()?.ok_or_else(|| A::Error::invalid_length(n, &self));
                let merge = Merge(next(0)?, Some(next(1)?));
                match seq.next_element::<IgnoredAny>()? {
                    None => Ok(merge),
                    Some(_) => Err(A::Error::invalid_length(3, &self)),
                }
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// `{token: id}`, or `[[token, score]]` for Unigram.
enum VocabFile<'a> {
    Ids(Vec<(Token<'a>, u32)>),
    Scores(Vec<(Token<'a>, f64)>),
}

impl<'de: 'a, 'a> Deserialize<'de> for VocabFile<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = VocabFile<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of tokens to ids or a list of tokens and scores")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<VocabFile<'de>, A::Error> {
                let mut entries = vec![];
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(VocabFile::Ids(entries))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<VocabFile<'de>, A::Error> {
                let mut entries = vec![];
                while let Some(entry) = seq.next_element()? {
                    entries.push(entry);
                }
                Ok(VocabFile::Scores(entries))
            }
        }
        deserializer.deserialize_any(Either)
    }
}

fn component<T: DeserializeOwned + Default>(name: &'static str, value: Value) -> Result<T> {
    if value.is_null() {
        return Ok(T::default());
    }
    serde_json::from_value(value).map_err(|e| {
        // Of a type that is not known, its name; not the list of all that are.
        let problem = e.to_string();
        let unknown = problem.strip_prefix("unknown variant ").and_then(|rest| rest.split_once(','));
        Error::format(name, unknown.map_or(problem.clone(), |(kind, _)| format!("type {kind} is not known")))
    })
}

impl Parts {
    /// Reads the text of a tokenizer.json.
    pub(crate) fn from_json(text: &str) -> Result<Self> {
        let file: File<'_> = serde_json::from_str(text).map_err(|e| Error::format("file", e.to_string()))?;
        let normalizer: Option<Normalizer> = component("normalizer", file.normalizer)?;
        let pre_tokenizer: Option<PreTokenizer> = component("pre_tokenizer", file.pre_tokenizer)?;
        let byte_level = Words::new(pre_tokenizer.as_ref())?.byte_level;
        Ok(Self {
            truncation: component("truncation", file.truncation)?,
            padding: component("padding", file.padding)?,
            added_tokens: component("added_tokens", file.added_tokens)?,
            normalizer,
            pre_tokenizer,
            post_processor: component("post_processor", file.post_processor)?,
            decoder: component("decoder", file.decoder)?,
            model: file.model.build(byte_level)?,
        })
    }

    /// Writes a tokenizer.json.
    pub(crate) fn to_json(&self) -> Result<String> {
        #[derive(Serialize)]
        struct Out<'a> {
            version: &'static str,
            truncation: &'a Option<Truncation>,
            padding: &'a Option<Padding>,
            added_tokens: &'a [AddedToken],
            normalizer: &'a Option<Normalizer>,
            pre_tokenizer: &'a Option<PreTokenizer>,
            post_processor: &'a Option<PostProcessor>,
            decoder: &'a Option<Decoder>,
            model: &'a Model,
        }
        let out = Out {
            version: "1.0",
            truncation: &self.truncation,
            padding: &self.padding,
            added_tokens: &self.added_tokens,
            normalizer: &self.normalizer,
            pre_tokenizer: &self.pre_tokenizer,
            post_processor: &self.post_processor,
            decoder: &self.decoder,
            model: &self.model,
        };
        serde_json::to_string_pretty(&out).map_err(|e| Error::format("file", e.to_string()))
    }
}

impl ModelFile<'_> {
    fn build(self, byte_level: bool) -> Result<Model> {
        let refuse = |problem: String| Err(Error::format("model", problem));
        // The oldest files do not say the type; only BPE has merges.
        let kind = match (self.kind, &self.merges) {
            (Some(kind), _) => kind,
            (None, Some(_)) => "BPE".to_owned(),
            (None, None) => return refuse("it has no type".into()),
        };
        match (kind.as_str(), self.vocab) {
            ("BPE", VocabFile::Ids(entries)) => {
                if self.dropout.is_some_and(|p| p > 0.0) {
                    return refuse("BPE with dropout is not on the fast path; its tokens are random, and made here without it".into());
                }
                for (name, value) in [
                    ("continuing_subword_prefix", self.continuing_subword_prefix),
                    ("end_of_word_suffix", self.end_of_word_suffix),
                ] {
                    if let Some(value) = value.filter(|v| !v.is_empty()) {
                        return refuse(format!("BPE with {name} {value:?} is not supported"));
                    }
                }
                let merges = self.merges.unwrap_or_default();
                let merges = merges.iter().map(Merge::pair).collect::<Result<Vec<_>>>()?;
                let options = BpeOptions {
                    unk_token: self.unk_token,
                    fuse_unk: self.fuse_unk,
                    byte_fallback: self.byte_fallback,
                    ignore_merges: self.ignore_merges,
                };
                Ok(Model::Bpe(Bpe::new(Vocab::new(&entries)?, &merges, options, byte_level)?))
            }
            ("WordPiece" | "Unigram", _) if byte_level => {
                refuse(format!("{kind} after a ByteLevel pre-tokenizer is not supported"))
            }
            ("WordPiece", VocabFile::Ids(entries)) => Ok(Model::WordPiece(WordPiece::new(
                Vocab::new(&entries)?,
                self.unk_token.unwrap_or_else(|| "[UNK]".into()),
                self.continuing_subword_prefix.unwrap_or_else(|| "##".into()),
                self.max_input_chars_per_word.unwrap_or(100),
            )?)),
            ("Unigram", VocabFile::Scores(entries)) => {
                Ok(Model::Unigram(Unigram::new(&entries, self.unk_id, self.byte_fallback)?))
            }
            ("BPE" | "WordPiece", VocabFile::Scores(_)) => {
                refuse(format!("the vocabulary of {kind} is a list"))
            }
            ("Unigram", VocabFile::Ids(_)) => refuse("the vocabulary of Unigram is not a list".into()),
            _ => refuse(format!("type {kind:?} is not supported, only BPE, WordPiece and Unigram are")),
        }
    }
}

impl Serialize for Vocab {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

impl Serialize for Model {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("type", self.name())?;
        match self {
            Self::Bpe(m) => {
                let none: Option<()> = None;
                let token = |id| m.vocab.token(id).unwrap_or_default();
                let merges: Vec<_> =
                    m.merges.iter().map(|&(left, right)| (token(left), token(right))).collect();
                map.serialize_entry("dropout", &none)?;
                map.serialize_entry("unk_token", &m.options.unk_token)?;
                map.serialize_entry("continuing_subword_prefix", &none)?;
                map.serialize_entry("end_of_word_suffix", &none)?;
                map.serialize_entry("fuse_unk", &m.options.fuse_unk)?;
                map.serialize_entry("byte_fallback", &m.options.byte_fallback)?;
                map.serialize_entry("ignore_merges", &m.options.ignore_merges)?;
                map.serialize_entry("vocab", &m.vocab)?;
                map.serialize_entry("merges", &merges)?;
            }
            Self::WordPiece(m) => {
                map.serialize_entry("unk_token", &m.unk_token)?;
                map.serialize_entry("continuing_subword_prefix", &m.continuing_subword_prefix)?;
                map.serialize_entry("max_input_chars_per_word", &m.max_input_chars_per_word)?;
                map.serialize_entry("vocab", &m.vocab)?;
            }
            Self::Unigram(m) => {
                let vocab: Vec<_> =
                    m.vocab.iter().map(|(token, id)| (token, m.scores[id as usize])).collect();
                map.serialize_entry("unk_id", &m.unk_id)?;
                map.serialize_entry("vocab", &vocab)?;
                map.serialize_entry("byte_fallback", &m.byte_fallback)?;
            }
        }
        map.end()
    }
}
