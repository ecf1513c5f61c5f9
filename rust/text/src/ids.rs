//! The fast way to ids: no offsets, no strings, words through a cache, many texts on many threads.

use std::ops::{Deref, DerefMut, Range};
use std::sync::{Mutex, PoisonError};

use crate::Result;
use crate::added::AddedToken;
use crate::cache::key_in;
use crate::model::{Model, Scratch};
use crate::native::{Native, Piece};
use crate::normalize::Normalizer;
use crate::text::Text;
use crate::tokenizer::{Engine, Tokenizer};

/// Many texts as ids, one after the other: text `i` is `ids[offsets[i]..offsets[i + 1]]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ragged {
    /// All ids, [N].
    pub ids: Vec<u32>,
    /// Where each text starts, and the end: [number of texts + 1].
    pub offsets: Vec<i64>,
}

impl Ragged {
    /// Number of texts.
    #[must_use]
    pub fn len(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// Whether there is no text.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The ids of text `i`.
    ///
    /// # Panics
    /// If there is no such text.
    #[must_use]
    pub fn row(&self, i: usize) -> &[u32] {
        &self.ids[self.offsets[i] as usize..self.offsets[i + 1] as usize]
    }
}

/// Appends the ids of a part of a text.
type EncodePart<'a> = dyn FnMut(&str, Range<usize>, &mut Vec<u32>) -> Result<()> + 'a;

/// Working memory and caches that no call is using.
#[derive(Default)]
pub(crate) struct Pool(Mutex<Vec<Scratch>>);

/// One of them on loan.
pub(crate) struct Borrowed<'a> {
    scratch: Option<Scratch>,
    pool: &'a Pool,
}

impl Pool {
    pub(crate) fn borrow(&self) -> Borrowed<'_> {
        let idle = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Borrowed { scratch: Some(idle.unwrap_or_default()), pool: self }
    }
}

impl Deref for Borrowed<'_> {
    type Target = Scratch;
    fn deref(&self) -> &Scratch {
        self.scratch.as_ref().expect("it is given back on drop only")
    }
}

impl DerefMut for Borrowed<'_> {
    fn deref_mut(&mut self) -> &mut Scratch {
        self.scratch.as_mut().expect("it is given back on drop only")
    }
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        self.pool.0.lock().unwrap_or_else(PoisonError::into_inner).extend(self.scratch.take());
    }
}

impl Tokenizer {
    /// Appends the ids of `text` to `out`: those of [`Tokenizer::encode`], truncation included, padding not.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_ids(&self, text: &str, add_special_tokens: bool, out: &mut Vec<u32>) -> Result<()> {
        match &self.engine {
            Engine::Native(native) => {
                let sides = native.sides(add_special_tokens);
                native.part_ids(text, 0..text.len(), &sides, &mut native.pool.borrow(), out)
            }
            Engine::Library(library) => library.ids(text, add_special_tokens, out),
        }
    }

    /// Encodes many texts to ids on `threads` threads (0: as many as there are cores). The result does not depend on
    /// their number. Truncation applies, padding does not.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`], for the first text that fails.
    pub fn encode_batch<S: AsRef<str> + Sync>(
        &self,
        texts: &[S],
        add_special_tokens: bool,
        threads: usize,
    ) -> Result<Ragged> {
        // Parts of some 64 KB, many texts or a piece of one, are taken in turn and put together in order.
        const PART_BYTES: usize = 1 << 16;
        let parts: Vec<(usize, Range<usize>)> = (0..texts.len())
            .flat_map(|i| self.cut(texts[i].as_ref(), PART_BYTES).into_iter().map(move |part| (i, part)))
            .collect();
        let bounds = crate::parallel::bounds(parts.iter().map(|(_, part)| part.len()), PART_BYTES);
        let work = |run: usize, encode: &mut EncodePart<'_>| {
            let parts = &parts[bounds[run]..bounds[run + 1]];
            // Prose has a token for some four bytes.
            let mut ids = Vec::with_capacity(parts.iter().map(|(_, part)| part.len()).sum::<usize>() / 3);
            let mut lengths = Vec::with_capacity(parts.len());
            for (i, part) in parts {
                let start = ids.len();
                encode(texts[*i].as_ref(), part.clone(), &mut ids)?;
                lengths.push((*i, (ids.len() - start) as i64));
            }
            Ok::<_, crate::Error>((ids, lengths))
        };
        let n_runs = bounds.len() - 1;
        let runs = match &self.engine {
            Engine::Native(native) => {
                let sides = native.sides(add_special_tokens);
                let scratch = || native.pool.borrow();
                crate::parallel::map(n_runs, threads, scratch, |run, scratch| {
                    work(run, &mut |text, part, ids| native.part_ids(text, part, &sides, scratch, ids))
                })
            }
            Engine::Library(library) => crate::parallel::map(
                n_runs,
                threads,
                || (),
                |run, ()| work(run, &mut |text, _, ids| library.ids(text, add_special_tokens, ids)),
            ),
        };
        let runs = runs.into_iter().collect::<Result<Vec<_>>>()?;
        let total = runs.iter().map(|(ids, _)| ids.len()).sum();
        let mut ragged = Ragged { ids: Vec::with_capacity(total), offsets: vec![0; texts.len() + 1] };
        for (ids, lengths) in runs {
            ragged.ids.extend_from_slice(&ids);
            for (i, length) in lengths {
                ragged.offsets[i + 1] += length;
            }
        }
        for i in 0..texts.len() {
            ragged.offsets[i + 1] += ragged.offsets[i];
        }
        Ok(ragged)
    }
}

impl Tokenizer {
    /// Cuts `text` into parts of about `target` bytes whose ids, one after the other, are those of the whole.
    fn cut(&self, text: &str, target: usize) -> Vec<Range<usize>> {
        match &self.engine {
            Engine::Native(native) => native.cut(text, target),
            Engine::Library(_) => std::iter::once(0..text.len()).collect(),
        }
    }
}

impl Native {
    /// The special tokens before and after a text.
    fn sides(&self, add_special_tokens: bool) -> (Vec<u32>, Vec<u32>) {
        if add_special_tokens { self.template.around() } else { Default::default() }
    }

    /// Appends the ids of one part of a text, its first or last with the special tokens on that side.
    fn part_ids(
        &self,
        text: &str,
        part: Range<usize>,
        (before, after): &(Vec<u32>, Vec<u32>),
        scratch: &mut Scratch,
        out: &mut Vec<u32>,
    ) -> Result<()> {
        if part.start == 0 {
            out.extend(before);
        }
        let start = out.len();
        self.text_ids(&text[part.clone()], scratch, out)?;
        if let Some(truncation) = &self.parts.truncation {
            truncation.apply_ids(out, start, before.len() + after.len())?;
        }
        if part.end == text.len() {
            out.extend(after);
        }
        Ok(())
    }

    /// Whether words are found in the text as it stands.
    fn is_plain(&self) -> bool {
        self.parts.normalizer.is_none() && self.words.keeps_text() && self.normalized.is_empty()
    }

    /// Whether normalizer and splitter are BERT's, which never look across ASCII white space.
    fn is_bert(&self) -> bool {
        self.words.is_bert()
            && self.normalized.is_empty()
            && matches!(self.parts.normalizer, None | Some(Normalizer::Bert { .. }))
    }

    /// Cuts `text` into parts of about `target` bytes whose ids, one after the other, are those of the whole.
    ///
    /// A cut is made before a space after something else, where every splitter that is accepted here starts a word.
    pub(crate) fn cut(&self, text: &str, target: usize) -> Vec<Range<usize>> {
        // A text of one part asks for nothing more.
        if text.len() <= 2 * target {
            return std::iter::once(0..text.len()).collect();
        }
        let spaced = |t: &AddedToken| t.lstrip || t.rstrip || t.content.contains(' ');
        let cuttable = (self.is_bert() || (self.is_plain() && self.words.starts_word_at_space()))
            && self.parts.truncation.is_none()
            && !self.parts.added_tokens.iter().any(spaced);
        let bytes = text.as_bytes();
        let mut parts = vec![];
        let mut start = 0;
        while cuttable && bytes.len() - start > 2 * target {
            let space = |&at: &usize| {
                bytes[at] == b' ' && text[..at].chars().next_back().is_some_and(|c| !c.is_whitespace())
            };
            let Some(at) = (start + target..bytes.len()).find(space) else { break };
            parts.push(start..at);
            start = at;
        }
        parts.push(start..text.len());
        parts
    }

    fn text_ids(&self, text: &str, scratch: &mut Scratch, out: &mut Vec<u32>) -> Result<()> {
        let bert = self.is_bert();
        if !bert && !self.is_plain() {
            return self.pieces::<()>(text, &mut |piece| match piece {
                Piece::Token { id, .. } => {
                    out.push(id);
                    Ok(())
                }
                Piece::Text(prepared, _) => self.word_ids(prepared, scratch, out),
            });
        }
        for part in self.raw.split(text) {
            let piece = &text[part.start..part.end];
            match part.token {
                Some(id) => out.push(id),
                None if bert => self.chunk_ids(piece, scratch, out)?,
                None => self.word_ids(piece, scratch, out)?,
            }
        }
        Ok(())
    }

    /// The ids of a prepared text, word by word.
    fn word_ids(&self, text: &str, scratch: &mut Scratch, out: &mut Vec<u32>) -> Result<()> {
        if let Model::Bpe(bpe) = &self.parts.model
            && bpe.is_characters()
        {
            return bpe.characters(text, out);
        }
        let mut ahead =
            Ahead::new(text, scratch, out, |word, scratch, out| self.parts.model.ids(word, scratch, out));
        self.words.split(text, &mut |start, end| ahead.push(start, end));
        ahead.finish()
    }

    /// BERT's way: normalizer and splitter never look across ASCII white space, so that what stands between is
    /// remembered as it was read, before it is normalized.
    fn chunk_ids(&self, text: &str, scratch: &mut Scratch, out: &mut Vec<u32>) -> Result<()> {
        let bytes = text.as_bytes();
        let mut ahead = Ahead::new(text, scratch, out, |chunk, scratch, out| {
            let mut normalized = Text::<()>::new(chunk, 0);
            if let Some(normalizer) = &self.parts.normalizer {
                normalizer.apply(&mut normalized);
            }
            let prepared = normalized.to_text();
            let mut result = Ok(());
            self.words.split(&prepared, &mut |a, b| {
                if result.is_ok() {
                    result = self.parts.model.ids(&prepared[a..b], scratch, out);
                }
            });
            result
        });
        let mut at = 0;
        while at < bytes.len() {
            let end = next_blank(bytes, at);
            if at < end {
                ahead.push(at, end);
            }
            at = end + 1;
        }
        ahead.finish()
    }
}

/// Where the next ASCII white space that separates words is, from `at` on; else the end.
#[inline(always)]
fn next_blank(bytes: &[u8], mut at: usize) -> usize {
    const EACH: u64 = 0x0101_0101_0101_0101;
    let blank = |b: u8| matches!(b, b' ' | b'\t' | b'\n' | b'\r');
    while let Some(eight) = bytes[at..].first_chunk() {
        let eight = u64::from_le_bytes(*eight);
        // The lowest byte that is flagged is the first that is no larger than a space; the test is Mycroft's.
        let low = eight.wrapping_sub(0x21 * EACH) & !eight & (0x80 * EACH);
        let n = low.trailing_zeros() as usize / 8;
        at += n;
        if n < 8 {
            if blank(bytes[at]) {
                return at;
            }
            at += 1;
        }
    }
    bytes[at..].iter().position(|&b| blank(b)).map_or(bytes.len(), |n| at + n)
}

/// Words that are looked up together.
const AHEAD: usize = 32;

/// Words of a text that are found and not yet looked up. Their entries of the cache are read one after the other without
/// looking for words in between, so that the processor waits for several at a time.
struct Ahead<'a, M> {
    text: &'a str,
    words: [(usize, usize); AHEAD],
    n: usize,
    scratch: &'a mut Scratch,
    out: &'a mut Vec<u32>,
    /// Appends the ids of a word that is not in the cache.
    miss: M,
    result: Result<()>,
}

impl<'a, M: FnMut(&str, &mut Scratch, &mut Vec<u32>) -> Result<()>> Ahead<'a, M> {
    fn new(text: &'a str, scratch: &'a mut Scratch, out: &'a mut Vec<u32>, miss: M) -> Self {
        Self { text, words: [(0, 0); AHEAD], n: 0, scratch, out, miss, result: Ok(()) }
    }

    #[inline(always)]
    fn push(&mut self, start: usize, end: usize) {
        self.words[self.n] = (start, end);
        self.n += 1;
        if self.n == AHEAD {
            self.look_up();
        }
    }

    #[inline(never)]
    fn look_up(&mut self) {
        let words = &self.words[..std::mem::take(&mut self.n)];
        let bytes = self.text.as_bytes();
        let mut keys = [0; AHEAD];
        for (key, &(start, end)) in keys.iter_mut().zip(words) {
            *key = key_in(bytes, start, end);
        }
        for (&key, &(start, end)) in keys.iter().zip(words) {
            if self.result.is_err() {
                return;
            }
            let word = &self.text[start..end];
            if !self.scratch.cache.get(word.as_bytes(), key, self.out) {
                let first = self.out.len();
                self.result = (self.miss)(word, self.scratch, self.out);
                if self.result.is_ok() {
                    self.scratch.cache.insert(word.as_bytes(), &self.out[first..]);
                }
            }
        }
    }

    /// Looks up the last words.
    ///
    /// # Errors
    /// That of the first word that has one.
    fn finish(mut self) -> Result<()> {
        self.look_up();
        self.result
    }
}
