"""What a width costs, from its sizes alone: bytes of weights, bytes a token reads, what fits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .buffers import working_bytes
from .cache import PAGE
from .capacity import slot_bytes
from .config import ATTENTION, MAMBA, MLP, ModelConfig, Width, kv_bytes_per_token
from .ops.matmul import TILE, tile_count


@dataclass(frozen=True)
class Fit:
    """What a given memory holds. weights, working: bytes of weights and of activation buffers.
    sequences: how many of `length` tokens fit in the rest; longest: tokens of a single one (0 when
    not even the weights fit)."""

    weights: int
    working: int
    length: int
    sequences: int
    longest: int


def item_size(dtype: torch.dtype) -> int:
    """Bytes of one element."""
    return torch.empty(0, dtype=dtype).element_size()


def weight_bytes(config: ModelConfig, width: Width, dtype: torch.dtype) -> int:
    """Bytes of all weights in memory when `width` is the widest served: matrices in whole 64x64
    tiles of `dtype`, the router and the small per-head tensors in float32."""
    size, D = item_size(dtype), width.hidden_size

    def matrix(rows: int, columns: int, item: int = size) -> int:
        return tile_count(rows) * tile_count(columns) * TILE * TILE * item

    total = (config.vocab_size + 1) * D * size + matrix(config.vocab_size, D)
    for i, kind in enumerate(config.layers):
        total += D * size  # the layer's norm
        if kind == MAMBA:
            heads = width.mamba_num_heads[i]
            inner, bc = heads * config.mamba_head_dim, config.n_groups * config.ssm_state_size
            total += sum(matrix(rows, D) for rows in (inner, inner, bc, bc, heads))
            total += matrix(D, inner) + inner * size + _mamba_vectors(config, heads)
        elif kind == ATTENTION:
            q = width.num_attention_heads[i] * config.head_dim
            kv = config.num_key_value_heads * config.head_dim
            total += matrix(q, D) + 2 * matrix(kv, D) + matrix(D, q)
        elif kind == MLP:
            total += matrix(width.intermediate_size[i], D) + matrix(D, width.intermediate_size[i])
        else:
            E, F = width.n_routed_experts[i], width.moe_intermediate_size[i]
            S = width.moe_shared_expert_intermediate_size[i]
            total += E * (matrix(F, D) + matrix(D, F)) + matrix(S, D) + matrix(D, S)
            total += matrix(E, D, 4) + 4 * E
    return total


def _mamba_vectors(config: ModelConfig, heads: int) -> int:
    """Float32 bytes beside the matrices: A_log, D, dt_bias, convolution weights and bias."""
    return 4 * (3 * heads + config.conv_dim(heads) * (config.conv_kernel + 1))


def bytes_per_token(
    config: ModelConfig, width: Width, dtype: torch.dtype, tracked: Width | None = None
) -> int:
    """Bytes of weights that one decoded token reads: J experts of every mixture, one row of the
    embedding, everything else once.

    Args:
        config: the checkpoint.
        width: the width that reads the token.
        dtype: of the matrices.
        tracked: for a sequence that tracks, the served width, the state of whose Mamba heads is
            updated too.
    """
    size, D = item_size(dtype), width.hidden_size
    total = D * size * 2 + config.vocab_size * D * size  # final norm, one embedding row, the head
    for i, kind in enumerate(config.layers):
        total += D * size
        if kind == MAMBA:
            heads = width.mamba_num_heads[i]
            state = heads if tracked is None else tracked.mamba_num_heads[i]
            inner, bc = heads * config.mamba_head_dim, config.n_groups * config.ssm_state_size
            rows = inner + state * config.mamba_head_dim + 2 * bc + state  # z | x | B | C | dt
            total += (rows * D + inner * D + inner) * size + _mamba_vectors(config, state)
        elif kind == ATTENTION:
            rows = width.num_attention_heads[i] + config.num_key_value_heads
            total += 2 * rows * config.head_dim * D * size
        elif kind == MLP:
            total += 2 * width.intermediate_size[i] * D * size
        else:
            inner = config.num_experts_per_tok * width.moe_intermediate_size[i]
            inner += width.moe_shared_expert_intermediate_size[i]
            total += 2 * inner * D * size + 4 * width.n_routed_experts[i] * (D + 1)
    return total


def fit(
    config: ModelConfig,
    width: Width,
    dtype: torch.dtype,
    memory: int,
    length: int,
    max_num_batched_tokens: int = 2048,
) -> Fit:
    """What `memory` bytes hold when `width` is the widest served.

    Args:
        length: tokens of a sequence, prompt and output.
        max_num_batched_tokens: rows of the largest pass, which the activation buffers are for.
    """
    weights = weight_bytes(config, width, dtype)
    rows = max_num_batched_tokens
    working = working_bytes(config, width, dtype, rows, min(rows, 64), length)
    slot = slot_bytes(config, width, dtype)
    page = PAGE * kv_bytes_per_token(config, item_size(dtype))
    rest = memory - weights - working
    each = slot + -(-length // PAGE) * page
    context = config.max_position_embeddings
    longest = min(context, (rest - slot) // page * PAGE if page else context)
    if rest < slot + page:
        return Fit(weights, working, length, 0, 0)
    return Fit(weights, working, length, rest // each if each else 0, longest)
