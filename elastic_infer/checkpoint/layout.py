"""Tensors of a checkpoint: their names, their shapes, and the part of each that a width keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from ..errors import CheckpointError
from .config import LAYER_KEYS, MOE, ModelConfig
from .tensor_files import Selection
from .widths import Width

EMBEDDING = "backbone.embeddings.weight"
MOST_TENSORS = 1 << 19


def _kept_heads(total: int, kept: int, groups: int) -> list[int]:
    """The first kept/groups heads of every group of total/groups heads, in checkpoint order."""
    step, keep = total // groups, kept // groups
    return [group * step + head for group in range(groups) for head in range(keep)]


def _channels(heads: Iterable[int], size: int, start: int = 0) -> list[int]:
    """Indices of the channels of ``heads``, each ``size`` wide, from ``start`` on."""
    return [start + head * size + channel for head in heads for channel in range(size)]


def _mamba(config: ModelConfig, width: Width, layer: int) -> dict[str, Selection]:
    total, size = config.mamba_num_heads, config.mamba_head_dim
    inner, shared = total * size, 2 * config.n_groups * config.ssm_state_size
    heads = _kept_heads(total, width.mamba_num_heads[layer], config.n_groups)
    channels = _channels(heads, size)
    # in_proj rows: z | x | B, C | dt; conv channels: x | B, C. B and C are kept whole.
    conv = channels + list(range(inner, inner + shared))
    rows = channels + [inner + channel for channel in conv]
    rows += [2 * inner + shared + head for head in heads]
    hidden = slice(0, width.hidden_size)
    return {
        "A_log": Selection(heads, None),
        "D": Selection(heads, None),
        "dt_bias": Selection(heads, None),
        "conv1d.weight": Selection(conv, None),
        "conv1d.bias": Selection(conv, None),
        "in_proj.weight": Selection(rows, hidden),
        "norm.weight": Selection(channels, None),
        "out_proj.weight": Selection(hidden, channels),
    }


def _attention(config: ModelConfig, width: Width, layer: int) -> dict[str, Selection]:
    heads = _kept_heads(
        config.num_attention_heads, width.num_attention_heads[layer], config.num_key_value_heads
    )
    channels = _channels(heads, config.head_dim)
    hidden = slice(0, width.hidden_size)
    return {
        "q_proj.weight": Selection(channels, hidden),
        "k_proj.weight": Selection(None, hidden),
        "v_proj.weight": Selection(None, hidden),
        "o_proj.weight": Selection(hidden, channels),
    }


def _mlp(config: ModelConfig, width: Width, layer: int) -> dict[str, Selection]:
    inner, hidden = slice(0, width.intermediate_size[layer]), slice(0, width.hidden_size)
    return {
        "up_proj.weight": Selection(inner, hidden),
        "down_proj.weight": Selection(hidden, inner),
    }


def _moe(config: ModelConfig, width: Width, layer: int) -> dict[str, Selection]:
    hidden = slice(0, width.hidden_size)
    experts = width.n_routed_experts[layer]
    inner = slice(0, width.moe_intermediate_size[layer])
    shared = slice(0, width.moe_shared_expert_intermediate_size[layer])
    out = {
        "gate.weight": Selection(slice(0, experts), hidden),
        "gate.e_score_correction_bias": Selection(slice(0, experts), None),
    }
    for expert in range(experts):
        out[f"experts.{expert}.up_proj.weight"] = Selection(inner, hidden)
        out[f"experts.{expert}.down_proj.weight"] = Selection(hidden, inner)
    out["shared_experts.up_proj.weight"] = Selection(shared, hidden)
    out["shared_experts.down_proj.weight"] = Selection(hidden, shared)
    return out


_MIXERS = {"M": _mamba, "*": _attention, "-": _mlp, "E": _moe}


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
    hidden = slice(0, width.hidden_size)
    out = {EMBEDDING: Selection(None, hidden)}
    for layer, kind in enumerate(config.layers):
        out[f"backbone.layers.{layer}.norm.weight"] = Selection(hidden, None)
        for name, selection in _MIXERS[kind](config, width, layer).items():
            out[f"backbone.layers.{layer}.mixer.{name}"] = selection
    out["backbone.norm_f.weight"] = Selection(hidden, None)
    if not config.tie_word_embeddings:
        out["lm_head.weight"] = Selection(None, hidden)
    return out


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{checkpoint name: shape} of every tensor a checkpoint of ``config`` must hold, in order.

    Raises: CheckpointError for a config of more tensors than any checkpoint has.
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
    yield EMBEDDING, (config.vocab_size, config.hidden_size)
    for layer, kind in enumerate(config.layers):
        yield f"backbone.layers.{layer}.norm.weight", (config.hidden_size,)
        for name, shape in _mixer_shapes(config, kind):
            yield f"backbone.layers.{layer}.mixer.{name}", shape
    yield "backbone.norm_f.weight", (config.hidden_size,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, config.hidden_size)


def _mixer_shapes(config: ModelConfig, kind: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = config.hidden_size
    inner = config.mamba_num_heads * config.mamba_head_dim
    conv = inner + 2 * config.n_groups * config.ssm_state_size
    heads = (config.mamba_num_heads,)
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    ffn, shared = config.moe_intermediate_size, config.moe_shared_expert_intermediate_size
    mixers: dict[str, dict[str, tuple[int, ...]]] = {
        "M": {
            "A_log": heads,
            "D": heads,
            "dt_bias": heads,
            "conv1d.weight": (conv, 1, config.conv_kernel),
            "conv1d.bias": (conv,),
            "in_proj.weight": (inner + conv + config.mamba_num_heads, hidden),
            "norm.weight": (inner,),
            "out_proj.weight": (hidden, inner),
        },
        "*": {
            "q_proj.weight": (q, hidden),
            "k_proj.weight": (kv, hidden),
            "v_proj.weight": (kv, hidden),
            "o_proj.weight": (hidden, q),
        },
        "-": {
            "up_proj.weight": (config.intermediate_size, hidden),
            "down_proj.weight": (hidden, config.intermediate_size),
        },
        "E": {
            "gate.weight": (config.n_routed_experts, hidden),
            "gate.e_score_correction_bias": (config.n_routed_experts,),
        },
    }
    yield from mixers[kind].items()
    if kind == MOE:
        for expert in range(config.n_routed_experts):
            yield f"experts.{expert}.up_proj.weight", (ffn, hidden)
            yield f"experts.{expert}.down_proj.weight", (hidden, ffn)
        yield "shared_experts.up_proj.weight", (shared, hidden)
        yield "shared_experts.down_proj.weight", (hidden, shared)


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
    return width.same_sizes(hull(config, width))


def hull(config: ModelConfig, width: Width) -> Width:
    """The smallest uniform width that holds ``width``: the maximum over the layers, per axis."""
    sizes = {}
    for key, kind in LAYER_KEYS.items():
        most = max(getattr(width, key))
        sizes[key] = tuple(most if layer == kind else 0 for layer in config.layers)
    return replace(width, **sizes)
