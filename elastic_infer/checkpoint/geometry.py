"""The tensors of a model, layer kind by layer kind: every axis with the sizes that a width cuts.

From this one table follow shapes, the part that a width keeps, parameter counts, bytes, the sizes
that rows carry, and the order of sorting. An axis is a run of parts: `in_proj` has the rows
z | x | B | C | dt, of which z, x and dt follow the Mamba heads while B and C are whole.

Three places know the same by hand: `model.layers`, which does arithmetic per pass,
`elastify.torch_model`, whose weights are cut by differentiable views, and `elastify.costs`, whose
float32 sums keep their order so that a run can be repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import repeat
from typing import Any, NamedTuple, TypeVar

from .config import ATTENTION, LAYER_KEYS, MAMBA, MLP, MOE, ModelConfig
from .widths import Width

HIDDEN = "hidden_size"
# Mamba heads whose state is updated: those of the width, or all served heads while tracking.
STATE_HEADS = "state_heads"

Sizes = Mapping[str, Any]  # of one layer: {width key: size}, numbers or tensors
Value = TypeVar("Value")


class Part(NamedTuple):
    """A part of an axis: `total` units of `unit` channels.

    key: the width key that sizes it, None where every width keeps the whole.
    groups: 0 where a width keeps the first units, else the first units of each of so many groups.
    """

    total: int
    unit: int = 1
    key: str | None = None
    groups: int = 0

    def size(self, sizes: Sizes) -> Any:
        """Channels at the sizes of a layer."""
        return (self.total if self.key is None else sizes[self.key]) * self.unit


Axis = tuple[Part, ...]


class Tensor(NamedTuple):
    """A tensor of a layer.

    name: in the layer; "{}" stands for the number of the expert.
    axes: its dimensions.
    per_expert: there is one for every expert.
    float32: kept in float32 in memory, whatever the model's dtype.
    """

    name: str
    axes: tuple[Axis, ...]
    per_expert: bool = False
    float32: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the whole checkpoint."""
        return tuple(sum(part.total * part.unit for part in axis) for axis in self.axes)

    @property
    def is_matrix(self) -> bool:
        """True where it multiplies activations."""
        return len(self.axes) == 2

    def count(self, sizes: Sizes) -> Any:
        """Elements of one such tensor at the sizes of a layer."""
        return math.prod(size_of(axis, sizes) for axis in self.axes)


def size_of(axis: Axis, sizes: Sizes) -> Any:
    """Channels of an axis at the sizes of a layer."""
    return sum(part.size(sizes) for part in axis)


def layer_sizes(width: Width, tracked: Width | None = None) -> list[dict[str, int]]:
    """The sizes of every layer at a width.

    tracked: for a sequence that tracks, the served width, whose heads' state is updated.
    """
    state = (tracked or width).mamba_num_heads
    columns = (getattr(width, key) for key in LAYER_KEYS)
    keys = (HIDDEN, STATE_HEADS, *LAYER_KEYS)
    return [dict(zip(keys, row)) for row in zip(repeat(width.hidden_size), state, *columns)]


# The table --------------------------------------------------------------------------------------


def _hidden(config: ModelConfig) -> Axis:
    return (Part(config.hidden_size, key=HIDDEN),)


def _sized(config: ModelConfig, key: str) -> Axis:
    return (Part(getattr(config, key), key=key),)


def _mamba(config: ModelConfig) -> tuple[Tensor, ...]:
    total, size, groups = config.mamba_num_heads, config.mamba_head_dim, config.n_groups
    z = Part(total, size, "mamba_num_heads", groups)
    x, dt = (Part(total, unit, STATE_HEADS, groups) for unit in (size, 1))
    b = c = Part(groups * config.ssm_state_size)
    conv, hidden = (x, b, c), _hidden(config)
    return (
        Tensor("A_log", ((dt,),), float32=True),
        Tensor("D", ((dt,),), float32=True),
        Tensor("dt_bias", ((dt,),), float32=True),
        Tensor("conv1d.weight", (conv, (Part(1),), (Part(config.conv_kernel),)), float32=True),
        Tensor("conv1d.bias", (conv,), float32=True),
        Tensor("in_proj.weight", ((z, x, b, c, dt), hidden)),
        Tensor("norm.weight", ((z,),)),
        Tensor("out_proj.weight", (hidden, (z,))),
    )


def _attention(config: ModelConfig) -> tuple[Tensor, ...]:
    groups, size = config.num_key_value_heads, config.head_dim
    q = (Part(config.num_attention_heads, size, "num_attention_heads", groups),)
    kv, hidden = (Part(groups, size),), _hidden(config)
    return (
        Tensor("q_proj.weight", (q, hidden)),
        Tensor("k_proj.weight", (kv, hidden)),
        Tensor("v_proj.weight", (kv, hidden)),
        Tensor("o_proj.weight", (hidden, q)),
    )


def _up_down(config: ModelConfig, key: str, at: str = "", per_expert: bool = False):
    inner, hidden = _sized(config, key), _hidden(config)
    return (
        Tensor(f"{at}up_proj.weight", (inner, hidden), per_expert),
        Tensor(f"{at}down_proj.weight", (hidden, inner), per_expert),
    )


def _mlp(config: ModelConfig) -> tuple[Tensor, ...]:
    return _up_down(config, "intermediate_size")


def _moe(config: ModelConfig) -> tuple[Tensor, ...]:
    experts = _sized(config, "n_routed_experts")
    return (
        Tensor("gate.weight", (experts, _hidden(config)), float32=True),
        Tensor("gate.e_score_correction_bias", (experts,), float32=True),
        *_up_down(config, "moe_intermediate_size", "experts.{}.", per_expert=True),
        *_up_down(config, "moe_shared_expert_intermediate_size", "shared_experts."),
    )


_TENSORS = {MAMBA: _mamba, ATTENTION: _attention, MLP: _mlp, MOE: _moe}
# The tensors that are one matrix in memory and read a layer's input, and the one that writes its
# output. Of a mixture, those of the shared expert.
_PROJECTIONS = {
    MAMBA: (("in_proj.weight",), "out_proj.weight"),
    ATTENTION: (("q_proj.weight", "k_proj.weight", "v_proj.weight"), "o_proj.weight"),
    MLP: (("up_proj.weight",), "down_proj.weight"),
    MOE: (("shared_experts.up_proj.weight",), "shared_experts.down_proj.weight"),
}


def layer_tensors(config: ModelConfig, kind: str) -> tuple[Tensor, ...]:
    """The tensors of a layer of `kind` in checkpoint order, without the norm before it."""
    return _TENSORS[kind](config)


def projection(config: ModelConfig, kind: str) -> tuple[Axis, Axis]:
    """The rows of the matrix that reads the input of a layer of `kind`, and the columns of the
    one that writes its output."""
    first, second = _PROJECTIONS[kind]
    axes = {tensor.name: tensor.axes for tensor in layer_tensors(config, kind)}
    return tuple(part for name in first for part in axes[name][0]), axes[second][1]


def _runs(config: ModelConfig) -> Iterator[tuple[str, int | None, list[Tensor]]]:
    """(prefix, layer, tensors), in checkpoint order; the tensors of experts apart from others."""
    hidden = _hidden(config)
    matrix = ((Part(config.vocab_size),), hidden)
    kinds = {kind: layer_tensors(config, kind) for kind in set(config.layers)}
    yield "backbone.", None, [Tensor("embeddings.weight", matrix)]
    for layer, kind in enumerate(config.layers):
        at, tensors = f"backbone.layers.{layer}.", kinds[kind]
        yield at, layer, [Tensor("norm.weight", (hidden,))]
        first = next((i for i, t in enumerate(tensors) if t.per_expert), len(tensors))
        last = first + sum(t.per_expert for t in tensors)
        for run in (tensors[:first], tensors[first:last], tensors[last:]):
            if run:
                yield f"{at}mixer.", layer, list(run)
    yield "backbone.", None, [Tensor("norm_f.weight", (hidden,))]
    if not config.tie_word_embeddings:
        yield "", None, [Tensor("lm_head.weight", matrix)]


def each_tensor(
    config: ModelConfig,
    value: Callable[[str, Tensor, int | None], Value],
    experts: Iterable[int] | None = None,
) -> Iterator[tuple[str, int | None, Value]]:
    """(checkpoint name, expert, value) of every tensor of a model, in checkpoint order.

    Args:
        config: the model.
        value: called with (name, tensor, layer), once for all experts, whose number is "{}" in the
            name; the layer of the embedding, the last norm and the head is None.
        experts: how many experts each layer has; all by default.
    """
    counts = None if experts is None else tuple(experts)
    for prefix, layer, run in _runs(config):
        names = [prefix + tensor.name for tensor in run]
        made = [(name, value(name, tensor, layer)) for name, tensor in zip(names, run)]
        if not run[0].per_expert:
            yield from ((name, None, result) for name, result in made)
            continue
        count = config.n_routed_experts if counts is None or layer is None else counts[layer]
        for expert in range(count):
            yield from ((name.format(expert), expert, result) for name, result in made)


# Indices ----------------------------------------------------------------------------------------


def channels(units: Iterable[int], size: int, start: int = 0) -> list[int]:
    """Indices of whole units, each `size` wide, from `start` on."""
    out: list[int] = []
    for first in (start + unit * size for unit in units):
        out += range(first, first + size)
    return out


def starts(axis: Axis) -> Iterator[tuple[Part, int]]:
    """Every part of an axis with the index of its first channel in the checkpoint."""
    start = 0
    for part in axis:
        yield part, start
        start += part.total * part.unit


def places(axis: Axis, units: Iterable[int]) -> list[list[int] | slice]:
    """Checkpoint indices of an axis, part by part: those of `units` in the parts that a width
    cuts, all of the others."""
    return [
        slice(start, start + part.total * part.unit)
        if part.key is None
        else channels(units, part.unit, start)
        for part, start in starts(axis)
    ]


def joined(parts: Iterable[list[int] | slice]) -> list[int]:
    """The indices of an axis in one list."""
    out: list[int] = []
    for part in parts:
        out += range(part.start, part.stop) if isinstance(part, slice) else part
    return out


def kept(axis: Axis, sizes: Sizes) -> slice | list[int] | None:
    """Checkpoint indices that a layer of `sizes` keeps of an axis, in checkpoint order; None where
    that is all at every width."""
    cut = next((part for part in axis if part.key is not None), None)
    if cut is None or cut.key is None:
        return None
    count = sizes[cut.key]
    if not cut.groups:
        return slice(0, count * cut.unit)
    step, keep = cut.total // cut.groups, count // cut.groups
    units = [group * step + unit for group in range(cut.groups) for unit in range(keep)]
    return joined(places(axis, units))
