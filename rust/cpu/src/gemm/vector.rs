//! What the kernels need of a register: one trait, so that each kernel is written once for all instruction sets.
//!
//! The methods are inlined into functions compiled for the instruction set (see `micro`); only there may they be used.

use crate::real::Real;

/// A register of [`LANES`](Self::LANES) elements.
///
/// # Safety
/// Every method requires that the CPU has the instructions of the type, and valid pointers.
pub(super) trait Vector: Copy {
    type Element: Real;
    const LANES: usize;

    unsafe fn splat(x: Self::Element) -> Self;
    unsafe fn load(from: *const Self::Element) -> Self;
    unsafe fn store(self, to: *mut Self::Element);
    /// `self·a + b`.
    unsafe fn mul_add(self, a: Self, b: Self) -> Self;
}

/// Lanes in plain Rust, for the compiler to vectorise.
#[cfg_attr(
    all(target_arch = "x86_64", not(test)),
    expect(dead_code, reason = "x86-64 has intrinsics at every level")
)]
#[derive(Clone, Copy)]
pub(super) struct Lanes<T, const N: usize>([T; N]);

impl<T: Real, const N: usize> Vector for Lanes<T, N> {
    type Element = T;
    const LANES: usize = N;

    #[inline(always)]
    unsafe fn splat(x: T) -> Self {
        Self([x; N])
    }
    #[inline(always)]
    unsafe fn load(from: *const T) -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { from.cast::<[T; N]>().read() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut T) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[T; N]>().write(self.0) };
    }
    #[inline(always)]
    unsafe fn mul_add(self, a: Self, b: Self) -> Self {
        // One rounding where the machine has the instruction.
        let fused = cfg!(target_arch = "aarch64");
        Self(std::array::from_fn(|l| {
            if fused { self.0[l].mul_add(a.0[l], b.0[l]) } else { self.0[l] * a.0[l] + b.0[l] }
        }))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Vector;

    macro_rules! vector {
        ($register:ty: $element:ty, $lanes:literal, $splat:ident $load:ident $store:ident,
         |$x:ident, $a:ident, $b:ident| $mul_add:expr) => {
            impl Vector for $register {
                type Element = $element;
                const LANES: usize = $lanes;

                #[inline(always)]
                unsafe fn splat(x: $element) -> Self {
                    // SAFETY: the caller's promise.
                    unsafe { $splat(x) }
                }
                #[inline(always)]
                unsafe fn load(from: *const $element) -> Self {
                    // SAFETY: the caller's promise.
                    unsafe { $load(from) }
                }
                #[inline(always)]
                unsafe fn store(self, to: *mut $element) {
                    // SAFETY: the caller's promise.
                    unsafe { $store(to, self) }
                }
                #[inline(always)]
                unsafe fn mul_add(self, $a: Self, $b: Self) -> Self {
                    let $x = self;
                    // SAFETY: the caller's promise.
                    unsafe { $mul_add }
                }
            }
        };
    }

    vector!(__m128: f32, 4, _mm_set1_ps _mm_loadu_ps _mm_storeu_ps,
        |x, a, b| _mm_add_ps(_mm_mul_ps(x, a), b));
    vector!(__m128d: f64, 2, _mm_set1_pd _mm_loadu_pd _mm_storeu_pd,
        |x, a, b| _mm_add_pd(_mm_mul_pd(x, a), b));
    vector!(__m256: f32, 8, _mm256_set1_ps _mm256_loadu_ps _mm256_storeu_ps,
        |x, a, b| _mm256_fmadd_ps(x, a, b));
    vector!(__m256d: f64, 4, _mm256_set1_pd _mm256_loadu_pd _mm256_storeu_pd,
        |x, a, b| _mm256_fmadd_pd(x, a, b));
    vector!(__m512: f32, 16, _mm512_set1_ps _mm512_loadu_ps _mm512_storeu_ps,
        |x, a, b| _mm512_fmadd_ps(x, a, b));
    vector!(__m512d: f64, 8, _mm512_set1_pd _mm512_loadu_pd _mm512_storeu_pd,
        |x, a, b| _mm512_fmadd_pd(x, a, b));
}
