//! Copies operands into the order in which the tile kernel reads them.
//!
//! A panel is `width` lanes (rows of A or columns of B) by `depth` steps, step-major: the element of lane l at step p is
//! at `p·width + l`. Lanes beyond the operand's edge are zero. The source either has its lanes along rows of memory
//! (`lanes` adjacent, as B or Aᵀ) or its steps (as Bᵀ or A).

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

/// Packs `lanes` lanes from `first` and `depth` steps from `step` into panels of `width`.
///
/// # Safety
/// * the source is readable there;
/// * `to` has room for `ceil(lanes / width) · width · depth` elements that nobody else touches.
pub(super) unsafe fn pack<T: Real>(
    source: &Source<T>,
    first: usize,
    lanes: usize,
    step: usize,
    depth: usize,
    width: usize,
    mut to: *mut T,
) {
    for lane in (0..lanes).step_by(width) {
        let count = width.min(lanes - lane);
        let from = source.at(first + lane, step);
        // SAFETY: the caller's promise.
        let panel = unsafe { std::slice::from_raw_parts_mut(to, width * depth) };
        if source.lanes_adjacent {
            for (p, to) in panel.chunks_exact_mut(width).enumerate() {
                // SAFETY: the caller's promise.
                let row = unsafe { std::slice::from_raw_parts(from.add(p * source.stride), count) };
                to[..count].copy_from_slice(row);
                to[count..].fill(T::ZERO);
            }
        } else {
            for l in 0..width {
                if l < count {
                    // SAFETY: the caller's promise.
                    let row = unsafe { std::slice::from_raw_parts(from.add(l * source.stride), depth) };
                    for (p, &x) in row.iter().enumerate() {
                        panel[p * width + l] = x;
                    }
                } else {
                    for p in 0..depth {
                        panel[p * width + l] = T::ZERO;
                    }
                }
            }
        }
        to = to.wrapping_add(width * depth);
    }
}
