//! Zeroed memory on a cache line. Pages that are not touched cost nothing: they come from the system as zeros.

use memmap2::MmapMut;

/// From how many bytes on memory is asked for in huge pages, of 2 MiB on most machines: a product that reads a column
/// of tiles meets another page at each row, more of them than the processor remembers where small ones are.
const HUGE: usize = 4 << 20;

/// Memory of its own.
#[derive(Debug)]
pub(crate) struct Zeroed {
    data: *mut u8,
    bytes: usize,
    #[expect(dead_code, reason = "held for its drop")]
    mapping: MmapMut,
}

// SAFETY: it owns its memory like a `Box<[u8]>`; it gives out a raw pointer, and who uses that when is the user's affair.
unsafe impl Send for Zeroed {}
// SAFETY: as above.
unsafe impl Sync for Zeroed {}

impl Zeroed {
    /// `bytes` zeros; `None` if there is no such memory.
    pub(crate) fn new(bytes: usize) -> Option<Self> {
        let mut mapping = MmapMut::map_anon(bytes.max(1)).ok()?;
        #[cfg(target_os = "linux")]
        if bytes >= HUGE {
            // A kernel without huge pages says no, and small ones do as well.
            let _ = mapping.advise(memmap2::Advice::HugePage);
        }
        Some(Self { data: mapping.as_mut_ptr(), bytes, mapping })
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
