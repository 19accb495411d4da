"""Tensors of a checkpoint: their names, their shapes, and the part of each that a width keeps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..errors import CheckpointError
from .config import LAYER_KEYS, MOE, ModelConfig
from .geometry import HIDDEN, Tensor, each_tensor, kept, layer_sizes
from .tensor_files import Selection
from .widths import Width

EMBEDDING = "backbone.embeddings.weight"
MOST_TENSORS = 1 << 19


def head_name(config: ModelConfig) -> str:
    """The tensor that makes the logits."""
    return EMBEDDING if config.tie_word_embeddings else "lm_head.weight"


def tensor_selections(config: ModelConfig, width: Width) -> dict[str, Selection]:
    """The part of every tensor that ``width`` keeps, in checkpoint order (order of the layers).

    Hidden channels, experts and FFN channels are the first ones; Mamba heads the first wH/G of
    every group, query heads the first wHq/Hkv of every KV head; B, C, K and V are whole. A
    tensor that the width does not use at all (an expert beyond wE) is absent.

    Args:
        config: the full checkpoint.
        width: sizes of one width; per-layer tuples are indexed by layer.

    Returns:
        {checkpoint name: Selection}
    """
    sizes = layer_sizes(width)

    def selection(_name: str, tensor: Tensor, layer: int | None) -> Selection:
        at = {HIDDEN: width.hidden_size} if layer is None else sizes[layer]
        rows, *columns = (kept(axis, at) for axis in tensor.axes[:2])
        return Selection(rows, columns[0] if columns else None)

    found = each_tensor(config, selection, width.n_routed_experts)
    return {name: selected for name, _, selected in found}


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{checkpoint name: shape} of every tensor a checkpoint of ``config`` must hold, in order.

    Raises:
        CheckpointError: a config of more tensors than any checkpoint has.
    """
    moe = len(config.layers_of(MOE))
    count = 16 * config.num_layers + 2 * moe * config.n_routed_experts
    if count > MOST_TENSORS:
        raise CheckpointError(
            f"config: n_routed_experts must give at most {MOST_TENSORS} tensors, got "
            f"{config.n_routed_experts} in each of {moe} layers"
        )
    return dict(iterate_shapes(config))


def iterate_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The shapes of `expected_shapes`, one (name, shape) after another: config.json may speak of
    more tensors than names fit in memory."""
    for name, _, shape in each_tensor(config, lambda _name, tensor, _layer: tensor.shape):
        yield name, shape


def _axis_size(axis: slice | list[int] | None, size: int) -> int:
    if axis is None:
        return size
    return len(range(size)[axis]) if isinstance(axis, slice) else len(axis)


def selection_shape(shape: tuple[int, ...], selection: Selection) -> tuple[int, ...]:
    """Shape of what ``selection`` keeps of a tensor of ``shape``."""
    if not shape:
        return shape
    out = (_axis_size(selection.rows, shape[0]), *shape[1:])
    if len(shape) == 1:
        return out
    return (out[0], _axis_size(selection.cols, shape[1]), *shape[2:])


def is_uniform(config: ModelConfig, width: Width) -> bool:
    """True if every axis has one size over all the layers that it sizes."""
    return width.same_sizes(smallest_uniform_width(config, width))


def smallest_uniform_width(config: ModelConfig, width: Width) -> Width:
    """The smallest uniform width that holds ``width``: the maximum over the layers, per axis."""
    sizes = {}
    for key, kind in LAYER_KEYS.items():
        most = max(getattr(width, key))
        sizes[key] = tuple(most if layer == kind else 0 for layer in config.layers)
    return replace(width, **sizes)
