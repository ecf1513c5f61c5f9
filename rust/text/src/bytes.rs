//! Bytes as text: the byte alphabet of byte-level tokenizers, where each is one printable character, and base64.
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
    let mut bytes = vec![];
    write_bytes(token, &mut bytes);
    bytes
}

/// Appends the bytes of a token.
pub(crate) fn write_bytes(token: &str, out: &mut Vec<u8>) {
    let start = out.len();
    for c in token.chars() {
        let Some(byte) = char_to_byte(c) else {
            out.truncate(start);
            out.extend_from_slice(token.as_bytes());
            return;
        };
        out.push(byte);
    }
}

/// Decodes base64 with `=` at the end (RFC 4648, section 4).
pub(crate) fn from_base64(text: &[u8]) -> Option<Vec<u8>> {
    let digit = |b: u8| match b {
        b'A'..=b'Z' => Some(b - b'A'),
        b'a'..=b'z' => Some(b - b'a' + 26),
        b'0'..=b'9' => Some(b - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    if !text.len().is_multiple_of(4) {
        return None;
    }
    let n_pad = text.iter().rev().take_while(|&&b| b == b'=').count().min(2);
    let mut out = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut n_bits) = (0u32, 0);
    for &b in &text[..text.len() - n_pad] {
        bits = bits << 6 | u32::from(digit(b)?);
        n_bits += 6;
        if n_bits >= 8 {
            n_bits -= 8;
            out.push((bits >> n_bits) as u8);
        }
    }
    Some(out)
}

/// Encodes as base64.
pub(crate) fn to_base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let bits = (0..3).fold(0u32, |bits, i| bits << 8 | u32::from(*chunk.get(i).unwrap_or(&0)));
        for i in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * i) & 63) as usize] as char;
            out.push(if i <= chunk.len() { digit } else { '=' });
        }
    }
    out
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

    #[test]
    fn base64_of_all_lengths() {
        for (text, bytes) in
            [("", &b""[..]), ("YQ==", b"a"), ("YWI=", b"ab"), ("YWJj", b"abc"), ("//79", b"\xff\xfe\xfd")]
        {
            assert_eq!(to_base64(bytes), text);
            assert_eq!(from_base64(text.as_bytes()).as_deref(), Some(bytes));
        }
        assert_eq!(from_base64(b"YQ="), None);
        assert_eq!(from_base64(b"Y*=="), None);
    }
}
