//! Zeroed memory on a cache line. Pages that are not touched cost nothing: they come from the system as zeros.

use std::alloc::{Layout, alloc_zeroed, dealloc};

/// What kernels and caches want an address to be a multiple of.
pub(crate) const ALIGNMENT: usize = 64;

/// Memory of its own.
#[derive(Debug)]
pub(crate) struct Zeroed {
    data: *mut u8,
    bytes: usize,
    allocated: *mut u8,
    layout: Layout,
}

// SAFETY: it owns its memory like a `Box<[u8]>`; it gives out a raw pointer, and who uses that when is the user's affair.
unsafe impl Send for Zeroed {}
// SAFETY: as above.
unsafe impl Sync for Zeroed {}

impl Zeroed {
    /// `bytes` zeros; `None` if there is no such memory.
    pub(crate) fn new(bytes: usize) -> Option<Self> {
        // Asked for a larger alignment than its own, the allocator would write the zeros itself.
        let layout = Layout::from_size_align(bytes.checked_add(ALIGNMENT)?, 16).ok()?;
        // SAFETY: the layout's size is not zero.
        let allocated = unsafe { alloc_zeroed(layout) };
        if allocated.is_null() {
            return None;
        }
        let data = allocated.map_addr(|at| at.next_multiple_of(ALIGNMENT));
        Some(Self { data, bytes, allocated, layout })
    }

    /// Its size.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The first byte.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.data
    }
}

impl Drop for Zeroed {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.allocated, self.layout) }
    }
}
