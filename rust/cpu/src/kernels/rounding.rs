//! Rounding by chance to values of bfloat16: up or down, the likelier the nearer, so that small changes are not lost on the
//! average. The bits are a pure function of (rng, stream, element). Source: Zamirai et al. 2020, "Revisiting BFloat16
//! Training".

use pyrformer_random::philox;

use crate::real::Real;

/// How the elements of one weight are rounded in one step.
#[derive(Clone, Copy, Debug)]
pub struct Rounding {
    key: [u32; 2],
    step: [u32; 2],
}

impl Rounding {
    /// By stream `stream` under `rng` = seed (low, high), step (low, high).
    #[must_use]
    pub fn new(stream: u32, rng: [i32; 4]) -> Self {
        let [low, high, step_low, step_high] = rng.map(i32::cast_unsigned);
        // As for dropout, with another addend.
        let key = [low, high ^ stream.wrapping_mul(0x9E37_79B9).wrapping_add(0xB16F)];
        Self { key, step: [step_low, step_high] }
    }

    /// Rounds `row`, whose first element has number `first`, in place.
    pub fn apply<T: Real>(&self, row: &mut [T], first: u64) {
        let mut at = 0;
        while at < row.len() {
            let index = first + at as u64;
            let block = index / 4;
            let words = philox(self.key, [block as u32, (block >> 32) as u32, self.step[0], self.step[1]]);
            let from = (index % 4) as usize;
            let end = (at + 4 - from).min(row.len());
            for (x, &word) in row[at..end].iter_mut().zip(&words[from..]) {
                *x = T::from_f64(f64::from(by_chance(x.to_f64() as f32, word)));
            }
            at = end;
        }
    }
}

/// One of the two values of bfloat16 next to a number, by the upper half of a random word; infinities and NaN stay.
fn by_chance(x: f32, word: u32) -> f32 {
    if !x.is_finite() {
        return x;
    }
    // Magnitudes are in the order of their bits, so the carry leads to the next value away from 0.
    f32::from_bits((x.to_bits() + (word >> 16)) & 0xFFFF_0000)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A thousand draws for each of some values.
    fn draws(x: f32) -> Vec<f32> {
        let mut row = vec![x; 1000];
        Rounding::new(7, [1, 2, 3, 4]).apply(&mut row, 13);
        row
    }

    #[test]
    fn a_number_becomes_one_of_its_neighbours_and_itself_on_the_average() {
        for x in [1.001_f32, -1.001, 3.1234, 1e-30, -6.5e20, 0.999, 1.0 / 3.0, 1e-39] {
            let low = f32::from_bits(x.to_bits() & 0xFFFF_0000);
            let high = f32::from_bits(low.to_bits() + 0x1_0000);
            let found = draws(x);
            assert!(found.iter().all(|&y| y == low || y == high), "{x}");
            assert!(found.contains(&low) && found.contains(&high), "{x}");
            let share = f64::from(x - low) / f64::from(high - low);
            let ups = found.iter().filter(|&&y| y == high).count() as f64 / 1000.0;
            // Four standard deviations.
            assert!(
                (ups - share).abs() < 4.0 * (share * (1.0 - share) / 1000.0).sqrt(),
                "{x}: {ups}, {share}"
            );
        }
    }

    #[test]
    fn values_of_bfloat16_infinities_and_nan_stay() {
        for x in [0.0, -0.0, 1.0, -2.5, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0x0001_0000)] {
            assert!(draws(x).iter().all(|y| y.to_bits() == x.to_bits()), "{x}");
        }
        // Its lower bits alone make it a NaN.
        let nan = f32::from_bits(0x7F80_0001);
        assert!(by_chance(nan, u32::MAX).to_bits() == nan.to_bits() && draws(nan).iter().all(|y| y.is_nan()));
    }

    #[test]
    fn bits_depend_on_stream_step_and_element_alone() {
        let x: Vec<f32> = (0..103).map(|i| 1.0 + i as f32 * 1e-4).collect();
        let rounded = |stream, step, first: usize| {
            let mut row = x[first..].to_vec();
            Rounding::new(stream, [5, 6, step, 0]).apply(&mut row, first as u64);
            row
        };
        let all = rounded(1, 2, 0);
        assert_eq!(all[50..], rounded(1, 2, 50));
        assert!(all != rounded(2, 2, 0) && all != rounded(1, 3, 0));
    }
}
