//! Pre-tokenizers: from a normalized text to words.
//!
//! What tokenizer.json writes as one list is two things here: changes to the text (a space or `▁` put in front, spaces
//! made `▁`), then splitters applied one inside the other. A file that asks for a change after a split is refused.

use serde::{Deserialize, Serialize};

use crate::pattern::Pattern;
use crate::split::{Behavior, Find, GPT2_PATTERN, LLAMA3_PATTERN, O200K_PATTERN, QWEN2_PATTERN, Splitter};
use crate::text::{Origin, Text};
use crate::{Error, Result};

/// A pre-tokenizer as tokenizer.json writes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub(crate) enum PreTokenizer {
    #[serde(rename = "BertPreTokenizer")]
    Bert,
    ByteLevel {
        add_prefix_space: bool,
        trim_offsets: bool,
        #[serde(default = "yes")]
        use_regex: bool,
    },
    Metaspace(Metaspace),
    Split {
        pattern: Pattern,
        behavior: Behavior,
        invert: bool,
    },
    WhitespaceSplit,
    /// Runs of letters, marks, digits and underscores, and runs of signs; white space goes.
    Whitespace,
    Punctuation {
        #[serde(default = "isolated")]
        behavior: Behavior,
    },
    CharDelimiterSplit {
        delimiter: char,
    },
    Digits {
        individual_digits: bool,
    },
    Sequence {
        pretokenizers: Vec<PreTokenizer>,
    },
}

fn isolated() -> Behavior {
    Behavior::Isolated
}

/// The settings of `Metaspace`, shared by pre-tokenizer and decoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Metaspace {
    /// Stands for a space.
    pub(crate) replacement: char,
    /// When one is put in front of the text.
    #[serde(default)]
    pub(crate) prepend_scheme: Prepend,
    /// Whether to split before each replacement.
    #[serde(default = "yes")]
    pub(crate) split: bool,
    /// What older files say in place of `prepend_scheme`.
    #[serde(default, skip_serializing)]
    add_prefix_space: Option<bool>,
}

/// When `Metaspace` puts its replacement in front.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Prepend {
    /// Before the first piece of the text only.
    First,
    Never,
    /// Before every piece between added tokens.
    #[default]
    Always,
}

fn yes() -> bool {
    true
}

impl Metaspace {
    /// `▁` for spaces, words split before it.
    pub(crate) fn new(prepend_scheme: Prepend) -> Self {
        Self { replacement: '▁', prepend_scheme, split: true, add_prefix_space: None }
    }

    /// The scheme, with the older setting taken into account.
    pub(crate) fn scheme(&self) -> Prepend {
        if self.add_prefix_space == Some(false) { Prepend::Never } else { self.prepend_scheme }
    }
}

/// What is done to the text before it is split.
#[derive(Clone, Debug)]
enum Change {
    PrefixSpace,
    Metaspace { replacement: char, scheme: Prepend },
}

/// A pre-tokenizer ready to run.
#[derive(Clone, Debug, Default)]
pub(crate) struct Words {
    changes: Vec<Change>,
    splitters: Vec<Splitter>,
    /// Whether the model sees bytes in the byte alphabet.
    pub(crate) byte_level: bool,
}

impl Words {
    /// Prepares `config`; none means one word.
    pub(crate) fn new(config: Option<&PreTokenizer>) -> Result<Self> {
        let mut words = Self::default();
        if let Some(config) = config {
            words.add(config)?;
        }
        Ok(words)
    }

    fn add(&mut self, config: &PreTokenizer) -> Result<()> {
        let refuse = |problem: String| Err(Error::format("pre_tokenizer", problem));
        if self.byte_level {
            return refuse(format!("{config:?} cannot come after ByteLevel"));
        }
        match config {
            PreTokenizer::Bert => self.splitters.push(Splitter::Bert),
            PreTokenizer::WhitespaceSplit => self.splitters.push(Splitter::Whitespace),
            PreTokenizer::Digits { individual_digits } => {
                self.splitters.push(Splitter::Digits { individual: *individual_digits });
            }
            PreTokenizer::ByteLevel { add_prefix_space, use_regex, .. } => {
                if *add_prefix_space {
                    self.change(Change::PrefixSpace)?;
                }
                if *use_regex {
                    self.add_splitter(Splitter::Gpt2 { digits_alone: false });
                }
                self.byte_level = true;
            }
            PreTokenizer::Metaspace(m) => {
                self.change(Change::Metaspace { replacement: m.replacement, scheme: m.scheme() })?;
                if m.split {
                    self.splitters.push(Splitter::Before(m.replacement));
                }
            }
            PreTokenizer::Whitespace => {
                let pattern = Pattern::regex(r"\w+|[^\w\s]+");
                self.splitters.push(Splitter::found(Find::pattern(pattern)?, true, Behavior::Removed));
            }
            PreTokenizer::Punctuation { behavior } => {
                self.splitters.push(Splitter::found(Find::Punctuation, false, *behavior));
            }
            PreTokenizer::CharDelimiterSplit { delimiter } => {
                let pattern = Pattern::String(delimiter.to_string());
                self.splitters.push(Splitter::found(Find::pattern(pattern)?, false, Behavior::Removed));
            }
            PreTokenizer::Split { pattern, behavior, invert } => {
                // These match every character, so that what is cut out and what is left are the same words.
                let whole =
                    matches!((behavior, invert), (Behavior::Isolated, false) | (Behavior::Removed, true));
                let splitter = match pattern.source().filter(|_| whole) {
                    Some(GPT2_PATTERN) => Splitter::Gpt2 { digits_alone: false },
                    Some(LLAMA3_PATTERN) => Splitter::Llama3 { digits: 3 },
                    Some(QWEN2_PATTERN) => Splitter::Llama3 { digits: 1 },
                    Some(O200K_PATTERN) => Splitter::O200k,
                    _ => Splitter::found(Find::pattern(pattern.clone())?, *invert, *behavior),
                };
                self.add_splitter(splitter);
            }
            PreTokenizer::Sequence { pretokenizers } => {
                pretokenizers.iter().try_for_each(|p| self.add(p))?;
            }
        }
        Ok(())
    }

    fn add_splitter(&mut self, splitter: Splitter) {
        match self.splitters.last().and_then(|last| last.then(&splitter)) {
            Some(both) => *self.splitters.last_mut().expect("there is a last one") = both,
            None => self.splitters.push(splitter),
        }
    }

    fn change(&mut self, change: Change) -> Result<()> {
        if !self.splitters.is_empty() {
            return Err(Error::format("pre_tokenizer", format!("{change:?} after a split is not supported")));
        }
        self.changes.push(change);
        Ok(())
    }

    /// Whether [`Words::prepare`] leaves every text as it is.
    pub(crate) fn keeps_text(&self) -> bool {
        self.changes.is_empty()
    }

    /// Whether a space after something else always starts a word, and nothing before it matters for what follows.
    pub(crate) fn starts_word_at_space(&self) -> bool {
        matches!(
            self.splitters.first(),
            Some(
                Splitter::Bert
                    | Splitter::Gpt2 { .. }
                    | Splitter::Llama3 { .. }
                    | Splitter::O200k
                    | Splitter::Whitespace
            )
        )
    }

    /// Whether this is exactly the BERT pre-tokenizer.
    pub(crate) fn is_bert(&self) -> bool {
        self.changes.is_empty() && self.splitters == [Splitter::Bert] && !self.byte_level
    }

    /// Makes the changes; `first` says that the piece starts the text.
    pub(crate) fn prepare<O: Origin>(&self, text: &mut Text<O>, first: bool) {
        for change in &self.changes {
            match change {
                Change::PrefixSpace => {
                    if text.chars.first().is_some_and(|&(c, _)| c != ' ') {
                        text.prepend(" ");
                    }
                }
                Change::Metaspace { replacement, scheme } => {
                    for (c, _) in &mut text.chars {
                        if *c == ' ' {
                            *c = *replacement;
                        }
                    }
                    let wanted = *scheme == Prepend::Always || (*scheme == Prepend::First && first);
                    if wanted && text.chars.first().is_some_and(|&(c, _)| c != *replacement) {
                        text.prepend(replacement.encode_utf8(&mut [0; 4]));
                    }
                }
            }
        }
    }

    /// Whether a text may be more than one word.
    pub(crate) fn splits(&self) -> bool {
        !self.splitters.is_empty()
    }

    /// Emits the byte range of each word of a prepared text.
    #[inline]
    pub(crate) fn split(&self, text: &str, emit: &mut impl FnMut(usize, usize)) {
        match self.splitters.as_slice() {
            [] if text.is_empty() => {}
            [] => emit(0, text.len()),
            [one] => one.split(text, emit),
            many => split_nested(many, text, 0, emit),
        }
    }
}

fn split_nested(splitters: &[Splitter], text: &str, at: usize, emit: &mut dyn FnMut(usize, usize)) {
    match splitters {
        [] => emit(at, at + text.len()),
        [first, rest @ ..] => {
            first.split(text, &mut |a, b| split_nested(rest, &text[a..b], at + a, emit));
        }
    }
}
