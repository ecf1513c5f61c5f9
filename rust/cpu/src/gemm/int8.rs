//! Weights kept in 8 bits: a quarter of the memory, and of the time that reading it takes.
//!
//! Each output feature has a scale, `max |w| / 127`, and integers `round(w / scale)` (weight-only quantisation with
//! scales by row: Dettmers et al. 2022, "LLM.int8()", §2.1, without its outliers). A product turns a few steps of some
//! columns into floats in the first cache and goes on with the kernel of floats, so that activations lose nothing and
//! bits depend on rows as they do there.

use crate::real::Real;
use crate::simd_fn;
use crate::view::Mat;

/// Output features that lie together: element (step p, feature j) is at `(j / LANES · K + p) · LANES + j % LANES`.
const LANES: usize = 16;

/// The right factor of products, `[K, N]` or, `transposed`, `[N, K]`, in 8 bits.
#[derive(Debug)]
pub struct Int8 {
    transposed: bool,
    n: usize,
    k: usize,
    data: Vec<i8>,
    scales: Vec<f32>,
}

impl Int8 {
    /// Rounds a matrix.
    #[must_use]
    pub fn new(weight: &Mat<'_, f32>, transposed: bool) -> Self {
        let (n, k) = if transposed { (weight.rows, weight.cols) } else { (weight.cols, weight.rows) };
        let mut largest = vec![0f32; n.next_multiple_of(LANES)];
        for r in 0..weight.rows {
            for (c, x) in weight.row(r).iter().enumerate() {
                let feature = &mut largest[if transposed { r } else { c }];
                *feature = feature.max(x.abs());
            }
        }
        let scales: Vec<f32> = largest.iter().map(|x| x / 127.0).collect();
        let mut quantised = Self { transposed, n, k, data: vec![0; scales.len() * k], scales };
        for r in 0..weight.rows {
            for (c, &x) in weight.row(r).iter().enumerate() {
                let (feature, step) = if transposed { (r, c) } else { (c, r) };
                let at = quantised.at(feature, step);
                // A scale of 0 has zeros only; a conversion from NaN gives 0.
                quantised.data[at] = (x / quantised.scales[feature]).round() as i8;
            }
        }
        quantised
    }

    fn at(&self, feature: usize, step: usize) -> usize {
        (feature / LANES * self.k + step) * LANES + feature % LANES
    }

    /// (N, K).
    pub(super) fn shape(&self) -> (usize, usize) {
        (self.n, self.k)
    }

    /// Whether the matrix is `[N, K]`.
    pub(crate) fn transposed(&self) -> bool {
        self.transposed
    }

    /// Writes row `r` of the matrix as floats.
    pub(crate) fn row<T: Real>(&self, r: usize, to: &mut [T]) {
        for (c, to) in to.iter_mut().enumerate() {
            let (feature, step) = if self.transposed { (r, c) } else { (c, r) };
            *to =
                T::from_i8(self.data[self.at(feature, step)]) * T::from_f64(f64::from(self.scales[feature]));
        }
    }

    /// Writes `depth` steps from `step` of `lanes` features from `first` as panels of `width`, as
    /// [`pack`](super::pack::pack) does.
    ///
    /// # Safety
    /// `to` has room for them, and nobody else touches it; `first` is a multiple of `width`, or both of 16.
    pub(super) unsafe fn expand<T: Real>(
        &self,
        (first, lanes): (usize, usize),
        (step, depth): (usize, usize),
        width: usize,
        to: *mut T,
    ) {
        let group = width.min(LANES);
        for lane in (0..lanes).step_by(width) {
            for part in (0..width).step_by(group) {
                let feature = first + lane + part;
                // SAFETY: the caller's promise; panels before this one take `lane · depth`.
                let panel = unsafe { to.add(lane * depth + part) };
                let from =
                    if feature < self.scales.len() { &self.data[self.at(feature, step)..] } else { &[] };
                let scales = self.scales.get(feature..feature + group).unwrap_or(&[]);
                // SAFETY: `depth` steps of `group` lanes, `width` apart, are inside the panel.
                unsafe {
                    match group {
                        4 => floats::<T, 4>(from, scales, depth, width, panel),
                        8 => floats::<T, 8>(from, scales, depth, width, panel),
                        16 => floats::<T, 16>(from, scales, depth, width, panel),
                        _ => unreachable!("no kernel has panels of {width}"),
                    }
                }
            }
        }
    }
}

/// `depth` steps of `W` lanes; zeros where there are no features.
///
/// # Safety
/// The places in the panel are writable.
unsafe fn floats<T: Real, const W: usize>(
    from: &[i8],
    scales: &[f32],
    depth: usize,
    width: usize,
    panel: *mut T,
) {
    let mut factors = [T::ZERO; W];
    for (factor, &scale) in factors.iter_mut().zip(scales) {
        *factor = T::from_f64(f64::from(scale));
    }
    if from.is_empty() {
        for p in 0..depth {
            // SAFETY: the caller's promise.
            unsafe { panel.add(p * width).cast::<[T; W]>().write([T::ZERO; W]) };
        }
        return;
    }
    assert!(from.len() >= (depth - 1) * LANES + W, "a panel of {depth} steps");
    // SAFETY: the caller's promise; the integers are there.
    unsafe { steps(Panel { from: from.as_ptr(), panel, depth, width }, factors) };
}

/// Where the integers of a panel are, and where its floats go.
struct Panel<T> {
    from: *const i8,
    panel: *mut T,
    depth: usize,
    width: usize,
}

/// # Safety
/// As [`floats`], and `depth` steps of integers are readable.
unsafe fn steps<T: Real, const W: usize>(at: Panel<T>, factors: [T; W]) {
    /// The same, for [`simd_fn!`](crate::simd_fn).
    trait Steps {
        fn run(&self);
    }
    impl<T: Real, const W: usize> Steps for (&Panel<T>, &[T; W]) {
        #[inline(always)]
        fn run(&self) {
            let (at, factors) = self;
            for p in 0..at.depth {
                // SAFETY: the promise of `steps`.
                unsafe {
                    let integers = at.from.add(p * LANES).cast::<[i8; W]>().read();
                    let floats: [T; W] = std::array::from_fn(|l| T::from_i8(integers[l]) * factors[l]);
                    at.panel.add(p * at.width).cast::<[T; W]>().write(floats);
                }
            }
        }
    }
    simd_fn! {
        fn run<S: Steps>(steps: S) {
            steps.run();
        }
    }
    run((&at, &factors));
}
