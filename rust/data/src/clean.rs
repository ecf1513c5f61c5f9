//! Named cleaning steps, applied to documents in the order given.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use unicode_normalization::UnicodeNormalization;

use crate::error::Error;

/// One cleaning step. Its name is what [`FromStr`] reads and [`fmt::Display`] prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
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
}

impl Step {
    /// All steps, in the order in which they are usually applied.
    pub const ALL: [Self; 4] = [Self::Nfc, Self::Nfkc, Self::Control, Self::Whitespace];

    /// The step's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Nfc => "nfc",
            Self::Nfkc => "nfkc",
            Self::Control => "control",
            Self::Whitespace => "whitespace",
        }
    }

    /// `text` after this step.
    #[must_use]
    pub fn apply(self, text: &str) -> String {
        match self {
            Self::Nfc => text.nfc().collect(),
            Self::Nfkc => text.nfkc().collect(),
            Self::Control => text.chars().filter(|&c| !c.is_control() || c == '\n' || c == '\t').collect(),
            Self::Whitespace => collapse(text),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Step {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|step| step.name() == name).ok_or_else(|| Error::UnknownStep {
            name: name.to_owned(),
            known: Self::ALL.map(Self::name).join(", "),
        })
    }
}

/// What one step did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct StepReport {
    /// The step.
    pub step: Step,
    /// How many documents it changed.
    pub documents_changed: usize,
    /// Characters before it less characters after it, over all documents; negative where it lengthened the texts.
    pub characters_removed: i64,
}

/// What each step did, in the order of application.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CleanReport {
    /// One entry for each step.
    pub steps: Vec<StepReport>,
}

/// Applies `steps` in order to every document, in place. Documents that become empty stay in the list.
pub fn clean(documents: &mut [String], steps: &[Step]) -> CleanReport {
    let apply = |&step: &Step| {
        let mut report = StepReport { step, documents_changed: 0, characters_removed: 0 };
        for document in documents.iter_mut() {
            let cleaned = step.apply(document);
            if cleaned != *document {
                report.documents_changed += 1;
                report.characters_removed += document.chars().count() as i64 - cleaned.chars().count() as i64;
                *document = cleaned;
            }
        }
        report
    };
    CleanReport { steps: steps.iter().map(apply).collect() }
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

    #[test]
    fn each_step_does_what_its_name_says() {
        assert_eq!(Step::Nfc.apply("e\u{301}ﬁ"), "éﬁ");
        assert_eq!(Step::Nfkc.apply("e\u{301}ﬁ²"), "éfi2");
        assert_eq!(Step::Control.apply("a\r\n\tb\0\u{85}\u{7f}c"), "a\n\tbc");
        assert_eq!(Step::Whitespace.apply("  a \t b\t\n \n\t\n\n c d  "), " a b\n\n c d");
        assert_eq!(Step::Whitespace.apply("a\nb\n\nc\n\n\n"), "a\nb\n\nc\n\n");
    }

    #[test]
    fn the_report_counts_documents_and_characters() {
        let mut documents = vec!["a\0b  c".to_owned(), "plain".to_owned(), "ﬃ".to_owned()];
        let report = clean(&mut documents, &[Step::Control, Step::Whitespace, Step::Nfkc]);
        assert_eq!(documents, ["ab c", "plain", "ffi"]);
        let numbers: Vec<_> =
            report.steps.iter().map(|s| (s.documents_changed, s.characters_removed)).collect();
        assert_eq!(numbers, [(1, 1), (1, 1), (1, -2)]);
    }

    #[test]
    fn names_are_read_back_and_others_refused() {
        for step in Step::ALL {
            assert_eq!(step.to_string().parse::<Step>().unwrap(), step);
        }
        let text = "NFC".parse::<Step>().unwrap_err().to_string();
        assert!(text.contains("\"NFC\"") && text.contains("nfc, nfkc, control, whitespace"), "{text}");
    }

    proptest! {
        #[test]
        fn each_step_is_idempotent(text in "[a e\u{301}ﬁ\t\n\r\0]{0,40}|\\PC{0,40}") {
            for step in Step::ALL {
                let once = step.apply(&text);
                prop_assert_eq!(step.apply(&once), once);
            }
        }
    }
}
