"""A model on a GPU: its fit, and the memory that is left for the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..cache.dtypes import CacheDtypes, item_size
from ..cache.pages import PAGE, pages_for
from ..checkpoint.config import ModelConfig
from ..checkpoint.counts import kv_bytes_per_token
from ..checkpoint.widths import Width
from ..device.device import Device
from ..errors import OutOfCapacity
from ..model.buffers import working_bytes
from .capacity import DEFAULT_ROWS, slot_bytes
from .footprint import weight_bytes


def cache_budget(
    device: Device,
    config: ModelConfig,
    widths: Mapping[str, Width],
    served: Width,
    dtype: torch.dtype,
    *,
    max_model_len: int | None,
    max_num_seqs: int | None,
    max_num_batched_tokens: int,
    gpu_memory_utilization: float,
    kv_cache_memory_bytes: int | None,
    formats: Mapping[str, str] | None = None,
    dtypes: CacheDtypes | None = None,
) -> int:
    """Bytes of device memory for the cache: `gpu_memory_utilization` of all there is, less what is
    in use, the weights, and the buffers of a pass.

    Args:
        widths: those of the checkpoint, by active parameters.
        served: the widest to be kept.
        formats: of quantized matrices (`Checkpoint.formats`).
        dtypes: of the cache; None = the model's defaults.

    Raises:
        OutOfCapacity: these leave no room for a cache (of `kv_cache_memory_bytes`, or of a page and
            a slot); states the bytes needed, the bytes free and a width that would fit.
    """
    free, total = device.memory()
    room = min(free, int(total * gpu_memory_utilization) - (total - free))
    length = max_model_len or config.max_position_embeddings
    segments = DEFAULT_ROWS if max_num_seqs is None else max_num_seqs
    dtypes = dtypes or CacheDtypes.of(dtype)
    page = PAGE * kv_bytes_per_token(config, item_size(dtypes.kv))

    def parts(width: Width) -> tuple[int, int, int]:
        """Bytes of weights, buffers and the least cache."""
        least = slot_bytes(config, width, dtypes) + page
        rows = max_num_batched_tokens
        working = working_bytes(config, width, dtype, rows, segments, length)
        return weight_bytes(config, width, dtype, formats), working, kv_cache_memory_bytes or least

    weights, working, cache = parts(served)
    if weights + working + cache > room:
        fitting = [name for name, w in widths.items() if sum(parts(w)) <= room]
        advice = f"max_width={fitting[-1]!r} fits" if fitting else "no width fits"
        raise OutOfCapacity(
            f"engine: {device.name} must have {weights + working + cache} bytes free (weights "
            f"{weights}, buffers {working}, cache {cache}), got {room} within "
            f"gpu_memory_utilization {gpu_memory_utilization} ({free} of {total} are free); "
            f"{advice}"
        )
    return room - weights - working


@dataclass(frozen=True)
class Fit:
    """Contents of a given memory.

    Attributes:
        weights: their bytes.
        working: bytes of activation buffers.
        length: tokens of a sequence.
        sequences: number of such sequences that fit in the rest.
        longest: tokens of the longest single sequence (0 when not even the weights fit).
    """

    weights: int
    working: int
    length: int
    sequences: int
    longest: int


def fit(
    config: ModelConfig,
    width: Width,
    dtype: torch.dtype,
    memory: int,
    length: int,
    max_num_batched_tokens: int = 2048,
    formats: Mapping[str, str] | None = None,
    dtypes: CacheDtypes | None = None,
) -> Fit:
    """Contents of `memory` bytes when `width` is the widest served.

    Args:
        length: tokens of a sequence, prompt and output.
        max_num_batched_tokens: rows of the largest pass, which the activation buffers are for.
        formats: of quantized matrices, as for `weight_bytes`.
        dtypes: of the cache; None = the model's defaults.
    """
    weights = weight_bytes(config, width, dtype, formats)
    rows = max_num_batched_tokens
    working = working_bytes(config, width, dtype, rows, min(rows, DEFAULT_ROWS), length)
    dtypes = dtypes or CacheDtypes.of(dtype)
    slot = slot_bytes(config, width, dtypes)
    page = PAGE * kv_bytes_per_token(config, item_size(dtypes.kv))
    rest = memory - weights - working
    each = slot + pages_for(length) * page
    context = config.max_position_embeddings
    longest = min(context, (rest - slot) // page * PAGE if page else context)
    if rest < slot + page:
        return Fit(weights, working, length, 0, 0)
    return Fit(weights, working, length, rest // each if each else 0, longest)
