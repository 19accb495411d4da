"""Sampling parameters, and what they change in a row of logits."""
