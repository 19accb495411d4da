"""Width tables from extracted slices: their sizes, checked against the full weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, WidthError, shown
from ..files.reading import is_folder, read_json, user_path
from ..files.writing import make_folder, write_whole
from ..torch_modes import plain_torch
from .checkpoint import Checkpoint
from .config import LAYER_KEYS, ModelConfig
from .hub import WIDTHS_NAME, config_folder, is_download_cache, resolve_folder
from .layout import EMBEDDING, selection_shape, smallest_uniform_width, tensor_selections
from .slicing import part_sources
from .tensor_files import INDEX_NAME, SINGLE_NAME, Axis, Selection, TensorFiles
from .width_table import parse_widths, width_to_dict
from .widths import Width

__all__ = ["derive_widths", "write_widths"]

logger = logging.getLogger(__name__)

# What every slice shares with the full model: it is never narrowed.
_SHARED = (
    "pattern",
    "vocab_size",
    "num_key_value_heads",
    "head_dim",
    "mamba_head_dim",
    "n_groups",
    "ssm_state_size",
    "conv_kernel",
    "num_experts_per_tok",
    "routed_scaling_factor",
    "layer_norm_epsilon",
)
HEAD = "lm_head.weight"
_BLOCK_BYTES = 32 * 2**20  # compared at a time


@plain_torch()
def derive_widths(
    full: str | Path | Checkpoint,
    slices: Mapping[str, str | Path] | None = None,
    slice_configs: Mapping[str, str | Path] | None = None,
    *,
    full_name: str = "full",
) -> dict[str, Any]:
    """The elastic table of ``full`` whose widths are the given extracted slices.

    Sizes come from each slice's config.json. Where a slice folder also holds weights, every
    tensor is compared with the prefix of the full one (in blocks, bounded memory); Mamba and
    query heads under the rule "the first of every group".

    Args:
        full: the elastic checkpoint: folder, Hub id, or open Checkpoint.
        slices: {width name: folder or Hub id of the extracted slice, with or without weights}.
        slice_configs: {width name: config.json of the slice}, sizes only.
        full_name: name of the full width, which becomes the default.

    Returns:
        ``{"version": 1, "default_width": full_name, "widths": {full_name: {}, name: {...}}}``

    Raises:
        WidthError: a size above full, off the grid, or a name given twice.
        CheckpointError: something that no width may change differs, or a tensor is no prefix:
            names the first such tensor and its first differing coordinate.
    """
    slices, slice_configs = dict(slices or {}), dict(slice_configs or {})
    names = [full_name, *slices, *slice_configs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or len(names) == 1:
        got = f"{', '.join(twice)} twice" if twice else "none"
        raise WidthError(f"derive_widths: slices must name at least one width each once, got {got}")
    table: dict[str, Any] = {full_name: {}}
    whole = full
    if not isinstance(whole, Checkpoint):  # a table that the folder already has plays no part
        whole = Checkpoint.open(whole, widths=_table(full_name, dict(table)))
    for name, source in {**slices, **slice_configs}.items():
        folder = resolve_folder(source) if name in slices else None
        config_file = user_path(source, "derive_widths: slice") if folder is None else None
        path = config_file or folder / "config.json"
        config = _slice_config(name, path)
        width = _derive_one(whole.config, config, name)
        table[name] = width_to_dict(whole.config, width)
        has_weights = folder is not None and any(
            (folder / file).is_file() for file in (SINGLE_NAME, INDEX_NAME)
        )
        if has_weights:
            _compare(whole, TensorFiles(folder), smallest_uniform_width(whole.config, width), name)
        else:
            logger.info("derive_widths: %s has no weights: sizes taken, nothing compared", name)
    return _table(full_name, table)


def _table(default: str, widths: dict[str, Any]) -> dict[str, Any]:
    return {"version": 1, "default_width": default, "widths": widths}


def _slice_config(name: str, path: Path) -> ModelConfig:
    try:
        return ModelConfig.from_dict(read_json(path))
    except CheckpointError as error:
        raise CheckpointError(f"derive_widths: slice {name} ({path}): {error}") from error


def _derive_one(full: ModelConfig, part: ModelConfig, name: str) -> Width:
    for key in _SHARED:
        want, got = getattr(full, key), getattr(part, key)
        if want != got:
            hint = ""
            if key == "pattern" and len(got) != len(want):
                hint = "; a slice that skips layers is no width (its cache would lack them)"
            raise CheckpointError(
                f"derive_widths: {key} of {name} must be {shown(want)} as in the full checkpoint, "
                f"got {shown(got)}{hint}"
            )
    if part.tie_word_embeddings and not full.tie_word_embeddings:
        raise CheckpointError(
            f"derive_widths: tie_word_embeddings of {name} must be false as in the full "
            "checkpoint, got True"
        )
    widths = parse_widths(part)
    if len(widths) != 1:
        raise CheckpointError(
            f"derive_widths: {name} must be a slice, which has one width, got {', '.join(widths)}"
        )
    (width,) = widths.values()
    sizes: dict[str, Any] = {"hidden_size": width.hidden_size}
    for key, kind in LAYER_KEYS.items():
        if kind in full.layers:
            sizes[key] = [getattr(width, key)[layer] for layer in full.layers_of(kind)]
    return parse_widths(full, {name: sizes})[name]


def _compare(whole: Checkpoint, part: TensorFiles, width: Width, name: str) -> None:
    absent = 0
    sources = {tensor: tensor for tensor in whole.names}
    selections = tensor_selections(whole.config, width)
    if whole.config.tie_word_embeddings and HEAD in part:  # a slice of a tied model has a head
        sources[HEAD], selections[HEAD] = EMBEDDING, selections[EMBEDDING]
    stored = part_sources(whole, {n: (sources[n], kept) for n, kept in selections.items()})
    for tensor, (source, kept) in stored.items():
        if tensor not in part:
            absent += 1
            continue
        want = selection_shape(whole.part_spec(source)[0], kept)
        got = part.shape_of(tensor)
        if got != want:
            raise CheckpointError(
                f"derive_widths: {tensor} of {name} must have shape {list(want)} as its "
                f"config.json says, got {list(got)}"
            )
        _compare_one(whole, part, tensor, source, kept, name)
    if absent:
        logger.warning("derive_widths: %d tensors of %s are absent: not compared", absent, name)


def _part_of(axis: Axis, start: int, stop: int) -> slice | list[int]:
    """Entries start..stop-1 of a selection."""
    if axis is None:
        return slice(start, stop)
    if isinstance(axis, slice):
        return slice((axis.start or 0) + start, (axis.start or 0) + stop)
    return list(axis[start:stop])


def _compare_one(
    whole: Checkpoint, part: TensorFiles, tensor: str, source: str, kept: Selection, name: str
) -> None:
    shape, dtype = part.shape_of(tensor), part.dtype_of(tensor)
    if not shape:
        if part.tensor(tensor).item() != whole.part(source).item():
            raise CheckpointError(
                f"derive_widths: {tensor} of {name} must be that of the full checkpoint, got "
                f"{part.tensor(tensor).item()!r} for {whole.part(source).item()!r}"
            )
        return
    row_bytes = max(1, torch.Size(shape[1:]).numel()) * dtype.itemsize
    step = max(1, _BLOCK_BYTES // row_bytes)
    for start in range(0, shape[0], step):
        stop = min(shape[0], start + step)
        got = part.tensor(tensor, slice(start, stop))
        want = whole.part(source, _part_of(kept.rows, start, stop), kept.cols).to(dtype)
        if dtype == torch.float8_e4m3fn:  # compared as bits
            got, want = got.view(torch.uint8), want.view(torch.uint8)
        differs = (got != want) & ~(got.isnan() & want.isnan())
        if not bool(differs.any()):
            continue
        at = [int(i) for i in differs.nonzero()[0]]
        mine, full = got[tuple(at)].item(), want[tuple(at)].item()
        at[0] += start
        origin = [_source(axis, i) for axis, i in zip(kept, at, strict=False)] + at[2:]
        raise CheckpointError(
            f"derive_widths: {tensor} of {name} must be a prefix of the full tensor, got {mine!r} "
            f"at {at} where the full one has {full!r} at {origin}; the slice's channels were "
            "reordered or trained further"
        )


def _source(axis: Axis, index: int) -> int:
    if axis is None:
        return index
    return (axis.start or 0) + index if isinstance(axis, slice) else axis[index]


def write_widths(
    table: Mapping[str, Any],
    target: str | Path,
    *,
    config_home: str | Path | None = None,
) -> Path:
    """Writes a width table where ``Checkpoint.open`` finds it.

    Args:
        table: elastic table; checked against the checkpoint where ``target`` is one.
        target: a ``.json`` file to write; or a checkpoint folder or Hub id: then
            elastic_widths.json beside its config.json, or, where the folder belongs to a download
            cache (never written to), ``<config_home>/elastic_infer/widths/<fingerprint>.json``.
        config_home: the user's config folder, None = ``~/.config``.

    Returns:
        The file written.

    Raises:
        CheckpointError: the file would lie in a download cache, or its folder is missing.
        WidthError: the table does not fit the checkpoint, or is none.
    """
    path = user_path(target, "write_widths: target")
    if path.suffix == ".json" and not is_folder(path):
        if not is_folder(path.parent):
            raise CheckpointError(f"write_widths: target must lie in a folder, got {path}")
        if is_download_cache(path.parent):
            raise CheckpointError(
                f"write_widths: target must not lie in a download cache, got {path}; give the "
                "checkpoint folder (the table then goes to the user's config folder) or another "
                "file"
            )
    else:
        folder = resolve_folder(target)
        checkpoint = Checkpoint.open(folder, widths=table)
        path = folder / WIDTHS_NAME
        if is_download_cache(folder):
            path = config_folder(config_home) / f"{checkpoint.fingerprint}.json"
            make_folder(path.parent, "write_widths")
    try:
        text = json.dumps(table, indent=2)
    except (TypeError, ValueError, RecursionError) as error:
        raise WidthError(
            f"write_widths: table must be what JSON can hold, got {shown(table)} ({error})"
        ) from error
    write_whole(path, text + "\n", "write_widths")
    logger.info("write_widths: wrote %s", path)
    return path
