"""Capacity of the cache: limits from the options and from free memory."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ..cache.dtypes import CacheDtypes, item_size
from ..cache.pages import PAGE
from ..checkpoint.config import ModelConfig
from ..checkpoint.counts import kv_bytes_per_token
from ..checkpoint.widths import Width
from ..errors import InvalidRequest, OutOfCapacity, shown

MAX_ROWS = 1024  # sequences of one pass
DEFAULT_ROWS = 64  # where no max_num_seqs is given


@dataclass(frozen=True)
class Capacity:
    """max_model_len: tokens of a sequence, prompt and output. max_num_seqs: sequences in the cache
    at once. num_slots: state slots, snapshots included. num_pages: KV pages of 64 tokens."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_pages: int
    num_slots: int


def free_memory() -> int:
    """Bytes of host memory that can be taken without swapping (Linux; elsewhere 4 GiB)."""
    try:
        with open("/proc/meminfo") as f:
            for line in f:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    pages = getattr(os, "sysconf_names", {}).get("SC_AVPHYS_PAGES")
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if pages else 4 << 30


def slot_bytes(config: ModelConfig, served: Width, dtypes: CacheDtypes | torch.dtype) -> int:
    """Bytes of one state slot at the served width; a dtype stands for a model's defaults."""
    dtypes = CacheDtypes.of(dtypes)
    ssm, conv = item_size(dtypes.ssm), item_size(dtypes.conv)
    total = 0
    for layer in config.layers_of("M"):
        heads = served.mamba_num_heads[layer]
        total += heads * config.mamba_head_dim * config.ssm_state_size * ssm
        total += config.conv_dim(heads) * (config.conv_kernel - 1) * conv
    return total


def plan_capacity(
    config: ModelConfig,
    served: Width,
    dtypes: CacheDtypes | torch.dtype,
    max_model_len: int | None,
    max_num_seqs: int | None,
    max_num_batched_tokens: int,
    kv_cache_memory_bytes: int | None,
    available: int | None = None,
) -> Capacity:
    """Limits that fit together, such that a sequence of max_model_len tokens always fits. By
    default half of the free memory is for the cache, and no more than DEFAULT_ROWS sequences of
    full length can use; without a max_model_len it is the model's context, or what fits of it.
    `available`: on a GPU, what there is for the cache.

    Raises:
        InvalidRequest: a limit out of range.
        OutOfCapacity: if a sequence cannot fit.
    """
    check_limits(
        config, max_model_len, max_num_seqs, max_num_batched_tokens, kv_cache_memory_bytes
    )
    length = config.max_position_embeddings if max_model_len is None else max_model_len
    wanted = DEFAULT_ROWS if max_num_seqs is None else max_num_seqs
    budget = kv_cache_memory_bytes
    if budget is None:
        budget = free_memory() // 2 if available is None else available
    dtypes = CacheDtypes.of(dtypes)
    slot = slot_bytes(config, served, dtypes)
    page = PAGE * kv_bytes_per_token(config, item_size(dtypes.kv))
    # The table of pages is the only thing that a token takes without attention. With attention it
    # takes less than a sixteenth of what the pages take.
    table = 16 * 4 * wanted
    fitting = (budget - slot) // (page or table) * PAGE
    least = length if max_model_len is not None else min(length, PAGE)
    if slot > budget or fitting < least:
        need = slot + -(-least // PAGE) * (page or table)
        raise OutOfCapacity(
            f"engine: kv_cache_memory_bytes must hold one sequence of {least} tokens: {need} bytes "
            f"(state {slot}, KV page of {PAGE} tokens {page}), got {budget}, which holds "
            f"{max(0, fitting)} tokens"
        )
    length = min(length, fitting)
    per_sequence = -(-length // PAGE)
    # Three slots per sequence, its own and two snapshots, as far as half of the budget goes; the
    # pages of one whole sequence come first.
    room = budget - per_sequence * page
    most = room // slot if slot else 3 * wanted
    if max_num_seqs is not None and most < wanted:
        raise OutOfCapacity(
            f"engine: kv_cache_memory_bytes must hold the states of max_num_seqs {wanted} "
            f"sequences ({slot} bytes each) beside one sequence of {length} tokens "
            f"({per_sequence * page} bytes of KV pages), got {budget}, which holds {most}"
        )
    half = budget // 2 // slot if slot else 3 * wanted
    slots = max(1, min(most, max(half, 0 if max_num_seqs is None else wanted), 3 * wanted))
    rows = min(wanted, slots)
    pages = min(rows * per_sequence + 1, (budget - slots * slot) // page) if page else 1
    return Capacity(length, rows, max_num_batched_tokens, int(pages), int(slots))


def check_limits(
    config: ModelConfig,
    max_model_len: int | None,
    max_num_seqs: int | None,
    max_num_batched_tokens: int,
    kv_cache_memory_bytes: int | None,
) -> None:
    """Refuses limits that are out of range for any device.

    Raises:
        InvalidRequest: a limit that is out of range.
    """
    if max_model_len is not None:
        _check("max_model_len", max_model_len, 2, config.max_position_embeddings)
    if max_num_seqs is not None:
        _check("max_num_seqs", max_num_seqs, 1, MAX_ROWS)
    least = (DEFAULT_ROWS if max_num_seqs is None else max_num_seqs) + PAGE
    _check("max_num_batched_tokens", max_num_batched_tokens, least, 1 << 20)
    if kv_cache_memory_bytes is not None:
        _check("kv_cache_memory_bytes", kv_cache_memory_bytes, 1, 1 << 50)


def _check(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(
            f"engine: {name} must be an int in [{low}, {high}], got {shown(value)}"
        )
