//! exp, tanh and erf of `f32` as straight-line code, so that loops over them vectorise.
//!
//! Every branch is a select and every table a polynomial. The polynomials are minimax fits (Lawson iteration over a
//! Chebyshev basis in `f64`), each stated with its interval and weight. Measured over all finite inputs against the
//! `f64` functions, with sums and products rounded separately: exp 1.03 ulp, tanh 1.34 ulp, erf 1.33 ulp (subnormal
//! results count in units of the smallest subnormal). Infinities, NaN and signed zeros are as in C99 Annex F.

/// 1.5·2²³: adding it rounds a small `f32` to an integer, which then sits in the low bits.
const ROUND: f32 = 12_582_912.0;

/// eˣ. Overflows to ∞ above 88.72, underflows through the subnormals to 0 below −103.97.
#[inline(always)]
#[must_use]
pub fn exp(x: f32) -> f32 {
    // Outside of this interval the result is ∞ or 0 anyway; a NaN passes, since it compares with nothing.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -104.0 { -104.0 } else { x };
    // x = n·ln 2 + r, |r| ≤ ln 2 / 2; the upper part of ln 2 has 15 bits, so n times it is exact.
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = (rounded.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let whole = rounded - ROUND;
    let r = x - whole * 0.693_145_75 - whole * 1.428_606_8e-6;
    // (eʳ − 1 − r) / r² on |r| ≤ 0.35, error · r² < 3.4e−9.
    let p = 1.395_171e-3;
    let p = p * r + 8.369_599e-3;
    let p = p * r + 4.166_618_7e-2;
    let p = p * r + 0.166_665_14;
    let p = p * r + 0.5;
    let y = p * (r * r) + r + 1.0;
    // · 2ⁿ in two steps, as 2ⁿ alone may be out of range where the product is not.
    let half = n >> 1;
    y * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

/// 2ⁿ for −126 ≤ n ≤ 127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// Hyperbolic tangent.
#[inline(always)]
#[must_use]
pub fn tanh(x: f32) -> f32 {
    let a = x.abs();
    // Below 0.625, (tanh a / a − 1) / a² as a polynomial in z = a², error · z < 4.2e−9.
    let z = a * a;
    let p = -5.717_011e-3;
    let p = p * z + 2.065_055_4e-2;
    let p = p * z - 5.374_348_5e-2;
    let p = p * z + 0.133_314_91;
    let p = p * z - 0.333_332_84;
    let small = p * z * a + a;
    // Above, 1 − 2 / (e²ᵃ + 1), which does not cancel there.
    let large = 1.0 - 2.0 / (exp(a + a) + 1.0);
    (if a < 0.625 { small } else { large }).copysign(x)
}

/// Error function, 2/√π ∫₀ˣ e^(−t²) dt.
#[inline(always)]
#[must_use]
pub fn erf(x: f32) -> f32 {
    let a = x.abs();
    // Below 0.92, erf a / a − 1 as a polynomial in z = a², error < 4.6e−10.
    let z = a * a;
    let p = 8.345_216e-5;
    let p = p * z - 8.137_435_7e-4;
    let p = p * z + 5.200_634_2e-3;
    let p = p * z - 2.685_927e-2;
    let p = p * z + 0.112_836_94;
    let p = p * z - 0.376_126_35;
    let p = p * z + 0.128_379_17;
    let small = p * a + a;
    // Above, 1 − e^q(a), q a fit of ln erfc on [0.92, 4], error · erfc / erf < 1.6e−9. From 4 on, erf rounds to 1.
    let t = if a > 4.0 { 4.0 } else { a };
    let q = 1.959_413e-4;
    let q = q * t - 3.043_254_6e-3;
    let q = q * t + 2.222_705_8e-2;
    let q = q * t - 0.103_931_87;
    let q = q * t - 0.637_181_94;
    let q = q * t - 1.127_675_8;
    let q = q * t - 1.956_395_6e-4;
    let large = 1.0 - exp(q);
    (if a < 0.92 { small } else { large }).copysign(x)
}

#[cfg(test)]
#[expect(clippy::print_stdout, reason = "the measured errors are printed")]
mod tests {
    use super::*;

    /// |got − want| in units of the last place of `want` as an `f32`.
    fn ulps(got: f32, want: f64) -> f64 {
        let nearest = want as f32;
        if got.to_bits() == nearest.to_bits() {
            return 0.0;
        }
        if !got.is_finite() || !nearest.is_finite() {
            return f64::INFINITY;
        }
        let exponent = (nearest.abs().to_bits() >> 23).max(1) as i32 - 127 - 23;
        (f64::from(got) - want).abs() / 2f64.powi(exponent)
    }

    /// The worst error over every `step`-th bit pattern of either sign, and where it is.
    fn worst(step: usize, f: fn(f32) -> f32, reference: fn(f64) -> f64) -> (f64, f32) {
        let mut worst = (0.0, 0.0);
        for magnitude in (0..=f32::INFINITY.to_bits()).step_by(step) {
            for bits in [magnitude, magnitude | 1 << 31] {
                let x = f32::from_bits(bits);
                let error = ulps(f(x), reference(f64::from(x)));
                if error > worst.0 {
                    worst = (error, x);
                }
            }
        }
        worst
    }

    fn check(name: &str, step: usize, f: fn(f32) -> f32, reference: fn(f64) -> f64, limit: f64) {
        let (error, x) = worst(step, f, reference);
        println!("{name}: at most {error:.3} ulp, at {x:e}");
        assert!(error <= limit, "{name}({x:e}) is {error:.3} ulp off");
    }

    /// A prime step, so that all low bits occur.
    const STEP: usize = 1009;

    #[test]
    fn exp_is_within_its_bound() {
        check("exp", STEP, exp, f64::exp, 1.1);
    }

    #[test]
    fn tanh_is_within_its_bound() {
        check("tanh", STEP, tanh, f64::tanh, 1.4);
    }

    #[test]
    fn erf_is_within_its_bound() {
        check("erf", STEP, erf, libm::erf, 1.4);
    }

    #[test]
    #[ignore = "all 2³² inputs take minutes"]
    fn every_input() {
        check("exp", 1, exp, f64::exp, 1.1);
        check("tanh", 1, tanh, f64::tanh, 1.4);
        check("erf", 1, erf, libm::erf, 1.4);
    }

    #[test]
    fn special_values() {
        let smallest = f32::from_bits(1);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(f32::NEG_INFINITY).to_bits(), 0);
        assert_eq!((exp(0.0), exp(-0.0), exp(smallest)), (1.0, 1.0, 1.0));
        assert_eq!((exp(f32::MAX), exp(f32::MIN)), (f32::INFINITY, 0.0));
        assert_eq!(
            (exp(88.722), exp(88.723)),
            ((f64::from(88.722f32).exp()) as f32, (f64::from(88.723f32).exp()) as f32)
        );
        assert!(exp(-100.0) > 0.0 && exp(-100.0).is_subnormal());
        for f in [tanh, erf] {
            assert_eq!((f(f32::INFINITY), f(f32::NEG_INFINITY)), (1.0, -1.0));
            assert_eq!((f(f32::MAX), f(f32::MIN)), (1.0, -1.0));
            assert_eq!((f(0.0).to_bits(), f(-0.0).to_bits()), (0, 1 << 31));
            assert!(f(smallest) > 0.0 && f(-smallest) < 0.0);
        }
        for f in [exp, tanh, erf] {
            assert!(f(f32::NAN).is_nan() && f(-f32::NAN).is_nan());
        }
    }
}
