//! A byte trie with values: the longest entry that a text starts with, in one walk.

use rustc_hash::FxHashMap;

const NONE: u32 = u32::MAX;

/// Maps byte strings to numbers below `u32::MAX`.
#[derive(Clone, Debug)]
pub(crate) struct Trie {
    /// (node << 8 | byte) → node.
    next: FxHashMap<u64, u32>,
    /// The value that ends at each node, or `NONE`.
    values: Vec<u32>,
}

impl Default for Trie {
    fn default() -> Self {
        Self { next: FxHashMap::default(), values: vec![NONE] }
    }
}

impl Trie {
    /// The node of the empty string.
    pub(crate) const ROOT: u32 = 0;

    /// Adds `key`; a later value replaces an earlier one.
    pub(crate) fn insert(&mut self, key: &[u8], value: u32) {
        let mut node = Self::ROOT;
        for &byte in key {
            let fresh = self.values.len() as u32;
            node = *self.next.entry(u64::from(node) << 8 | u64::from(byte)).or_insert(fresh);
            if node == fresh {
                self.values.push(NONE);
            }
        }
        self.values[node as usize] = value;
    }

    /// The node reached from `node` by `byte`.
    #[inline]
    pub(crate) fn step(&self, node: u32, byte: u8) -> Option<u32> {
        self.next.get(&(u64::from(node) << 8 | u64::from(byte))).copied()
    }

    /// The value at `node`.
    #[inline]
    pub(crate) fn value(&self, node: u32) -> Option<u32> {
        let value = self.values[node as usize];
        (value != NONE).then_some(value)
    }

    /// The node that `key` leads to from the root.
    pub(crate) fn walk(&self, key: &[u8]) -> Option<u32> {
        key.iter().try_fold(Self::ROOT, |node, &byte| self.step(node, byte))
    }

    /// The longest entry below `node` that `text` starts with: (length in bytes, value). Empty entries do not count.
    pub(crate) fn longest(&self, node: u32, text: &[u8]) -> Option<(usize, u32)> {
        let mut node = node;
        let mut best = None;
        for (i, &byte) in text.iter().enumerate() {
            let Some(next) = self.step(node, byte) else { break };
            node = next;
            if let Some(value) = self.value(node) {
                best = Some((i + 1, value));
            }
        }
        best
    }
}
