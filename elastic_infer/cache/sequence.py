"""A sequence in the cache: its tokens, its runs of widths, its snapshots."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from .pages import PAGE


@dataclass(frozen=True)
class Run:
    """`count` consecutive tokens that `width` read, as "prefill" or "step"; `tracked` when narrow
    reading also updated the state of the heads outside the width."""

    width: str
    kind: str
    count: int
    tracked: bool = False


def append_run(runs: list[Run], width: str, kind: str, count: int, tracked: bool) -> None:
    """Adds `count` tokens to a run-length list, in place. A prefill that begins off the grid of
    64 tokens begins a run: a 16-bit state was rounded there, and is again when runs are replayed.
    """
    if count == 0:
        return
    same = runs and (runs[-1].width, runs[-1].kind, runs[-1].tracked) == (width, kind, tracked)
    if same and (kind == "step" or sum(run.count for run in runs) % PAGE == 0):
        runs[-1] = replace(runs[-1], count=runs[-1].count + count)
    else:
        runs.append(Run(width, kind, count, tracked))


@dataclass
class Snapshot:
    """A sequence as it was: a slot with its state, shared pages, number of tokens and runs; the
    logits [V] after the last of them where the owner keeps them."""

    length: int
    slot: int
    pages: list[int]
    runs: list[Run]
    logits: torch.Tensor | None = None


@dataclass
class SavedState:
    """State of one slot in host memory: per Mamba layer ssm [H, P, N] and conv [C, 3]."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Saved:
    """A sequence's cache content in host memory, for preemption and files.

    Attributes:
        kv: per attention layer k, v [pages, Hkv, 64, K], every page once.
        pages: the sequence's pages as indices into these.
        snapshots: (snapshot without slot, its state), pages likewise.
    """

    kv: list[tuple[torch.Tensor, torch.Tensor]]
    pages: list[int]
    state: SavedState
    snapshots: list[tuple[Snapshot, SavedState]]

    @property
    def page_count(self) -> int:
        return 1 + max([*self.pages, *(p for s, _ in self.snapshots for p in s.pages)], default=-1)

    @property
    def slot_count(self) -> int:
        return 1 + len(self.snapshots)


@dataclass(eq=False)
class Sequence:
    """One sequence: the tokens that are in the cache, and where.

    Attributes:
        track: narrow widths also update the state of heads outside them, so that a later widening
            by `carry` finds everything.

    Closed sequences have slot -1.
    """

    tokens: list[int] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    slot: int = -1
    track: bool = False
    snapshots: list[Snapshot] = field(default_factory=list)
    saved: Saved | None = None  # while preempted

    @property
    def length(self) -> int:
        return len(self.tokens)
