//! Decoding over slices of logits: processors, sampling, beams, stopping.
