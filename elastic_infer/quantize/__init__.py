"""Quantized weights: the formats, reading published checkpoints, and making new ones."""
