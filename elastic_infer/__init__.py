"""Inference of elastic hybrid models: many widths, one set of weights, one cache."""
