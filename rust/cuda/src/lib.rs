//! CUDA kernel sources, embedded; launch records for a plan. No driver.
