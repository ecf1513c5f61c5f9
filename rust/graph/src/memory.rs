//! The memory plan: buffers with lifetimes → offsets in one arena.
//!
//! Buffers are placed largest first, each at the lowest gap among those already placed whose lifetimes meet its own.
//! Source: Pisarchyk and Lee 2020, "Efficient Memory Management for Deep Neural Net Inference", algorithm 3 (greedy by
//! size).

/// Offsets are multiples of this: a cache line, and a 512-bit vector.
pub const ALIGNMENT: usize = 64;

/// A block of memory that must exist from step `first` to step `last`, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifetime {
    /// Size.
    pub bytes: usize,
    /// First step that touches it.
    pub first: usize,
    /// Last step that touches it.
    pub last: usize,
}

/// Where each buffer lies, and how much memory that takes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// Offset of each buffer, in the order given.
    pub offsets: Vec<usize>,
    /// End of the highest one.
    pub arena_bytes: usize,
    /// The largest sum of sizes alive at one step: a lower bound for `arena_bytes`.
    pub live_bytes: usize,
}

/// Rounds a size up to the alignment.
#[must_use]
pub fn align(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT)
}

/// Places all buffers.
#[must_use]
pub fn place(buffers: &[Lifetime]) -> Layout {
    let mut order: Vec<usize> = (0..buffers.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(buffers[i].bytes), buffers[i].first, i));
    let mut offsets = vec![0; buffers.len()];
    // Placed buffers by offset.
    let mut placed: Vec<usize> = Vec::new();
    for &i in &order {
        let me = buffers[i];
        let mut at = 0;
        let mut best: Option<(usize, usize)> = None;
        for &j in &placed {
            let other = buffers[j];
            if other.first > me.last || other.last < me.first || other.bytes == 0 {
                continue;
            }
            if offsets[j] >= at + align(me.bytes) {
                let gap = offsets[j] - at;
                if best.is_none_or(|(smallest, _)| gap < smallest) {
                    best = Some((gap, at));
                }
            }
            at = at.max(offsets[j] + align(other.bytes));
        }
        offsets[i] = best.map_or(at, |(_, offset)| offset);
        let position = placed.partition_point(|&j| offsets[j] <= offsets[i]);
        placed.insert(position, i);
    }
    let arena_bytes = (0..buffers.len()).map(|i| offsets[i] + align(buffers[i].bytes)).max().unwrap_or(0);
    Layout { offsets, arena_bytes, live_bytes: live_bytes(buffers) }
}

fn live_bytes(buffers: &[Lifetime]) -> usize {
    let steps = buffers.iter().map(|b| b.last + 1).max().unwrap_or(0);
    let mut change = vec![0_isize; steps + 1];
    for b in buffers {
        change[b.first] += align(b.bytes) as isize;
        change[b.last + 1] -= align(b.bytes) as isize;
    }
    let mut live = 0;
    let mut most = 0;
    for c in change {
        live += c;
        most = most.max(live);
    }
    most.unsigned_abs()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn buffers_alive_together_never_overlap(
            raw in prop::collection::vec((0usize..5000, 0usize..40, 0usize..40), 0..60)
        ) {
            let buffers: Vec<Lifetime> = raw
                .iter()
                .map(|&(bytes, a, b)| Lifetime { bytes, first: a.min(b), last: a.max(b) })
                .collect();
            let layout = place(&buffers);
            prop_assert!(layout.arena_bytes >= layout.live_bytes);
            for (i, a) in buffers.iter().enumerate() {
                prop_assert_eq!(layout.offsets[i] % ALIGNMENT, 0);
                prop_assert!(layout.offsets[i] + a.bytes <= layout.arena_bytes);
                for (j, b) in buffers.iter().enumerate().skip(i + 1) {
                    let meet = a.first <= b.last && b.first <= a.last;
                    let apart = layout.offsets[i] + a.bytes <= layout.offsets[j]
                        || layout.offsets[j] + b.bytes <= layout.offsets[i];
                    prop_assert!(!meet || apart || a.bytes == 0 || b.bytes == 0);
                }
            }
        }
    }

    #[test]
    fn memory_is_reused_after_the_last_reader() {
        let chain: Vec<Lifetime> = (0..10).map(|i| Lifetime { bytes: 640, first: i, last: i + 1 }).collect();
        assert_eq!(place(&chain).arena_bytes, 2 * 640);
    }
}
