"""The rows and columns that a width keeps of every tensor; checkpoints cut down to one width."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import CheckpointError, WidthError, shown
from ..files.reading import TAKEN_ALONG, TEXT_FILES, is_file, read_bytes
from ..files.writing import make_folder, new_folder, require_new, write_json, write_whole
from ..torch_modes import plain_torch
from .config import ModelConfig
from .layout import EMBEDDING, selection_shape, smallest_uniform_width, tensor_selections
from .published import SIDECAR
from .stored import stored_selections
from .tensor_files import Selection, take, write_safetensors
from .width_table import slice_config
from .widths import Width

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

__all__ = [
    "copy_side_files",
    "part_sources",
    "slice_checkpoint",
    "slice_state_dict",
    "with_kv_factors",
]

logger = logging.getLogger(__name__)

SHARD_BYTES = 5 * 10**9


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
    cut = smallest_uniform_width(config, width)
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
    """Tensors for `write_safetensors`, with the factors of 8-bit keys and values: every export has
    those of its source, whose KV heads it keeps whole.

    Args:
        checkpoint: the source.
        specs: {name: (shape, dtype)} of everything else.
        tensor: gives one of them by its name.
    """
    factors = {name: checkpoint.part_spec(name) for name in checkpoint.kv_factor_names}
    return {
        **specs,
        **factors,
    }, lambda name: checkpoint.part(name) if name in factors else tensor(name)


def part_sources(
    checkpoint: Checkpoint, sources: Mapping[str, tuple[str, Selection]]
) -> dict[str, tuple[str, Selection]]:
    """The stored tensors behind {name: (source, what is kept of it)}, in the same form: a plain
    tensor is itself, a quantized one its codes and block scales, cut, and its scalars, whole."""
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
