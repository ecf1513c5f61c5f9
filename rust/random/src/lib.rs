//! One random generator for the whole project: counter-based Philox 4×32-10.
//!
//! A draw is a pure function of a key and a counter, so nothing depends on what was drawn before, on the number of
//! threads, or on how a batch was split. The key holds the seed and the *purpose* of the draw (shuffle, mask,
//! dropout of layer 3, sample 2 …); the counter holds its coordinates (step, row, position …).
//!
//! Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", section 3.3 and table 2;
//! known-answer vectors from the Random123 distribution (`kat_vectors`).

const MULTIPLIER_0: u32 = 0xD251_1F53;
const MULTIPLIER_1: u32 = 0xCD9E_8D57;
/// Golden ratio and √3 − 1, the Weyl constants that bump the key between rounds.
const WEYL_0: u32 = 0x9E37_79B9;
const WEYL_1: u32 = 0xBB67_AE85;

/// Four random words for one `counter` under one `key`.
#[inline(always)]
#[must_use]
pub fn philox(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    let [mut k0, mut k1] = key;
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    for _ in 0..10 {
        let p0 = u64::from(MULTIPLIER_0) * u64::from(c0);
        let p1 = u64::from(MULTIPLIER_1) * u64::from(c2);
        (c0, c1, c2, c3) = ((p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32);
        k0 = k0.wrapping_add(WEYL_0);
        k1 = k1.wrapping_add(WEYL_1);
    }
    [c0, c1, c2, c3]
}

/// A uniform `f32` in [0, 1): the upper 24 bits of a word.
#[inline(always)]
#[must_use]
pub fn unit_f32(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / 16_777_216.0)
}

/// A uniform `f64` in [0, 1): 53 bits of two words.
#[inline(always)]
#[must_use]
pub fn unit_f64(high: u32, low: u32) -> f64 {
    let bits = (u64::from(high) << 32 | u64::from(low)) >> 11;
    bits as f64 * (1.0 / 9_007_199_254_740_992.0)
}

/// A sequence of draws at fixed coordinates: words 0, 1, 2 … of `(seed, purpose, index)`.
///
/// `purpose` separates uses of one seed (see the constants of the crates that draw); `index` is the coordinate:
/// a document, a row, a sequence. Two streams that differ in any of the three are independent.
#[derive(Clone, Debug)]
pub struct Stream {
    key: [u32; 2],
    index: u64,
    block: u64,
    words: [u32; 4],
    used: usize,
}

impl Stream {
    /// Opens the stream of `(seed, purpose, index)` at its first word.
    #[must_use]
    pub fn new(seed: u64, purpose: u32, index: u64) -> Self {
        // The upper half of the seed and the purpose share a key word: multiply by odd constants so that small
        // values of either do not meet.
        let high = ((seed >> 32) as u32).wrapping_mul(0x85EB_CA6B) ^ purpose.wrapping_mul(WEYL_0);
        Self { key: [seed as u32, high], index, block: 0, words: [0; 4], used: 4 }
    }

    /// The next 32 random bits.
    #[inline]
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            let (i, b) = (self.index, self.block);
            self.words = philox(self.key, [b as u32, (b >> 32) as u32, i as u32, (i >> 32) as u32]);
            self.block += 1;
            self.used = 0;
        }
        self.used += 1;
        self.words[self.used - 1]
    }

    /// A uniform `f64` in [0, 1).
    pub fn next_f64(&mut self) -> f64 {
        let high = self.next_u32();
        unit_f64(high, self.next_u32())
    }

    /// A uniform integer in `0..bound`, without bias (Lemire 2019, "Fast random integer generation in an interval").
    ///
    /// # Panics
    /// If `bound` is 0.
    pub fn below(&mut self, bound: u32) -> u32 {
        assert!(bound > 0, "[random] an empty range has no member to draw");
        let threshold = bound.wrapping_neg() % bound;
        loop {
            let product = u64::from(self.next_u32()) * u64::from(bound);
            if product as u32 >= threshold {
                return (product >> 32) as u32;
            }
        }
    }

    /// Two independent standard normal draws (Box and Muller 1958).
    pub fn normal_pair(&mut self) -> (f64, f64) {
        let radius = (-2.0 * (1.0 - self.next_f64()).ln()).sqrt();
        let angle = std::f64::consts::TAU * self.next_f64();
        (radius * angle.cos(), radius * angle.sin())
    }
}

/// A pseudo-random permutation of `0..len`, evaluated one index at a time in O(1) memory.
///
/// A balanced Feistel network over the next even power of two, cycle-walked into range; each round's function is one
/// Philox word. Source: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", section 4 (generalised
/// Feistel and cycle walking).
#[derive(Clone, Copy, Debug)]
pub struct Permutation {
    key: [u32; 2],
    domain: u32,
    len: u64,
    half_bits: u32,
}

impl Permutation {
    /// The permutation of `0..len` drawn from `(seed, purpose, index)`; `index` is usually the epoch.
    #[must_use]
    pub fn new(len: u64, seed: u64, purpose: u32, index: u32) -> Self {
        let bits = 64 - len.saturating_sub(1).leading_zeros();
        let half_bits = bits.div_ceil(2).max(1);
        let high = ((seed >> 32) as u32).wrapping_mul(0x85EB_CA6B) ^ purpose.wrapping_mul(WEYL_0);
        Self { key: [seed as u32, high], domain: index, len, half_bits }
    }

    /// Where `i` goes.
    ///
    /// # Panics
    /// If `i` is not below the length.
    #[must_use]
    pub fn get(&self, i: u64) -> u64 {
        assert!(i < self.len, "[random] index {i} is outside a permutation of {}", self.len);
        let mask = (1u64 << self.half_bits) - 1;
        let mut x = i;
        loop {
            let (mut left, mut right) = (x >> self.half_bits, x & mask);
            for round in 0..6u32 {
                let word = philox(self.key, [right as u32, (right >> 32) as u32, round, self.domain]);
                let mixed = u64::from(word[0]) | u64::from(word[1]) << 32;
                (left, right) = (right, left ^ (mixed & mask));
            }
            x = left << self.half_bits | right;
            if x < self.len {
                return x;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        let ones = 0xFFFF_FFFF;
        assert_eq!(philox([0, 0], [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([ones; 2], [ones; 4]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0xa409_3822, 0x299f_31d0], [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn permutations_visit_every_index_once() {
        for len in [1, 2, 3, 5, 64, 65, 1000, 4097] {
            let p = Permutation::new(len, 7, 1, 3);
            let mut seen = vec![false; len as usize];
            for i in 0..len {
                let j = p.get(i) as usize;
                assert!(!seen[j], "{j} twice in a permutation of {len}");
                seen[j] = true;
            }
        }
    }

    #[test]
    fn bounded_draws_are_uniform() {
        let mut stream = Stream::new(1, 2, 3);
        let mut counts = [0u32; 6];
        for _ in 0..60_000 {
            counts[stream.below(6) as usize] += 1;
        }
        // Chi-square with 5 degrees of freedom: 20.5 is passed once in a thousand seeds.
        let chi: f64 = counts.iter().map(|&c| (f64::from(c) - 1e4).powi(2) / 1e4).sum();
        assert!(chi < 20.5, "{chi}");
    }

    #[test]
    fn streams_differ_in_each_coordinate() {
        let first = |s, p, i| Stream::new(s, p, i).next_u32();
        let base = first(1, 1, 1);
        assert!(base != first(2, 1, 1) && base != first(1, 2, 1) && base != first(1, 1, 2));
        assert!(base != first(1 << 32 | 1, 1, 1));
    }
}
