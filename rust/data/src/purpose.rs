//! The purposes under which this crate draws random numbers (see [`pyrformer_random::Stream`]).
//!
//! A purpose must never be shared between two uses, nor its value changed: saved runs resume by it.

/// Order of the blocks of an epoch of causal batches.
pub const CAUSAL_ORDER: u32 = 0x0101;
/// Offset of the first block of an epoch of causal batches.
pub const CAUSAL_PHASE: u32 = 0x0102;
/// Length of the prefix of a row of causal batches.
pub const PREFIX: u32 = 0x0103;
/// Spans and order of the targets of a row of permuted batches.
pub const PERMUTE: u32 = 0x0104;
/// Order of the pieces of an epoch of masked batches.
pub const MASKED_ORDER: u32 = 0x0111;
/// Order of the batches within a pool of masked batches.
pub const MASKED_POOL: u32 = 0x0112;
/// Which tokens are masked, and by what they are replaced.
pub const MASK: u32 = 0x0113;
/// Order of the runs of sentences of an epoch of batches of pairs.
pub const PAIR_ORDER: u32 = 0x0121;
/// Where a run of sentences is cut, and what follows.
pub const PAIR: u32 = 0x0122;
