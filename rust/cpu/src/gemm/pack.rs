//! Copies operands into the order in which the tile kernel reads them.
//!
//! A panel is `width` lanes (rows of A or columns of B) by `depth` steps, step-major: the element of lane l at step p is
//! at `p·width + l`. Lanes beyond the operand's edge are zero. The source either has its lanes along rows of memory
//! (`lanes` adjacent, as B or Aᵀ) or its steps (as Bᵀ or A).

use super::micro::prefetch;
use crate::real::Real;

/// An operand as the packers see it: lanes × steps, one of them contiguous.
#[derive(Clone, Copy)]
pub(super) struct Source<T> {
    pub(super) data: *const T,
    /// Distance of two rows of memory.
    pub(super) stride: usize,
    /// Whether lanes are contiguous (a row of memory is one step).
    pub(super) lanes_adjacent: bool,
}

// SAFETY: it is only an address; those who read there promise that it is readable and that nobody writes.
unsafe impl<T: Sync> Sync for Source<T> {}

impl<T> Source<T> {
    /// Address of lane `lane` at step `step`.
    #[inline(always)]
    pub(super) fn at(&self, lane: usize, step: usize) -> *const T {
        let offset = if self.lanes_adjacent { step * self.stride + lane } else { lane * self.stride + step };
        self.data.wrapping_add(offset)
    }

    /// Distances between lanes and between steps.
    pub(super) fn strides(&self) -> (usize, usize) {
        if self.lanes_adjacent { (1, self.stride) } else { (self.stride, 1) }
    }
}

/// Panels filled side by side from rows of memory: longer reads, few enough streams of writes.
const TOGETHER: usize = 4;
/// How many rows ahead memory is asked for what is copied: nothing foresees a row that is pages away.
const ROWS_AHEAD: usize = 8;

/// Transposes one panel: `lanes` rows of memory, `stride` apart, into `depth` steps of `width` lanes, zeros beyond.
///
/// # Safety
/// * the rows are readable, and the panel is writable by nobody else;
/// * `lanes ≤ width`.
pub(super) type Transpose<T> =
    unsafe fn(from: *const T, stride: usize, lanes: usize, depth: usize, width: usize, panel: *mut T);

/// Packs `lanes` lanes from `first` and `depth` steps from `step` into panels of `width`.
///
/// # Safety
/// * the source is readable there, and the CPU has what `transpose` needs;
/// * `to` has room for `ceil(lanes / width) · width · depth` elements that nobody else touches.
pub(super) unsafe fn pack<T: Real>(
    source: &Source<T>,
    transpose: Transpose<T>,
    (first, lanes): (usize, usize),
    (step, depth): (usize, usize),
    width: usize,
    to: *mut T,
) {
    if source.lanes_adjacent {
        let from = source.at(first, step);
        // SAFETY: the caller's promise, in all arms.
        unsafe {
            match width {
                4 => copy::<T, 4>(from, source.stride, lanes, depth, to),
                6 => copy::<T, 6>(from, source.stride, lanes, depth, to),
                8 => copy::<T, 8>(from, source.stride, lanes, depth, to),
                12 => copy::<T, 12>(from, source.stride, lanes, depth, to),
                16 => copy::<T, 16>(from, source.stride, lanes, depth, to),
                32 => copy::<T, 32>(from, source.stride, lanes, depth, to),
                _ => unreachable!("no kernel has panels of {width}"),
            }
        }
        return;
    }
    for lane in (0..lanes).step_by(width) {
        let count = width.min(lanes - lane);
        // SAFETY: the caller's promise; `lane` is a multiple of the width, so panels before it take `lane · depth`.
        unsafe {
            transpose(source.at(first + lane, step), source.stride, count, depth, width, to.add(lane * depth))
        };
    }
}

/// Packs rows of memory that are steps.
///
/// # Safety
/// As [`pack`].
unsafe fn copy<T: Real, const W: usize>(
    from: *const T,
    stride: usize,
    lanes: usize,
    depth: usize,
    to: *mut T,
) {
    let whole = lanes / W * W;
    for group in (0..whole).step_by(TOGETHER * W) {
        let end = whole.min(group + TOGETHER * W);
        for p in 0..depth {
            for lane in (group..end).step_by(W) {
                let ahead = from.wrapping_add((p + ROWS_AHEAD) * stride + lane);
                for line in 0..(W * size_of::<T>()).div_ceil(64) {
                    prefetch(ahead.wrapping_byte_add(64 * line));
                }
                // SAFETY: the caller's promise.
                unsafe {
                    let row = from.add(p * stride + lane).cast::<[T; W]>().read();
                    to.add(lane * depth + p * W).cast::<[T; W]>().write(row);
                }
            }
        }
    }
    let rest = lanes - whole;
    if rest > 0 {
        for p in 0..depth {
            // SAFETY: the caller's promise; the parts together are `rest` lanes.
            unsafe {
                let (mut from, mut to) = (from.add(p * stride + whole), to.add(whole * depth + p * W));
                to.cast::<[T; W]>().write([T::ZERO; W]);
                // In parts of fixed size, as a copy of unknown length is a call.
                copy_part::<T, 16>(rest, &mut from, &mut to);
                copy_part::<T, 8>(rest, &mut from, &mut to);
                copy_part::<T, 4>(rest, &mut from, &mut to);
                copy_part::<T, 2>(rest, &mut from, &mut to);
                copy_part::<T, 1>(rest, &mut from, &mut to);
            }
        }
    }
}

/// Copies `N` elements, a power of two, if it is a term of `count`.
///
/// # Safety
/// If it is, there are as many at `from` and `to`.
#[inline(always)]
unsafe fn copy_part<T: Real, const N: usize>(count: usize, from: &mut *const T, to: &mut *mut T) {
    if count & N != 0 {
        // SAFETY: the caller's promise.
        unsafe {
            to.cast::<[T; N]>().write(from.cast::<[T; N]>().read());
            (*from, *to) = (from.add(N), to.add(N));
        }
    }
}

/// [`Transpose`] in plain Rust.
///
/// # Safety
/// As [`Transpose`].
pub(super) unsafe fn transpose<T: Real>(
    from: *const T,
    stride: usize,
    lanes: usize,
    depth: usize,
    width: usize,
    panel: *mut T,
) {
    for lane in 0..width {
        for p in 0..depth {
            // SAFETY: the caller's promise.
            unsafe {
                *panel.add(p * width + lane) =
                    if lane < lanes { *from.add(lane * stride + p) } else { T::ZERO }
            };
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use std::arch::x86_64::*;

    use crate::gemm::micro::prefetch;

    /// How far ahead of what is read the next is asked for.
    const AHEAD: usize = 128;

    /// [`super::Transpose`] by blocks of 8 × 8 in registers, for widths made of groups of 8, 6 and 4 lanes.
    ///
    /// # Safety
    /// As [`super::Transpose`]; the CPU has AVX2; `width % 8` is 0, 4 or 6.
    #[target_feature(enable = "avx2")]
    pub(in crate::gemm) unsafe fn transpose(
        from: *const f32,
        stride: usize,
        lanes: usize,
        depth: usize,
        width: usize,
        panel: *mut f32,
    ) {
        debug_assert!(matches!(width % 8, 0 | 4 | 6), "width {width}");
        let whole = depth - depth % 8;
        for p in (0..whole).step_by(8) {
            for group in (0..width).step_by(8) {
                let mut rows = [_mm256_setzero_ps(); 8];
                for (l, row) in rows.iter_mut().enumerate() {
                    if group + l < lanes {
                        let at = (group + l) * stride + p;
                        // SAFETY: the lane exists, and so do steps `p..p + 8`.
                        *row = unsafe { _mm256_loadu_ps(from.add(at)) };
                        prefetch(from.wrapping_add(at + AHEAD));
                    }
                }
                let steps = transpose_8x8(rows);
                for (q, &step) in steps.iter().enumerate() {
                    // SAFETY: the lanes written are below `width`.
                    unsafe {
                        let to = panel.add((p + q) * width + group);
                        match width - group {
                            4 => _mm_storeu_ps(to, _mm256_castps256_ps128(step)),
                            6 => {
                                _mm_storeu_ps(to, _mm256_castps256_ps128(step));
                                _mm_storel_pd(
                                    to.add(4).cast(),
                                    _mm_castps_pd(_mm256_extractf128_ps::<1>(step)),
                                );
                            }
                            _ => _mm256_storeu_ps(to, step),
                        }
                    }
                }
            }
        }
        if whole < depth {
            // SAFETY: the caller's promise; the steps from `whole` on.
            unsafe {
                super::transpose(
                    from.add(whole),
                    stride,
                    lanes,
                    depth - whole,
                    width,
                    panel.add(whole * width),
                );
            }
        }
    }

    /// Element j of result i is element i of row j.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(in crate::gemm) fn transpose_8x8(rows: [__m256; 8]) -> [__m256; 8] {
        let [r0, r1, r2, r3, r4, r5, r6, r7] = rows;
        let (a0, a1) = (_mm256_unpacklo_ps(r0, r1), _mm256_unpackhi_ps(r0, r1));
        let (a2, a3) = (_mm256_unpacklo_ps(r2, r3), _mm256_unpackhi_ps(r2, r3));
        let (a4, a5) = (_mm256_unpacklo_ps(r4, r5), _mm256_unpackhi_ps(r4, r5));
        let (a6, a7) = (_mm256_unpacklo_ps(r6, r7), _mm256_unpackhi_ps(r6, r7));
        let (b0, b1) = (_mm256_shuffle_ps::<0x44>(a0, a2), _mm256_shuffle_ps::<0xEE>(a0, a2));
        let (b2, b3) = (_mm256_shuffle_ps::<0x44>(a1, a3), _mm256_shuffle_ps::<0xEE>(a1, a3));
        let (b4, b5) = (_mm256_shuffle_ps::<0x44>(a4, a6), _mm256_shuffle_ps::<0xEE>(a4, a6));
        let (b6, b7) = (_mm256_shuffle_ps::<0x44>(a5, a7), _mm256_shuffle_ps::<0xEE>(a5, a7));
        [
            _mm256_permute2f128_ps::<0x20>(b0, b4),
            _mm256_permute2f128_ps::<0x20>(b1, b5),
            _mm256_permute2f128_ps::<0x20>(b2, b6),
            _mm256_permute2f128_ps::<0x20>(b3, b7),
            _mm256_permute2f128_ps::<0x31>(b0, b4),
            _mm256_permute2f128_ps::<0x31>(b1, b5),
            _mm256_permute2f128_ps::<0x31>(b2, b6),
            _mm256_permute2f128_ps::<0x31>(b3, b7),
        ]
    }
}
