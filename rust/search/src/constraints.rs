//! Lexical constraints: what a beam must say before it may end.
//!
//! A constraint is a list of alternatives; it is met once one of them occurs, contiguous, in the addition. How far a
//! hypothesis has come is its *bank*: beams of different banks get equal shares of the width, so that hypotheses which
//! pay for a constraint early are not crowded out by those which put it off.
//! Source: Post & Vilar 2018, "Fast Lexically Constrained Decoding with Dynamic Beam Allocation".
//!
//! In order, a constraint counts only behind those given before it (the `OrderedConstraintState` of fairseq).
//!
//! Differs from transformers 4 `force_words_ids`: without an order occurrences may overlap, and the prompt does not
//! count.

use crate::GenerationOptions;

/// How far an addition has come with the constraints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Whether every constraint is met.
    pub(crate) met: bool,
    /// Tokens of constraints said so far: the longest alternative's length where met, otherwise those begun.
    pub(crate) bank: usize,
}

/// How many first tokens of `words` end `addition`.
fn begun(words: &[u32], addition: &[u32]) -> usize {
    (1..words.len()).rev().find(|&n| addition.ends_with(&words[..n])).unwrap_or(0)
}

/// Where in `addition` the first occurrence of an alternative ends.
fn first_end(alternatives: &[Vec<u32>], addition: &[u32]) -> Option<usize> {
    let end =
        |words: &Vec<u32>| addition.windows(words.len()).position(|w| w == words).map(|at| at + words.len());
    alternatives.iter().filter_map(end).min()
}

/// The alternatives of a constraint not yet met, and the part of the addition in which they are looked for.
type Open<'a> = (&'a [Vec<u32>], &'a [u32]);

/// The constraints not yet met, each with the part of `addition` in which it is looked for; and the tokens said of those
/// that are. In order, only the first unmet one is looked for, behind all that are met.
fn unmet<'a>(options: &'a GenerationOptions, addition: &'a [u32]) -> (Vec<Open<'a>>, usize) {
    let (mut open, mut said, mut from) = (Vec::new(), 0, 0);
    for alternatives in &options.force_words_ids {
        let rest = &addition[from..];
        match first_end(alternatives, rest) {
            Some(end) => {
                said += alternatives.iter().map(Vec::len).max().unwrap_or(0);
                from += if options.ordered_constraints { end } else { 0 };
            }
            None => open.push((&alternatives[..], rest)),
        }
        if options.ordered_constraints && !open.is_empty() {
            break;
        }
    }
    (open, said)
}

pub(crate) fn progress(options: &GenerationOptions, addition: &[u32]) -> Progress {
    let (open, mut bank) = unmet(options, addition);
    for (alternatives, rest) in &open {
        bank += alternatives.iter().map(|words| begun(words, rest)).max().unwrap_or(0);
    }
    Progress { met: open.is_empty(), bank }
}

/// The tokens that would bring `addition` on with a constraint not yet met, ascending.
pub(crate) fn advancing(options: &GenerationOptions, addition: &[u32]) -> Vec<u32> {
    let (open, _) = unmet(options, addition);
    let next = |(alternatives, rest): &Open<'_>| {
        alternatives.iter().map(|words| words[begun(words, rest)]).collect::<Vec<_>>()
    };
    let mut tokens: Vec<u32> = open.iter().flat_map(next).collect();
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_counts_phrases_and_what_is_begun() {
        let force_words_ids = vec![vec![vec![1, 1, 2]], vec![vec![5], vec![6, 7]]];
        let options = GenerationOptions { force_words_ids, ..GenerationOptions::default() };
        let of = |ids: &[u32]| (progress(&options, ids), advancing(&options, ids));
        assert_eq!(of(&[]), (Progress { met: false, bank: 0 }, vec![1, 5, 6]));
        // A mismatch falls back to the longest beginning that still stands, not to nothing.
        assert_eq!(of(&[1, 1, 1]), (Progress { met: false, bank: 2 }, vec![2, 5, 6]));
        assert_eq!(of(&[1, 1, 1, 2]), (Progress { met: false, bank: 3 }, vec![5, 6]));
        assert_eq!(of(&[6, 1, 1, 2, 6]), (Progress { met: false, bank: 4 }, vec![5, 7]));
        assert_eq!(of(&[1, 1, 2, 5]), (Progress { met: true, bank: 5 }, vec![]));
    }

    #[test]
    fn in_order_a_constraint_counts_behind_those_before_it() {
        let force_words_ids = vec![vec![vec![1, 2]], vec![vec![2, 3], vec![4]]];
        let options = GenerationOptions { force_words_ids, ordered_constraints: true, ..Default::default() };
        let of = |ids: &[u32]| (progress(&options, ids), advancing(&options, ids));
        assert_eq!(of(&[4]), (Progress { met: false, bank: 0 }, vec![1]));
        assert_eq!(of(&[4, 1]), (Progress { met: false, bank: 1 }, vec![2]));
        // The 2 is used up.
        assert_eq!(of(&[1, 2, 3]), (Progress { met: false, bank: 2 }, vec![2, 4]));
        assert_eq!(of(&[1, 2, 3, 2]), (Progress { met: false, bank: 3 }, vec![3, 4]));
        assert_eq!(of(&[1, 2, 4]), (Progress { met: true, bank: 4 }, vec![]));
    }
}
