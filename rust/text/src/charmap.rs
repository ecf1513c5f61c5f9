//! SentencePiece's character maps, `Precompiled` in tokenizer.json: which strings are written as which others.
//!
//! A map is a double array (the length of it in bytes, then its units, each u32), then the strings it leads to, each
//! ended by a zero. Source of the format: s-yata/darts-clone `include/darts.h` (`DoubleArrayUnit`); of its use:
//! SentencePiece `src/normalizer.cc`. Which strings are looked up is as in the `tokenizers` library (`Precompiled`):
//! graphemes of less than 6 bytes, then single characters, and of what is found at the start of one, the shortest.

use serde::{Deserialize, Serialize};
use unicode_segmentation::UnicodeSegmentation;

use crate::bytes::{from_base64, to_base64};
use crate::text::{Origin, Text};
use crate::{Error, Result};

/// A character map.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct CharMap {
    units: Vec<u32>,
    strings: String,
}

impl CharMap {
    /// Reads a map.
    pub(crate) fn new(bytes: &[u8]) -> Option<Self> {
        let (length, rest) = bytes.split_first_chunk()?;
        let length = u32::from_le_bytes(*length) as usize;
        let (units, strings) = rest.split_at_checked(length)?;
        let (units, []) = units.as_chunks() else { return None };
        let units: Vec<u32> = units.iter().map(|unit| u32::from_le_bytes(*unit)).collect();
        let strings = String::from_utf8(strings.to_vec()).ok()?;
        (!units.is_empty()).then_some(Self { units, strings })
    }

    /// The bytes of the map.
    fn to_bytes(&self) -> Vec<u8> {
        let length = (self.units.len() * 4) as u32;
        let units = self.units.iter().flat_map(|unit| unit.to_le_bytes());
        length.to_le_bytes().into_iter().chain(units).chain(self.strings.bytes()).collect()
    }

    /// What the shortest entry that `text` starts with is written as.
    fn get(&self, text: &str) -> Option<&str> {
        let offset = |unit: u32| ((unit >> 10) << ((unit & (1 << 9)) >> 6)) as usize;
        let mut at = offset(self.units[0]);
        for byte in text.bytes().take_while(|&byte| byte != 0) {
            at ^= byte as usize;
            let &unit = self.units.get(at)?;
            if unit & (1 << 31 | 0xff) != u32::from(byte) {
                return None;
            }
            at ^= offset(unit);
            if unit >> 8 & 1 == 1 {
                let start = (self.units.get(at)? & !(1 << 31)) as usize;
                let found = self.strings.get(start..)?;
                return Some(found.split('\0').next().unwrap_or(found));
            }
        }
        None
    }

    /// Rewrites `text`. Of the characters that one becomes, the first has its place; the last one of several that become
    /// fewer stands for all the rest.
    pub(crate) fn apply<O: Origin>(&self, text: &mut Text<O>) {
        let string = text.to_text();
        // Each character with the number of those it takes the place of.
        let mut out: Vec<(char, isize)> = Vec::with_capacity(text.chars.len());
        let mut changed = false;
        let mut write = |out: &mut Vec<(char, isize)>, old: &str, new: &str| {
            changed = true;
            let (n_old, n_new) = (old.chars().count() as isize, new.chars().count() as isize);
            out.extend(new.chars().zip(0..).map(|(c, i)| (c, isize::from(i < n_old.min(n_new)))));
            if n_new < n_old
                && let Some((_, taken)) = out.last_mut()
            {
                *taken += n_old - n_new;
            }
        };
        for grapheme in string.graphemes(true) {
            if grapheme.len() < 6
                && let Some(new) = self.get(grapheme)
            {
                write(&mut out, grapheme, new);
                continue;
            }
            for (i, c) in grapheme.char_indices() {
                let old = &grapheme[i..i + c.len_utf8()];
                match self.get(old) {
                    Some(new) => write(&mut out, old, new),
                    None => out.push((c, 1)),
                }
            }
        }
        if changed {
            text.rewrite(out.into_iter().map(|(c, taken)| (c, taken.max(0) as usize)));
        }
    }
}

impl TryFrom<String> for CharMap {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        let map = from_base64(text.as_bytes()).and_then(|bytes| Self::new(&bytes));
        map.ok_or_else(|| {
            Error::format("normalizer", "precompiled_charsmap of Precompiled is no character map")
        })
    }
}

impl From<CharMap> for String {
    fn from(map: CharMap) -> Self {
        to_base64(&map.to_bytes())
    }
}
