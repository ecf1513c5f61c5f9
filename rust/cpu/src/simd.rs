//! Which vector instructions to use, chosen at run time, and how a kernel is compiled for each of them.
//!
//! [`simd_fn!`](crate::simd_fn) compiles one generic body per [`Level`] and picks the best on each call, so a plain loop
//! in a kernel is vectorised as wide as the machine allows. A loop vectorises where its iterations are independent. A
//! reduction does not by itself, because floating-point addition is not associative and the compiler may not reorder
//! it: write it with [`LANES`] accumulators which are combined in a fixed order, as [`sum`] and [`dot`] do. The order
//! then is part of the program, and the same at every level.

use std::sync::OnceLock;

use crate::real::Real;

/// A set of vector instructions; each includes the ones before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What the target always has: SSE2 on x86-64, NEON on aarch64.
    Baseline,
    /// AVX2 and FMA (x86-64): 256 bits.
    Avx2,
    /// AVX-512 F, BW, DQ and VL (x86-64): 512 bits.
    Avx512,
}

impl Level {
    /// The name used by `PYRFORMER_SIMD`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Level::Baseline => "baseline",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
        }
    }
}

/// Why `PYRFORMER_SIMD` cannot be followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LevelError {
    /// Not one of the names.
    #[error("[simd] PYRFORMER_SIMD is {0:?}; set it to baseline, avx2 or avx512, or unset it")]
    Unknown(String),
    /// A level that this machine does not have.
    #[error("[simd] PYRFORMER_SIMD asks for {}, but this CPU offers {}; choose a lower level or unset it", .asked.name(), .offered.name())]
    Unsupported {
        /// What the variable names.
        asked: Level,
        /// The best that the CPU has.
        offered: Level,
    },
}

/// The best level of this CPU.
#[must_use]
pub fn detect() -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                return Level::Avx512;
            }
            return Level::Avx2;
        }
    }
    Level::Baseline
}

fn choose(asked: Option<&str>, offered: Level) -> Result<Level, LevelError> {
    let Some(name) = asked else { return Ok(offered) };
    let asked = [Level::Baseline, Level::Avx2, Level::Avx512]
        .into_iter()
        .find(|level| level.name() == name)
        .ok_or_else(|| LevelError::Unknown(name.to_owned()))?;
    if asked > offered { Err(LevelError::Unsupported { asked, offered }) } else { Ok(asked) }
}

/// The level in use, or why `PYRFORMER_SIMD` cannot be followed. The variable is read once per process.
///
/// # Errors
/// [`LevelError`] if the variable names no level, or one above [`detect`].
pub fn check() -> Result<Level, LevelError> {
    static CHOSEN: OnceLock<Result<Level, LevelError>> = OnceLock::new();
    CHOSEN
        .get_or_init(|| {
            let asked = std::env::var_os("PYRFORMER_SIMD").map(|value| value.to_string_lossy().into_owned());
            choose(asked.as_deref(), detect())
        })
        .clone()
}

/// The level in use: `PYRFORMER_SIMD` if that is right, else the best of the CPU. Call [`check`] once at start-up to
/// report a wrong value.
#[inline]
#[must_use]
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| check().unwrap_or_else(|_| detect()))
}

/// Defines a function whose body is compiled once per [`Level`](crate::simd::Level); each call runs the one in use.
///
/// ```
/// use pyrformer_cpu::{real::Real, simd_fn};
///
/// simd_fn! {
///     /// y += a·x, over the common length.
///     pub fn axpy<T: Real>(a: T, x: &[T], y: &mut [T]) {
///         for (y, &x) in y.iter_mut().zip(x) {
///             *y += a * x;
///         }
///     }
/// }
/// let mut y = [1.0f32, 2.0];
/// axpy(2.0, &[3.0, 4.0], &mut y);
/// assert_eq!(y, [7.0, 10.0]);
/// ```
///
/// Type parameters take one bound each (`F: Fn(T) -> T` is one); arguments are plain names. The choice costs a load and
/// a predictable branch, so give it a whole row or more. Functions called by the body must be `#[inline(always)]` or
/// small enough to be inlined, or they are compiled for the baseline. Products and sums stay separate instructions, so
/// results are the same at every level, but where the body asks for fused ones: `FUSED`, a constant in it, says whether
/// the level has them.
#[macro_export]
macro_rules! simd_fn {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$($g:ident : $bound:path),+ $(,)?>)?
     ($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body<$($($g: $bound,)+)? const FUSED: bool>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                fn avx2 $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
                    body::<$($($g,)+)? true>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512 $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
                    body::<$($($g,)+)? true>($($arg),*)
                }
                match $crate::simd::level() {
                    // SAFETY: `level` names only what the CPU has.
                    $crate::simd::Level::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::simd::Level::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::simd::Level::Baseline => {}
                }
            }
            // NEON always has them.
            body::<$($($g,)+)? { cfg!(target_arch = "aarch64") }>($($arg),*)
        }
    };
}

/// Accumulators of a reduction: lane `l` takes elements `l, l + LANES, l + 2·LANES, …`.
pub const LANES: usize = 32;

/// Combines lanes, a power of two of them, in a fixed order: halves onto each other until one is left.
#[inline(always)]
pub fn fold_lanes<T: Real, const N: usize>(mut lanes: [T; N], combine: impl Fn(T, T) -> T) -> T {
    let mut half = N / 2;
    while half > 0 {
        for l in 0..half {
            lanes[l] = combine(lanes[l], lanes[l + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// Reduces `term(x[i])` by `combine` over fixed lanes; `start` is the neutral element.
#[inline(always)]
pub fn reduce<T: Real>(x: &[T], start: T, term: impl Fn(T) -> T, combine: impl Fn(T, T) -> T) -> T {
    let mut lanes = [start; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for l in 0..LANES {
            lanes[l] = combine(lanes[l], term(chunk[l]));
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = combine(*lane, term(x));
    }
    fold_lanes(lanes, combine)
}

simd_fn! {
    /// Σ xᵢ; 0 for an empty slice.
    pub fn sum<T: Real>(x: &[T]) -> T {
        reduce(x, T::ZERO, |x| x, |a, b| a + b)
    }
}

simd_fn! {
    /// Σ xᵢ²; 0 for an empty slice.
    pub fn sum_sq<T: Real>(x: &[T]) -> T {
        reduce(x, T::ZERO, |x| x * x, |a, b| a + b)
    }
}

simd_fn! {
    /// The largest element; −∞ for an empty slice. NaN elements may or may not show.
    pub fn max<T: Real>(x: &[T]) -> T {
        reduce(x, T::NEG_INFINITY, |x| x, Real::max)
    }
}

simd_fn! {
    /// The largest |xᵢ|, 0 for an empty slice; NaN if one is there.
    pub fn largest_abs<T: Real>(x: &[T]) -> T {
        reduce(x, T::ZERO, |x| x.abs(), |a, b| if b <= a || a.is_nan() { a } else { b })
    }
}

simd_fn! {
    /// Σ xᵢ·yᵢ over two slices of one length.
    pub fn dot<T: Real>(x: &[T], y: &[T]) -> T {
        assert_eq!(x.len(), y.len(), "dot of {} and {} elements", x.len(), y.len());
        let mut lanes = [T::ZERO; LANES];
        let ((xs, x_rest), (ys, y_rest)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
        for (x, y) in xs.iter().zip(ys) {
            for l in 0..LANES {
                lanes[l] += x[l] * y[l];
            }
        }
        for (lane, (&x, &y)) in lanes.iter_mut().zip(x_rest.iter().zip(y_rest)) {
            *lane += x * y;
        }
        fold_lanes(lanes, |a, b| a + b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_is_followed_or_refused() {
        assert_eq!(choose(None, Level::Avx2), Ok(Level::Avx2));
        assert_eq!(choose(Some("baseline"), Level::Avx512), Ok(Level::Baseline));
        assert_eq!(choose(Some("avx2"), Level::Avx2), Ok(Level::Avx2));
        assert_eq!(
            choose(Some("avx512"), Level::Avx2),
            Err(LevelError::Unsupported { asked: Level::Avx512, offered: Level::Avx2 })
        );
        assert_eq!(choose(Some("AVX9"), Level::Avx2), Err(LevelError::Unknown("AVX9".into())));
        assert_eq!(choose(Some(""), Level::Avx2), Err(LevelError::Unknown(String::new())));
    }

    fn data(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37 + 11) % 101) as f32 / 7.0 - 6.0).collect()
    }

    #[test]
    fn reductions_match_f64() {
        for n in [0, 1, 2, 31, 32, 33, 63, 64, 65, 1000] {
            let (x, y) = (data(n), data(n + 3)[3..].to_vec());
            let wide: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
            let near =
                |a: f32, b: f64| assert!((f64::from(a) - b).abs() <= 1e-3 + 1e-5 * b.abs(), "{n}: {a} {b}");
            near(sum(&x), wide.iter().sum());
            near(sum_sq(&x), wide.iter().map(|x| x * x).sum());
            near(dot(&x, &y), wide.iter().zip(&y).map(|(x, &y)| x * f64::from(y)).sum());
            let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(max(&x), largest);
            assert!((sum(&wide) - wide.iter().sum::<f64>()).abs() < 1e-9);
        }
    }

    #[test]
    fn every_level_gives_the_same_bits() {
        let x = data(1003);
        let at_level = sum(&x);
        let at_baseline = reduce(&x, 0.0, |x| x, |a, b| a + b);
        assert_eq!(at_level.to_bits(), at_baseline.to_bits());
    }

    simd_fn! {
        fn mapped<T: Real, F: Fn(T) -> T>(x: &mut [T], f: F) -> usize {
            for x in x.iter_mut() {
                *x = f(*x);
            }
            x.len()
        }
    }

    #[test]
    fn bodies_take_closures() {
        let mut x = [1.0f64, 2.0];
        assert_eq!(mapped(&mut x, |x| x + 1.0), 2);
        assert_eq!(x, [2.0, 3.0]);
    }
}
