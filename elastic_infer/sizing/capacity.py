"""Capacity of the cache: limits from the options and from free memory."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ..cache.dtypes import CacheDtypes, item_size
from ..cache.pages import PAGE, pages_for
from ..checkpoint.config import ModelConfig
from ..checkpoint.counts import kv_bytes_per_token
from ..checkpoint.widths import Width
from ..errors import OutOfCapacity
from ..value_checks import check_int

MAX_NUM_SEQS = 1024  # sequences of one pass
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
    *,
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
        config,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
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
        need = slot + pages_for(least) * (page or table)
        raise OutOfCapacity(
            f"engine: kv_cache_memory_bytes must hold one sequence of {least} tokens: {need} bytes "
            f"(state {slot}, KV page of {PAGE} tokens {page}), got {budget}, which holds "
            f"{max(0, fitting)} tokens"
        )
    length = min(length, fitting)
    per_sequence = pages_for(length)
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
    return Capacity(
        max_model_len=length,
        max_num_seqs=rows,
        max_num_batched_tokens=max_num_batched_tokens,
        num_pages=int(pages),
        num_slots=int(slots),
    )


def check_limits(
    config: ModelConfig,
    *,
    max_model_len: int | None,
    max_num_seqs: int | None,
    max_num_batched_tokens: int,
    kv_cache_memory_bytes: int | None,
) -> None:
    """Refuses limits that are out of range for any device.

    Raises:
        InvalidRequest: a limit that is out of range.
    """
    context = config.max_position_embeddings
    if max_model_len is not None:
        check_int("engine: max_model_len", max_model_len, 2, context)
    if max_num_seqs is not None:
        check_int("engine: max_num_seqs", max_num_seqs, 1, MAX_NUM_SEQS)
    least = (DEFAULT_ROWS if max_num_seqs is None else max_num_seqs) + PAGE
    check_int("engine: max_num_batched_tokens", max_num_batched_tokens, least, 1 << 20)
    if kv_cache_memory_bytes is not None:
        check_int("engine: kv_cache_memory_bytes", kv_cache_memory_bytes, 1, 1 << 50)
