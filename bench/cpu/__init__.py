"""Speed of the CPU engine: ops, decoding, quantised models, beside llama.cpp."""
