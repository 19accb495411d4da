"""Bytes and operations of a whole pass, from sizes alone: its floor on a device."""

from __future__ import annotations

from elastic_infer.checkpoint.config import ModelConfig
from elastic_infer.checkpoint.geometry import layer_sizes, layer_tensors
from elastic_infer.checkpoint.widths import Width

STATE_ITEM = 4  # the SSM state is float32


def distinct_experts(experts: int, chosen: int, rows: int) -> float:
    """Expected number of experts that some row names, for evenly spread rows."""
    return experts * (1 - (1 - chosen / experts) ** rows)


def projections(config: ModelConfig, width: Width, layer: int) -> int:
    """Weights of a layer that every row uses (of a mixture: the shared expert)."""
    sizes = layer_sizes(width)[layer]
    return sum(
        tensor.count(sizes)
        for tensor in layer_tensors(config, config.layers[layer])
        if tensor.is_matrix and not tensor.per_expert and not tensor.float32
    )


def step_bytes(
    config: ModelConfig,
    width: Width,
    batch: int,
    context: int,
    distinct: float | None = None,
    item: int = 2,
) -> int:
    """Bytes that one decode step moves at least: weights once, every sequence's state in and out,
    its keys and values once.

    Args:
        batch: sequences, one token each.
        context: tokens of each in the cache.
        distinct: experts that some row names, by layer; None: as expected of evenly spread rows.
        item: bytes of a weight, a key or a value.
    """
    D, J = width.hidden_size, config.num_experts_per_tok
    total = (config.vocab_size + batch) * D * item
    for layer, kind in enumerate(config.layers):
        total += projections(config, width, layer) * item
        if kind == "M":
            inner = width.mamba_num_heads[layer] * config.mamba_head_dim
            channels = config.conv_dim(width.mamba_num_heads[layer])
            history = channels * (config.conv_kernel - 1) * item
            total += 2 * batch * (inner * config.ssm_state_size * STATE_ITEM + history)
        elif kind == "*":
            total += 2 * batch * context * config.num_key_value_heads * config.head_dim * item
        elif kind == "E":
            E = width.n_routed_experts[layer]
            read = distinct_experts(E, J, batch) if distinct is None else distinct
            total += int(read * 2 * D * width.moe_intermediate_size[layer] * item) + 4 * E * D
    return total


def prefill_flops(config: ModelConfig, width: Width, tokens: int, chunk: int = 128) -> int:
    """Operations of reading a prompt, with the logits of its last token: products of weights,
    causal attention, and the chunked form of the recurrence."""
    D, N, P = width.hidden_size, config.ssm_state_size, config.mamba_head_dim
    total = 2 * config.vocab_size * D
    for layer, kind in enumerate(config.layers):
        weights = projections(config, width, layer)
        if kind == "E":
            routed = config.num_experts_per_tok * width.moe_intermediate_size[layer]
            weights += 2 * D * routed + width.n_routed_experts[layer] * D
        total += 2 * tokens * weights
        if kind == "M":
            heads = width.mamba_num_heads[layer]
            total += tokens * (2 * chunk * N * config.n_groups + heads * P * (2 * chunk + 4 * N))
        elif kind == "*":
            total += 2 * tokens**2 * width.num_attention_heads[layer] * config.head_dim
    return total
