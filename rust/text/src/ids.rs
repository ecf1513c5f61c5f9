//! The fast way to ids: no offsets, no strings, words through a cache, many texts on many threads.

use std::ops::{Deref, DerefMut, Range};
use std::sync::{Mutex, PoisonError};

use crate::Result;
use crate::added::AddedToken;
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
            let mut ids = vec![];
            let mut lengths = vec![];
            for (i, part) in &parts[bounds[run]..bounds[run + 1]] {
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
        let mut ragged = Ragged { ids: vec![], offsets: vec![0; texts.len() + 1] };
        for run in runs {
            let (ids, lengths) = run?;
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
        let mut result = Ok(());
        self.words.split(text, &mut |start, end| {
            if result.is_ok() {
                result = self.parts.model.ids(&text[start..end], scratch, out);
            }
        });
        result
    }

    /// BERT's way: normalizer and splitter never look across ASCII white space, so that what stands between is
    /// remembered as it was read, before it is normalized.
    fn chunk_ids(&self, text: &str, scratch: &mut Scratch, out: &mut Vec<u32>) -> Result<()> {
        let blank = |b: &u8| matches!(b, b' ' | b'\t' | b'\n' | b'\r');
        let bytes = text.as_bytes();
        let mut at = 0;
        while at < bytes.len() {
            if blank(&bytes[at]) {
                at += 1;
                continue;
            }
            let end = bytes[at..].iter().position(blank).map_or(bytes.len(), |n| at + n);
            let chunk = &bytes[at..end];
            if !scratch.cache.get(chunk, out) {
                let start = out.len();
                let mut normalized = Text::<()>::new(&text[at..end], 0);
                if let Some(normalizer) = &self.parts.normalizer {
                    normalizer.apply(&mut normalized);
                }
                let prepared = normalized.to_text();
                let mut result = Ok(());
                self.words.split(&prepared, &mut |a, b| {
                    if result.is_ok() {
                        result = self
                            .parts
                            .model
                            .tokenize(&prepared[a..b], scratch)
                            .map(|pieces| out.extend(pieces.iter().map(|&(id, _)| id)));
                    }
                });
                result?;
                scratch.cache.insert(chunk, &out[start..]);
            }
            at = end;
        }
        Ok(())
    }
}
