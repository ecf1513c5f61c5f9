//! The byte alphabet of byte-level tokenizers: each byte written as one printable character.
//!
//! Source: openai/gpt-2 `encoder.py` (`bytes_to_unicode`): printable Latin-1 bytes stand for themselves, the others for
//! U+0100, U+0101 … in order.

use std::sync::LazyLock;

static CHARS: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut next = 0x100;
    std::array::from_fn(|byte| match byte {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => byte as u8 as char,
        _ => {
            next += 1;
            char::from_u32(next - 1).expect("below U+0200 every code point is a character")
        }
    })
});

static BYTES: LazyLock<[Option<u8>; 0x144]> = LazyLock::new(|| {
    let mut bytes = [None; 0x144];
    for (byte, &c) in CHARS.iter().enumerate() {
        bytes[c as usize] = Some(byte as u8);
    }
    bytes
});

/// The character that stands for `byte`.
pub(crate) fn byte_to_char(byte: u8) -> char {
    CHARS[byte as usize]
}

/// The byte that `c` stands for.
pub(crate) fn char_to_byte(c: char) -> Option<u8> {
    BYTES.get(c as usize).copied().flatten()
}

/// The bytes of a token; one with a character outside the byte alphabet stands for its own UTF-8.
pub(crate) fn from_alphabet(token: &str) -> Vec<u8> {
    token.chars().map(char_to_byte).collect::<Option<_>>().unwrap_or_else(|| token.as_bytes().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_is_a_bijection() {
        for byte in 0..=255 {
            assert_eq!(char_to_byte(byte_to_char(byte)), Some(byte));
        }
        assert_eq!(from_alphabet("Ġa"), b" a");
        assert_eq!(from_alphabet("a b"), b"a b");
        assert_eq!(char_to_byte('\u{143}'), Some(0xad));
    }
}
