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

/// The words that `tokenizer` splits `documents` into and how often each comes, in the order of their bytes.
pub(super) fn words<S: AsRef<str> + Sync>(
    documents: &[S],
    tokenizer: &Native,
    threads: usize,
) -> Vec<(String, u64)> {
    let split = &tokenizer.words;
    let cut = |d: &str| tokenizer.cut(d, PART_BYTES);
    let parts: Vec<&str> = documents
        .iter()
        .map(AsRef::as_ref)
        .flat_map(|d| cut(d).into_iter().map(move |part| &d[part]))
        .collect();
    let sums: FxHashMap<String, u64> = match &tokenizer.parts.normalizer {
        None if split.keeps_text() => {
            let counts = count(&parts, threads, |part, counts| {
                split.split(part, &mut |a, b| *counts.entry(&part[a..b]).or_insert(0) += 1);
            });
            counts.into_iter().map(|(word, n)| (word.to_owned(), n)).collect()
        }
        // What stands between white space is counted first, and normalized once however often it comes.
        normalizer => {
            let chunks = count(&parts, threads, |part, counts| {
                for chunk in part.split([' ', '\t', '\n', '\r']).filter(|c| !c.is_empty()) {
                    *counts.entry(chunk).or_insert(0) += 1;
                }
            });
            let mut sums: FxHashMap<String, u64> = FxHashMap::default();
            for (chunk, n) in chunks {
                let mut text = Text::<()>::new(chunk, 0);
                if let Some(normalizer) = normalizer {
                    normalizer.apply(&mut text);
                }
                split.prepare(&mut text, true);
                let text = text.to_text();
                split.split(&text, &mut |a, b| match sums.get_mut(&text[a..b]) {
                    Some(sum) => *sum += n,
                    None => {
                        sums.insert(text[a..b].to_owned(), n);
                    }
                });
            }
            sums
        }
    };
    let mut words: Vec<_> = sums.into_iter().collect();
    words.sort_unstable();
    words
}

/// How often each character comes.
pub(super) fn characters<S: AsRef<str> + Sync>(documents: &[S], threads: usize) -> FxHashMap<char, u64> {
    let parts: Vec<&str> = documents.iter().map(AsRef::as_ref).collect();
    count(&parts, threads, |part, counts| {
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
