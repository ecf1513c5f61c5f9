//! The ids of words met before.
//!
//! Nearly all words of a text are short, have few tokens and come again: they sit in a direct-mapped table whose entries
//! hold word and ids in half a cache line; a collision overwrites. The rest goes to an ordinary map of bounded size.
//! What is cached never changes a result, so caches are per thread and need no order.

use rustc_hash::FxHashMap;

/// Longest word in the table, in bytes: with its length it fills 16.
const SHORT: usize = 15;
/// Most ids of a word in the table.
const FEW: usize = 3;
/// Entries of the table: 2^15 × 32 bytes = 1 MiB.
const SLOTS: usize = 1 << 15;
/// Longest word and most words of the map.
const LONG: usize = 96;
const MANY: usize = 1 << 14;

#[derive(Clone, Copy)]
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
            table: vec![Entry { word: 0, ids: [0; FEW], n_ids: 0 }; SLOTS].into_boxed_slice(),
            rest: FxHashMap::default(),
        }
    }
}

/// The bytes of a short word and its length in one number; never 0.
#[inline(always)]
fn pack(word: &[u8]) -> u128 {
    let mut bytes = [0u8; 16];
    bytes[..word.len()].copy_from_slice(word);
    bytes[SHORT] = word.len() as u8;
    u128::from_le_bytes(bytes)
}

#[inline(always)]
fn slot(word: u128) -> usize {
    let mixed = (word as u64 ^ ((word >> 64) as u64).rotate_left(29)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed >> 49) as usize
}

impl Cache {
    /// Appends the ids of `word` to `out` if they are known.
    #[inline(always)]
    pub(crate) fn get(&self, word: &[u8], out: &mut Vec<u32>) -> bool {
        if word.len() <= SHORT {
            let packed = pack(word);
            let entry = &self.table[slot(packed)];
            if entry.word == packed {
                out.extend_from_slice(&entry.ids[..entry.n_ids as usize]);
                return true;
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
            self.table[slot(packed)] = entry;
        } else if word.len() <= LONG {
            if self.rest.len() == MANY {
                self.rest.clear();
            }
            self.rest.insert(word.into(), ids.into());
        }
    }
}
