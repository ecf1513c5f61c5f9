//! Properties of characters, one flag each, looked up in a flat table of one byte per code point.
//!
//! The table (1.1 MB) is filled from the ranges of `unicode_tables.rs` at first use, in about a millisecond; only the
//! pages of the scripts in use are ever touched again.

use std::sync::LazyLock;

use crate::unicode_tables as tables;

/// General category L.
pub(crate) const LETTER: u8 = 1;
/// General category N.
pub(crate) const NUMBER: u8 = 2;
/// `White_Space`, what `\s` matches and [`char::is_whitespace`] says.
pub(crate) const SPACE: u8 = 4;
/// Split off by a BERT pre-tokenizer.
pub(crate) const PUNCTUATION: u8 = 8;
/// Removed by BERT's text cleaning.
pub(crate) const CONTROL: u8 = 16;
/// Removed by BERT's accent stripping.
pub(crate) const NONSPACING_MARK: u8 = 32;
/// Surrounded with spaces by BERT's normalizer.
pub(crate) const IDEOGRAPH: u8 = 64;
/// General category M.
pub(crate) const MARK: u8 = 128;

/// The blocks of ideographs that BERT tokenizers split character by character.
/// Source: google-research/bert `tokenization.py` (`_is_chinese_char`), with the start of the fifth block as the
/// `tokenizers` library has it.
const IDEOGRAPHS: &[(u32, u32)] = &[
    (0x3400, 0x4dbf),
    (0x4e00, 0x9fff),
    (0xf900, 0xfaff),
    (0x20000, 0x2a6df),
    (0x2a700, 0x2b81f),
    (0x2b920, 0x2ceaf),
    (0x2f800, 0x2fa1f),
];

static FLAGS: LazyLock<Box<[u8]>> = LazyLock::new(|| {
    let mut flags = vec![0u8; 0x11_0000].into_boxed_slice();
    for (flag, ranges) in [
        (LETTER, tables::LETTER),
        (NUMBER, tables::NUMBER),
        (PUNCTUATION, tables::PUNCTUATION),
        (CONTROL, tables::CONTROL),
        (NONSPACING_MARK, tables::NONSPACING_MARK),
        (IDEOGRAPH, IDEOGRAPHS),
        (MARK, tables::MARK),
    ] {
        for &(first, last) in ranges {
            flags[first as usize..=last as usize].iter_mut().for_each(|f| *f |= flag);
        }
    }
    for c in ('\0'..='\u{3000}').filter(|c| c.is_whitespace()) {
        flags[c as usize] |= SPACE;
    }
    flags
});

/// The table itself, to be fetched once before a loop.
#[derive(Clone, Copy)]
pub(crate) struct Flags(&'static [u8]);

impl Flags {
    pub(crate) fn get() -> Self {
        Self(&FLAGS)
    }

    /// All flags of `c`.
    #[inline(always)]
    pub(crate) fn of(self, c: char) -> u8 {
        self.0[c as usize]
    }

    /// Whether `c` has one of `flags`.
    #[inline(always)]
    pub(crate) fn has(self, c: char, flags: u8) -> bool {
        self.of(c) & flags != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_standard_library_where_it_should() {
        let flags = Flags::get();
        for c in '\0'..=char::MAX {
            assert_eq!(flags.has(c, SPACE), c.is_whitespace(), "{c:?}");
            if c.is_ascii() {
                assert_eq!(flags.has(c, LETTER), c.is_ascii_alphabetic());
                assert_eq!(flags.has(c, NUMBER), c.is_ascii_digit());
                assert_eq!(flags.has(c, PUNCTUATION), c.is_ascii_punctuation());
            }
        }
        assert!(flags.has('é', LETTER) && flags.has('Ⅷ', NUMBER) && flags.has('中', IDEOGRAPH | LETTER));
        assert!(flags.has('\u{301}', MARK) && flags.has('\u{200b}', CONTROL) && !flags.has('\n', CONTROL));
    }
}
