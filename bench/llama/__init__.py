"""llama.cpp as a peer: building it, converting models, timing it."""
