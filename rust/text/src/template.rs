//! Post-processing: the special tokens around one or two texts, type ids, and offsets without white space.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::bytes::byte_to_char;
use crate::encoding::Encoding;
use crate::{Error, Result};

/// A post-processor as tokenizer.json writes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub(crate) enum PostProcessor {
    BertProcessing {
        sep: (String, u32),
        cls: (String, u32),
    },
    RobertaProcessing {
        sep: (String, u32),
        cls: (String, u32),
        trim_offsets: bool,
        add_prefix_space: bool,
    },
    ByteLevel {
        add_prefix_space: bool,
        trim_offsets: bool,
        #[serde(default = "yes")]
        use_regex: bool,
    },
    TemplateProcessing {
        single: Vec<Piece>,
        pair: Vec<Piece>,
        special_tokens: BTreeMap<String, SpecialToken>,
    },
    Sequence {
        processors: Vec<PostProcessor>,
    },
}

fn yes() -> bool {
    true
}

impl PostProcessor {
    /// XLNet's template: `A <sep> <cls>`, with a second text `A <sep> B <sep> <cls>`; `<cls>` is of type 2.
    pub(crate) fn xlnet_template(sep: &(String, u32), cls: &(String, u32)) -> Self {
        let special = |token: &(String, u32), type_id| Piece::SpecialToken { id: token.0.clone(), type_id };
        let part = |text, type_id| [Piece::Sequence { id: text, type_id }, special(sep, type_id)];
        Self::TemplateProcessing {
            single: part(Text::A, 0).into_iter().chain([special(cls, 2)]).collect(),
            pair: part(Text::A, 0).into_iter().chain(part(Text::B, 1)).chain([special(cls, 2)]).collect(),
            special_tokens: [define(sep), define(cls)].into(),
        }
    }

    /// Llama's template: `<s> A </s>`, and the same around `B`, of type 1; either token may be missing.
    pub(crate) fn bos_eos_template(bos: Option<&(String, u32)>, eos: Option<&(String, u32)>) -> Self {
        let special = |token: Option<&(String, u32)>, type_id| {
            token.map(|(token, _)| Piece::SpecialToken { id: token.clone(), type_id })
        };
        let around = |text, type_id| {
            let sequence = Piece::Sequence { id: text, type_id };
            special(bos, type_id).into_iter().chain([sequence]).chain(special(eos, type_id))
        };
        Self::TemplateProcessing {
            single: around(Text::A, 0).collect(),
            pair: around(Text::A, 0).chain(around(Text::B, 1)).collect(),
            special_tokens: bos.into_iter().chain(eos).map(define).collect(),
        }
    }

    /// BERT's template: `[CLS] A [SEP]`, and `B [SEP]` of type 1 after it.
    pub(crate) fn bert_template(cls: &(String, u32), sep: &(String, u32)) -> Self {
        let special = |token: &(String, u32), type_id| Piece::SpecialToken { id: token.0.clone(), type_id };
        let single = vec![special(cls, 0), Piece::Sequence { id: Text::A, type_id: 0 }, special(sep, 0)];
        let second = [Piece::Sequence { id: Text::B, type_id: 1 }, special(sep, 1)];
        Self::TemplateProcessing {
            pair: single.iter().cloned().chain(second).collect(),
            single,
            special_tokens: [define(cls), define(sep)].into(),
        }
    }
}

/// A special token of a template, by its name.
fn define((token, id): &(String, u32)) -> (String, SpecialToken) {
    (token.clone(), SpecialToken { id: token.clone(), ids: vec![*id], tokens: vec![token.clone()] })
}

/// One place of a template.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Piece {
    SpecialToken { id: String, type_id: u32 },
    Sequence { id: Text, type_id: u32 },
}

/// The first or the second text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Text {
    A,
    B,
}

/// What a special token of a template stands for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct SpecialToken {
    id: String,
    ids: Vec<u32>,
    tokens: Vec<String>,
}

/// A place of a prepared template.
#[derive(Clone, Debug)]
enum Slot {
    Special { tokens: Vec<(u32, String)>, type_id: u32 },
    Text { text: Text, type_id: u32 },
}

/// A post-processor ready to run.
#[derive(Clone, Debug, Default)]
pub(crate) struct Template {
    /// `add_prefix_space` of each trimming of offsets, in order.
    trims: Vec<bool>,
    /// Roberta's way: every type id is 0.
    one_type: bool,
    single: Vec<Slot>,
    pair: Vec<Slot>,
}

impl Template {
    /// Prepares `config`; none means the texts one after the other, of types 0 and 1.
    pub(crate) fn new(config: Option<&PostProcessor>) -> Result<Self> {
        let text = |text, type_id| Slot::Text { text, type_id };
        let mut template = Self {
            single: vec![text(Text::A, 0)],
            pair: vec![text(Text::A, 0), text(Text::B, 1)],
            ..Self::default()
        };
        if let Some(config) = config {
            template.add(config, &mut false)?;
        }
        Ok(template)
    }

    fn add(&mut self, config: &PostProcessor, templated: &mut bool) -> Result<()> {
        let special =
            |t: &(String, u32), type_id| Slot::Special { tokens: vec![(t.1, t.0.clone())], type_id };
        let text = |text, type_id| Slot::Text { text, type_id };
        if !matches!(config, PostProcessor::ByteLevel { .. } | PostProcessor::Sequence { .. })
            && std::mem::replace(templated, true)
        {
            return Err(Error::format("post_processor", "a Sequence with two templates is not supported"));
        }
        match config {
            PostProcessor::BertProcessing { sep, cls } => {
                self.single = vec![special(cls, 0), text(Text::A, 0), special(sep, 0)];
                self.pair = self.single.clone();
                self.pair.extend([text(Text::B, 1), special(sep, 1)]);
            }
            PostProcessor::RobertaProcessing { sep, cls, trim_offsets, add_prefix_space } => {
                if *trim_offsets {
                    self.trims.push(*add_prefix_space);
                }
                self.one_type = true;
                self.single = vec![special(cls, 0), text(Text::A, 0), special(sep, 0)];
                self.pair = self.single.clone();
                self.pair.extend([special(sep, 0), text(Text::B, 0), special(sep, 0)]);
            }
            PostProcessor::ByteLevel { add_prefix_space, trim_offsets, .. } => {
                if *trim_offsets {
                    self.trims.push(*add_prefix_space);
                }
            }
            PostProcessor::TemplateProcessing { single, pair, special_tokens } => {
                let slot = |piece: &Piece| match piece {
                    Piece::Sequence { id, type_id } => Ok(text(*id, *type_id)),
                    Piece::SpecialToken { id, type_id } => {
                        let token = special_tokens.get(id).filter(|t| t.ids.len() == t.tokens.len());
                        let token = token.ok_or_else(|| {
                            let problem =
                                format!("the template names {id:?}, which special_tokens does not define");
                            Error::format("post_processor", problem)
                        })?;
                        let tokens = token.ids.iter().copied().zip(token.tokens.iter().cloned()).collect();
                        Ok(Slot::Special { tokens, type_id: *type_id })
                    }
                };
                self.single = single.iter().map(slot).collect::<Result<_>>()?;
                self.pair = pair.iter().map(slot).collect::<Result<_>>()?;
                let holds = |slots: &[Slot], wanted| {
                    slots.iter().any(|s| matches!(s, Slot::Text { text, .. } if *text == wanted))
                };
                if !holds(&self.single, Text::A) || !holds(&self.pair, Text::A) || !holds(&self.pair, Text::B)
                {
                    return Err(Error::format("post_processor", "the template leaves out a text"));
                }
            }
            PostProcessor::Sequence { processors } => {
                processors.iter().try_for_each(|p| self.add(p, templated))?;
            }
        }
        Ok(())
    }

    fn slots(&self, pair: bool) -> &[Slot] {
        if pair { &self.pair } else { &self.single }
    }

    /// Number of special tokens around one text or two.
    pub(crate) fn n_added(&self, pair: bool) -> usize {
        self.slots(pair)
            .iter()
            .map(|slot| match slot {
                Slot::Special { tokens, .. } => tokens.len(),
                Slot::Text { .. } => 0,
            })
            .sum()
    }

    /// The special tokens around a single text, as ids: (before, after).
    pub(crate) fn around(&self) -> (Vec<u32>, Vec<u32>) {
        let mut sides = (vec![], vec![]);
        let mut after = false;
        for slot in &self.single {
            match slot {
                Slot::Text { .. } => after = true,
                Slot::Special { tokens, .. } => {
                    let side = if after { &mut sides.1 } else { &mut sides.0 };
                    side.extend(tokens.iter().map(|&(id, _)| id));
                }
            }
        }
        sides
    }

    /// Takes leading and trailing white space out of the offsets where the post-processor says so.
    fn trim(&self, encoding: &mut Encoding) {
        let space = byte_to_char(b' ');
        for &add_prefix_space in &self.trims {
            for (i, (token, offsets)) in encoding.tokens.iter().zip(&mut encoding.offsets).enumerate() {
                let blank = |c: &char| *c == space || c.is_whitespace();
                let leading = token.chars().take_while(blank).count() as u32;
                let trailing = token.chars().rev().take_while(blank).count() as u32;
                // A single space before the first token is one that was put there.
                let own = (i == 0 || offsets.0 == 0) && add_prefix_space && leading == 1;
                if !own {
                    offsets.0 = (offsets.0 + leading).min(offsets.1);
                }
                if trailing > 0 && offsets.1 >= trailing {
                    offsets.1 = (offsets.1 - trailing).max(offsets.0);
                }
            }
        }
        encoding.overflowing.iter_mut().for_each(|part| self.trim(part));
    }

    /// Puts one text or two into the template. Without `add_special_tokens` only type ids and offsets are set.
    pub(crate) fn apply(
        &self,
        mut first: Encoding,
        mut second: Option<Encoding>,
        add_special_tokens: bool,
    ) -> Encoding {
        self.trim(&mut first);
        if let Some(second) = &mut second {
            self.trim(second);
        }
        let none = [];
        let firsts = std::iter::once(&first).chain(&first.overflowing);
        let mut combined = firsts.flat_map(|a| {
            let rest = second.as_ref().map_or(none.iter(), |b| b.overflowing.iter());
            let seconds = second.as_ref().into_iter().chain(rest).map(Some);
            // With no second text there is one combination.
            let lone = second.is_none().then_some(None);
            seconds.chain(lone).map(move |b| self.fill(a, b, add_special_tokens))
        });
        let mut whole = combined.next().unwrap_or_default();
        // The reference lists the parts of the first text with all of the second before those of the second alone.
        let n_second = second.as_ref().map_or(1, |b| 1 + b.overflowing.len());
        let mut parts: Vec<Encoding> = combined.collect();
        parts.rotate_left(n_second - 1);
        whole.overflowing = parts;
        whole
    }

    fn fill(&self, first: &Encoding, second: Option<&Encoding>, add_special_tokens: bool) -> Encoding {
        let mut out = Encoding::default();
        for slot in self.slots(second.is_some()) {
            match slot {
                Slot::Text { text, type_id } => {
                    let part = if *text == Text::A { Some(first) } else { second };
                    let start = out.len();
                    out.append(part.unwrap_or(first));
                    let type_id = if self.one_type { 0 } else { *type_id };
                    out.type_ids[start..].fill(type_id);
                }
                Slot::Special { tokens, type_id } if add_special_tokens => {
                    for (id, token) in tokens {
                        out.push(*id, token, (0, 0), None, None, *type_id);
                    }
                }
                Slot::Special { .. } => {}
            }
        }
        out
    }
}
