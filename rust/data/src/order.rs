//! The order in which training visits units of a corpus (blocks of it, or pieces of documents): epoch after epoch, each
//! a shuffle of all of them.
//!
//! The first epoch is shuffled in windows that follow the text: the first one covers [`WINDOW`] tokens, each further one
//! as many as all before it. So the beginning of the order depends on the beginning of the text alone, and training may
//! begin while the rest is still being tokenized. Later epochs are shuffled as a whole.

use pyrformer_random::Permutation;

/// Tokens in the first window. Shorter corpora are shuffled as a whole from the start.
const WINDOW: u64 = 1 << 18;

/// The shuffled epochs of `0..count`.
#[derive(Clone, Debug)]
pub(crate) struct Order {
    seed: u64,
    purpose: u32,
    /// The end of each window of the first epoch, rising; the last one is the number of units.
    ends: Vec<u64>,
    /// Units in windows that a longer corpus would leave as they are.
    settled: u64,
}

impl Order {
    /// The order of `count` units of a corpus of `tokens`.
    ///
    /// `before(t)` is how many of them lie before token `t`; a window is settled if the corpus has `margin` tokens
    /// behind it.
    pub(crate) fn new(
        count: u64,
        tokens: u64,
        margin: u64,
        seed: u64,
        purpose: u32,
        before: impl Fn(u64) -> u64,
    ) -> Self {
        let (mut ends, mut settled) = (Vec::new(), 0);
        let borders = std::iter::successors(Some(WINDOW), |border| border.checked_mul(2));
        for border in borders.take_while(|&border| border < tokens) {
            let end = before(border).min(count);
            if end > ends.last().map_or(0, |&last| last) && end < count {
                ends.push(end);
                if border + margin <= tokens {
                    settled = end;
                }
            }
        }
        ends.push(count);
        Self { seed, purpose, ends, settled }
    }

    /// Units in windows that a longer corpus would leave as they are: the first places of epoch 0.
    pub(crate) fn settled(&self) -> u64 {
        self.settled
    }

    /// The unit at a place of an epoch.
    ///
    /// # Panics
    /// If the place is not below the number of units.
    pub(crate) fn get(&self, epoch: u64, place: u64) -> u64 {
        let count = self.ends[self.ends.len() - 1];
        if epoch > 0 {
            return Permutation::new(count, self.seed, self.purpose, epoch as u32).get(place);
        }
        let window = self.ends.partition_point(|&end| end <= place);
        let start = if window == 0 { 0 } else { self.ends[window - 1] };
        // From the far end of the numbers that epochs have, the first one excepted.
        let index = (window as u32).wrapping_neg();
        let within = Permutation::new(self.ends[window] - start, self.seed, self.purpose, index);
        start + within.get(place - start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Units of `size` tokens each.
    fn order(tokens: u64, size: u64, seed: u64) -> Order {
        Order::new(tokens / size, tokens, size, seed, 1, |border| border / size)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn each_epoch_visits_each_unit_once_and_a_prefix_settles_its_windows(
            tokens in 20_000u64..9_000_000, more in 0u64..9_000_000, size in 900u64..5_000, seed: u64,
        ) {
            let (short, long) = (order(tokens, size, seed), order(tokens + more, size, seed));
            for epoch in 0..2 {
                let mut seen: Vec<u64> = (0..tokens / size).map(|place| short.get(epoch, place)).collect();
                seen.sort_unstable();
                prop_assert_eq!(seen, (0..tokens / size).collect::<Vec<_>>());
            }
            prop_assert!(short.settled() * size <= tokens);
            // At least a quarter of a text beyond the first windows is settled.
            prop_assert!(short.settled() * size * 4 + 8 * size >= tokens || tokens < 2 * WINDOW);
            for place in 0..short.settled() {
                prop_assert_eq!(short.get(0, place), long.get(0, place));
            }
        }
    }

    #[test]
    fn windows_are_shuffled_apart() {
        let order = order(8 * WINDOW, 1024, 5);
        let place_of = |window: u64| (0..WINDOW / 1024).map(move |i| (window * WINDOW / 1024) + i);
        let first: Vec<u64> = place_of(0).map(|place| order.get(0, place)).collect();
        assert!(first.iter().all(|&unit| unit < WINDOW / 1024));
        let second: Vec<u64> = place_of(1).map(|place| order.get(0, place) - WINDOW / 1024).collect();
        assert_ne!(first, second, "two windows of one length have orders of their own");
        assert!(place_of(0).any(|place| order.get(1, place) > 4 * WINDOW / 1024));
    }
}
