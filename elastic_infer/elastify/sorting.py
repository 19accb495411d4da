"""Sorting a checkpoint by importance, so that every smaller model is a prefix of it.

The sorted model computes the same function: all that reads or writes an axis is permuted alike.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import ModelConfig
from ..checkpoint.geometry import HIDDEN, STATE_HEADS, Axis, Tensor as Spec, each_tensor, starts
from ..checkpoint.layout import expected_shapes
from ..checkpoint.slicing import SHARD_BYTES, copy_side_files, with_kv_factors
from ..checkpoint.tensor_files import write_safetensors
from ..errors import CheckpointError
from ..files.writing import new_folder, require_new, write_json
from .importance import Importance
from .torch_model import ElasticNemotronH, encode_floats

__all__ = [
    "Order",
    "head_order",
    "importance_order",
    "random_order",
    "sort_checkpoint",
    "sort_model",
    "sort_state_dict",
    "sorted_sources",
]

logger = logging.getLogger(__name__)


class Source(NamedTuple):
    """Origin of a sorted tensor: a name, and the old index of every new row and column."""

    name: str
    rows: Tensor | None
    cols: Tensor | None


@dataclass
class Order:
    """New order of every axis, as the old index of each new place (int64).

    Attributes:
        indices: {"hidden_size": [D], "<width key>.<layer>": [units]}, named as in `Importance`;
            expert neurons [E, F] by *old* expert.
    """

    indices: dict[str, Tensor]

    def of(self, key: str, layer: int | None = None) -> Tensor:
        """Indices of width key `key`, of one layer (None for hidden_size)."""
        return self.indices[key if layer is None else f"{key}.{layer}"]


def _descending(scores: Tensor) -> Tensor:
    """Indices of the last dimension by falling score; equal scores keep their order."""
    return torch.argsort(-scores, dim=-1, stable=True)


def head_order(scores: Tensor, groups: int) -> Tensor:
    """Heads by falling score inside each of `groups` equal groups; no head leaves its group.

    Args:
        scores: [heads]
        groups: divides heads.

    Returns:
        [heads] int64, old index of each new place.
    """
    size = len(scores) // groups
    inside = _descending(scores.view(groups, size))
    return (inside + torch.arange(groups)[:, None] * size).flatten()


def importance_order(config: ModelConfig, importance: Importance) -> Order:
    """The order that puts the most important component of every axis first.

    Args:
        config: the model
        importance: its scores.

    Raises:
        CheckpointError: a score is missing, misshapen or not finite.
    """
    importance.check(config)
    groups = {
        "mamba_num_heads": config.n_groups,
        "num_attention_heads": config.num_key_value_heads,
    }
    indices = {}
    for name, scores in importance.scores.items():
        key = name.partition(".")[0]
        if key == "mamba_head_dim":  # no width removes head channels
            continue
        indices[name] = head_order(scores, groups[key]) if key in groups else _descending(scores)
    return Order(indices)


def random_order(config: ModelConfig, seed: int) -> Order:
    """A random order of every axis, heads inside their groups: the control of a comparison."""
    from .importance import score_shapes

    generator = torch.Generator().manual_seed(seed)
    scores = {
        name: torch.rand(shape, generator=generator, dtype=torch.float64)
        for name, shape in score_shapes(config).items()
    }
    return importance_order(config, Importance(scores))


def _spread(heads: Tensor, size: int, start: int = 0) -> Tensor:
    """Channels of heads, each `size` wide, from channel `start` on."""
    return (start + heads[:, None] * size + torch.arange(size)).flatten()


def _index(axis: Axis, order: Order, layer: int | None) -> Tensor | None:
    """Old index of every new place of an axis, None where it stays; [E, F] for expert neurons."""
    if all(part.key is None for part in axis):
        return None
    pieces = []
    for part, start in starts(axis):
        if part.key is None:
            pieces.append(torch.arange(start, start + part.total * part.unit))
            continue
        key = "mamba_num_heads" if part.key == STATE_HEADS else part.key
        units = order.of(key, None if key == HIDDEN else layer)
        pieces.append(_spread(units, part.unit, start) if part.groups else units)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def sorted_sources(config: ModelConfig, order: Order) -> dict[str, Source]:
    """Sources of every tensor of the sorted checkpoint, in checkpoint order.

    Hidden channels are permuted everywhere alike; Mamba heads (z, x and dt rows, conv channels,
    A_log, D, dt_bias, norm, out_proj columns), query heads, FFN neurons, experts (gate rows,
    correction bias) and each expert's neurons per layer. B, C, K and V stay.

    Args:
        config: the checkpoint
        order: of all its axes.

    Returns:
        {name in the sorted checkpoint: Source}
    """

    def source(name: str, tensor: Spec, layer: int | None) -> Callable[[int | None], Source]:
        rows, *others = (_index(axis, order, layer) for axis in tensor.axes[:2])
        cols = others[0] if others else None
        if not tensor.per_expert:
            return lambda _: Source(name, rows, cols)
        experts = order.of("n_routed_experts", layer).tolist()

        def of_expert(new: int | None) -> Source:
            old = experts[new]
            return Source(name.format(old), *(i[old] if i.dim() == 2 else i for i in (rows, cols)))

        return of_expert

    return {name: made(expert) for name, expert, made in each_tensor(config, source)}


def _permuted(tensor: Tensor, source: Source) -> Tensor:
    for dim, index in ((0, source.rows), (1, source.cols)):
        if index is not None:
            tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor.contiguous()


def sort_state_dict(
    config: ModelConfig, state: Mapping[str, Tensor], order: Order
) -> dict[str, Tensor]:
    """The tensors of the sorted checkpoint.

    Args:
        config: the checkpoint
        state: {checkpoint name: tensor}
        order: of all its axes.

    Raises:
        CheckpointError: a tensor is missing.
    """
    out = {}
    for name, source in sorted_sources(config, order).items():
        if source.name not in state:
            raise CheckpointError(f"sort_state_dict: state must hold {source.name}, got none")
        out[name] = _permuted(state[source.name], source)
    return out


@torch.no_grad()
def sort_model(model: ElasticNemotronH, order: Order) -> ElasticNemotronH:
    """Sorts the weights of a model in place and returns it; its function stays the same."""
    model.load_checkpoint_state(sort_state_dict(model.config, model.checkpoint_state(), order))
    return model


def sort_checkpoint(
    checkpoint: Checkpoint,
    order: Order,
    out_folder: str | Path,
    progress: Callable[[int, int], None] | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes the sorted checkpoint, one tensor in memory at a time; config.json comes last.

    A width table of the parent is left out: its prefixes would be other models now.

    Args:
        checkpoint: the open parent.
        order: of all its axes.
        out_folder: new or empty folder.
        progress: called with (bytes written, bytes in all) after every tensor.
        shard_bytes: size at which the next safetensors file is begun.

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder is not empty, is a file, or cannot be written.
    """
    out = require_new(out_folder, "sort")
    checkpoint.require_plain("sort")
    config = checkpoint.config
    sources = sorted_sources(config, order)
    shapes = expected_shapes(config)
    specs = {name: (shapes[name], checkpoint.dtype_of(s.name)) for name, s in sources.items()}

    def tensor(name: str) -> torch.Tensor:
        return _permuted(checkpoint.tensor(sources[name].name), sources[name])

    raw = {key: value for key, value in config.raw.items() if key != "elastic"}
    if "elastic" in config.raw:
        logger.warning("sort: the parent's width table is left out: its widths are others now")
    with new_folder(out, "sort") as fresh:
        write_safetensors(fresh, *with_kv_factors(checkpoint, specs, tensor), shard_bytes, progress)
        copy_side_files(checkpoint.folder, fresh)
        write_json(fresh / "config.json", encode_floats(raw), "sort")
    return out
