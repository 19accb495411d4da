"""Parameters and bytes of a model at a width."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .config import ATTENTION, MAMBA
from .geometry import layer_sizes, layer_tensors
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
    embedding = config.vocab_size * width.hidden_size
    total = active = width.hidden_size + embedding  # the last norm
    if not config.tie_word_embeddings:
        total, active = total + embedding, active + embedding
    tensors = {kind: layer_tensors(config, kind) for kind in set(config.layers)}
    for kind, sizes in zip(config.layers, layer_sizes(width)):
        experts, used = sizes["n_routed_experts"], config.num_experts_per_tok
        total, active = total + width.hidden_size, active + width.hidden_size  # the layer's norm
        for tensor in tensors[kind]:
            count = tensor.count(sizes)
            total += count * (experts if tensor.per_expert else 1)
            active += count * (used if tensor.per_expert else 1)
    return Counts(total, active, active - (0 if config.tie_word_embeddings else embedding))


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
