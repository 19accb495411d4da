"""From a checkpoint to a model that is ready to run: devices, limits, weights, cache."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import _C
from ..cache.cache import Cache
from ..cache.dtypes import FP8, CacheDtypes, cache_dtypes
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.widths import Width, widest
from ..codes import dtype_name
from ..device.device import Device, choose_device
from ..device.machine import available_cpus
from ..errors import InvalidRequest, WidthError, shown
from ..files.reading import GENERATION_CONFIG, read_json
from ..model.loader import Progress, WeightLoader, activation_dtype
from ..model.model import Model
from ..sizing.capacity import Capacity, check_limits, plan_capacity
from ..sizing.fit import cache_budget
from ..text.tokenizer import Tokenizer, eos_ids_from_folder
from ..torch_modes import plain_torch
from ..value_checks import check_int, is_one_of, is_real

logger = logging.getLogger(__name__)


@dataclass
class Loaded:
    """The parts of an engine."""

    model: Model
    tokenizer: Tokenizer | None
    checkpoint: Checkpoint
    capacity: Capacity
    default_width: str
    generation_config: dict[str, Any]
    eos_ids: tuple[int, ...]


@dataclass(kw_only=True)
class Options:
    """The arguments of `Engine.from_pretrained` that say how to load."""

    device: str
    dtype: str | torch.dtype
    max_width: str | None
    max_model_len: int | None
    max_num_seqs: int | None
    max_num_batched_tokens: int
    kv_cache_memory_bytes: int | None
    gpu_memory_utilization: float
    threads: int | None
    isa: str
    progress: Progress | None
    batch_invariant: bool = False
    enforce_eager: bool = False
    kv_cache_dtype: str = "auto"
    mamba_ssm_cache_dtype: str = "auto"
    activation_quantization: str = "none"


def load(
    path: str | Path,
    revision: str | None,
    widths: str | Path | Mapping[str, Any] | None,
    options: Options,
) -> Loaded:
    """Opens the checkpoint and reads what is to be served.

    Raises:
        CheckpointError: a folder that cannot be used.
        WidthError: an unknown `max_width`.
        InvalidRequest: an option that is out of range, or cannot be used here.
        OutOfCapacity: weights and cache that do not fit.
    """
    with plain_torch():
        return _load(path, revision, widths, options)


def _load(
    path: str | Path,
    revision: str | None,
    widths: str | Path | Mapping[str, Any] | None,
    options: Options,
) -> Loaded:
    device = choose_device(options.device)
    _check_switches(options)
    _check_share(options.gpu_memory_utilization)
    checkpoint = Checkpoint.open(path, revision, widths)
    kept, served = served_widths(checkpoint.widths, options.max_width)
    try:
        kind = activation_dtype(checkpoint, options.dtype)
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
    config = checkpoint.config
    check_activations(options.activation_quantization, device, checkpoint.formats)
    limits = {
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "kv_cache_memory_bytes": options.kv_cache_memory_bytes,
    }
    check_limits(config, **limits)
    dtypes = cache_dtypes(config, kind, options.kv_cache_dtype, options.mamba_ssm_cache_dtype)
    _tell_missing_factors(checkpoint, dtypes)
    tokenizer = Tokenizer.from_folder(checkpoint.folder)
    generation_config = read_generation_config(checkpoint.folder)
    if not device.is_cpu:
        budget = partial(cache_budget, device, config, checkpoint.widths, served, kind, **limits)
        share, formats = options.gpu_memory_utilization, checkpoint.formats
        available = budget(dtypes=dtypes, formats=formats, gpu_memory_utilization=share)
    else:
        available = None  # a CPU's free memory is asked for
    capacity = plan_capacity(config, served, dtypes, available=available, **limits)
    pool = _pool(device, options)
    start = time.perf_counter()
    with device.running():
        loader = WeightLoader(checkpoint, served, kind, pool, options.progress, device)
        weights = loader.load()
        cache = Cache(config, served, dtypes, capacity.num_pages, capacity.num_slots, device)
        model = Model(
            config,
            weights,
            list(kept.values()),
            cache,
            pool,
            max_num_batched_tokens=capacity.max_num_batched_tokens,
            max_num_seqs=capacity.max_num_seqs,
            max_length=capacity.max_model_len,
            device=device,
            graphs=not options.enforce_eager,
            activation_quantization=options.activation_quantization,
        )
        device.wait()
    seconds = time.perf_counter() - start
    what = f"{', '.join(kept)}, {dtype_name(kind)}, {weights.nbytes / 1e6:.0f} MB of weights"
    logger.info("loaded %s in %.1f s: widths %s, %s", path, seconds, what, _where(device, pool))
    logger.info("limits of %s: %s", path, _limits_text(capacity, dtypes))
    default = checkpoint.default_width if checkpoint.default_width in kept else list(kept)[-1]
    eos_ids = _eos_ids(checkpoint, tokenizer)
    return Loaded(model, tokenizer, checkpoint, capacity, default, generation_config, eos_ids)


def _limits_text(capacity: Capacity, dtypes: CacheDtypes) -> str:
    """Limits of an engine, as its log tells them."""
    kv, state = dtypes.names
    return (
        f"max_model_len {capacity.max_model_len}, max_num_seqs {capacity.max_num_seqs}, "
        f"{capacity.num_pages} KV pages ({kv}), {capacity.num_slots} state slots ({state})"
    )


def _tell_missing_factors(checkpoint: Checkpoint, dtypes: CacheDtypes) -> None:
    """Warns where keys and values in 8 bits are asked for, or stated by the checkpoint, and it has
    no factors for them: large ones would be cut to the largest code."""
    stated = checkpoint.published and checkpoint.published.kv_cache == "FP8"
    if checkpoint.lacks_kv_factors and (stated or dtypes.kv == FP8):
        logger.warning(
            "%s: keys and values in FP8 are %s, but there is no k_scale or v_scale of some "
            "attention layers: the factor is 1, and values beyond 448 are cut",
            checkpoint.folder,
            "asked for" if dtypes.kv == FP8 else "stated by the checkpoint",
        )


def check_activations(requested: object, device: Device, formats: Mapping[str, str]) -> None:
    """Refuses activations in a form that the device or the weights do not allow.

    Args:
        requested: "none", "int8" (the CPU) or "nvfp4" (GPUs of compute capability 12.x).
        formats: of the checkpoint's quantized matrices, by name.

    Raises:
        InvalidRequest: a form that is not allowed.
    """
    name = "engine: activation_quantization"
    if not is_one_of(requested, ("none", "int8", "nvfp4")):
        raise InvalidRequest(f"{name} must be none, int8 or nvfp4, got {shown(requested)}")
    if requested == "none":
        return
    if requested == "int8":
        why = "" if device.is_cpu else "int8 is for the CPU, the device is a GPU"
    else:
        why = "a GPU of compute capability 12.x is needed, the device is the CPU"
        why = why if device.is_cpu else _C.cuda_lacks(device.place.index or 0, 120, True)
    if not why and "nvfp4" not in formats.values():
        why = "the checkpoint has no NVFP4 matrix"
    if why:
        raise InvalidRequest(f"{name} must be none: {why}, got {shown(requested)}")
    if requested == "nvfp4":
        logger.warning(
            "activation_quantization: NVFP4 weights multiply activations in 4 bits, with kernels "
            "that have never run on a GPU"
        )


def served_widths(
    widths: Mapping[str, Width], max_width: str | None
) -> tuple[dict[str, Width], Width]:
    """(widths that can be used, axis-wise maximum of them) when `max_width` is the widest to serve.

    Raises:
        WidthError: an unknown name.
    """
    if max_width is None:
        return dict(widths), widest(widths)
    if not isinstance(max_width, str) or max_width not in widths:
        raise WidthError(f"max_width: must be one of {', '.join(widths)}, got {shown(max_width)}")
    top = widths[max_width]
    return {name: w for name, w in widths.items() if w.fits_in(top)}, top


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The object in generation_config.json; empty without the file.

    Raises:
        CheckpointError: one that is no JSON object.
    """
    path = folder / GENERATION_CONFIG
    return read_json(path, f"{path.name}:", dict) if os.path.lexists(path) else {}


def _eos_ids(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Tokens that end a sequence, by the checkpoint's files and by its tokenizer."""
    stated = eos_ids_from_folder(checkpoint.folder)
    own = tokenizer.eos_ids if tokenizer else ()
    return tuple(dict.fromkeys((*stated, *own))) or checkpoint.config.eos_token_ids


def _pool(device: Device, options: Options) -> _C.Pool:
    threads = _threads(options.threads) if device.is_cpu else 1
    try:
        return _C.Pool(threads, options.isa, options.batch_invariant)
    except ValueError as error:
        raise InvalidRequest(f"engine: {error}") from None


def _where(device: Device, pool: _C.Pool) -> str:
    """The kernels and their threads or device, for the log."""
    if device.is_cpu:
        return f"{pool.isa} kernels on {pool.threads} threads"
    if device.stream is None:
        return "CUDA kernels, emulated"
    return f"CUDA kernels on {device.name} ({torch.cuda.get_device_name(device.place)})"


def _check_switches(options: Options) -> None:
    for name in ("batch_invariant", "enforce_eager"):
        check_switch(name, getattr(options, name))
    if not isinstance(options.isa, str):
        raise InvalidRequest(
            f"engine: isa must be auto, portable, avx2 or avx512, got {shown(options.isa)}"
        )
    if options.progress is not None and not callable(options.progress):
        raise InvalidRequest(
            "engine: progress must be None or a function of (tensor name, bytes), got "
            f"{shown(options.progress)}"
        )


def check_switch(name: str, value: object) -> None:
    """Raises InvalidRequest unless an option of the engine is True or False."""
    if not isinstance(value, bool):
        raise InvalidRequest(f"engine: {name} must be True or False, got {shown(value)}")


def _check_share(value: object) -> None:
    if not is_real(value) or not 0 < value <= 1:
        raise InvalidRequest(
            f"engine: gpu_memory_utilization must be a number in (0, 1], got {shown(value)}"
        )


def _threads(threads: int | None) -> int:
    if threads is None:
        return available_cpus()
    check_int("engine: threads", threads, 1, 1024)
    return threads
