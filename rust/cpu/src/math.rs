//! exp, tanh and erf of `f32` as straight-line code, so that loops over them vectorise.
//!
//! Every branch is a select and every table a polynomial. The polynomials are minimax fits (Lawson iteration over a
//! Chebyshev basis in `f64`), each stated with its interval and weight. `FUSED` says whether `a·b + c` is rounded once,
//! which takes an instruction that not every CPU has. Measured over all finite inputs against the `f64` functions,
//! without and with it: exp 1.03 and 1.05 ulp, tanh 1.34, erf 1.33 (subnormal results count in units of the smallest subnormal).
//! Infinities, NaN and signed zeros are as in C99 Annex F, but for [`exp_normal`].

/// 1.5·2²³: adding it rounds a small `f32` to an integer, which then sits in the low bits.
const ROUND: f32 = 12_582_912.0;
/// ln 2 in two parts; the upper has 15 bits, so an exponent times it is exact.
const LN_2: (f32, f32) = (0.693_145_75, 1.428_606_8e-6);

/// `a·b + c`.
#[inline(always)]
fn fma<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// The polynomial in `x` with these coefficients, the highest first.
#[inline(always)]
fn polynomial<const FUSED: bool, const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    let mut p = coefficients[0];
    for &c in &coefficients[1..] {
        p = fma::<FUSED>(p, x, c);
    }
    p
}

/// eʳ for |r| ≤ ln 2 / 2, where `x = whole · ln 2 + r`.
#[inline(always)]
fn exp_rest<const FUSED: bool>(x: f32, whole: f32) -> f32 {
    let r = fma::<FUSED>(-whole, LN_2.0, x);
    let r = fma::<FUSED>(-whole, LN_2.1, r);
    // (eʳ − 1 − r) / r² on |r| ≤ 0.35, error · r² < 3.4e−9.
    let p = [1.395_171e-3, 8.369_599e-3, 4.166_618_7e-2, 0.166_665_14, 0.5];
    fma::<FUSED>(polynomial::<FUSED, 5>(r, p), r * r, r) + 1.0
}

/// eˣ. Overflows to ∞ above 88.72, underflows through the subnormals to 0 below −103.97.
#[inline(always)]
#[must_use]
pub fn exp<const FUSED: bool>(x: f32) -> f32 {
    // Outside of this interval the result is ∞ or 0 anyway; a NaN passes, since it compares with nothing.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -104.0 { -104.0 } else { x };
    let rounded = fma::<FUSED>(x, std::f32::consts::LOG2_E, ROUND);
    let n = (rounded.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let y = exp_rest::<FUSED>(x, rounded - ROUND);
    // · 2ⁿ in two steps, as 2ⁿ alone may be out of range where the product is not.
    let half = n >> 1;
    y * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

/// eˣ where that is a normal number below e⁸⁸: 0 where it is smaller, e⁸⁸ where it is larger. Shorter than [`exp`], for
/// softmax and sigmoids, which cannot tell.
#[inline(always)]
#[must_use]
pub fn exp_normal<const FUSED: bool>(x: f32) -> f32 {
    // With the bias of exponents in it, the low bits of a rounded number are the exponent field of 2ⁿ.
    const BIASED: f32 = ROUND + 127.0;
    let bounded = if x > 88.0 { 88.0 } else { x };
    let rounded = fma::<FUSED>(bounded, std::f32::consts::LOG2_E, BIASED);
    let y = exp_rest::<FUSED>(bounded, rounded - BIASED) * f32::from_bits(rounded.to_bits() << 23);
    if x < -87.336 { 0.0 } else { y }
}

/// 2ⁿ for −126 ≤ n ≤ 127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// Hyperbolic tangent.
#[inline(always)]
#[must_use]
pub fn tanh<const FUSED: bool>(x: f32) -> f32 {
    let a = x.abs();
    // Below 0.625, (tanh a / a − 1) / a² as a polynomial in z = a², error · z < 4.2e−9.
    let z = a * a;
    let p = [-5.717_011e-3, 2.065_055_4e-2, -5.374_348_5e-2, 0.133_314_91, -0.333_332_84];
    let small = fma::<FUSED>(polynomial::<FUSED, 5>(z, p) * z, a, a);
    // Above, 1 − 2 / (e²ᵃ + 1), which does not cancel there.
    let large = 1.0 - 2.0 / (exp_normal::<FUSED>(a + a) + 1.0);
    (if a < 0.625 { small } else { large }).copysign(x)
}

/// Error function, 2/√π ∫₀ˣ e^(−t²) dt.
#[inline(always)]
#[must_use]
pub fn erf<const FUSED: bool>(x: f32) -> f32 {
    let a = x.abs();
    // Below 0.92, erf a / a − 1 as a polynomial in z = a², error < 4.6e−10.
    let z = a * a;
    let p = [
        8.345_216e-5,
        -8.137_435_7e-4,
        5.200_634_2e-3,
        -2.685_927e-2,
        0.112_836_94,
        -0.376_126_35,
        0.128_379_17,
    ];
    let small = fma::<FUSED>(polynomial::<FUSED, 7>(z, p), a, a);
    // Above, 1 − e^q(a), q a fit of ln erfc on [0.92, 4], error · erfc / erf < 1.6e−9. From 4 on, erf rounds to 1.
    let t = if a > 4.0 { 4.0 } else { a };
    let q = [
        1.959_413e-4,
        -3.043_254_6e-3,
        2.222_705_8e-2,
        -0.103_931_87,
        -0.637_181_94,
        -1.127_675_8,
        -1.956_395_6e-4,
    ];
    let large = 1.0 - exp_normal::<FUSED>(polynomial::<FUSED, 7>(t, q));
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
        check("exp", STEP, exp::<false>, f64::exp, 1.1);
        check("exp, fused", STEP, exp::<true>, f64::exp, 1.1);
    }

    #[test]
    fn tanh_is_within_its_bound() {
        check("tanh", STEP, tanh::<false>, f64::tanh, 1.4);
        check("tanh, fused", STEP, tanh::<true>, f64::tanh, 1.4);
    }

    #[test]
    fn erf_is_within_its_bound() {
        check("erf", STEP, erf::<false>, libm::erf, 1.4);
        check("erf, fused", STEP, erf::<true>, libm::erf, 1.4);
    }

    #[test]
    #[ignore = "all 2³² inputs take minutes"]
    fn every_input() {
        check("exp", 1, exp::<false>, f64::exp, 1.1);
        check("exp, fused", 1, exp::<true>, f64::exp, 1.1);
        check("tanh", 1, tanh::<false>, f64::tanh, 1.4);
        check("tanh, fused", 1, tanh::<true>, f64::tanh, 1.4);
        check("erf", 1, erf::<false>, libm::erf, 1.4);
        check("erf, fused", 1, erf::<true>, libm::erf, 1.4);
    }

    #[test]
    fn exp_normal_is_exp_where_that_is_normal() {
        fn limited(x: f64) -> f64 {
            let y = x.min(88.0).exp();
            if x < f64::from(-87.336f32) { 0.0 } else { y }
        }
        check("exp_normal", STEP, exp_normal::<false>, limited, 1.1);
        check("exp_normal, fused", STEP, exp_normal::<true>, limited, 1.1);
        assert_eq!(exp_normal::<true>(f32::NEG_INFINITY).to_bits(), 0);
        assert!(exp_normal::<true>(f32::INFINITY).is_finite());
        assert_eq!(exp_normal::<true>(0.0), 1.0);
    }

    #[test]
    fn special_values() {
        let smallest = f32::from_bits(1);
        assert_eq!(exp::<true>(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp::<true>(f32::NEG_INFINITY).to_bits(), 0);
        assert_eq!((exp::<true>(0.0), exp::<true>(-0.0), exp::<true>(smallest)), (1.0, 1.0, 1.0));
        assert_eq!((exp::<true>(f32::MAX), exp::<true>(f32::MIN)), (f32::INFINITY, 0.0));
        assert_eq!(
            (exp::<true>(88.722), exp::<true>(88.723)),
            ((f64::from(88.722f32).exp()) as f32, (f64::from(88.723f32).exp()) as f32)
        );
        assert!(exp::<true>(-100.0) > 0.0 && exp::<true>(-100.0).is_subnormal());
        for f in [tanh::<false>, erf::<false>, tanh::<true>, erf::<true>] {
            assert_eq!((f(f32::INFINITY), f(f32::NEG_INFINITY)), (1.0, -1.0));
            assert_eq!((f(f32::MAX), f(f32::MIN)), (1.0, -1.0));
            assert_eq!((f(0.0).to_bits(), f(-0.0).to_bits()), (0, 1 << 31));
            assert!(f(smallest) > 0.0 && f(-smallest) < 0.0);
        }
        for f in [exp::<true>, exp_normal::<true>, exp_normal::<false>, tanh::<true>, erf::<true>] {
            assert!(f(f32::NAN).is_nan() && f(-f32::NAN).is_nan());
        }
    }
}
