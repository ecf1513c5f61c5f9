//! Decoders: from tokens back to text, one token at a time.
//!
//! A decoder is a chain of stages; each takes a token, keeps what it cannot decide yet, and hands the rest on. The text
//! of a whole is what comes out of its tokens in turn, so that streaming and decoding agree by construction.

use serde::{Deserialize, Serialize};

use crate::bytes::from_alphabet;
use crate::pattern::Pattern;
use crate::pretokenize::{Metaspace, Prepend};
use crate::{Error, Result};

/// A decoder as tokenizer.json writes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub(crate) enum Decoder {
    WordPiece {
        prefix: String,
        cleanup: bool,
    },
    ByteLevel {
        #[serde(default = "yes")]
        add_prefix_space: bool,
        #[serde(default = "yes")]
        trim_offsets: bool,
        #[serde(default = "yes")]
        use_regex: bool,
    },
    Metaspace(Metaspace),
    ByteFallback,
    /// Everything from here on is one token.
    Fuse,
    Replace {
        pattern: Pattern,
        content: String,
    },
    /// Drops up to so many `content` at the ends of each token.
    Strip {
        content: char,
        start: usize,
        stop: usize,
    },
    Sequence {
        decoders: Vec<Decoder>,
    },
}

fn yes() -> bool {
    true
}

/// The stages of a decoder, as they are before the first token.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stages(Vec<Stage>);

#[derive(Clone, Debug)]
enum Stage {
    /// No decoder: tokens joined by spaces.
    Join {
        first: bool,
    },
    WordPiece {
        prefix: String,
        cleanup: bool,
        first: bool,
    },
    ByteLevel(Utf8),
    Metaspace {
        replacement: char,
        prefix: bool,
        first: bool,
    },
    ByteFallback {
        bytes: Vec<u8>,
    },
    Replace {
        pattern: String,
        content: String,
    },
    /// Of each token.
    Strip {
        content: char,
        start: usize,
        stop: usize,
    },
    /// Of the whole text: `start` is what may still go, `held` what may turn out to be the end.
    StripWhole {
        content: char,
        start: usize,
        stop: usize,
        held: String,
    },
}

impl Stages {
    /// Prepares `config`.
    pub(crate) fn new(config: Option<&Decoder>) -> Result<Self> {
        let mut stages = Self::default();
        match config {
            Some(config) => stages.add(config, &mut false)?,
            None => stages.0.push(Stage::Join { first: true }),
        }
        Ok(stages)
    }

    fn add(&mut self, config: &Decoder, fused: &mut bool) -> Result<()> {
        let refuse = |what: &str| Err(Error::format("decoder", format!("{what} is not supported")));
        let per_token = matches!(
            config,
            Decoder::WordPiece { .. }
                | Decoder::Metaspace(_)
                | Decoder::ByteFallback
                | Decoder::Replace { .. }
        );
        if *fused && per_token {
            return refuse(&format!("{config:?} after Fuse or ByteLevel"));
        }
        let stage = match config {
            Decoder::WordPiece { prefix, cleanup } => {
                Stage::WordPiece { prefix: prefix.clone(), cleanup: *cleanup, first: true }
            }
            Decoder::ByteLevel { .. } => {
                *fused = true;
                Stage::ByteLevel(Utf8::default())
            }
            Decoder::Metaspace(m) => {
                let prefix = m.scheme() != Prepend::Never;
                Stage::Metaspace { replacement: m.replacement, prefix, first: true }
            }
            Decoder::ByteFallback => Stage::ByteFallback { bytes: vec![] },
            Decoder::Fuse => {
                *fused = true;
                return Ok(());
            }
            Decoder::Replace { pattern: Pattern::String(pattern), content } => {
                Stage::Replace { pattern: pattern.clone(), content: content.clone() }
            }
            Decoder::Replace { pattern, .. } => return refuse(&format!("Replace with {pattern:?}")),
            &Decoder::Strip { content, start, stop } if *fused => {
                Stage::StripWhole { content, start, stop, held: String::new() }
            }
            &Decoder::Strip { content, start, stop } => Stage::Strip { content, start, stop },
            Decoder::Sequence { decoders } => return decoders.iter().try_for_each(|d| self.add(d, fused)),
        };
        self.0.push(stage);
        Ok(())
    }

    /// Whether this is the byte-level decoder alone.
    pub(crate) fn is_byte_level(&self) -> bool {
        matches!(self.0.as_slice(), [Stage::ByteLevel(_)])
    }

    /// Takes a token and appends what it decides to `out`.
    pub(crate) fn push(&mut self, token: &str, out: &mut String) {
        push(&mut self.0, token, out);
    }

    /// Appends what was held back; the stages are spent.
    pub(crate) fn finish(&mut self, out: &mut String) {
        let mut stages = self.0.as_mut_slice();
        while let [stage, rest @ ..] = stages {
            match stage {
                Stage::ByteLevel(utf8) => {
                    let mut text = String::new();
                    utf8.finish(&mut text);
                    push(rest, &text, out);
                }
                Stage::ByteFallback { bytes } => flush_bytes(bytes, rest, out),
                Stage::StripWhole { content, stop, held, .. } => {
                    let mut text = held.as_str();
                    for _ in 0..*stop {
                        text = text.strip_suffix(*content).unwrap_or(text);
                    }
                    push(rest, text, out);
                    held.clear();
                }
                _ => {}
            }
            stages = rest;
        }
    }
}

fn push(stages: &mut [Stage], token: &str, out: &mut String) {
    let [stage, rest @ ..] = stages else {
        out.push_str(token);
        return;
    };
    match stage {
        Stage::Join { first } => {
            if !std::mem::take(first) {
                push(rest, " ", out);
            }
            push(rest, token, out);
        }
        Stage::WordPiece { prefix, cleanup: clean, first } => {
            let mut text = match (std::mem::take(first), token.strip_prefix(prefix.as_str())) {
                (true, _) => token.to_owned(),
                (false, Some(inside)) => inside.to_owned(),
                (false, None) => format!(" {token}"),
            };
            if *clean {
                text = cleanup(&text);
            }
            push(rest, &text, out);
        }
        Stage::ByteLevel(utf8) => {
            let mut text = String::new();
            utf8.push(&from_alphabet(token), &mut text);
            push(rest, &text, out);
        }
        Stage::Metaspace { replacement, prefix, first } => {
            let first = std::mem::take(first);
            let text: String = token
                .chars()
                .filter(|c| !(first && *prefix && c == replacement))
                .map(|c| if c == *replacement { ' ' } else { c })
                .collect();
            push(rest, &text, out);
        }
        Stage::ByteFallback { bytes } => match byte_token(token) {
            Some(byte) => bytes.push(byte),
            None => {
                flush_bytes(bytes, rest, out);
                push(rest, token, out);
            }
        },
        Stage::Replace { pattern, content } => push(rest, &token.replace(pattern.as_str(), content), out),
        Stage::Strip { content, start, stop } => {
            let mut text = token;
            for _ in 0..*start {
                text = text.strip_prefix(*content).unwrap_or(text);
            }
            for _ in 0..*stop {
                text = text.strip_suffix(*content).unwrap_or(text);
            }
            push(rest, text, out);
        }
        Stage::StripWhole { content, start, stop, held } => {
            let mut text = token;
            while let (Some(shorter), 1..) = (text.strip_prefix(*content), *start) {
                text = shorter;
                *start -= 1;
            }
            if !text.is_empty() {
                *start = 0;
            }
            held.push_str(text);
            let kept =
                held.chars().rev().take(*stop).take_while(|c| c == content).count() * content.len_utf8();
            let ready: String = held.drain(..held.len() - kept).collect();
            push(rest, &ready, out);
        }
    }
}

/// The byte that `<0x..>` stands for.
fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// A run of bytes is its text if it is valid as a whole, else one U+FFFD for each byte.
fn flush_bytes(bytes: &mut Vec<u8>, rest: &mut [Stage], out: &mut String) {
    if bytes.is_empty() {
        return;
    }
    match String::from_utf8(std::mem::take(bytes)) {
        Ok(text) => push(rest, &text, out),
        Err(error) => error.as_bytes().iter().for_each(|_| push(rest, "\u{fffd}", out)),
    }
}

/// English punctuation closed up, as the `tokenizers` library does it.
fn cleanup(text: &str) -> String {
    const RULES: [(&str, &str); 11] = [
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" do not", " don't"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ];
    RULES.iter().fold(
        text.to_owned(),
        |text, (from, to)| {
            if text.contains(from) { text.replace(from, to) } else { text }
        },
    )
}

/// Bytes arriving in pieces, read as UTF-8; what is invalid becomes U+FFFD as in [`String::from_utf8_lossy`].
#[derive(Clone, Debug, Default)]
struct Utf8 {
    /// The start of a character that may yet be completed.
    pending: Vec<u8>,
}

impl Utf8 {
    fn push(&mut self, bytes: &[u8], out: &mut String) {
        self.pending.extend_from_slice(bytes);
        let mut done = 0;
        loop {
            match std::str::from_utf8(&self.pending[done..]) {
                Ok(text) => {
                    out.push_str(text);
                    done = self.pending.len();
                    break;
                }
                Err(error) => {
                    let valid = &self.pending[done..done + error.valid_up_to()];
                    out.push_str(&String::from_utf8_lossy(valid));
                    done += valid.len();
                    let Some(invalid) = error.error_len() else { break };
                    out.push('\u{fffd}');
                    done += invalid;
                }
            }
        }
        self.pending.drain(..done);
    }

    fn finish(&mut self, out: &mut String) {
        out.push_str(&String::from_utf8_lossy(&std::mem::take(&mut self.pending)));
    }
}
