//! The two element types of the kernels: `f32`, the product, and `f64`, for gradient checks.
//!
//! A kernel is written once over `T: Real`. Transcendental functions of `f32` come from [`math`](crate::math), so loops
//! over them vectorise; those of `f64` come from the standard library.

use std::fmt::{Debug, Display};
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, DivAssign, Mul, MulAssign, Neg, Sub, SubAssign};

use crate::gemm::Kernel;
use crate::math;
use crate::simd::Level;

/// A floating-point element: `f32` or `f64`.
pub trait Real:
    Copy
    + Send
    + Sync
    + Debug
    + Display
    + Default
    + PartialEq
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + SubAssign
    + MulAssign
    + DivAssign
    + Sum
    + 'static
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// ∞.
    const INFINITY: Self;
    /// −∞.
    const NEG_INFINITY: Self;

    /// The nearest value to `x`.
    fn from_f64(x: f64) -> Self;
    /// The integer as a float.
    fn from_i8(x: i8) -> Self;
    /// The value itself: both types fit into `f64`.
    fn to_f64(self) -> f64;
    /// The nearest integer, halves away from 0, or the nearest that there is; 0 for NaN.
    fn rounded(self) -> i32;
    /// √x.
    #[must_use]
    fn sqrt(self) -> Self;
    /// |x|.
    #[must_use]
    fn abs(self) -> Self;
    /// `self·a + b`, rounded once. Fast only inside code compiled for a level with FMA; elsewhere a library call.
    #[must_use]
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// Natural logarithm.
    #[must_use]
    fn ln(self) -> Self;
    /// eˣ; here and below, `FUSED` allows multiply-adds to be rounded once: true only in code compiled for them.
    #[must_use]
    fn exp<const FUSED: bool>(self) -> Self;
    /// eˣ for softmax and sigmoids, see [`math::exp_normal`].
    #[must_use]
    fn exp_normal<const FUSED: bool>(self) -> Self;
    /// Hyperbolic tangent.
    #[must_use]
    fn tanh<const FUSED: bool>(self) -> Self;
    /// Error function.
    #[must_use]
    fn erf<const FUSED: bool>(self) -> Self;
    /// Whether the value is NaN.
    fn is_nan(self) -> bool;
    /// Whether the value is neither NaN nor infinite.
    fn is_finite(self) -> bool;

    /// The matrix-product kernel of this type at `level`.
    #[doc(hidden)]
    fn kernel(level: Level) -> Kernel<Self>;

    /// The larger; `other` where the two do not compare (a NaN in `self` is dropped, one in `other` kept). One
    /// instruction, so loops vectorise.
    #[inline(always)]
    #[must_use]
    fn max(self, other: Self) -> Self {
        if self > other { self } else { other }
    }

    /// The smaller; `other` where the two do not compare.
    #[inline(always)]
    #[must_use]
    fn min(self, other: Self) -> Self {
        if self < other { self } else { other }
    }
}

macro_rules! real {
    ($t:ty, functions: $functions:ident, kernel: $kernel:path) => {
        impl Real for $t {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const INFINITY: Self = <$t>::INFINITY;
            const NEG_INFINITY: Self = <$t>::NEG_INFINITY;

            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                x as $t
            }
            #[inline(always)]
            fn from_i8(x: i8) -> Self {
                <$t>::from(x)
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                f64::from(self)
            }
            #[inline(always)]
            fn rounded(self) -> i32 {
                (self + if self < 0.0 { -0.5 } else { 0.5 }) as i32
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                <$t>::sqrt(self)
            }
            #[inline(always)]
            fn abs(self) -> Self {
                <$t>::abs(self)
            }
            #[inline(always)]
            fn mul_add(self, a: Self, b: Self) -> Self {
                <$t>::mul_add(self, a, b)
            }
            #[inline(always)]
            fn ln(self) -> Self {
                <$t>::ln(self)
            }
            #[inline(always)]
            fn exp<const FUSED: bool>(self) -> Self {
                $functions::exp::<FUSED>(self)
            }
            #[inline(always)]
            fn exp_normal<const FUSED: bool>(self) -> Self {
                $functions::exp_normal::<FUSED>(self)
            }
            #[inline(always)]
            fn tanh<const FUSED: bool>(self) -> Self {
                $functions::tanh::<FUSED>(self)
            }
            #[inline(always)]
            fn erf<const FUSED: bool>(self) -> Self {
                $functions::erf::<FUSED>(self)
            }
            #[inline(always)]
            fn is_nan(self) -> bool {
                <$t>::is_nan(self)
            }
            #[inline(always)]
            fn is_finite(self) -> bool {
                <$t>::is_finite(self)
            }
            fn kernel(level: Level) -> Kernel<Self> {
                $kernel(level)
            }
        }
    };
}

/// The functions of `f64`, from libraries.
mod library {
    pub(super) fn exp<const FUSED: bool>(x: f64) -> f64 {
        x.exp()
    }
    pub(super) fn exp_normal<const FUSED: bool>(x: f64) -> f64 {
        x.exp()
    }
    pub(super) fn tanh<const FUSED: bool>(x: f64) -> f64 {
        x.tanh()
    }
    pub(super) fn erf<const FUSED: bool>(x: f64) -> f64 {
        libm::erf(x)
    }
}

real!(f32, functions: math, kernel: crate::gemm::kernel_f32);
real!(f64, functions: library, kernel: crate::gemm::kernel_f64);

#[cfg(test)]
mod tests {
    use super::*;

    fn constants<T: Real>() {
        assert_eq!(T::from_f64(0.0), T::ZERO);
        assert_eq!(T::ONE.to_f64(), 1.0);
        assert!(T::NEG_INFINITY < T::ZERO && T::INFINITY > T::ONE && !T::INFINITY.is_finite());
        assert_eq!(T::from_f64(-4.0).abs().sqrt().to_f64(), 2.0);
        assert_eq!(T::from_f64(3.0).mul_add(T::from_f64(2.0), T::ONE).to_f64(), 7.0);
        assert_eq!(T::ONE.max(T::ZERO), T::ONE);
        assert_eq!(T::ONE.min(T::ZERO), T::ZERO);
        let nan = T::from_f64(f64::NAN);
        assert_eq!(nan.max(T::ONE), T::ONE);
        assert!(T::ONE.max(nan).is_nan());
        assert_eq!([T::ONE, T::ONE].into_iter().sum::<T>().to_f64(), 2.0);
    }

    #[test]
    fn both_types_keep_the_contract() {
        constants::<f32>();
        constants::<f64>();
    }

    #[test]
    fn functions_agree_between_the_types() {
        for i in -40..40 {
            let x = f64::from(i) * 0.125;
            let y = x as f32;
            assert!((f64::from(Real::exp::<false>(y)) / Real::exp::<false>(x) - 1.0).abs() < 1e-6);
            assert!((f64::from(Real::tanh::<false>(y)) - Real::tanh::<false>(x)).abs() < 1e-6);
            assert!((f64::from(Real::erf::<false>(y)) - Real::erf::<false>(x)).abs() < 1e-6);
        }
    }
}
