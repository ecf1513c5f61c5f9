"""GGUF, llama.cpp's files of models: the file and its blocks of few bits; what its architectures call things; models
out of it and into it."""
