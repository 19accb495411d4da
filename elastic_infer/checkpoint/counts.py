"""Parameters and bytes of a model at a width."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .config import ATTENTION, MAMBA, MLP
from .widths import Width

if TYPE_CHECKING:
    from .config import ModelConfig


class Counts(NamedTuple):
    """Parameters of a width.

    `active` counts the experts of one token and both embedding matrices;
    `active_without_embedding` leaves out the input embedding, of which a token reads one row.
    """

    total: int
    active: int
    active_without_embedding: int


def count_parameters(config: ModelConfig, width: Width) -> Counts:
    """Parameters of a width: all of them, and those that one token uses.

    Args:
        config: the checkpoint.
        width: a width of it.

    Returns:
        Counts(total, active, active_without_embedding), norms, biases and per-head vectors
        included, the router's correction bias too.
    """
    hidden = width.hidden_size
    total = active = hidden  # final norm
    for i, layer in enumerate(config.layers):
        shared = hidden  # the layer's own norm
        experts = used = 0
        if layer == MAMBA:
            heads = width.mamba_num_heads[i]
            inner = heads * config.mamba_head_dim
            conv = config.conv_dim(heads)
            shared += hidden * (inner + conv + heads) + conv * (config.conv_kernel + 1)
            shared += 3 * heads + inner + inner * hidden
        elif layer == ATTENTION:
            rows = width.num_attention_heads[i] + config.num_key_value_heads
            shared += 2 * rows * config.head_dim * hidden
        elif layer == MLP:
            shared += 2 * width.intermediate_size[i] * hidden
        else:
            count = width.n_routed_experts[i]
            expert = 2 * width.moe_intermediate_size[i] * hidden
            shared += count * hidden + count
            shared += 2 * width.moe_shared_expert_intermediate_size[i] * hidden
            experts, used = count * expert, config.num_experts_per_tok * expert
        total += shared + experts
        active += shared + used
    embedding = config.vocab_size * hidden
    lookup = 0 if config.tie_word_embeddings else embedding
    return Counts(total + embedding + lookup, active + embedding + lookup, active + embedding)


def kv_bytes_per_token(config: ModelConfig, itemsize: int = 2) -> int:
    """Bytes of K and V of one token over all attention layers; the same at every width.

    Args:
        config: the checkpoint.
        itemsize: bytes of one cached value, 2 for bfloat16.
    """
    layers = len(config.layers_of(ATTENTION))
    return layers * 2 * config.num_key_value_heads * config.head_dim * itemsize


def state_bytes(config: ModelConfig, conv_itemsize: int = 2) -> int:
    """Bytes of one sequence's Mamba state: SSM float32 [H, P, N] and conv [C, 3] per layer.

    Args:
        config: the checkpoint; state is kept for all of its heads, whatever the width.
        conv_itemsize: bytes of one conv value, 2 for bfloat16.
    """
    ssm = config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size * 4
    conv = config.conv_dim() * (config.conv_kernel - 1) * conv_itemsize
    return len(config.layers_of(MAMBA)) * (ssm + conv)
