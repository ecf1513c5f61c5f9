//! A text on its way through normalizers: characters, each with the place it came from.
//!
//! The place is generic: `(u32, u32)`, a byte range of the original text, where offsets are wanted, and `()` where
//! only the ids matter, which makes the same code run without any bookkeeping.

/// Where a character came from.
pub(crate) trait Origin: Copy + Default {
    /// The origin of bytes `start..end` of the original text.
    fn new(start: usize, end: usize) -> Self;
    /// The range from the start of `self` to the end of `last`.
    fn to(self, last: Self) -> (usize, usize);
}

impl Origin for () {
    fn new(_: usize, _: usize) -> Self {}
    fn to(self, (): Self) -> (usize, usize) {
        (0, 0)
    }
}

impl Origin for (u32, u32) {
    fn new(start: usize, end: usize) -> Self {
        (start as u32, end as u32)
    }
    fn to(self, last: Self) -> (usize, usize) {
        (self.0 as usize, last.1 as usize)
    }
}

/// Characters and their origins.
#[derive(Clone, Debug, Default)]
pub(crate) struct Text<O> {
    /// The characters in order.
    pub(crate) chars: Vec<(char, O)>,
}

impl<O: Origin> Text<O> {
    /// The characters of `piece`, which starts at byte `at` of the original text.
    pub(crate) fn new(piece: &str, at: usize) -> Self {
        let chars = piece.char_indices().map(|(i, c)| (c, O::new(at + i, at + i + c.len_utf8()))).collect();
        Self { chars }
    }

    /// The characters as a string.
    pub(crate) fn to_text(&self) -> String {
        self.chars.iter().map(|&(c, _)| c).collect()
    }

    /// Replaces each character by those `f` appends; all of them get its origin.
    pub(crate) fn flat_map(&mut self, mut f: impl FnMut(char, &mut dyn FnMut(char))) {
        let mut out = Vec::with_capacity(self.chars.len());
        for &(c, origin) in &self.chars {
            f(c, &mut |new| out.push((new, origin)));
        }
        self.chars = out;
    }

    /// Writes `chars` over the text. Each comes with the number of characters it takes the place of; it gets the origin
    /// of the first of them, or, where it takes the place of none, of the character before.
    ///
    /// This is the alignment rule of the `tokenizers` library (`NormalizedString::transform`).
    pub(crate) fn rewrite(&mut self, chars: impl Iterator<Item = (char, usize)>) {
        let mut at = 0usize;
        let mut out = Vec::with_capacity(self.chars.len());
        for (c, taken) in chars {
            let from = if taken == 0 { at.checked_sub(1) } else { Some(at) };
            let origin = from.and_then(|i| self.chars.get(i)).map_or_else(O::default, |&(_, o)| o);
            out.push((c, origin));
            at += taken;
        }
        self.chars = out;
    }

    /// Puts `prefix` before the text, with the origin of its first character; an empty text stays empty.
    pub(crate) fn prepend(&mut self, prefix: &str) {
        if let Some(&(_, origin)) = self.chars.first() {
            self.chars.splice(0..0, prefix.chars().map(|c| (c, origin)));
        }
    }
}
