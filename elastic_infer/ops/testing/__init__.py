"""The laws and shapes that every op is held to, for tests and benchmarks."""
