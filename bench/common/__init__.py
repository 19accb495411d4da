"""Roofs, models, peers in torch and the record of commit and machine that all benchmarks share."""
