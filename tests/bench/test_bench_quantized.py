"""bench/cpu/quantized.py on tiny shapes: models of random NVFP4 weights, and what a step reads."""

import pytest
import torch

from bench.common.tokens import random_tokens
from bench.cpu import quantized


@pytest.mark.parametrize("width", ["S", "L"])
def test_a_random_model_runs(width):
    built = quantized.build(quantized.model_config("tiny"), width, 1)
    ours = quantized.Ours(built)
    tokens = random_tokens(5, built.config.vocab_size, 0)
    assert ours.decode([tokens], [width], tokens) > 0
    assert ours.prefill(tokens * 8, width) > 0
    assert torch.isfinite(built.core.model.buffers.logits[0]).all()
    assert 0 < quantized.python_share(built, width, tokens, tokens) < 1


def test_bytes_of_a_step():
    """Everything once but for the experts that no token names, and the rest of the embedding."""
    built = quantized.build(quantized.model_config("tiny"), "L", 1)
    weights, config = built.core.model.weights, built.config
    idle = 0
    for layer in weights.layers:
        if hasattr(layer, "gate"):
            one = layer.up.image[0].nbytes + layer.down.image[0].nbytes
            idle += one * (layer.up.experts - config.num_experts_per_tok)
            idle += layer.up.scale.nbytes + layer.down.scale.nbytes
    rows = weights.embedding.nbytes - weights.embedding[0].nbytes
    moved = quantized.bytes_per_step(built, "L") - quantized.state_bytes(built, "L")
    expected = weights.nbytes - idle - rows - weights.final_norm.nbytes
    assert abs(moved - expected) <= 4 * 1024  # the scales of segments
