//! Model files: safetensors, Hugging Face layout, atomic directories.
