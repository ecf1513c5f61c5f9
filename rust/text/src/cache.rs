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
/// Entries of the table: 2^16 × 32 bytes = 2 MiB.
const SLOT_BITS: u32 = 16;
/// Longest word and most words of the map.
const LONG: usize = 96;
const MANY: usize = 1 << 14;

#[derive(Clone, Copy)]
#[repr(align(32))]
struct Entry {
    word: u128,
    ids: [u32; FEW],
    n_ids: u32,
}

/// Maps words to ids.
pub(crate) struct Cache {
    table: Box<[Entry]>,
    rest: FxHashMap<Box<[u8]>, Box<[u32]>>,
}

impl Default for Cache {
    fn default() -> Self {
        Self {
            table: vec![Entry { word: 0, ids: [0; FEW], n_ids: 0 }; 1 << SLOT_BITS].into_boxed_slice(),
            rest: FxHashMap::default(),
        }
    }
}

/// The bytes of a short word and its length in one number; never 0.
///
/// Two loads that overlap where the word is shorter: copying it to a buffer first would wait for the store.
#[inline(always)]
fn pack(word: &[u8]) -> u128 {
    let n = word.len();
    let load8 = |at: usize| word[at..at + 8].iter().rev().fold(0u64, |x, &b| x << 8 | u64::from(b));
    let load4 = |at: usize| word[at..at + 4].iter().rev().fold(0u64, |x, &b| x << 8 | u64::from(b));
    let (low, high) = match n {
        8.. => (load8(0), load8(n - 8) >> (8 * (SHORT - n)) >> 8),
        4.. => (load4(0) | load4(n - 4) >> (8 * (8 - n)) << 32, 0),
        0 => (0, 0),
        _ => {
            let byte = |i: usize| u64::from(word[i]) << (8 * i);
            (byte(0) | byte(n / 2) | byte(n - 1), 0)
        }
    };
    u128::from(low) | u128::from(high) << 64 | (n as u128) << 120
}

#[inline(always)]
fn slot(word: u128) -> usize {
    let mixed = (word as u64 ^ ((word >> 64) as u64).rotate_left(29)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed >> (64 - SLOT_BITS)) as usize
}

impl Cache {
    /// Appends the ids of `word` to `out` if they are known.
    #[inline(always)]
    pub(crate) fn get(&self, word: &[u8], out: &mut Vec<u32>) -> bool {
        if word.len() <= SHORT {
            let packed = pack(word);
            let at = slot(packed);
            for entry in [&self.table[at], &self.table[at ^ 1]] {
                if entry.word == packed {
                    out.extend_from_slice(&entry.ids[..entry.n_ids as usize]);
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
        if word.len() <= SHORT && ids.len() <= FEW {
            let packed = pack(word);
            let mut entry = Entry { word: packed, ids: [0; FEW], n_ids: ids.len() as u32 };
            entry.ids[..ids.len()].copy_from_slice(ids);
            let at = slot(packed);
            self.table[at ^ 1] = self.table[at];
            self.table[at] = entry;
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
    fn packing_is_a_copy_with_the_length() {
        let word = b"abcdefghijklmno";
        for n in 0..=SHORT {
            let mut bytes = [0; 16];
            bytes[..n].copy_from_slice(&word[..n]);
            bytes[SHORT] = n as u8;
            assert_eq!(pack(&word[..n]), u128::from_le_bytes(bytes), "{n}");
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
            if cache.get(word(i).as_bytes(), &mut out) {
                assert_eq!(out, ids(i));
                found += 1;
            }
        }
        assert!(found > 1000);
    }
}
