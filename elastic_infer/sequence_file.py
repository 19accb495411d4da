"""A sequence in a file: safetensors with state, KV, tokens and width runs, in checkpoint order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .cache import PAGE, Run, Saved, SavedState, Sequence
from .config import width_to_dict
from .errors import CheckpointError, WidthError
from .tensor_files import save_tensors
from .weights import rank_major

if TYPE_CHECKING:
    from .engine import Engine

VERSION = "2"  # 2 records what the cache is kept in


def _checkpoint_order(engine: Engine) -> list[list[int]]:
    """Per Mamba layer: for each head of the cache its rank among the heads in checkpoint order."""
    config, served = engine.config, engine._model.weights.served
    orders = []
    for layer in config.layers_of("M"):
        heads = rank_major(config.mamba_num_heads, served.mamba_num_heads[layer], config.n_groups)
        orders.append(sorted(range(len(heads)), key=lambda i: heads[i]))
    return orders


def _conv_order(engine: Engine, heads: list[int], channels: int) -> list[int]:
    P = engine.config.mamba_head_dim
    x = [h * P + p for h in heads for p in range(P)]
    return x + list(range(len(x), channels))


def write_sequence(path, content: tuple[dict[str, torch.Tensor], dict[str, str]]) -> None:
    """Writes what `sequence_content` gave; a file that is there is replaced when the new one is
    whole. Needs no engine.

    Raises: CheckpointError if it cannot be written.
    """
    save_tensors(path, *content, what="sequence file")


def sequence_content(
    engine: Engine, sequence: Sequence, width: str, unread: list[int], logits
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A copy of a sequence as tensors and metadata. Heads are in checkpoint order, KV without the
    unused end of its last page.

    width: what reads on. unread: tokens that are not in the cache yet. logits: float32 [V] after
    the last read token, or None.
    """
    saved = engine._model.cache.export(sequence)
    tensors = {}
    for i, (k, v) in enumerate(saved.kv):
        for name, pages in (("k", k), ("v", v)):
            flat = pages[saved.pages].transpose(1, 2).flatten(0, 1)  # [tokens, Hkv, K]
            tensors[f"attention.{i}.{name}"] = flat[: sequence.length].contiguous()
    for i, ((ssm, conv), order) in enumerate(zip(saved.state.layers, _checkpoint_order(engine))):
        tensors[f"mamba.{i}.ssm"] = ssm[order].contiguous()
        tensors[f"mamba.{i}.conv"] = conv[_conv_order(engine, order, conv.shape[0])].contiguous()
    if logits is not None:
        tensors["logits"] = logits.clone()
    tensors["tokens"] = torch.tensor(sequence.tokens, dtype=torch.int32)
    tensors["unread"] = torch.tensor(unread, dtype=torch.int32)
    runs = [[r.width, r.kind, r.count, r.tracked] for r in sequence.runs]
    metadata = {
        "format": "elastic_infer.sequence",
        "version": VERSION,
        "fingerprint": engine.fingerprint,
        "width": width,
        "track": json.dumps(sequence.track),
        "cache": json.dumps(_dtypes(engine)),
        "runs": json.dumps(runs),
        "widths": json.dumps(_sizes(engine, [width, *(r.width for r in sequence.runs)])),
    }
    return tensors, metadata


def _dtypes(engine: Engine) -> dict[str, str]:
    """What the engine keeps its cache in, by the names of its options."""
    kv, state = engine._model.cache.dtypes.names
    return {"kv_cache_dtype": kv, "mamba_ssm_cache_dtype": state}


def _sizes(engine: Engine, names: list[str]) -> dict:
    """Table entries of the widths that a file speaks of: what their names mean."""
    return {n: width_to_dict(engine.config, engine.widths[n]) for n in sorted(set(names))}


def read_sequence(path, engine: Engine) -> tuple[Sequence, Saved, str, list[int], object]:
    """Reads what `write_sequence` wrote: (sequence without a place, its content, width, unread
    tokens, logits or None).

    Raises: CheckpointError for a file that is no sequence, is damaged, belongs to other weights,
        or does not fit the served width.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise CheckpointError(f"sequence file: path must name a file, got {path}")
    try:
        with safe_open(str(path), framework="pt") as f:
            metadata = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"sequence file: {path} must be whole safetensors, got: {error}"
        ) from error
    if metadata.get("format") != "elastic_infer.sequence" or metadata.get("version") != VERSION:
        raise CheckpointError(
            f"sequence file: {path} must be an elastic_infer sequence of version {VERSION}, got "
            f"{metadata.get('format')!r} version {metadata.get('version')!r}"
        )
    if metadata["fingerprint"] != engine.fingerprint:
        raise CheckpointError(
            f"sequence file: {path} must belong to these weights ({engine.fingerprint[:12]}…), got "
            f"one for {metadata['fingerprint'][:12]}…; load it with the checkpoint that wrote it"
        )
    try:
        return _parse(path, engine, metadata, tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, (CheckpointError, WidthError)):
            raise
        raise CheckpointError(
            f"sequence file: {path} must be as `save` writes it, got {type(error).__name__}: "
            f"{error}"
        ) from error


def _parse(path, engine: Engine, metadata: dict, tensors: dict):
    runs = [Run(w, k, c, t) for w, k, c, t in json.loads(metadata["runs"])]
    names = [metadata["width"], *(run.width for run in runs)]
    for name in names:
        engine._intake.check_width(name)
    sizes = json.loads(metadata["widths"])
    for name, here in _sizes(engine, names).items():
        if sizes[name] != here:
            raise CheckpointError(
                f"sequence file: {path} must have been read by widths of these sizes, got "
                f"{name!r} as {sizes[name]}, here it is {here}"
            )
    kept, here = json.loads(metadata["cache"]), _dtypes(engine)
    if kept != here:
        raise CheckpointError(
            f"sequence file: {path} must be loaded by an engine that keeps its cache as the one "
            f"that wrote it, got {kept}, here it is {here}"
        )
    tokens, unread = tensors["tokens"].tolist(), tensors["unread"].tolist()
    if sum(run.count for run in runs) != len(tokens):
        raise ValueError(f"width runs of {sum(r.count for r in runs)} tokens for {len(tokens)}")
    if tokens + unread:
        engine._intake.check_tokens("tokens", tokens + unread)
    logits = tensors.get("logits")
    if logits is not None:
        _expect(path, tensors, "logits", (engine.config.vocab_size,), torch.float32)
    sequence = Sequence(tokens=tokens, runs=runs, track=json.loads(metadata["track"]))
    return sequence, _content(path, engine, tensors, len(tokens)), names[0], unread, logits


def _content(path, engine: Engine, tensors: dict, length: int) -> Saved:
    """The tensors of a file in the cache's own order and shapes."""
    cache, pages = engine._model.cache, -(-length // PAGE)
    kv = []
    for i, (k, v) in enumerate(zip(cache.k, cache.v)):
        pair = []
        for name, like in (("k", k), ("v", v)):
            flat = _expect(path, tensors, f"attention.{i}.{name}",
                           (length, like.shape[1], like.shape[3]), like.dtype)  # fmt: skip
            room = torch.zeros(pages * PAGE, *flat.shape[1:], dtype=flat.dtype)
            room[:length] = flat
            pair.append(room.unflatten(0, (pages, PAGE)).transpose(1, 2).contiguous())
        kv.append(tuple(pair))
    states = []
    for i, (ssm, conv, order) in enumerate(zip(cache.ssm, cache.conv, _checkpoint_order(engine))):
        inverse = torch.tensor(order).argsort()
        saved_ssm = _expect(path, tensors, f"mamba.{i}.ssm", ssm.shape[1:], ssm.dtype)
        saved_conv = _expect(path, tensors, f"mamba.{i}.conv", conv.shape[1:], conv.dtype)
        channels = torch.tensor(_conv_order(engine, order, conv.shape[1])).argsort()
        states.append((saved_ssm[inverse], saved_conv[channels]))
    used = list(range(pages)) if cache.k else []
    return Saved(kv=kv, pages=used, state=SavedState(states), snapshots=[])


def _expect(path, tensors: dict, name: str, shape, dtype: torch.dtype) -> torch.Tensor:
    tensor = tensors.get(name)
    if tensor is None or tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
        got = "none" if tensor is None else f"{tensor.dtype}{list(tensor.shape)}"
        raise CheckpointError(
            f"sequence file: {path} must hold {name} as {dtype}{list(shape)} for this engine's "
            f"served width, got {got}"
        )
    return tensor
