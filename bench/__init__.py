"""Benchmarks: every figure of the documentation is printed and committed by one of these."""
