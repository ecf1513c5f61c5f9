//! Named cleaning steps, applied to documents in the order given.

use std::collections::HashSet;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::str::FromStr;

use unicode_normalization::UnicodeNormalization;

use crate::error::Error;

/// One cleaning step. Its name is what [`FromStr`] reads and [`fmt::Display`] prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// `nfc`: Unicode canonical composition (UAX 15).
    Nfc,
    /// `nfkc`: Unicode compatibility composition (UAX 15); may lengthen a text.
    Nfkc,
    /// `control`: removes the characters of category Cc except line feed and tab.
    Control,
    /// `whitespace`: makes a run of spaces and tabs one space, drops them at line ends, and more than two line
    /// feeds in a row become two.
    Whitespace,
    /// `html`: decodes HTML's character references once (`&amp;lt;` becomes `&lt;`); unknown ones stay.
    Html,
    /// `duplicates`: drops documents whose text came before. Texts are compared by 128 bits of a hash, so this step
    /// keeps 16 bytes for each document.
    Duplicates,
    /// `min-length=N`: drops documents of fewer than N characters.
    MinLength(usize),
}

/// The forms of the names of all steps.
const NAMES: &str = "nfc, nfkc, control, whitespace, html, duplicates, min-length=N";

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nfc => f.write_str("nfc"),
            Self::Nfkc => f.write_str("nfkc"),
            Self::Control => f.write_str("control"),
            Self::Whitespace => f.write_str("whitespace"),
            Self::Html => f.write_str("html"),
            Self::Duplicates => f.write_str("duplicates"),
            Self::MinLength(least) => write!(f, "min-length={least}"),
        }
    }
}

impl FromStr for Step {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Ok(match name {
            "nfc" => Self::Nfc,
            "nfkc" => Self::Nfkc,
            "control" => Self::Control,
            "whitespace" => Self::Whitespace,
            "html" => Self::Html,
            "duplicates" => Self::Duplicates,
            _ => match name.strip_prefix("min-length=").map(str::parse) {
                Some(Ok(least)) => Self::MinLength(least),
                _ => return Err(Error::UnknownStep { name: name.to_owned(), known: NAMES.to_owned() }),
            },
        })
    }
}

/// What one step did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepReport {
    /// The step.
    pub step: Step,
    /// How many documents it changed.
    pub documents_changed: u64,
    /// How many documents it dropped.
    pub documents_dropped: u64,
    /// Characters before it less characters after it, over all documents (those of dropped ones count as removed);
    /// negative where it lengthened the texts.
    pub characters_removed: i64,
}

/// Applies steps in order to one document after another, and counts what each does.
#[derive(Clone, Debug)]
pub struct Cleaner {
    reports: Vec<StepReport>,
    seen: HashSet<u128>,
}

impl Cleaner {
    /// A cleaner that has seen no document.
    #[must_use]
    pub fn new(steps: &[Step]) -> Self {
        let report =
            |&step| StepReport { step, documents_changed: 0, documents_dropped: 0, characters_removed: 0 };
        Self { reports: steps.iter().map(report).collect(), seen: HashSet::new() }
    }

    /// The document after all steps; `None` if one dropped it.
    pub fn clean(&mut self, document: String) -> Option<String> {
        let mut text = document;
        for report in &mut self.reports {
            let cleaned: String = match report.step {
                Step::Nfc => text.nfc().collect(),
                Step::Nfkc => text.nfkc().collect(),
                Step::Control => {
                    text.chars().filter(|&c| !c.is_control() || c == '\n' || c == '\t').collect()
                }
                Step::Whitespace => collapse(&text),
                Step::Html => html_escape::decode_html_entities(&text).into_owned(),
                Step::Duplicates | Step::MinLength(_) => {
                    let length = text.chars().count();
                    let keep = match report.step {
                        Step::MinLength(least) => length >= least,
                        _ => self.seen.insert(fingerprint(&text)),
                    };
                    if keep {
                        continue;
                    }
                    report.documents_dropped += 1;
                    report.characters_removed += length as i64;
                    return None;
                }
            };
            if cleaned != text {
                report.documents_changed += 1;
                report.characters_removed += text.chars().count() as i64 - cleaned.chars().count() as i64;
                text = cleaned;
            }
        }
        Some(text)
    }

    /// What each step did so far, in the order of application.
    #[must_use]
    pub fn reports(&self) -> &[StepReport] {
        &self.reports
    }
}

/// 128 bits of SipHash under its fixed key: the same on every run.
fn fingerprint(text: &str) -> u128 {
    let half = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        (salt, text).hash(&mut hasher);
        u128::from(hasher.finish())
    };
    half(0) << 64 | half(1)
}

fn collapse(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut blank = false;
    let mut line_feeds = 0;
    for c in text.chars() {
        match c {
            ' ' | '\t' => blank = true,
            '\n' => {
                // A blank before a line feed stood at the line's end: it goes.
                blank = false;
                line_feeds += 1;
                if line_feeds <= 2 {
                    out.push(c);
                }
            }
            _ => {
                if blank {
                    out.push(' ');
                }
                blank = false;
                line_feeds = 0;
                out.push(c);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn apply(step: Step, text: &str) -> String {
        Cleaner::new(&[step]).clean(text.to_owned()).unwrap()
    }

    #[test]
    fn each_step_does_what_its_name_says() {
        assert_eq!(apply(Step::Nfc, "e\u{301}ﬁ"), "éﬁ");
        assert_eq!(apply(Step::Nfkc, "e\u{301}ﬁ²"), "éfi2");
        assert_eq!(apply(Step::Control, "a\r\n\tb\0\u{85}\u{7f}c"), "a\n\tbc");
        assert_eq!(apply(Step::Whitespace, "  a \t b\t\n \n\t\n\n c d  "), " a b\n\n c d");
        assert_eq!(apply(Step::Whitespace, "a\nb\n\nc\n\n\n"), "a\nb\n\nc\n\n");
        assert_eq!(
            apply(Step::Html, "&lt;a&gt; &amp;lt; &eacute;&#39;&#x41; &none; & &"),
            "<a> &lt; é'A &none; & &"
        );
    }

    #[test]
    fn documents_are_dropped_once_and_counted() {
        let mut cleaner = Cleaner::new(&[Step::Whitespace, Step::MinLength(2), Step::Duplicates]);
        let kept: Vec<_> =
            ["éa", "b", "é  a", "é a", "éa", "é a"].map(|d| cleaner.clean(d.to_owned())).into();
        assert_eq!(kept, [Some("éa".to_owned()), None, Some("é a".to_owned()), None, None, None]);
        let numbers: Vec<_> = cleaner
            .reports()
            .iter()
            .map(|r| (r.documents_changed, r.documents_dropped, r.characters_removed))
            .collect();
        assert_eq!(numbers, [(1, 0, 1), (0, 1, 1), (0, 3, 8)]);
    }

    #[test]
    fn names_are_read_back_and_others_refused() {
        for name in ["nfc", "nfkc", "control", "whitespace", "html", "duplicates", "min-length=12"] {
            assert_eq!(name.parse::<Step>().unwrap().to_string(), name);
        }
        for name in ["NFC", "min-length", "min-length=-1"] {
            let text = name.parse::<Step>().unwrap_err().to_string();
            assert!(text.contains(name) && text.contains(NAMES), "{text}");
        }
    }

    proptest! {
        #[test]
        fn each_step_is_idempotent(text in "[a e\u{301}ﬁ\t\n\r\0]{0,40}|\\PC{0,40}") {
            for step in [Step::Nfc, Step::Nfkc, Step::Control, Step::Whitespace] {
                let once = apply(step, &text);
                prop_assert_eq!(apply(step, &once), once);
            }
        }
    }
}
