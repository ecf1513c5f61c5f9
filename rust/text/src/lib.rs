//! Tokenizers and their training, readers, packing, masking, batches.
