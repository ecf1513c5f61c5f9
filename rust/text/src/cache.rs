//! The ids of words met before.
//!
//! Nearly all words of a text are short, have few tokens and come again: they sit in a table whose entries hold word and
//! ids in half a cache line. A word may be in either half of its line; a third one drives the older out. The rest goes to
//! an ordinary map of bounded size.
//! What is cached never changes a result, so caches are per thread and need no order.

use rustc_hash::FxHashMap;

/// Longest word in the table, in bytes: with its length it fills 16.
const SHORT: usize = 15;
/// Most ids of a word in the table.
const FEW: usize = 3;
/// Entries of the table: 2^18 × 32 bytes = 8 MiB, of which only pages that are used exist.
const SLOT_BITS: u32 = 18;
/// Longest word and most words of the map.
const LONG: usize = 96;
const MANY: usize = 1 << 14;
/// Numbers of an entry: the word, and its ids with their number behind them.
const ENTRY: usize = 2;

/// Maps words to ids.
pub(crate) struct Cache {
    /// Entries from the first whole cache line on. Numbers, since zeroed memory for those comes from the system.
    table: Vec<u128>,
    first: usize,
    rest: FxHashMap<Box<[u8]>, Box<[u32]>>,
}

impl Default for Cache {
    fn default() -> Self {
        let line = 2 * ENTRY;
        let table = vec![0u128; (ENTRY << SLOT_BITS) + line];
        Self { first: table.as_ptr().align_offset(64).min(line), table, rest: FxHashMap::default() }
    }
}

/// What a word is looked up by: the bytes of a short one and its length in one number; 0 for a longer one.
pub(crate) type Key = u128;

/// The key of bytes `start .. end` of a text.
#[inline(always)]
pub(crate) fn key_in(text: &[u8], start: usize, end: usize) -> Key {
    let n = end - start;
    match text[start..].first_chunk() {
        // One load, and what is behind the word taken off.
        Some(sixteen) if n <= SHORT => {
            let kept = (1u128 << (8 * n)) - 1;
            (u128::from_le_bytes(*sixteen) & kept) | ((n as u128) << 120)
        }
        _ => key(&text[start..end]),
    }
}

/// The key of a word.
#[inline]
pub(crate) fn key(word: &[u8]) -> Key {
    if word.len() > SHORT {
        return 0;
    }
    let mut bytes = [0; 16];
    bytes[..word.len()].copy_from_slice(word);
    bytes[SHORT] = word.len() as u8;
    u128::from_le_bytes(bytes)
}

#[inline(always)]
fn slot(word: Key) -> usize {
    let mixed = (word as u64 ^ ((word >> 64) as u64).rotate_left(29)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed >> (64 - SLOT_BITS)) as usize
}

impl Cache {
    /// Appends the ids of `word` to `out` if they are known.
    #[inline(always)]
    pub(crate) fn get(&self, word: &[u8], key: Key, out: &mut Vec<u32>) -> bool {
        if key != 0 {
            let at = slot(key);
            for at in [at, at ^ 1] {
                let at = self.first + ENTRY * at;
                if self.table[at] == key {
                    let ids = self.table[at + 1];
                    let end = out.len() + (ids >> 96) as usize;
                    // All that there may be, and less again: a copy of a known length.
                    out.extend_from_slice(&[ids as u32, (ids >> 32) as u32, (ids >> 64) as u32]);
                    out.truncate(end);
                    return true;
                }
            }
        }
        self.get_rest(word, out)
    }

    #[inline(never)]
    fn get_rest(&self, word: &[u8], out: &mut Vec<u32>) -> bool {
        match self.rest.get(word) {
            Some(ids) => {
                out.extend_from_slice(ids);
                true
            }
            None => false,
        }
    }

    /// Remembers the ids of `word`.
    pub(crate) fn insert(&mut self, word: &[u8], ids: &[u32]) {
        let key = key(word);
        if key != 0 && ids.len() <= FEW {
            let packed = ids.iter().rev().fold(0, |x, &id| (x << 32) | u128::from(id));
            let at = slot(key);
            let (newer, older) = (self.first + ENTRY * at, self.first + ENTRY * (at ^ 1));
            self.table.copy_within(newer..newer + ENTRY, older);
            self.table[newer] = key;
            self.table[newer + 1] = packed | ((ids.len() as u128) << 96);
        } else if word.len() <= LONG {
            if self.rest.len() == MANY {
                self.rest.clear();
            }
            self.rest.insert(word.into(), ids.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_the_same_inside_a_text() {
        let text = b"abcdefghijklmnopqrstuvwxyz";
        for start in 0..text.len() {
            for end in start + 1..=text.len() {
                let word = &text[start..end];
                assert_eq!(key_in(text, start, end), key(word), "{start} {end}");
                assert_eq!(key(word) == 0, word.len() > SHORT);
            }
        }
    }

    #[test]
    fn what_is_found_is_what_was_put_in() {
        let mut cache = Cache::default();
        let word = |i: u32| format!("{i}{}", "x".repeat(i as usize % 120));
        let ids = |i: u32| vec![i; i as usize % 5];
        for i in 0..300_000 {
            cache.insert(word(i).as_bytes(), &ids(i));
        }
        let mut found = 0;
        for i in 0..300_000 {
            let mut out = vec![];
            let word = word(i);
            if cache.get(word.as_bytes(), key(word.as_bytes()), &mut out) {
                assert_eq!(out, ids(i));
                found += 1;
            }
        }
        assert!(found > 1000);
    }
}
