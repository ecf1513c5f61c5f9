//! What a kernel sees of memory: a matrix of rows, each row contiguous, rows a fixed stride apart.
//!
//! Every tensor of a plan is one of these (leading axes flattened into rows, the last axis into columns), so a slice
//! along the last axis is a view: the same rows with fewer columns.

use std::marker::PhantomData;

/// A read-only matrix. `stride` is the distance between rows in elements.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a, T> {
    data: *const T,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns; a row is contiguous.
    pub cols: usize,
    /// Elements from the start of one row to the start of the next.
    pub stride: usize,
    life: PhantomData<&'a [T]>,
}

// SAFETY: a `Mat` only ever reads, like the `&[T]` it stands for.
unsafe impl<T: Sync> Send for Mat<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Mat<'_, T> {}

impl<'a, T> Mat<'a, T> {
    /// Views `data` as `[rows, cols]` without gaps.
    ///
    /// # Panics
    /// If `data` is shorter than `rows * cols`.
    #[must_use]
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        assert!(data.len() >= rows * cols, "{} elements cannot hold [{rows}, {cols}]", data.len());
        Self { data: data.as_ptr(), rows, cols, stride: cols, life: PhantomData }
    }

    /// # Safety
    /// * for every `i < rows`, `data + i * stride .. + cols` is readable and initialised for `'a`;
    /// * nothing writes to those elements during `'a`.
    #[must_use]
    pub unsafe fn from_raw(data: *const T, rows: usize, cols: usize, stride: usize) -> Self {
        Self { data, rows, cols, stride, life: PhantomData }
    }

    /// Row `i`, of length `cols`.
    #[inline(always)]
    #[must_use]
    pub fn row(&self, i: usize) -> &'a [T] {
        debug_assert!(i < self.rows, "row {i} of {}", self.rows);
        // SAFETY: the constructors promise that row `i < rows` is readable.
        unsafe { std::slice::from_raw_parts(self.data.add(i * self.stride), self.cols) }
    }

    /// The first element's address.
    #[inline(always)]
    #[must_use]
    pub fn as_ptr(&self) -> *const T {
        self.data
    }

    /// Rows `from .. from + rows`, columns `col .. col + cols`.
    #[inline(always)]
    #[must_use]
    pub fn block(&self, from: usize, rows: usize, col: usize, cols: usize) -> Self {
        debug_assert!(from + rows <= self.rows && col + cols <= self.cols);
        // SAFETY: the block lies inside this matrix.
        Self { data: unsafe { self.data.add(from * self.stride + col) }, rows, cols, ..*self }
    }
}

/// A matrix that several threads fill together, each its own part.
#[derive(Clone, Copy, Debug)]
pub struct MatMut<'a, T> {
    data: *mut T,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns; a row is contiguous.
    pub cols: usize,
    /// Elements from the start of one row to the start of the next.
    pub stride: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: writing goes through the unsafe `row_mut`/`slice_mut`, whose callers promise disjoint parts.
unsafe impl<T: Send> Send for MatMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for MatMut<'_, T> {}

impl<'a, T> MatMut<'a, T> {
    /// Views `data` as `[rows, cols]` without gaps.
    ///
    /// # Panics
    /// If `data` is shorter than `rows * cols`.
    #[must_use]
    pub fn new(data: &'a mut [T], rows: usize, cols: usize) -> Self {
        assert!(data.len() >= rows * cols, "{} elements cannot hold [{rows}, {cols}]", data.len());
        Self { data: data.as_mut_ptr(), rows, cols, stride: cols, life: PhantomData }
    }

    /// # Safety
    /// * for every `i < rows`, `data + i * stride .. + cols` is readable and writable for `'a`;
    /// * nothing else touches those elements during `'a`, but through copies of this view.
    #[must_use]
    pub unsafe fn from_raw(data: *mut T, rows: usize, cols: usize, stride: usize) -> Self {
        Self { data, rows, cols, stride, life: PhantomData }
    }

    /// Row `i`, of length `cols`.
    ///
    /// # Safety
    /// While the slice lives, no other thread or slice touches row `i` of this view.
    #[inline(always)]
    #[must_use]
    pub unsafe fn row_mut(&self, i: usize) -> &'a mut [T] {
        debug_assert!(i < self.rows, "row {i} of {}", self.rows);
        // SAFETY: the row is inside the view (constructor), and the caller has it alone.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(i * self.stride), self.cols) }
    }

    /// The first element's address.
    #[inline(always)]
    #[must_use]
    pub fn as_ptr(&self) -> *mut T {
        self.data
    }

    /// Rows `from .. from + rows`, columns `col .. col + cols`.
    #[inline(always)]
    #[must_use]
    pub fn block(&self, from: usize, rows: usize, col: usize, cols: usize) -> Self {
        debug_assert!(from + rows <= self.rows && col + cols <= self.cols);
        // SAFETY: the block lies inside this matrix.
        Self { data: unsafe { self.data.add(from * self.stride + col) }, rows, cols, ..*self }
    }

    /// Writes one element.
    ///
    /// # Safety
    /// No other thread or slice touches the element.
    #[inline(always)]
    pub unsafe fn set(&self, row: usize, col: usize, value: T) {
        debug_assert!(row < self.rows && col < self.cols, "({row}, {col}) of [{}, {}]", self.rows, self.cols);
        // SAFETY: inside the view (constructor), and the caller has it alone.
        unsafe { self.data.add(row * self.stride + col).write(value) }
    }

    /// The same memory, read-only.
    ///
    /// # Safety
    /// Nothing writes to it while the result is read.
    #[inline(always)]
    #[must_use]
    pub unsafe fn as_mat(&self) -> Mat<'a, T> {
        // SAFETY: writable memory is readable; the caller keeps writers away.
        unsafe { Mat::from_raw(self.data, self.rows, self.cols, self.stride) }
    }
}
