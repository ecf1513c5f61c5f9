//! Half-precision conversions, by bits.
//!
//! Widening is exact. Narrowing rounds to nearest, ties to even (IEEE 754-2019, section 4.3.1); magnitudes beyond the
//! largest finite value become infinite, and NaN stays NaN.

/// The value of IEEE binary16 `bits`, exact.
#[must_use]
pub fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let exponent = u32::from(bits >> 10 & 0x1F);
    let fraction = u32::from(bits & 0x3FF);
    let magnitude = match exponent {
        // Subnormal: fraction · 2⁻²⁴, which a float32 product holds exactly.
        0 => (fraction as f32 * (1.0 / 16_777_216.0)).to_bits(),
        0x1F => 0x7F80_0000 | fraction << 13,
        // Rebias the exponent from 15 to 127.
        _ => (exponent + 112) << 23 | fraction << 13,
    };
    f32::from_bits(sign | magnitude)
}

/// The IEEE binary16 nearest to `value`, ties to even.
#[must_use]
pub fn f32_to_f16(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = (bits >> 16) as u16 & 0x8000;
    let magnitude = bits & 0x7FFF_FFFF;
    if magnitude > 0x7F80_0000 {
        return sign | 0x7E00;
    }
    // From 2¹⁶ up all is infinite; a little below, the rounding carry gets there by itself.
    if magnitude >= 0x4780_0000 {
        return sign | 0x7C00;
    }
    let rounded = if magnitude >= 0x3880_0000 {
        // Normal: rebias, then let the rounding carry run into the exponent.
        round_to_even(magnitude - 0x3800_0000, 13)
    } else {
        // Below 2⁻¹⁴: count units of 2⁻²⁴, with the implicit bit written out. Under 2⁻²⁵ everything rounds to zero.
        let shift = 126 - (magnitude >> 23);
        if shift > 24 { 0 } else { round_to_even(magnitude & 0x7F_FFFF | 0x80_0000, shift) }
    };
    sign | rounded as u16
}

/// The value of bfloat16 `bits`, exact.
#[must_use]
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The bfloat16 nearest to `value`, ties to even.
#[must_use]
pub fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        // Rounding could carry a NaN into infinity, or clear all that marks it: keep the sign, set the quiet bit.
        return (bits >> 16) as u16 | 0x0040;
    }
    round_to_even(bits, 16) as u16
}

/// `bits / 2^shift` to the nearest integer, ties to even; `shift` in 1..=24.
fn round_to_even(bits: u32, shift: u32) -> u32 {
    let odd = bits >> shift & 1;
    (bits + (1 << (shift - 1)) - 1 + odd) >> shift
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Every finite value of a 16-bit format with its bits, ascending; zero once.
    fn finite(widen: fn(u16) -> f32) -> Vec<(f64, u16)> {
        let mut all: Vec<_> = (0..=u16::MAX)
            .filter(|&b| b != 0x8000 && widen(b).is_finite())
            .map(|b| (f64::from(widen(b)), b))
            .collect();
        all.sort_by(|a, b| a.0.total_cmp(&b.0));
        all
    }

    /// Nearest by search over all values, ties to the even pattern: the definition, slowly.
    fn nearest(value: f32, all: &[(f64, u16)], infinity: u16) -> u16 {
        let x = f64::from(value);
        let i = all.partition_point(|&(v, _)| v < x);
        let sign = if value.is_sign_negative() { 0x8000 } else { 0 };
        // The neighbour beyond the largest finite value is where the next binade would begin.
        let step = all[all.len() - 1].0 - all[all.len() - 2].0;
        let above = all.get(i).copied().unwrap_or((all[all.len() - 1].0 + step, infinity));
        let below = if i == 0 { (all[0].0 - step, infinity | 0x8000) } else { all[i - 1] };
        let bits = match (x - below.0).total_cmp(&(above.0 - x)) {
            std::cmp::Ordering::Less => below.1,
            std::cmp::Ordering::Greater => above.1,
            std::cmp::Ordering::Equal if below.1 & 1 == 0 => below.1,
            std::cmp::Ordering::Equal => above.1,
        };
        if bits & 0x7FFF == 0 { sign } else { bits }
    }

    #[test]
    fn every_pattern_survives_the_round_trip() {
        for bits in 0..=u16::MAX {
            let (h, b) = (f16_to_f32(bits), bf16_to_f32(bits));
            assert!(h.is_nan() && f16_to_f32(f32_to_f16(h)).is_nan() || f32_to_f16(h) == bits, "{bits:#x}");
            assert!(
                b.is_nan() && bf16_to_f32(f32_to_bf16(b)).is_nan() || f32_to_bf16(b) == bits,
                "{bits:#x}"
            );
        }
    }

    #[test]
    fn known_values() {
        assert_eq!(f16_to_f32(0x3C00), 1.0);
        assert_eq!(f16_to_f32(0x7BFF), 65504.0);
        assert_eq!(f16_to_f32(0x0001), 2f32.powi(-24));
        assert_eq!(f32_to_f16(65519.996), 0x7BFF);
        assert_eq!(f32_to_f16(65520.0), 0x7C00);
        assert_eq!(f32_to_f16(f32::NEG_INFINITY), 0xFC00);
        assert_eq!(f32_to_bf16(f32::MAX), 0x7F80);
        assert_eq!(f32_to_bf16(f32::INFINITY), 0x7F80);
    }

    #[test]
    fn midpoints_go_to_even() {
        let (halves, brains) = (finite(f16_to_f32), finite(bf16_to_f32));
        for pair in halves.windows(2) {
            let middle = ((pair[0].0 + pair[1].0) / 2.0) as f32;
            for x in [middle, middle.next_up(), middle.next_down()] {
                assert_eq!(f32_to_f16(x), nearest(x, &halves, 0x7C00), "{x:e}");
            }
        }
        for pair in brains.windows(2) {
            let middle = ((pair[0].0 + pair[1].0) / 2.0) as f32;
            for x in [middle, middle.next_up(), middle.next_down()] {
                assert_eq!(f32_to_bf16(x), nearest(x, &brains, 0x7F80), "{x:e}");
            }
        }
    }

    proptest! {
        #[test]
        fn narrowing_is_nearest(bits: u32) {
            let x = f32::from_bits(bits);
            if x.is_finite() {
                prop_assert_eq!(f32_to_f16(x), nearest(x, &finite(f16_to_f32), 0x7C00));
                prop_assert_eq!(f32_to_bf16(x), nearest(x, &finite(bf16_to_f32), 0x7F80));
            }
        }
    }
}
