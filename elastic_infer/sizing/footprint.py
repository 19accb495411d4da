"""Cost of a width from its sizes alone: bytes of weights, bytes per token, sequences that fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ..cache.dtypes import item_size
from ..checkpoint.config import ModelConfig
from ..checkpoint.counts import count_parameters
from ..checkpoint.geometry import Tensor, layer_sizes, layer_tensors, size_of
from ..checkpoint.layout import head_name
from ..checkpoint.widths import Width
from ..codes import bits_per_weight, dtype_name
from ..ops.tiles import TILE, tile_count


class _Store:
    """Bytes of matrices by checkpoint name: those of their format, else of one dtype."""

    def __init__(self, dtype: torch.dtype, formats: Mapping[str, str] | None):
        self.plain = dtype_name(dtype)
        self.formats = formats or {}

    def weights(self, name: str, count: int, float32: bool = False) -> int:
        """Bytes of `count` weights of a matrix as they are read."""
        form = "float32" if float32 else self.formats.get(name, self.plain)
        return int(count * bits_per_weight(form) / 8)

    def tiles(self, name: str, rows: int, columns: int, float32: bool = False) -> int:
        """Bytes of a matrix in whole tiles, with its scale where it has one."""
        count = tile_count(rows) * tile_count(columns) * TILE * TILE
        return self.weights(name, count, float32) + (4 if name in self.formats else 0)


def weight_bytes(
    config: ModelConfig,
    width: Width,
    dtype: torch.dtype,
    formats: Mapping[str, str] | None = None,
) -> int:
    """Bytes of all weights in memory when `width` is the widest served: matrices in whole 64x64
    tiles of their format, else of `dtype`, the router and the small per-head tensors in float32.

    Args:
        formats: {checkpoint name: "nvfp4" or "fp8"} of quantized matrices (`Checkpoint.formats`).
    """
    size, D, store = item_size(dtype), width.hidden_size, _Store(dtype, formats)
    total = (config.vocab_size + 1) * D * size
    total += store.tiles(head_name(config), config.vocab_size, D)
    for sizes, name, tensor in _tensors(config, width):
        if tensor.is_matrix:
            rows, columns = tensor.axes
            across = size_of(columns, sizes)
            held = sum(store.tiles(name, part.size(sizes), across, tensor.float32) for part in rows)
        else:
            held = tensor.count(sizes) * (4 if tensor.float32 else size)
        total += held * (sizes["n_routed_experts"] if tensor.per_expert else 1)
    return total + config.num_layers * D * size  # the norms of the layers


def _tensors(
    config: ModelConfig, width: Width, tracked: Width | None = None
) -> Iterator[tuple[dict[str, int], str, Tensor]]:
    """(sizes, name, tensor) of all layers; the first expert stands for every expert."""
    tensors = {kind: layer_tensors(config, kind) for kind in set(config.layers)}
    for layer, sizes in enumerate(layer_sizes(width, tracked)):
        for tensor in tensors[config.layers[layer]]:
            yield sizes, f"backbone.layers.{layer}.mixer.{tensor.name.format(0)}", tensor


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
        formats: {checkpoint name: "nvfp4" or "fp8"} of quantized matrices.
    """
    size, D, store = item_size(dtype), width.hidden_size, _Store(dtype, formats)
    total = D * size * 2 + store.weights(head_name(config), config.vocab_size * D)  # norm, a row
    for sizes, name, tensor in _tensors(config, width, tracked):
        count = tensor.count(sizes) * (config.num_experts_per_tok if tensor.per_expert else 1)
        if tensor.is_matrix:
            total += store.weights(name, count, tensor.float32)
        else:
            total += count * (4 if tensor.float32 else size)
    return total + config.num_layers * D * size  # the norms of the layers


def mean_bits(
    config: ModelConfig, width: Width, dtype: torch.dtype, formats: Mapping[str, str] | None
) -> float:
    """Bits per parameter of a width in memory, everything counted."""
    total = count_parameters(config, width).total
    return 8 * weight_bytes(config, width, dtype, formats) / total
