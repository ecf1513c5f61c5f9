//! The usual ways of treating text, by name: what training starts from and vocabulary files without a tokenizer.json imply.

use std::str::FromStr;

use crate::added::AddedToken;
use crate::decode::Decoder;
use crate::format::Parts;
use crate::model::Model;
use crate::normalize::Normalizer;
use crate::pattern::Pattern;
use crate::pretokenize::{Metaspace, PreTokenizer, Prepend};
use crate::template::PostProcessor;
use crate::{Error, Result};

/// What kind of tokenizer is trained, and how it treats text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// Byte-level BPE with GPT-2's split; special token `<|endoftext|>`.
    Gpt2,
    /// WordPiece on lowercase text without accents, in the template `[CLS] … [SEP]`; BERT's five special tokens.
    BertUncased,
    /// The same on text as it is written.
    BertCased,
    /// As `BertCased`, with every character of the documents in the alphabet instead of the 1000 most frequent.
    Multilingual,
    /// BPE on characters with bytes for those unknown, spaces written `▁`, one put in front; `<unk>`, `<s>` and `</s>`, the
    /// second of which begins a text.
    Llama,
    /// Unigram on words that start with `▁`, NFKC, the template `… <sep> <cls>`; XLNet's special tokens.
    Xlnet,
    /// One token for each character; no special tokens.
    Char,
}

impl Preset {
    /// The presets by name.
    pub const ALL: [(&str, Self); 7] = [
        ("gpt2", Self::Gpt2),
        ("bert-uncased", Self::BertUncased),
        ("bert-cased", Self::BertCased),
        ("multilingual", Self::Multilingual),
        ("llama", Self::Llama),
        ("xlnet", Self::Xlnet),
        ("char", Self::Char),
    ];

    /// The preset that a kind of model (`"bpe"`, `"wordpiece"`, `"unigram"`, `"char"`) is trained with if none is named.
    ///
    /// # Errors
    /// [`Error::Option`] for another kind.
    pub fn of_kind(kind: &str) -> Result<Self> {
        match kind {
            "bpe" => Ok(Self::Gpt2),
            "wordpiece" => Ok(Self::BertUncased),
            "unigram" => Ok(Self::Xlnet),
            "char" => Ok(Self::Char),
            _ => Err(Error::option(
                "train",
                "kind",
                format!("is {kind:?} but must be bpe, wordpiece, unigram or char"),
            )),
        }
    }

    pub(crate) fn special_tokens(self) -> &'static [&'static str] {
        match self {
            Self::Gpt2 => &["<|endoftext|>"],
            Self::Char => &[],
            Self::Llama => &["<unk>", "<s>", "</s>"],
            Self::Xlnet => &["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>"],
            Self::BertUncased | Self::BertCased | Self::Multilingual => {
                &["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
            }
        }
    }

    /// The parts of a tokenizer of this preset. WordPiece has a template if `[CLS]` and `[SEP]` are among the added tokens.
    pub(crate) fn parts(self, added_tokens: Vec<AddedToken>, model: Model) -> Parts {
        let token = |content: &str| {
            let found = added_tokens.iter().find(|t| t.content == content);
            found.map(|t| (t.content.clone(), t.id))
        };
        let post_processor = match self {
            Self::Llama => token("<s>").map(|bos| PostProcessor::bos_eos_template(Some(&bos), None)),
            Self::Xlnet => match (token("<sep>"), token("<cls>")) {
                (Some(sep), Some(cls)) => Some(PostProcessor::xlnet_template(&sep, &cls)),
                _ => None,
            },
            Self::BertUncased | Self::BertCased | Self::Multilingual => {
                match (token("[CLS]"), token("[SEP]")) {
                    (Some(cls), Some(sep)) => Some(PostProcessor::bert_template(&cls, &sep)),
                    _ => None,
                }
            }
            Self::Gpt2 | Self::Char => None,
        };
        let space = |c: &str| Normalizer::Replace { pattern: Pattern::String(c.into()), content: " ".into() };
        let plain = Parts {
            truncation: None,
            padding: None,
            added_tokens,
            normalizer: None,
            pre_tokenizer: None,
            post_processor,
            decoder: Some(Decoder::Fuse),
            model,
        };
        match self {
            Self::Char => plain,
            Self::Llama => Parts {
                pre_tokenizer: Some(PreTokenizer::Metaspace(Metaspace::new(Prepend::First))),
                decoder: Some(Decoder::Sequence {
                    decoders: vec![
                        Decoder::Replace { pattern: Pattern::String("▁".into()), content: " ".into() },
                        Decoder::ByteFallback,
                        Decoder::Fuse,
                        Decoder::Strip { content: ' ', start: 1, stop: 0 },
                    ],
                }),
                ..plain
            },
            Self::Xlnet => Parts {
                // Line ends and tabs are white space like any other, as in SentencePiece's own normalization.
                normalizer: Some(Normalizer::Sequence {
                    normalizers: vec![
                        Normalizer::Nfkc,
                        space("\n"),
                        space("\r"),
                        space("\t"),
                        Normalizer::Replace { pattern: Pattern::regex(" {2,}"), content: " ".into() },
                    ],
                }),
                pre_tokenizer: Some(PreTokenizer::Metaspace(Metaspace::new(Prepend::Always))),
                decoder: Some(Decoder::Metaspace(Metaspace::new(Prepend::Always))),
                ..plain
            },
            Self::Gpt2 => Parts {
                pre_tokenizer: Some(PreTokenizer::ByteLevel {
                    add_prefix_space: false,
                    trim_offsets: true,
                    use_regex: true,
                }),
                post_processor: Some(PostProcessor::ByteLevel {
                    add_prefix_space: true,
                    trim_offsets: false,
                    use_regex: true,
                }),
                decoder: Some(Decoder::ByteLevel {
                    add_prefix_space: true,
                    trim_offsets: true,
                    use_regex: true,
                }),
                ..plain
            },
            Self::BertUncased | Self::BertCased | Self::Multilingual => Parts {
                normalizer: Some(Normalizer::Bert {
                    clean_text: true,
                    handle_chinese_chars: true,
                    strip_accents: None,
                    lowercase: self == Self::BertUncased,
                }),
                pre_tokenizer: Some(PreTokenizer::Bert),
                decoder: Some(Decoder::WordPiece { prefix: "##".into(), cleanup: true }),
                ..plain
            },
        }
    }
}

impl FromStr for Preset {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self> {
        let known = Self::ALL.iter().find(|(known, _)| *known == name).map(|&(_, preset)| preset);
        known.ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|&(name, _)| name).collect();
            Error::option("train", "preset", format!("is {name:?} but must be one of {}", names.join(", ")))
        })
    }
}
