//! Lexical constraints: what a beam must say before it may end.
//!
//! A constraint is a list of alternatives; it is met once one of them occurs, contiguous, in the addition. How far a
//! hypothesis has come is its *bank*: beams of different banks get equal shares of the width, so that hypotheses which
//! pay for a constraint early are not crowded out by those which put it off.
//! Source: Post & Vilar 2018, "Fast Lexically Constrained Decoding with Dynamic Beam Allocation".
//!
//! Differs from transformers 4 `force_words_ids`: occurrences may overlap, and the prompt does not count.

/// How far `addition` has come with `constraints`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Whether every constraint is met.
    pub(crate) met: bool,
    /// Tokens of constraints said so far: the longest alternative's length where met, otherwise those begun.
    pub(crate) bank: usize,
}

fn is_met(alternatives: &[Vec<u32>], addition: &[u32]) -> bool {
    alternatives.iter().any(|words| addition.windows(words.len()).any(|w| w == words))
}

/// How many first tokens of `words` end `addition`.
fn begun(words: &[u32], addition: &[u32]) -> usize {
    (1..words.len()).rev().find(|&n| addition.ends_with(&words[..n])).unwrap_or(0)
}

pub(crate) fn progress(constraints: &[Vec<Vec<u32>>], addition: &[u32]) -> Progress {
    let mut found = Progress { met: true, bank: 0 };
    for alternatives in constraints {
        let met = is_met(alternatives, addition);
        let lengths = alternatives.iter().map(|words| if met { words.len() } else { begun(words, addition) });
        found.bank += lengths.max().unwrap_or(0);
        found.met &= met;
    }
    found
}

/// The tokens that would bring `addition` on with a constraint not yet met, ascending.
pub(crate) fn advancing(constraints: &[Vec<Vec<u32>>], addition: &[u32]) -> Vec<u32> {
    let unmet = constraints.iter().filter(|alternatives| !is_met(alternatives, addition));
    let mut tokens: Vec<u32> = unmet.flatten().map(|words| words[begun(words, addition)]).collect();
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_counts_phrases_and_what_is_begun() {
        let constraints = [vec![vec![1, 1, 2]], vec![vec![5], vec![6, 7]]];
        let of = |ids: &[u32]| (progress(&constraints, ids), advancing(&constraints, ids));
        assert_eq!(of(&[]), (Progress { met: false, bank: 0 }, vec![1, 5, 6]));
        // A mismatch falls back to the longest beginning that still stands, not to nothing.
        assert_eq!(of(&[1, 1, 1]), (Progress { met: false, bank: 2 }, vec![2, 5, 6]));
        assert_eq!(of(&[1, 1, 1, 2]), (Progress { met: false, bank: 3 }, vec![5, 6]));
        assert_eq!(of(&[6, 1, 1, 2, 6]), (Progress { met: false, bank: 4 }, vec![5, 7]));
        assert_eq!(of(&[1, 1, 2, 5]), (Progress { met: true, bank: 5 }, vec![]));
    }
}
