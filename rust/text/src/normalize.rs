//! Normalizers: what happens to a text before it is split into words.
//!
//! Each works on [`Text`], characters with their origins, so that tokens find back to the original text. The field
//! names are those of tokenizer.json; a component that is not in [`Normalizer`] is refused when the file is read.

use serde::{Deserialize, Serialize};
use unicode_normalization::char::{
    canonical_combining_class, compose, decompose_canonical, decompose_compatible,
};

use crate::Result;
use crate::charmap::CharMap;
use crate::pattern::Pattern;
use crate::text::{Origin, Text};
use crate::unicode::{self, Flags};

/// A normalizer as tokenizer.json writes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub(crate) enum Normalizer {
    /// BERT's cleaning, ideograph spacing, accent stripping (by default where it lowercases) and lowercasing.
    #[serde(rename = "BertNormalizer")]
    Bert {
        clean_text: bool,
        handle_chinese_chars: bool,
        strip_accents: Option<bool>,
        lowercase: bool,
    },
    #[serde(rename = "NFC")]
    Nfc,
    #[serde(rename = "NFD")]
    Nfd,
    #[serde(rename = "NFKC")]
    Nfkc,
    #[serde(rename = "NFKD")]
    Nfkd,
    Lowercase,
    /// Drops all marks; usually after NFD.
    StripAccents,
    /// Drops white space at the ends.
    Strip {
        strip_left: bool,
        strip_right: bool,
    },
    /// Puts a string before a text that is not empty.
    Prepend {
        prepend: String,
    },
    Replace {
        pattern: Pattern,
        content: String,
    },
    /// SentencePiece's rewriting.
    Precompiled {
        precompiled_charsmap: CharMap,
    },
    Sequence {
        normalizers: Vec<Normalizer>,
    },
}

impl Normalizer {
    /// Refuses what cannot be carried out.
    pub(crate) fn check(&self) -> Result<()> {
        match self {
            Self::Replace { pattern, .. } => pattern.check("normalizer"),
            Self::Sequence { normalizers } => normalizers.iter().try_for_each(Self::check),
            _ => Ok(()),
        }
    }

    /// Normalizes `text` in place.
    pub(crate) fn apply<O: Origin>(&self, text: &mut Text<O>) {
        match self {
            Self::Bert { clean_text, handle_chinese_chars, strip_accents, lowercase: lower } => {
                bert(text, *clean_text, *handle_chinese_chars);
                if strip_accents.unwrap_or(*lower) {
                    decompose(text, false, false);
                    let flags = Flags::get();
                    text.chars.retain(|&(c, _)| !flags.has(c, unicode::NONSPACING_MARK));
                }
                if *lower {
                    lowercase(text);
                }
            }
            Self::Nfd => decompose(text, false, false),
            Self::Nfkd => decompose(text, true, false),
            Self::Nfc => decompose(text, false, true),
            Self::Nfkc => decompose(text, true, true),
            Self::Lowercase => lowercase(text),
            Self::StripAccents => {
                let flags = Flags::get();
                text.chars.retain(|&(c, _)| !flags.has(c, unicode::MARK));
            }
            Self::Strip { strip_left, strip_right } => {
                if *strip_right {
                    let end = text.chars.iter().rposition(|(c, _)| !c.is_whitespace()).map_or(0, |i| i + 1);
                    text.chars.truncate(end);
                }
                if *strip_left {
                    let start = text.chars.iter().position(|(c, _)| !c.is_whitespace());
                    text.chars.drain(..start.unwrap_or(text.chars.len()));
                }
            }
            Self::Prepend { prepend } => text.prepend(prepend),
            Self::Replace { pattern, content } => replace(text, pattern, content),
            Self::Precompiled { precompiled_charsmap } => precompiled_charsmap.apply(text),
            Self::Sequence { normalizers } => normalizers.iter().for_each(|n| n.apply(text)),
        }
    }
}

fn bert<O: Origin>(text: &mut Text<O>, clean: bool, ideographs: bool) {
    let flags = Flags::get();
    if clean {
        text.chars.retain(|&(c, _)| !flags.has(c, unicode::CONTROL));
        for (c, _) in &mut text.chars {
            if flags.has(*c, unicode::SPACE) {
                *c = ' ';
            }
        }
    }
    if ideographs && text.chars.iter().any(|&(c, _)| flags.has(c, unicode::IDEOGRAPH)) {
        text.flat_map(|c, push| {
            let spaced = flags.has(c, unicode::IDEOGRAPH);
            if spaced {
                push(' ');
            }
            push(c);
            if spaced {
                push(' ');
            }
        });
    }
}

fn lowercase<O: Origin>(text: &mut Text<O>) {
    if text.chars.iter().all(|(c, _)| c.is_ascii()) {
        text.chars.iter_mut().for_each(|(c, _)| c.make_ascii_lowercase());
    } else {
        text.flat_map(|c, push| c.to_lowercase().for_each(push));
    }
}

/// Canonical or compatibility decomposition (Unicode Standard Annex 15), composed again if `composed`.
fn decompose<O: Origin>(text: &mut Text<O>, compatible: bool, composed: bool) {
    // Every ASCII character is its own decomposition and composition.
    if text.chars.iter().all(|(c, _)| c.is_ascii()) {
        return;
    }
    let mut parts = Vec::with_capacity(text.chars.len());
    for &(c, _) in &text.chars {
        // The first part takes the place of the character, the others follow it.
        let mut taken = 1;
        let push = |part| parts.push((part, std::mem::take(&mut taken)));
        if compatible {
            decompose_compatible(c, push);
        } else {
            decompose_canonical(c, push);
        }
    }
    let mut rest = parts.as_mut_slice();
    while let Some(start) = rest.iter().position(|&(c, _)| canonical_combining_class(c) != 0) {
        rest = &mut rest[start..];
        let end = rest.iter().position(|&(c, _)| canonical_combining_class(c) == 0).unwrap_or(rest.len());
        rest[..end].sort_by_key(|&(c, _)| canonical_combining_class(c));
        rest = &mut rest[end..];
    }
    if composed {
        parts = recompose(parts);
    }
    text.rewrite(parts.into_iter());
}

/// Canonical composition of a decomposed text; a composed character takes the places of both its parts.
fn recompose(parts: Vec<(char, usize)>) -> Vec<(char, usize)> {
    let mut out: Vec<(char, usize)> = Vec::with_capacity(parts.len());
    // The last starter, and the class of the last mark after it that stayed.
    let mut starter: Option<usize> = None;
    let mut last_class = 0;
    for (c, taken) in parts {
        let class = canonical_combining_class(c);
        if let Some(s) = starter {
            let adjacent = s + 1 == out.len();
            if (adjacent || (last_class < class && last_class != 0))
                && let Some(composed) = compose(out[s].0, c)
            {
                out[s].0 = composed;
                out[s].1 += taken;
                continue;
            }
        }
        if class == 0 {
            starter = Some(out.len());
        }
        last_class = class;
        out.push((c, taken));
    }
    out
}

/// Writes `content` for what is found; it gets the origin of the last character found, or of the one before nothing.
fn replace<O: Origin>(text: &mut Text<O>, pattern: &Pattern, content: &str) {
    let string = text.to_text();
    let mut out = Vec::new();
    // How far the text has been read, in bytes and in characters.
    let (mut bytes, mut chars) = (0, 0);
    pattern.find(&string, |start, end| {
        if out.is_empty() {
            out.reserve(text.chars.len());
        }
        let n_kept = string[bytes..start].chars().count();
        out.extend_from_slice(&text.chars[chars..chars + n_kept]);
        chars += n_kept + string[start..end].chars().count();
        bytes = end;
        let origin = chars.checked_sub(1).map_or_else(O::default, |last| text.chars[last].1);
        out.extend(content.chars().map(|c| (c, origin)));
    });
    if bytes > 0 || !out.is_empty() {
        out.extend_from_slice(&text.chars[chars..]);
        text.chars = out;
    }
}

#[cfg(test)]
mod tests {
    use unicode_normalization::UnicodeNormalization;

    use super::*;

    #[test]
    fn forms_agree_with_the_normalization_crate() {
        let samples = [
            "é e\u{301} \u{344}",
            "q\u{307}\u{323}a\u{323}\u{307}",
            "각 \u{1100}\u{1161}\u{11a8}",
            "ﬁ①㎏",
            "a\u{5ae}\u{300}b",
            "\u{301}x",
        ];
        for s in samples.into_iter().chain(["Ω≠¾İ\u{1e9b}\u{323}"]) {
            let apply = |n: Normalizer| {
                let mut text = Text::<()>::new(s, 0);
                n.apply(&mut text);
                text.to_text()
            };
            assert_eq!(apply(Normalizer::Nfc), s.nfc().collect::<String>());
            assert_eq!(apply(Normalizer::Nfd), s.nfd().collect::<String>());
            assert_eq!(apply(Normalizer::Nfkc), s.nfkc().collect::<String>());
            assert_eq!(apply(Normalizer::Nfkd), s.nfkd().collect::<String>());
        }
    }

    #[test]
    fn origins_follow_the_characters() {
        let mut text = Text::<(u32, u32)>::new("aÉ中", 10);
        Normalizer::Bert {
            clean_text: true,
            handle_chinese_chars: true,
            strip_accents: None,
            lowercase: true,
        }
        .apply(&mut text);
        assert_eq!(text.to_text(), "ae 中 ");
        assert_eq!(text.chars[1].1, (11, 13));
        assert_eq!(text.chars[3].1, (13, 16));
    }

    #[test]
    fn broken_patterns_are_refused() {
        let n = Normalizer::Replace { pattern: Pattern::regex("a(+"), content: String::new() };
        assert!(n.check().is_err_and(|e| e.to_string().contains("a(+")));
    }
}
