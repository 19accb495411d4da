"""KV pages, state slots and the sequences that hold them."""
