//! Weights kept in 8 bits: a quarter of the memory, and of the time that reading it takes.
//!
//! Each output feature has a scale, `max |w| / 127`, and integers `round(w / scale)`; each row of activations, when it is
//! multiplied, a scale `max |a| / 4095` and 13-bit integers (scales by row and feature: Dettmers et al. 2022, "LLM.int8()",
//! §2.1; more bits for activations in place of its outliers). Integers of 16 bits multiply in pairs, twice as many at a
//! time as floats, and sums of up to [`DEPTH`] products are exact. So a result depends on its row and its feature alone,
//! and is the same for all levels, threads and shapes.

use super::{Epilogue, PackBuffers, Shared, finish};
use crate::error::{Result, room};
use crate::real::Real;
use crate::simd::{Level, largest_abs, level};
use crate::threads::Pool;
use crate::view::{Mat, MatMut};

/// Output features that lie together, in panels of K steps, two steps of a feature side by side.
const LANES: usize = 16;
/// Integers of two steps of a panel.
const PAIR: usize = 2 * LANES;
/// The largest integer of an activation.
const LARGEST: f64 = 4095.0;
/// Steps of K whose sum is exact: 127 · 4095 · 4096 < 2³¹.
const DEPTH: usize = 4096;
/// Rows of a tile: with two registers of sums each, and four for operands, they fill the register file.
const HEIGHT: usize = 6;
/// Bytes of integers of activations that stay in the second cache while panels pass.
const BLOCK: usize = 192 << 10;
/// Up to this many rows of tiles, what comes next of B is asked for at each pair of steps.
const STREAM_TILES: usize = 8;
/// With one row of tiles, B is read in a straight line, and asked for so many bytes before.
const AHEAD: usize = 2048;
/// The most panels of a task.
const GROUP: usize = 16;

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
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn new(weight: &Mat<'_, f32>, transposed: bool) -> Result<Self> {
        let (n, k) = if transposed { (weight.rows, weight.cols) } else { (weight.cols, weight.rows) };
        let mut largest = vec![0f32; n.next_multiple_of(LANES)];
        for r in 0..weight.rows {
            for (c, x) in weight.row(r).iter().enumerate() {
                let feature = &mut largest[if transposed { r } else { c }];
                *feature = feature.max(x.abs());
            }
        }
        let scales: Vec<f32> = largest.iter().map(|x| x / 127.0).collect();
        let elements = scales.len() * k.next_multiple_of(2);
        let mut data = room(elements)?;
        data.resize(elements, 0);
        let mut quantised = Self { transposed, n, k, data, scales };
        for r in 0..weight.rows {
            for (c, &x) in weight.row(r).iter().enumerate() {
                let (feature, step) = if transposed { (r, c) } else { (c, r) };
                let at = quantised.at(feature, step);
                // A scale of 0 has zeros only, and 0/0 becomes 0.
                quantised.data[at] = (x / quantised.scales[feature]).round() as i8;
            }
        }
        Ok(quantised)
    }

    fn at(&self, feature: usize, step: usize) -> usize {
        feature / LANES * self.panel() + step / 2 * PAIR + feature % LANES * 2 + step % 2
    }

    /// Integers of a panel: whole pairs of steps, with zeros beyond the last.
    fn panel(&self) -> usize {
        self.k.next_multiple_of(2) * LANES
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
}

/// `C = A·B` (or `+=`) by the pool.
///
/// # Safety
/// As [`gemm`](super::gemm), whose shapes were checked.
pub(super) unsafe fn multiply<T: Real>(
    pool: &Pool,
    buffers: &PackBuffers<T>,
    a: &Mat<'_, T>,
    b: &Int8,
    (c, accumulate): (&MatMut<'_, T>, bool),
    epilogue: Epilogue<'_, T>,
) {
    let (m, n, k) = (a.rows, b.n, b.k);
    if m == 0 || n == 0 {
        return;
    }
    let threads = if m * n * k < super::SMALL { 1 } else { pool.threads() };
    let shared = buffers.shared();
    // Rows of integers in whole pairs of steps, each behind its scale.
    let stride = k.next_multiple_of(2) + SCALE;
    let room = shared.elements * size_of::<T>() / size_of::<i16>();
    let at_once = (room / stride).clamp(1, m);
    let mut spill = vec![];
    let integers = if at_once * stride <= room {
        Shared(shared.data.cast::<i16>())
    } else {
        // One row that is longer than the buffer.
        spill.resize(stride, 0i16);
        Shared(spill.as_mut_ptr())
    };
    let panels = n.div_ceil(LANES);
    let group = panels.div_ceil(panels.div_ceil(GROUP).next_multiple_of(threads));
    for from in (0..m).step_by(at_once) {
        let rows = at_once.min(m - from);
        let share = rows.div_ceil(threads);
        pool.run(rows.div_ceil(share), &|task, _| {
            for i in task * share..rows.min((task + 1) * share) {
                // SAFETY: a row of the buffer for each row of A, each written by one task.
                let to = unsafe { std::slice::from_raw_parts_mut(integers.get().add(i * stride), stride) };
                quantise(a.row(from + i), to);
            }
        });
        pool.run(panels.div_ceil(group), &|task, _| {
            let part = Part { first: task * group, panels: group.min(panels - task * group), from, rows };
            // SAFETY: the rows were written; tasks have different columns of C.
            unsafe {
                columns(b, (integers.get(), stride), part, c, accumulate);
                let end = n.min((part.first + part.panels) * LANES);
                finish(c, from..from + rows, part.first * LANES..end, epilogue);
            }
        });
    }
}

/// Places of 16 bits before a row of integers that hold its scale, as `f32`.
const SCALE: usize = 2;

/// A row of activations as integers behind their scale, padded to whole pairs with 0.
fn quantise<T: Real>(row: &[T], to: &mut [i16]) {
    // What is not finite makes the scale so, and with it the whole row of C.
    let scale = (largest_abs(row).to_f64() / LARGEST) as f32;
    let (head, to) = to.split_at_mut(SCALE);
    let bits = scale.to_bits();
    head.copy_from_slice(&[bits as u16 as i16, (bits >> 16) as u16 as i16]);
    let factor = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    let (whole, rest) = to.split_at_mut(row.len());
    crate::simd_fn! {
        fn round<T: Real>(row: &[T], factor: T, to: &mut [i16]) {
            for (to, &x) in to.iter_mut().zip(row) {
                *to = (x * factor).rounded() as i16;
            }
        }
    }
    round(row, T::from_f64(f64::from(factor)), whole);
    rest.fill(0);
}

fn scale_of(head: [i16; SCALE]) -> f32 {
    f32::from_bits(u32::from(head[0] as u16) | u32::from(head[1] as u16) << 16)
}

/// Some panels of columns and rows of C.
#[derive(Clone, Copy)]
struct Part {
    first: usize,
    panels: usize,
    from: usize,
    rows: usize,
}

/// Computes a part of C from rows of integers, `stride` apart. A panel stays in the first cache for a block of rows, and
/// that block in the second for all panels.
///
/// # Safety
/// * the rows are readable;
/// * nobody else touches the part of C.
unsafe fn columns<T: Real>(
    b: &Int8,
    (integers, stride): (*const i16, usize),
    part: Part,
    c: &MatMut<'_, T>,
    accumulate: bool,
) {
    let vectors = cfg!(target_arch = "x86_64") && level() >= Level::Avx2;
    let rows = part.rows.div_ceil(part.rows.div_ceil((BLOCK / (2 * stride)).max(HEIGHT)));
    let tall = rows.div_ceil(rows.div_ceil(HEIGHT));
    let panel = |number: usize, step: usize| b.data.as_ptr().wrapping_add(number * b.panel() + step * LANES);
    let panels = part.first..part.first + part.panels;
    for (from, step) in
        (0..part.rows).step_by(rows).flat_map(|i| (0..b.k.max(1)).step_by(DEPTH).map(move |p| (i, p)))
    {
        let block = rows.min(part.rows - from);
        let (pairs, tiles) = (DEPTH.min(b.k - step).div_ceil(2), block.div_ceil(tall));
        for number in panels.clone() {
            // Each row of tiles asks for its share of the next panel.
            let (next, share) = match tiles {
                1 => (panel(number, step).wrapping_add(AHEAD), PAIR),
                2..=STREAM_TILES => (panel(number + 1, step), PAIR / tiles),
                _ => (panel(number, step), 0),
            };
            for (t, i) in (from..from + block).step_by(tall).enumerate() {
                let rows = tall.min(from + block - i);
                let mut sums = [[0i32; LANES]; HEIGHT];
                let tile = Tile {
                    // SAFETY: row `i` of integers, behind its scale.
                    a: unsafe { integers.add(i * stride + SCALE + step) },
                    stride,
                    b: panel(number, step),
                    pairs,
                    ahead: next.wrapping_add(t * pairs * share),
                    share,
                };
                // SAFETY: the rows and the panel hold `pairs` pairs; the CPU has the level.
                unsafe {
                    #[cfg(target_arch = "x86_64")]
                    if vectors {
                        avx2::tile(rows, &tile, &mut sums);
                    }
                    if !vectors {
                        plain(rows, &tile, &mut sums);
                    }
                }
                let column = number * LANES;
                let lanes = LANES.min(b.n - column);
                let scales = &b.scales[column..column + lanes];
                for (r, sums) in sums.iter().enumerate().take(rows) {
                    // SAFETY: the head of the row; a part of C that is ours.
                    let (scale, to) = unsafe {
                        let head = integers.add((i + r) * stride).cast::<[i16; SCALE]>().read();
                        (scale_of(head), c.block(part.from + i + r, 1, column, lanes).row_mut(0))
                    };
                    for ((to, &sum), &by) in to.iter_mut().zip(sums).zip(scales) {
                        let value = T::from_f64(f64::from(sum as f32 * (scale * by)));
                        *to = if accumulate || step > 0 { *to + value } else { value };
                    }
                }
            }
        }
    }
}

/// Rows of A and a panel of B, both in pairs of steps; and what memory is asked for, `share` bytes a pair.
struct Tile {
    a: *const i16,
    stride: usize,
    b: *const i8,
    pairs: usize,
    ahead: *const i8,
    share: usize,
}

/// # Safety
/// `rows ≤ HEIGHT` rows and the panel hold `pairs` pairs.
unsafe fn plain(rows: usize, tile: &Tile, sums: &mut [[i32; LANES]; HEIGHT]) {
    for p in 0..tile.pairs {
        // SAFETY: the caller's promise.
        let b = unsafe { tile.b.add(p * PAIR).cast::<[i8; PAIR]>().read() };
        for (i, sums) in sums.iter_mut().enumerate().take(rows) {
            // SAFETY: as above.
            let a = unsafe { tile.a.add(i * tile.stride + 2 * p).cast::<[i16; 2]>().read_unaligned() };
            for (l, sum) in sums.iter_mut().enumerate() {
                *sum += i32::from(a[0]) * i32::from(b[2 * l]) + i32::from(a[1]) * i32::from(b[2 * l + 1]);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::{HEIGHT, LANES, PAIR, Tile};
    use crate::gemm::micro::prefetch;

    /// As [`super::plain`].
    ///
    /// # Safety
    /// As [`super::plain`]; the CPU has AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn tile(rows: usize, at: &Tile, sums: &mut [[i32; LANES]; HEIGHT]) {
        // SAFETY: the caller's promise, in all arms.
        unsafe {
            match rows {
                1 => rows_of::<1>(at, sums),
                2 => rows_of::<2>(at, sums),
                3 => rows_of::<3>(at, sums),
                4 => rows_of::<4>(at, sums),
                5 => rows_of::<5>(at, sums),
                6 => rows_of::<6>(at, sums),
                _ => debug_assert!(false, "a tile of {rows} rows"),
            }
        }
    }

    /// # Safety
    /// As [`tile`] with `rows = H`.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn rows_of<const H: usize>(at: &Tile, sums: &mut [[i32; LANES]; HEIGHT]) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut registers = [[_mm256_setzero_si256(); 2]; H];
            for p in 0..at.pairs {
                let b = at.b.add(p * PAIR).cast::<__m128i>();
                let b0 = _mm256_cvtepi8_epi16(_mm_loadu_si128(b));
                let b1 = _mm256_cvtepi8_epi16(_mm_loadu_si128(b.add(1)));
                prefetch(at.ahead.wrapping_add(p * at.share));
                for (i, sums) in registers.iter_mut().enumerate() {
                    let a = at.a.add(i * at.stride + 2 * p).cast::<i32>().read_unaligned();
                    let a = _mm256_set1_epi32(a);
                    sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(a, b0));
                    sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(a, b1));
                }
            }
            for (registers, sums) in registers.iter().zip(sums) {
                let to = sums.as_mut_ptr().cast::<__m256i>();
                _mm256_storeu_si256(to, registers[0]);
                _mm256_storeu_si256(to.add(1), registers[1]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::gemm::{Factor, Gemm, gemm, gemm_by, no_epilogue};

    fn floats(count: usize, seed: u64) -> Vec<f32> {
        let mixed = |at: usize| (at as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15 ^ seed << 17) >> 40;
        (0..count).map(|at| mixed(at) as f32 / 8_388_608.0 - 1.0).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn products(
            m in 1usize..70, n in 1usize..70, k in 0usize..300, transposed: bool, accumulate: bool,
            threads in 1usize..4, scale in prop::sample::select(vec![1e-20f32, 1.0, 1e20]),
        ) {
            let (pool, buffers) = (Pool::new(threads), PackBuffers::new(threads).unwrap());
            let a: Vec<f32> = floats(m * k, 1).iter().map(|x| x * scale).collect();
            let (rows, cols) = if transposed { (n, k) } else { (k, n) };
            let b = floats(rows * cols, 2);
            let int8 = Int8::new(&Mat::new(&b, rows, cols), transposed).unwrap();
            let mut near = b.clone();
            if cols > 0 {
                near.chunks_exact_mut(cols).enumerate().for_each(|(r, row)| int8.row(r, row));
            }
            prop_assert!(near.iter().zip(&b).all(|(x, y)| (x - y).abs() <= 1.0 / 254.0 + 1e-6));
            let run = |m: usize, floats: bool| {
                let mut c = vec![scale; m * n];
                let (a, to) = (Mat::new(&a[..m * k], m, k), MatMut::new(&mut c, m, n));
                let near = Mat::new(&near, rows, cols);
                // SAFETY: `c` is ours.
                unsafe {
                    if floats {
                        let g = Gemm { a, ta: false, b: near, tb: transposed, c: to, accumulate };
                        gemm(&pool, &buffers, &g, &no_epilogue);
                    } else {
                        gemm_by(&pool, &buffers, (a, false), Factor::Int8(&int8), (to, accumulate), &no_epilogue);
                    }
                }
                c
            };
            let (want, got) = (run(m, true), run(m, false));
            for (x, y) in got.iter().zip(&want) {
                // Half a step of the activations, times the sum of the weights.
                prop_assert!((x - y).abs() <= scale * (k as f32 * 0.5 / 4095.0 + 1e-3), "{x} for {y}");
            }
            prop_assert_eq!(&run(1, false)[..], &got[..n]);
        }
    }

    #[test]
    fn sums_are_exact_at_the_limit() {
        let (a, b) = (vec![4095i16; DEPTH * HEIGHT], vec![127i8; DEPTH * LANES]);
        let (pairs, ahead) = (DEPTH / 2, b.as_ptr());
        let tile = Tile { a: a.as_ptr(), stride: DEPTH, b: b.as_ptr(), pairs, ahead, share: PAIR };
        let mut sums = [[0; LANES]; HEIGHT];
        // SAFETY: the operands hold `DEPTH` steps.
        unsafe { plain(HEIGHT, &tile, &mut sums) };
        assert!(sums.iter().flatten().all(|&sum| i64::from(sum) == 127 * 4095 * 4096));
        #[cfg(target_arch = "x86_64")]
        if crate::simd::detect() >= Level::Avx2 {
            let mixed: Vec<i16> = floats(DEPTH * HEIGHT, 3).iter().map(|x| (x * 4095.0) as i16).collect();
            let tile = Tile { a: mixed.as_ptr(), ..tile };
            for rows in 1..=HEIGHT {
                let (mut want, mut got) = ([[0; LANES]; HEIGHT], [[0; LANES]; HEIGHT]);
                // SAFETY: as above, on a CPU with AVX2.
                unsafe {
                    plain(rows, &tile, &mut want);
                    avx2::tile(rows, &tile, &mut got);
                }
                assert_eq!(got, want);
            }
        }
    }

    #[test]
    fn what_is_not_finite_shows() {
        let (pool, buffers) = (Pool::new(1), PackBuffers::new(1).unwrap());
        let int8 = Int8::new(&Mat::new(&[1.0, 0.5, 0.0, 2.0], 2, 2), false).unwrap();
        for bad in [f32::NAN, f32::INFINITY] {
            let (a, mut c) = ([1.0, bad, 1.0, 2.0], [0.0f32; 4]);
            let (a, to) = (Mat::new(&a, 2, 2), MatMut::new(&mut c, 2, 2));
            // SAFETY: `c` is ours.
            unsafe {
                gemm_by(&pool, &buffers, (a, false), Factor::Int8(&int8), (to, false), &no_epilogue);
            }
            assert!(c[..2].iter().all(|x| x.is_nan()), "{c:?}");
            assert!(c[2..].iter().all(|x| x.is_finite()), "{c:?}");
        }
    }
}
