"""Speed of the CPU engine: ops, decoding, quantized models, beside llama.cpp."""
