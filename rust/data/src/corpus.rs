//! The token ids of a corpus: held in memory, or mapped from prepared shards.
//!
//! A shard is a safetensors file with two tensors: `ids`, U16 or U32 `[N]`, and `offsets`, I64 `[D + 1]`, where document
//! `d` is `ids[offsets[d]..offsets[d + 1]]`. A document lies within one shard.

use std::borrow::Cow;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pyrformer_files::{DType, SafeTensors, TensorView, write_safetensors};

use crate::error::{Error, Result, check_offsets};

const IDS: &str = "ids";
const OFFSETS: &str = "offsets";

/// The token ids of a corpus, one after another, and where its documents begin. Clones share the ids.
#[derive(Clone, Debug)]
pub struct Corpus {
    parts: Vec<Part>,
    /// Start of each document and the end of the last `[D + 1]`.
    documents: Arc<[u64]>,
}

/// Ids that lie together.
#[derive(Clone, Debug)]
struct Part {
    /// Which tokens of the corpus these are.
    tokens: Range<usize>,
    /// Where the first of them lies in `ids`.
    from: usize,
    /// The number that the document of its first token has in the corpus that this one was split from.
    document: usize,
    ids: Ids,
}

#[derive(Clone, Debug)]
enum Ids {
    Held(Arc<[u32]>),
    Mapped(Arc<SafeTensors>),
}

impl Corpus {
    /// Ids in memory; document `d` is `ids[documents[d]..documents[d + 1]]`.
    ///
    /// # Errors
    /// If `documents` are not such offsets.
    pub fn held(ids: Arc<[u32]>, documents: Arc<[u64]>) -> Result<Self> {
        check_offsets(ids.len(), &documents)?;
        let part = Part { tokens: 0..ids.len(), from: 0, document: 0, ids: Ids::Held(ids) };
        Ok(Self { parts: vec![part], documents })
    }

    /// Shards one after another, memory-mapped: ids are read from the disk when a batch asks for them.
    ///
    /// # Errors
    /// If a file is not a shard, or its offsets do not fit its ids.
    pub fn open(paths: &[PathBuf]) -> Result<Self> {
        let (mut parts, mut documents) = (Vec::new(), vec![0]);
        for path in paths {
            let start = *documents.last().unwrap_or(&0);
            let (ids, len, offsets) = open_shard(path)?;
            documents.extend(offsets[1..].iter().map(|offset| start + offset));
            let start = start as usize;
            if len > 0 {
                let ids = Ids::Mapped(ids);
                parts.push(Part { tokens: start..start + len, from: 0, document: 0, ids });
            }
        }
        for part in &mut parts {
            part.document = holder(&documents, part.tokens.start);
        }
        Ok(Self { parts, documents: documents.into() })
    }

    /// The number of tokens.
    #[must_use]
    pub fn len(&self) -> usize {
        self.parts.last().map_or(0, |part| part.tokens.end)
    }

    /// Whether there is no token.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Start of each document, and the end of the last `[D + 1]`.
    #[must_use]
    pub fn documents(&self) -> &[u64] {
        &self.documents
    }

    /// The number that a document, which is not empty, has in the corpus that this one was split from; its own without
    /// a split.
    #[must_use]
    pub fn number(&self, document: usize) -> usize {
        let Some(&start) = self.documents.get(document) else { return document };
        let within = self.parts.partition_point(|part| part.tokens.end <= start as usize);
        let Some(part) = self.parts.get(within) else { return document };
        part.document + document - holder(&self.documents, part.tokens.start)
    }

    /// Two corpora: what is not held out and what is, each part (shard) on its own.
    ///
    /// A part of `1 / held_out` documents or more gives every so many-th of them; a shorter one its last share of
    /// tokens, cut between documents where that is possible. So what is held out of a shard does not depend on those
    /// behind it.
    #[must_use]
    pub fn split(&self, held_out: f64) -> (Self, Self) {
        let (mut heads, mut tails) = (Builder::default(), Builder::default());
        let every = (1.0 / held_out.clamp(f64::MIN_POSITIVE, 1.0)).round().max(2.0) as usize;
        for part in &self.parts {
            let Range { start, end } = part.tokens;
            let first = self.documents.partition_point(|&at| (at as usize) < start);
            let last = self.documents.partition_point(|&at| (at as usize) < end);
            if last - first >= every {
                let mut from = start;
                for document in (first..last).skip(every - 1).step_by(every) {
                    let bounds = self.documents[document] as usize..self.documents[document + 1] as usize;
                    heads.add(self, part, from..bounds.start);
                    from = bounds.end.min(end);
                    tails.add(self, part, bounds.start..from);
                }
                heads.add(self, part, from..end);
                continue;
            }
            let aim = end - ((end - start) as f64 * held_out.clamp(0.0, 1.0)).ceil() as usize;
            let border = self.documents.partition_point(|&at| (at as usize) < aim);
            let cut = self.documents.get(border).map_or(end, |&at| at as usize);
            let cut = if cut == start || cut >= end { aim } else { cut };
            heads.add(self, part, start..cut);
            tails.add(self, part, cut..end);
        }
        (heads.done(), tails.done())
    }

    /// The ids of `range`.
    ///
    /// # Panics
    /// If the range goes beyond the corpus.
    #[must_use]
    pub fn ids(&self, range: Range<usize>) -> Cow<'_, [u32]> {
        let first = self.parts.partition_point(|part| part.tokens.end <= range.start);
        if let Some(Part { tokens, from, ids: Ids::Held(ids), .. }) = self.parts.get(first)
            && range.end <= tokens.end
        {
            let start = from + range.start - tokens.start;
            return Cow::Borrowed(&ids[start..start + range.len()]);
        }
        let mut out = Vec::with_capacity(range.len());
        for part in &self.parts[first..] {
            if part.tokens.start >= range.end {
                break;
            }
            let (start, end) = (range.start.max(part.tokens.start), range.end.min(part.tokens.end));
            let at = part.from + start - part.tokens.start;
            part.ids.copy(at..at + end - start, &mut out);
        }
        assert_eq!(out.len(), range.len(), "a range beyond the corpus was asked for");
        Cow::Owned(out)
    }

    /// Checks that every id in memory is below `limit`; mapped ones are looked at when they are used.
    pub(crate) fn check_ids(&self, limit: usize) -> Result<()> {
        for part in &self.parts {
            if let Ids::Held(ids) = &part.ids
                && let Some(position) = ids.iter().position(|&id| id as usize >= limit)
            {
                return Err(Error::TokenId { position, id: ids[position], limit });
            }
        }
        Ok(())
    }
}

impl Ids {
    fn copy(&self, range: Range<usize>, out: &mut Vec<u32>) {
        match self {
            Self::Held(ids) => out.extend_from_slice(&ids[range]),
            Self::Mapped(file) => {
                let view = file.get(IDS).expect("a shard is opened only if it has ids");
                let bytes = &view.bytes[range.start * view.dtype.size()..range.end * view.dtype.size()];
                if view.dtype == DType::U16 {
                    out.extend(bytes.as_chunks().0.iter().map(|&c| u32::from(u16::from_le_bytes(c))));
                } else {
                    out.extend(bytes.as_chunks().0.iter().map(|&c| u32::from_le_bytes(c)));
                }
            }
        }
    }
}

/// The number of the document that holds token `at`.
fn holder(documents: &[u64], at: usize) -> usize {
    documents.partition_point(|&offset| offset <= at as u64).saturating_sub(1)
}

/// Puts ranges of a corpus one after another.
struct Builder {
    parts: Vec<Part>,
    documents: Vec<u64>,
}

impl Default for Builder {
    fn default() -> Self {
        Self { parts: Vec::new(), documents: vec![0] }
    }
}

impl Builder {
    fn add(&mut self, corpus: &Corpus, part: &Part, range: Range<usize>) {
        if range.is_empty() {
            return;
        }
        let start = self.parts.last().map_or(0, |part| part.tokens.end);
        let from = part.from + range.start - part.tokens.start;
        let document = part.document + holder(&corpus.documents, range.start)
            - holder(&corpus.documents, part.tokens.start);
        self.parts.push(Part { tokens: start..start + range.len(), from, document, ids: part.ids.clone() });
        let inner = |at: u64| (range.start as u64) < at && at < range.end as u64;
        let first = corpus.documents.partition_point(|&at| at <= range.start as u64);
        let borders = corpus.documents[first..].iter().take_while(|&&at| inner(at));
        self.documents.extend(borders.map(|&at| at - range.start as u64 + start as u64));
        self.documents.push((start + range.len()) as u64);
    }

    fn done(self) -> Corpus {
        Corpus { parts: self.parts, documents: self.documents.into() }
    }
}

/// Writes a shard; it appears whole or not at all. Ids are stored in 16 bits where `vocab_size` allows it.
///
/// # Errors
/// If `offsets` do not cut `ids` into documents, an id is not below `vocab_size`, or the file cannot be written.
pub fn write_shard(path: &Path, ids: &[u32], offsets: &[u64], vocab_size: usize) -> Result<()> {
    check_offsets(ids.len(), offsets)?;
    if let Some(position) = ids.iter().position(|&id| id as usize >= vocab_size) {
        return Err(Error::TokenId { position, id: ids[position], limit: vocab_size });
    }
    let narrow = vocab_size <= 1 << 16;
    let bytes: Vec<u8> = if narrow {
        ids.iter().flat_map(|&id| (id as u16).to_le_bytes()).collect()
    } else {
        ids.iter().flat_map(|id| id.to_le_bytes()).collect()
    };
    let starts: Vec<u8> = offsets.iter().flat_map(|at| at.to_le_bytes()).collect();
    let tensor = |dtype, len: usize, bytes: Vec<u8>| TensorView {
        dtype,
        shape: Cow::Owned(vec![len]),
        bytes: Cow::Owned(bytes),
    };
    let tensors = [
        (IDS, tensor(if narrow { DType::U16 } else { DType::U32 }, ids.len(), bytes)),
        (OFFSETS, tensor(DType::I64, offsets.len(), starts)),
    ];
    Ok(write_safetensors(path, &tensors, DType::F32)?)
}

/// The file of a shard, the number of its ids, and its offsets.
fn open_shard(path: &Path) -> Result<(Arc<SafeTensors>, usize, Vec<u64>)> {
    let wrong = |what| Error::Shard { path: path.to_owned(), what };
    let file = SafeTensors::open(path)?;
    let ids = file.get(IDS).filter(|t| matches!(t.dtype, DType::U16 | DType::U32) && t.shape.len() == 1);
    let offsets = file.get(OFFSETS).filter(|t| t.dtype == DType::I64 && t.shape.len() == 1);
    let (Some(ids), Some(offsets)) = (ids, offsets) else {
        return Err(wrong("has no flat tensors ids (U16 or U32) and offsets (I64)"));
    };
    let starts: Vec<u64> = offsets.bytes.as_chunks().0.iter().map(|&c| u64::from_le_bytes(c)).collect();
    let len = ids.shape[0];
    check_offsets(len, &starts).map_err(|_| wrong("has offsets that do not fit its ids"))?;
    Ok((Arc::new(file), len, starts))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn held(ids: Vec<u32>, documents: Vec<u64>) -> Corpus {
        Corpus::held(ids.into(), documents.into()).unwrap()
    }

    proptest! {
        #[test]
        fn shards_read_as_what_was_written(
            lengths in prop::collection::vec(prop::collection::vec(0_u64..9, 1..6), 1..5), wide: bool
        ) {
            let folder = tempfile::tempdir().unwrap();
            let (mut all, mut borders, mut paths) = (Vec::new(), vec![0], Vec::new());
            for (n, documents) in lengths.iter().enumerate() {
                let mut offsets = vec![0_u64];
                for len in documents {
                    offsets.push(offsets.last().unwrap() + len);
                    borders.push(borders.last().unwrap() + len);
                }
                let ids: Vec<u32> = (0..*offsets.last().unwrap()).map(|i| (i as u32 * 7919) % 65_536).collect();
                let path = folder.path().join(format!("{n}.safetensors"));
                write_shard(&path, &ids, &offsets, if wide { 100_000 } else { 65_536 }).unwrap();
                all.extend(ids);
                paths.push(path);
            }
            let corpus = Corpus::open(&paths).unwrap();
            prop_assert_eq!(corpus.len(), all.len());
            prop_assert_eq!(corpus.documents(), &borders[..]);
            for start in 0..=all.len() {
                let end = all.len().min(start + 11);
                prop_assert_eq!(&corpus.ids(start..end)[..], &all[start..end]);
            }
            // A split loses nothing, and repeats nothing.
            let (head, tail) = corpus.split(0.3);
            prop_assert_eq!(head.len() + tail.len(), all.len());
            let mut halves = [head.ids(0..head.len()).to_vec(), tail.ids(0..tail.len()).to_vec()].concat();
            halves.sort_unstable();
            all.sort_unstable();
            prop_assert_eq!(halves, all);
            for part in [&head, &tail] {
                check_offsets(part.len(), part.documents()).unwrap();
                // A document's tokens lie in the one that its number says.
                for (d, pair) in part.documents().windows(2).enumerate().filter(|(_, pair)| pair[0] < pair[1]) {
                    let ids = part.ids(pair[0] as usize..pair[1] as usize).into_owned();
                    let number = part.number(d);
                    let whole = corpus.ids(borders[number] as usize..borders[number + 1] as usize);
                    prop_assert!(whole.windows(ids.len()).any(|window| window == ids));
                }
            }
            // The split of the first shards is the beginning of the split of all.
            let some = Corpus::open(&paths[..1]).unwrap().split(0.3);
            prop_assert_eq!(&some.0.ids(0..some.0.len()), &head.ids(0..some.0.len()));
            prop_assert_eq!(&some.1.ids(0..some.1.len()), &tail.ids(0..some.1.len()));
        }
    }

    #[test]
    fn a_split_is_at_a_border_of_documents_where_there_is_one() {
        let corpus = held((0..10).collect(), vec![0, 4, 7, 10]);
        let (head, tail) = corpus.split(0.4);
        assert_eq!((head.documents(), tail.documents()), (&[0, 4, 7][..], &[0, 3][..]));
        assert_eq!(&tail.ids(0..3)[..], [7, 8, 9]);
        let (head, tail) = held((0..10).collect(), vec![0, 10]).split(0.2);
        assert_eq!((head.len(), &tail.ids(0..2)[..]), (8, &[8, 9][..]));
    }

    #[test]
    fn of_many_documents_every_so_many_th_is_held_out() {
        let corpus = held((0..12).collect(), vec![0, 2, 3, 5, 6, 8, 9, 10, 12]);
        let (head, tail) = corpus.split(0.25);
        assert_eq!(&tail.ids(0..3)[..], [5, 10, 11]);
        assert_eq!((tail.documents(), tail.number(0), tail.number(1)), (&[0, 1, 3][..], 3, 7));
        assert_eq!(&head.ids(0..9)[..], [0, 1, 2, 3, 4, 6, 7, 8, 9]);
        assert_eq!((0..6).map(|d| head.number(d)).collect::<Vec<_>>(), [0, 1, 2, 4, 5, 6]);
    }

    #[test]
    fn what_is_no_shard_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        assert!(write_shard(&path, &[1, 2], &[0, 3], 10).is_err());
        assert!(write_shard(&path, &[1, 12], &[0, 2], 10).is_err());
        assert!(!path.exists());
        write_safetensors(&path, &[], DType::F32).unwrap();
        let text = Corpus::open(&[path]).unwrap_err().to_string();
        assert!(text.contains("a.safetensors") && text.contains("offsets"), "{text}");
    }
}
