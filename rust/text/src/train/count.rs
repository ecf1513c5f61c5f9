//! Counting the words of documents, in parallel.

use rustc_hash::FxHashMap;

use crate::native::Native;
use crate::parallel;
use crate::text::Text;

/// Bytes of a piece of work.
const PART_BYTES: usize = 1 << 18;

/// Counts the parts of documents, in runs of about `PART_BYTES`; `tally` adds one part to the counts.
fn count<'d, K: std::hash::Hash + Eq + Send>(
    parts: &[&'d str],
    threads: usize,
    tally: impl Fn(&'d str, &mut FxHashMap<K, u64>) + Sync,
) -> FxHashMap<K, u64> {
    let bounds = parallel::bounds(parts.iter().map(|part| part.len()), PART_BYTES);
    let maps = parallel::run(bounds.len() - 1, threads, |queue| {
        let mut counts = FxHashMap::default();
        for run in queue.take() {
            parts[bounds[run]..bounds[run + 1]].iter().for_each(|part| tally(part, &mut counts));
        }
        counts
    });
    // Sums do not depend on their order.
    let mut maps = maps.into_iter();
    let mut sum = maps.next().unwrap_or_default();
    for (key, n) in maps.flatten() {
        *sum.entry(key).or_insert(0) += n;
    }
    sum
}

/// What has been counted of the documents so far: memory grows with what is different in them, not with their length.
pub(super) enum Counts {
    Characters(FxHashMap<char, u64>),
    /// Words, or, where the text is changed before it is split, what stands between white space: that is normalized
    /// and split once, at the end, however often it comes.
    Words(FxHashMap<Box<str>, u64>),
}

impl Counts {
    /// Adds documents whose words `tokenizer` finds.
    pub(super) fn add<S: AsRef<str> + Sync>(&mut self, documents: &[S], tokenizer: &Native, threads: usize) {
        let documents = documents.iter().map(AsRef::as_ref);
        match self {
            Self::Characters(sums) => {
                let documents: Vec<&str> = documents.collect();
                for (c, n) in characters(&documents, threads) {
                    *sums.entry(c).or_insert(0) += n;
                }
            }
            Self::Words(sums) => {
                let parts: Vec<&str> = documents
                    .flat_map(|d| tokenizer.cut(d, PART_BYTES).into_iter().map(move |part| &d[part]))
                    .collect();
                let plain = counts_words(tokenizer);
                let counts = count(&parts, threads, |part, counts: &mut FxHashMap<&str, u64>| {
                    if plain {
                        let emit = &mut |a, b| *counts.entry(&part[a..b]).or_insert(0) += 1;
                        tokenizer.words.split(part, emit);
                    } else {
                        for chunk in part.split([' ', '\t', '\n', '\r']).filter(|c| !c.is_empty()) {
                            *counts.entry(chunk).or_insert(0) += 1;
                        }
                    }
                });
                for (word, n) in counts {
                    match sums.get_mut(word) {
                        Some(sum) => *sum += n,
                        None => {
                            sums.insert(word.into(), n);
                        }
                    }
                }
            }
        }
    }
}

/// Whether words stand in the text as it is, so that they are what is counted.
fn counts_words(tokenizer: &Native) -> bool {
    tokenizer.parts.normalizer.is_none() && tokenizer.words.keeps_text()
}

/// The words of what was counted and how often each comes, in the order of their bytes.
pub(super) fn words(counted: FxHashMap<Box<str>, u64>, tokenizer: &Native) -> Vec<(String, u64)> {
    let mut words: Vec<(String, u64)> = if counts_words(tokenizer) {
        counted.into_iter().map(|(word, n)| (word.into(), n)).collect()
    } else {
        let mut sums: FxHashMap<String, u64> = FxHashMap::default();
        for (chunk, n) in counted {
            let mut text = Text::<()>::new(&chunk, 0);
            if let Some(normalizer) = &tokenizer.parts.normalizer {
                normalizer.apply(&mut text);
            }
            tokenizer.words.prepare(&mut text, true);
            let text = text.to_text();
            tokenizer.words.split(&text, &mut |a, b| match sums.get_mut(&text[a..b]) {
                Some(sum) => *sum += n,
                None => {
                    sums.insert(text[a..b].to_owned(), n);
                }
            });
        }
        sums.into_iter().collect()
    };
    words.sort_unstable();
    words
}

/// How often each character comes.
fn characters(parts: &[&str], threads: usize) -> FxHashMap<char, u64> {
    count(parts, threads, |part, counts| {
        let mut ascii = [0u64; 128];
        for c in part.chars() {
            match ascii.get_mut(c as usize) {
                Some(n) => *n += 1,
                None => *counts.entry(c).or_insert(0) += 1,
            }
        }
        for (c, &n) in (0u8..).zip(&ascii).filter(|(_, n)| **n > 0) {
            *counts.entry(c as char).or_insert(0) += n;
        }
    })
}
