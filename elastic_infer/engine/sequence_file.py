"""A sequence in a file: safetensors with state, KV, tokens and width runs, in checkpoint order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..cache.pages import PAGE, pages_for
from ..cache.sequence import Run, Saved, SavedState, Sequence
from ..checkpoint.tensor_files import DTYPES, open_safetensors, save_tensors
from ..checkpoint.width_table import width_to_dict
from ..errors import CheckpointError, WidthError, shown
from ..files.reading import is_file, parse_json, user_path
from ..model.weights import rank_major
from .core import Core

VERSION = "2"  # 2 records what the cache is kept in


def _checkpoint_order(core: Core) -> list[list[int]]:
    """Per Mamba layer: for each head of the cache its rank among the heads in checkpoint order."""
    config, served = core.config, core.model.weights.served
    orders = []
    for layer in config.layers_of("M"):
        heads = rank_major(config.mamba_num_heads, served.mamba_num_heads[layer], config.n_groups)
        orders.append(sorted(range(len(heads)), key=lambda i: heads[i]))
    return orders


def _conv_order(core: Core, heads: list[int], channels: int) -> list[int]:
    P = core.config.mamba_head_dim
    x = [h * P + p for h in heads for p in range(P)]
    return x + list(range(len(x), channels))


def write_sequence(path, content: tuple[dict[str, torch.Tensor], dict[str, str]]) -> None:
    """Writes what `sequence_content` gave; a file that is there is replaced when the new one is
    whole. Needs no engine.

    Raises:
        CheckpointError: if it cannot be written.
    """
    save_tensors(path, *content, what="sequence file")


def sequence_content(
    core: Core, sequence: Sequence, width: str, unread: list[int], logits
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A copy of a sequence as tensors and metadata. Heads are in checkpoint order, KV without the
    unused end of its last page.

    Args:
        width: what reads on.
        unread: tokens that are not in the cache yet.
        logits: float32 [V] after the last read token, or None.
    """
    saved = core.model.cache.export(sequence)
    tensors = {}
    for i, (k, v) in enumerate(saved.kv):
        for name, pages in (("k", k), ("v", v)):
            flat = pages[saved.pages].transpose(1, 2).flatten(0, 1)  # [tokens, Hkv, K]
            tensors[f"attention.{i}.{name}"] = flat[: sequence.length].contiguous()
    for i, ((ssm, conv), order) in enumerate(zip(saved.state.layers, _checkpoint_order(core))):
        tensors[f"mamba.{i}.ssm"] = ssm[order].contiguous()
        tensors[f"mamba.{i}.conv"] = conv[_conv_order(core, order, conv.shape[0])].contiguous()
    if logits is not None:
        tensors["logits"] = logits.clone()
    tensors["tokens"] = torch.tensor(sequence.tokens, dtype=torch.int32)
    tensors["unread"] = torch.tensor(unread, dtype=torch.int32)
    runs = [[r.width, r.kind, r.count, r.tracked] for r in sequence.runs]
    metadata = {
        "format": "elastic_infer.sequence",
        "version": VERSION,
        "fingerprint": core.fingerprint,
        "width": width,
        "track": json.dumps(sequence.track),
        "cache": json.dumps(_dtypes(core)),
        "runs": json.dumps(runs),
        "widths": json.dumps(_sizes(core, [width, *(r.width for r in sequence.runs)])),
    }
    return tensors, metadata


def _dtypes(core: Core) -> dict[str, str]:
    """Formats of the engine's cache, by the names of its options."""
    kv, state = core.model.cache.dtypes.names
    return {"kv_cache_dtype": kv, "mamba_ssm_cache_dtype": state}


def _sizes(core: Core, names: list[str]) -> dict:
    """Table entries of the widths that a file speaks of: what their names mean."""
    return {n: width_to_dict(core.config, core.widths[n]) for n in sorted(set(names))}


def read_sequence(path, core: Core) -> tuple[Sequence, Saved, str, list[int], object]:
    """Reads what `write_sequence` wrote: (sequence without a place, its content, width, unread
    tokens, logits or None).

    Raises:
        CheckpointError: a file that is no sequence, is damaged, belongs to other weights, or does
            not fit the served width.
    """
    path = user_path(path, "sequence file: path")
    if not is_file(path):
        raise CheckpointError(f"sequence file: path must name a file, got {path}")
    with open_safetensors(path, "sequence file") as stored:
        return _read(path, core, stored)


def _read(path: Path, core: Core, stored: Any):
    metadata = stored.metadata() or {}
    if metadata.get("format") != "elastic_infer.sequence" or metadata.get("version") != VERSION:
        raise CheckpointError(
            f"sequence file: {path} must be an elastic_infer sequence of version {VERSION}, got "
            f"{shown(metadata.get('format'))} version {shown(metadata.get('version'))}"
        )
    written_by = metadata.get("fingerprint", "")
    if written_by != core.fingerprint:
        raise CheckpointError(
            f"sequence file: {path} must belong to these weights ({core.fingerprint[:12]}…), got "
            f"one for {written_by[:12]}…; load it with the checkpoint that wrote it"
        )
    try:
        return _parse(path, core, metadata, _Tensors(path, stored))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, (CheckpointError, WidthError)):
            raise
        raise CheckpointError(
            f"sequence file: {path} must be as `save` writes it, got {type(error).__name__}: "
            f"{error}"
        ) from error


class _Tensors:
    """The tensors of a file; shape and dtype are compared before anything is read."""

    def __init__(self, path: Path, stored: Any):
        self.path, self.stored, self.names = path, stored, frozenset(stored.keys())

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor that must have this shape and dtype."""
        kind, found = self._kind(name)
        if kind != dtype or found != tuple(shape):
            got = "none" if found is None else f"{kind}{list(found)}"
            raise CheckpointError(
                f"sequence file: {self.path} must hold {name} as {dtype}{list(shape)} for this "
                f"engine's served width, got {got}"
            )
        return self.stored.get_tensor(name)

    def ids(self, name: str, most: int) -> list[int]:
        """A list of at most `most` token ids."""
        kind, found = self._kind(name)
        if kind != torch.int32 or len(found) != 1 or found[0] > most:
            got = "none" if found is None else f"{kind}{list(found)}"
            raise CheckpointError(
                f"sequence file: {self.path} must hold {name} as at most {most} ids in int32, got "
                f"{got}"
            )
        return self.stored.get_tensor(name).tolist()

    def _kind(self, name: str) -> tuple[torch.dtype | None, tuple[int, ...] | None]:
        if name not in self.names:
            return None, None
        entry = self.stored.get_slice(name)
        return DTYPES.get(entry.get_dtype()), tuple(entry.get_shape())


def _value(path: Path, metadata: dict[str, str], key: str, kind: type) -> Any:
    """One JSON value of the metadata.

    Raises:
        KeyError: without it.
        ValueError: one of another type.
    """
    value = parse_json(metadata[key], f"sequence file: {path} must be as `save` writes it: {key}")
    if not isinstance(value, kind):
        raise ValueError(f"{key} {shown(value)}")
    return value


def _runs(path: Path, metadata: dict[str, str]) -> list[Run]:
    """The width runs, every field of its type; ValueError for anything else."""
    runs = []
    for entry in _value(path, metadata, "runs", list):
        width, kind, count, tracked = entry if isinstance(entry, list) else ()
        if (
            not isinstance(width, str)
            or kind not in ("prefill", "step")
            or type(count) is not int
            or count < 1
            or type(tracked) is not bool
        ):
            raise ValueError(f"a run {shown(entry)}")
        runs.append(Run(width, kind, count, tracked))
    return runs


def _parse(path: Path, core: Core, metadata: dict[str, str], tensors: _Tensors):
    runs, track = _runs(path, metadata), _value(path, metadata, "track", bool)
    names = [metadata["width"], *(run.width for run in runs)]
    for name in names:
        core.intake.check_width(name)
    sizes = _value(path, metadata, "widths", dict)
    for name, here in _sizes(core, names).items():
        if sizes[name] != here:
            raise CheckpointError(
                f"sequence file: {path} must have been read by widths of these sizes, got "
                f"{name!r} as {shown(sizes[name])}, here it is {here}"
            )
    kept, here = _value(path, metadata, "cache", dict), _dtypes(core)
    if kept != here:
        raise CheckpointError(
            f"sequence file: {path} must be loaded by an engine that keeps its cache as the one "
            f"that wrote it, got {shown(kept)}, here it is {here}"
        )
    longest = core.max_model_len
    tokens, unread = tensors.ids("tokens", longest), tensors.ids("unread", longest)
    if sum(run.count for run in runs) != len(tokens):
        raise ValueError(f"width runs of {sum(r.count for r in runs)} tokens for {len(tokens)}")
    if tokens + unread:
        core.intake.check_tokens("tokens", tokens + unread)
    logits = None
    if "logits" in tensors.names:
        logits = tensors.get("logits", (core.config.vocab_size,), torch.float32)
    sequence = Sequence(tokens=tokens, runs=runs, track=track)
    return sequence, _content(core, tensors, len(tokens)), names[0], unread, logits


def _content(core: Core, tensors: _Tensors, length: int) -> Saved:
    """The tensors of a file in the cache's own order and shapes."""
    cache, pages = core.model.cache, pages_for(length)
    kv = []
    for i, (k, v) in enumerate(zip(cache.k, cache.v)):
        pair = []
        for name, like in (("k", k), ("v", v)):
            shape = (length, like.shape[1], like.shape[3])
            flat = tensors.get(f"attention.{i}.{name}", shape, like.dtype)
            room = torch.zeros(pages * PAGE, *flat.shape[1:], dtype=flat.dtype)
            room[:length] = flat
            pair.append(room.unflatten(0, (pages, PAGE)).transpose(1, 2).contiguous())
        kv.append(tuple(pair))
    states = []
    for i, (ssm, conv, order) in enumerate(zip(cache.ssm, cache.conv, _checkpoint_order(core))):
        inverse = torch.tensor(order).argsort()
        saved_ssm = tensors.get(f"mamba.{i}.ssm", ssm.shape[1:], ssm.dtype)
        saved_conv = tensors.get(f"mamba.{i}.conv", conv.shape[1:], conv.dtype)
        channels = torch.tensor(_conv_order(core, order, conv.shape[1])).argsort()
        states.append((saved_ssm[inverse], saved_conv[channels]))
    used = list(range(pages)) if cache.k else []
    return Saved(kv=kv, pages=used, state=SavedState(states), snapshots=[])
