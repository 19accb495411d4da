"""Whether a model fits a GPU, and what is left of it for the cache."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..cache.cache import PAGE
from ..cache.dtypes import CacheDtypes, item_size
from ..checkpoint.config import ModelConfig
from ..checkpoint.widths import Width, kv_bytes_per_token
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

    widths: those of the checkpoint, by active parameters; served: the widest to be kept. formats:
    of quantised matrices (`Checkpoint.formats`). dtypes: of the cache; None = the model's defaults.

    Raises: OutOfCapacity with what is needed, what is free and which width would fit, when these
        leave no room for a cache (of `kv_cache_memory_bytes`, or of a page and a slot).
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
