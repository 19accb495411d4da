"""Shared by the ops over packed sequences: parts of their references and cases."""

from __future__ import annotations

import torch

from ._spec import Arguments


def spans(a: Arguments) -> list[tuple[int, int, int]]:
    """(first token, last token + 1, slot) of each sequence; without cu_seqlens, one token each."""
    slots = a["slots"].tolist()
    starts = a["cu_seqlens"].tolist() if "cu_seqlens" in a else list(range(len(slots) + 1))
    return list(zip(starts[:-1], starts[1:], slots, strict=True))


def active(a: Arguments, sizes: str, full: int) -> list[int]:
    """The active size of each sequence according to the width table `sizes` ([W], or None)."""
    if a["seq_width"] is None:
        return [full] * len(a["slots"])
    return [int(a[sizes][int(w)]) for w in a["seq_width"]]


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """float64 for the oracle, float32 otherwise: no op computes in bfloat16."""
    return torch.promote_types(x.dtype, torch.float32)


def offsets(lengths: list[int]) -> torch.Tensor:
    """[S+1] int32 token offsets of sequences of the given lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def draw_slots(
    generator: torch.Generator, sequences: int, slots: int, padded: int | None
) -> torch.Tensor:
    """[S] int32 distinct slots in random order; the sequence `padded` gets -1."""
    drawn = torch.randperm(slots, generator=generator)[:sequences].to(torch.int32)
    if padded is not None:
        drawn[padded] = -1
    return drawn


def at_width(a: Arguments, width: int) -> tuple[list[int], torch.Tensor]:
    """The sequences that run at `width`, and all their tokens."""
    chosen = [s for s, w in enumerate(a["seq_width"].tolist()) if w == width]
    all_spans = spans(a)
    tokens = [torch.arange(*all_spans[s][:2]) for s in chosen]
    return chosen, torch.cat(tokens) if tokens else torch.arange(0)
