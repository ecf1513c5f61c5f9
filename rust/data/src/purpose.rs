//! The purposes under which this crate draws random numbers (see [`pyrformer_random::Stream`]).
//!
//! A purpose must never be shared between two uses, nor its value changed: saved runs resume by it.

/// Order of the blocks of an epoch of causal batches.
pub const CAUSAL_ORDER: u32 = 0x0101;
/// Offset of the first block of an epoch of causal batches.
pub const CAUSAL_PHASE: u32 = 0x0102;
/// Order of the pieces of an epoch of masked batches.
pub const MASKED_ORDER: u32 = 0x0111;
/// Order of the batches within a pool of masked batches.
pub const MASKED_POOL: u32 = 0x0112;
/// Which tokens are masked, and by what they are replaced.
pub const MASK: u32 = 0x0113;
