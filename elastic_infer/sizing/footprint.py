"""Cost of a width from its sizes alone: bytes of weights, bytes per token, sequences that fit."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..cache.dtypes import item_size
from ..checkpoint.config import ATTENTION, MAMBA, MLP, ModelConfig
from ..checkpoint.counts import count_parameters
from ..checkpoint.widths import Width
from ..codes import bits_per_weight
from ..ops.tiles import TILE, tile_count


class _Store:
    """Bytes of matrices by checkpoint name: those of their format, else of one dtype."""

    def __init__(self, dtype: torch.dtype, formats: Mapping[str, str] | None):
        self.plain = str(dtype).removeprefix("torch.")
        self.formats = formats or {}

    def weights(self, name: str, count: int) -> int:
        """Bytes of `count` weights of a matrix as they are read."""
        return int(count * bits_per_weight(self.formats.get(name, self.plain)) / 8)

    def tiles(self, name: str, rows: int, columns: int) -> int:
        """Bytes of a matrix in whole tiles, with its scale where it has one."""
        count = tile_count(rows) * tile_count(columns) * TILE * TILE
        return self.weights(name, count) + (4 if name in self.formats else 0)


def head_name(config: ModelConfig) -> str:
    """The tensor that makes the logits."""
    return "backbone.embeddings.weight" if config.tie_word_embeddings else "lm_head.weight"


def weight_bytes(
    config: ModelConfig,
    width: Width,
    dtype: torch.dtype,
    formats: Mapping[str, str] | None = None,
) -> int:
    """Bytes of all weights in memory when `width` is the widest served: matrices in whole 64x64
    tiles of their format, else of `dtype`, the router and the small per-head tensors in float32.

    formats: {checkpoint name: "nvfp4" or "fp8"} of quantised matrices (`Checkpoint.formats`).
    """
    size, D, matrix = item_size(dtype), width.hidden_size, _Store(dtype, formats).tiles
    total = (config.vocab_size + 1) * D * size + matrix(head_name(config), config.vocab_size, D)
    for i, kind in enumerate(config.layers):
        at = f"backbone.layers.{i}.mixer."
        total += D * size  # the layer's norm
        if kind == MAMBA:
            heads = width.mamba_num_heads[i]
            inner, bc = heads * config.mamba_head_dim, config.n_groups * config.ssm_state_size
            segments = (inner, inner, bc, bc, heads)
            total += sum(matrix(at + "in_proj.weight", rows, D) for rows in segments)
            total += matrix(at + "out_proj.weight", D, inner)
            total += inner * size + _mamba_vectors(config, heads)
        elif kind == ATTENTION:
            q = width.num_attention_heads[i] * config.head_dim
            kv = config.num_key_value_heads * config.head_dim
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                total += matrix(f"{at}{name}_proj.weight", rows, D)
            total += matrix(at + "o_proj.weight", D, q)
        elif kind == MLP:
            total += _up_down(matrix, at, width.intermediate_size[i], D)
        else:
            E, F = width.n_routed_experts[i], width.moe_intermediate_size[i]
            S = width.moe_shared_expert_intermediate_size[i]
            total += E * _up_down(matrix, at + "experts.0.", F, D)
            total += _up_down(matrix, at + "shared_experts.", S, D)
            total += tile_count(E) * tile_count(D) * TILE * TILE * 4 + 4 * E  # the router
    return total


def _up_down(matrix, at: str, inner: int, hidden: int) -> int:
    return matrix(at + "up_proj.weight", inner, hidden) + matrix(
        at + "down_proj.weight", hidden, inner
    )


def _mamba_vectors(config: ModelConfig, heads: int) -> int:
    """Float32 bytes beside the matrices: A_log, D, dt_bias, convolution weights and bias."""
    return 4 * (3 * heads + config.conv_dim(heads) * (config.conv_kernel + 1))


def bytes_per_token(
    config: ModelConfig,
    width: Width,
    dtype: torch.dtype,
    tracked: Width | None = None,
    formats: Mapping[str, str] | None = None,
) -> int:
    """Bytes of weights that one decoded token reads: J experts of every mixture, one row of the
    embedding, everything else once.

    Args:
        config: the checkpoint.
        width: the width that reads the token.
        dtype: of the matrices.
        tracked: for a sequence that tracks, the served width, the state of whose Mamba heads is
            updated too.
        formats: {checkpoint name: "nvfp4" or "fp8"} of quantised matrices.
    """
    size, D, read = item_size(dtype), width.hidden_size, _Store(dtype, formats).weights
    total = D * size * 2 + read(head_name(config), config.vocab_size * D)  # norm, a row, the head
    for i, kind in enumerate(config.layers):
        at = f"backbone.layers.{i}.mixer."
        total += D * size
        if kind == MAMBA:
            heads = width.mamba_num_heads[i]
            state = heads if tracked is None else tracked.mamba_num_heads[i]
            inner, bc = heads * config.mamba_head_dim, config.n_groups * config.ssm_state_size
            rows = inner + state * config.mamba_head_dim + 2 * bc + state  # z | x | B | C | dt
            total += read(at + "in_proj.weight", rows * D) + inner * size
            total += read(at + "out_proj.weight", inner * D) + _mamba_vectors(config, state)
        elif kind == ATTENTION:
            q = width.num_attention_heads[i] * config.head_dim
            kv = config.num_key_value_heads * config.head_dim
            for name, rows in (("q", q), ("k", kv), ("v", kv), ("o", q)):
                total += read(f"{at}{name}_proj.weight", rows * D)
        elif kind == MLP:
            total += sum(
                read(f"{at}{name}_proj.weight", width.intermediate_size[i] * D)
                for name in ("up", "down")
            )
        else:
            inner = config.num_experts_per_tok * width.moe_intermediate_size[i]
            shared = width.moe_shared_expert_intermediate_size[i]
            for name in ("up", "down"):
                total += read(f"{at}experts.0.{name}_proj.weight", inner * D)
                total += read(f"{at}shared_experts.{name}_proj.weight", shared * D)
            total += 4 * width.n_routed_experts[i] * (D + 1)
    return total


def mean_bits(
    config: ModelConfig, width: Width, dtype: torch.dtype, formats: Mapping[str, str] | None
) -> float:
    """Bits per parameter of a width in memory, everything counted."""
    total = count_parameters(config, width).total
    return 8 * weight_bytes(config, width, dtype, formats) / total
