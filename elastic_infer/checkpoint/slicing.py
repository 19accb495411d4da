"""Which rows and columns of every tensor a width keeps, and checkpoints cut down to one width."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import CheckpointError, WidthError, shown
from ..files.reading import TAKEN_ALONG, TEXT_FILES, is_file, read_bytes
from ..files.writing import make_folder, new_folder, require_new, write_json, write_whole
from ..torch_modes import plain_torch
from .config import ModelConfig
from .published import SIDECAR
from .stored import stored_selections
from .tensor_files import Selection, take, write_safetensors
from .widths import LAYER_KEYS, MOE, Width, slice_config

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

__all__ = [
    "Selection",
    "copy_side_files",
    "expected_shapes",
    "hull",
    "is_uniform",
    "part_sources",
    "selection_shape",
    "slice_checkpoint",
    "slice_state_dict",
    "tensor_selections",
    "with_kv_factors",
]

logger = logging.getLogger(__name__)

EMBEDDING = "backbone.embeddings.weight"
SHARD_BYTES = 5 * 10**9
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
    """What ``width`` keeps of every tensor, in checkpoint order (order of the layers).

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
    """What `expected_shapes` returns, one (name, shape) after another: config.json may speak of
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


def slice_state_dict(
    config: ModelConfig, state: Mapping[str, torch.Tensor], width: Width
) -> dict[str, torch.Tensor]:
    """The weights of the exported slice: every tensor of ``state`` cut to ``width``.

    Args:
        config: the full checkpoint.
        state: {checkpoint name: full tensor}; names that no width knows are left out.
        width: sizes; with per-layer lists each layer's tensors get that layer's own sizes.

    Returns:
        {checkpoint name: contiguous copy}, dtypes unchanged.

    Raises:
        CheckpointError: a tensor that the width needs is not in ``state``.
    """
    out = {}
    for name, (rows, cols) in tensor_selections(config, width).items():
        if name not in state:
            raise CheckpointError(f"slice_state_dict: state must hold {name}, got none")
        out[name] = take(state[name], rows, cols)
    return out


def is_uniform(config: ModelConfig, width: Width) -> bool:
    """Whether every axis has one size over all the layers that it sizes."""
    return width.same_sizes(hull(config, width))


def hull(config: ModelConfig, width: Width) -> Width:
    """The smallest uniform width that holds ``width``: the maximum over the layers, per axis."""
    sizes = {}
    for key, kind in LAYER_KEYS.items():
        most = max(getattr(width, key))
        sizes[key] = tuple(most if layer == kind else 0 for layer in config.layers)
    return replace(width, **sizes)


@plain_torch()
def slice_checkpoint(
    checkpoint: Checkpoint,
    width_name: str,
    out_folder: str | Path,
    progress: Callable[[int, int], None] | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes width ``width_name`` as a checkpoint of its own; no other copy of it is needed.

    A width with one size per axis gives an ordinary ``nemotron_h`` checkpoint. One with per-layer
    sizes has no ordinary config: it gives an elastic checkpoint cut at the maximum over the
    layers, whose table holds this one width with its per-layer lists. Tensors are streamed, one
    in memory at a time. The folder appears whole (`writing.new_folder`): an export that fails
    leaves nothing.

    Args:
        checkpoint: the open elastic checkpoint.
        width_name: a name in ``checkpoint.widths``.
        out_folder: new or empty folder.
        progress: called with (bytes written, bytes in all) after every tensor.
        shard_bytes: size at which the next safetensors file is begun.

    Returns:
        The folder.

    Raises:
        WidthError: unknown width.
        CheckpointError: the folder exists and is not empty, is a file, or cannot be written.
    """
    config = checkpoint.config
    if not isinstance(width_name, str) or width_name not in checkpoint.widths:
        known = ", ".join(checkpoint.widths)
        raise WidthError(f"slice: width must be one of {known}, got {shown(width_name)}")
    width = checkpoint.widths[width_name]
    out = require_new(out_folder, "slice")
    cut = hull(config, width)
    sources = {name: (name, kept) for name, kept in tensor_selections(config, cut).items()}
    raw = slice_config(config, width)
    if config.tie_word_embeddings:
        # transformers ties no nemotron_h head: without its own tensor it would draw a random one.
        sources["lm_head.weight"] = (EMBEDDING, sources[EMBEDDING][1])
        raw["tie_word_embeddings"] = False
        logger.info("slice: the tied head is written out as lm_head.weight")
    parts = part_sources(checkpoint, sources)
    specs = {}
    for name, (source, kept) in parts.items():
        shape, dtype = checkpoint.part_spec(source)
        specs[name] = (selection_shape(shape, kept), dtype)

    def cut_part(name: str) -> torch.Tensor:
        source, (rows, cols) = parts[name]
        return checkpoint.part(source, rows, cols)

    with new_folder(out, "slice") as fresh:
        stored = with_kv_factors(checkpoint, specs, cut_part)
        write_safetensors(fresh, *stored, shard_bytes, progress)
        copy_side_files(checkpoint.folder, fresh, (SIDECAR,))
        write_json(fresh / "config.json", raw, "slice")
    if "elastic" in raw:
        logger.info("slice: %s has per-layer sizes: %s is an elastic checkpoint", width_name, out)
    logger.info(
        "slice: wrote width %s to %s; its config.json keeps time_step_min = %s: transformers "
        "clamps dt to it in prefill (not in a step), this library never does",
        width_name,
        out,
        raw.get("time_step_min", "0.001 (the default)"),
    )
    return out


def with_kv_factors(
    checkpoint: Checkpoint,
    specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    tensor: Callable[[str], torch.Tensor],
) -> tuple[dict[str, tuple[tuple[int, ...], torch.dtype]], Callable[[str], torch.Tensor]]:
    """What `write_safetensors` takes, with the factors of 8-bit keys and values: every export has
    those of its source, whose KV heads it keeps whole.

    Args:
        checkpoint: the source.
        specs: {name: (shape, dtype)} of everything else.
        tensor: gives one of them by its name.
    """
    factors = {name: checkpoint.part_spec(name) for name in checkpoint.kv_factor_names}
    return {**specs, **factors}, lambda name: (
        checkpoint.part(name) if name in factors else tensor(name)
    )


def part_sources(
    checkpoint: Checkpoint, sources: Mapping[str, tuple[str, Selection]]
) -> dict[str, tuple[str, Selection]]:
    """The stored tensors behind {name: (source, what is kept of it)}, in the same form: a plain
    tensor is itself, a quantised one its codes and block scales, cut, and its scalars, whole."""
    out: dict[str, tuple[str, Selection]] = {}
    for name, (source, kept) in sources.items():
        if source in checkpoint.quantized:
            found = stored_selections(checkpoint.quantized[source], kept)
            out |= {part: (part, selection) for part, selection in found.items()}
        else:
            out[name] = (source, kept)
    return out


def copy_side_files(source: Path, target: Path, more: tuple[str, ...] = ()) -> list[str]:
    """Copies the tokenizer and generation files, and those of ``more``, that ``source`` has;
    returns their names. Raises: CheckpointError for one that cannot be read or written."""
    names = (*TEXT_FILES, *TAKEN_ALONG, *more)
    found = (path for name in names for path in sorted(source.glob(name)) if is_file(path))
    copied = [path.relative_to(source).as_posix() for path in found]
    for name in copied:
        content = read_bytes(source / name, f"checkpoint: {source / name}", 1 << 30)
        make_folder((target / name).parent, "checkpoint")
        write_whole(target / name, content, "checkpoint")
    return copied
