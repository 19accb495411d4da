"""What the CPU engine reaches: ops, decoding, quantised models, beside llama.cpp."""
