"""The engine: its public object, sequences driven by hand, and the one thread."""
