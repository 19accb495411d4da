"""The tables of a pass: which tokens are read, for whom, at which mode, and into which pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..cache.pages import PAGE
from ..cache.sequence import Sequence
from ..device.device import Device
from ..device.shared import Shared
from .buffers import batch_tables, logit_rows
from .draw import DRAW_FIELDS, GREEDY, Draw
from .modes import WidthTables


@dataclass
class Segment:
    """The next tokens of one sequence in a pass.

    Attributes:
        kind: "step" (exactly one token) or "prefill".
        logits: "none", "last" (after the last token) or "all" (after every token).
        draw: for a step, how to draw the token after it; a device does that in the same pass.
        feed: for a step on a device, the row of what the last pass drew that holds its token (-1:
            `tokens` does); `tokens` then has any one id in its place, and the caller tells the
            cache (`advance`) once it knows the token.
    """

    sequence: Sequence
    tokens: list[int]
    width: str
    kind: str = "step"
    logits: str = "last"
    draw: Draw = GREEDY
    feed: int = -1


@dataclass
class Result:
    """Logits of a pass: float32 [rows, V], and per segment (in the order given) its rows of it.

    A view of a buffer that the next pass overwrites, except for more than `Model.logit_rows` rows.

    Attributes:
        drawn: int32 [rows] tokens drawn from them as each segment's `draw` says, after steps on a
            device.
    """

    logits: torch.Tensor
    spans: list[tuple[int, int]]
    drawn: torch.Tensor | None = None

    def of(self, segment: int) -> torch.Tensor:
        """Logits [rows, V] of one segment."""
        start, end = self.spans[segment]
        return self.logits[start:end]


@dataclass(frozen=True)
class Shape:
    """Extent of a pass: all rows, how many of them are steps, all segments."""

    rows: int
    steps: int
    segments: int


class Batch:
    """The tables that the ops of a pass read, filled from its segments.

    Args:
        modes: number of modes.
        max_num_batched_tokens: rows of the largest pass.
        max_num_seqs: sequences of the largest pass.
        max_length: tokens of the longest sequence.

    The tables themselves are `tables`, on both sides of a device.
    """

    def __init__(
        self,
        device: Device,
        modes: WidthTables,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        max_length: int,
    ):
        self._modes, self._is_cpu = modes, device.is_cpu
        self._logit_rows = logit_rows(max_num_seqs)
        tables = batch_tables(max_num_batched_tokens, max_num_seqs, max_length)
        self.tables = Shared(device, tables, sides=2)
        self._pages: list[tuple[int, ...]] = []  # what the device's page table holds, by row
        # Rows in which a side of the host has an older page table than the device.
        self._stale: list[set[int]] = [set() for _ in range(self.tables.sides)]

    def fill(self, segments: list[Segment], shape: Shape, size: int) -> None:
        """Writes the tables of a pass and brings them to the device.

        Args:
            size: rows of the recorded pass that serves a pass of steps; more than its own are
                padding.
        """
        self.tables.turn()
        write = self.tables.write
        ids, row_mode, mapping, cu = [], [], [], [0]
        seq_mode, lengths, context, slots = [], [], [], []
        for s in segments:
            sequence, n, pages = s.sequence, len(s.tokens), s.sequence.pages
            mode, start = self._modes.mode(s.width, sequence.track), sequence.length
            ids += s.tokens
            row_mode += [mode] * n
            seq_mode.append(mode)
            context.append(start)
            lengths.append(start + n)
            slots.append(sequence.slot)
            if pages:
                mapping += [pages[p // PAGE] * PAGE + p % PAGE for p in range(start, start + n)]
            cu.append(cu[-1] + n)
        new_pages = self._fill_pages(segments)
        if shape.rows == shape.steps:
            # Padding up to the recorded size: these rows read and write no cache.
            for _ in range(size - shape.steps):
                ids.append(0)
                row_mode.append(row_mode[-1])
                seq_mode.append(seq_mode[-1])
                context.append(0)
                lengths.append(0)
                slots.append(-1)
                mapping.append(-1)
                cu.append(cu[-1] + 1)
        write("ids", ids)
        write("row_mode", row_mode)
        write("seq_mode", seq_mode)
        write("slot_mapping", mapping)
        write("cu_seqlens", cu)
        write("cu_prefill", [c - shape.steps for c in cu[shape.steps :]])
        write("slots", slots)
        write("lengths", lengths)
        write("context", context)
        if shape.rows == shape.steps and not self._is_cpu:
            for name in DRAW_FIELDS:
                write(name, [getattr(s.draw, name) for s in segments])
            write("feed", [s.feed for s in segments] + [-1] * (len(ids) - shape.steps))
        if shape.rows > shape.steps:
            self.fill_logit_rows(wanted_rows(segments)[0][: self._logit_rows])
        self.tables.upload("page_table" if new_pages else "logit_mode")

    def _fill_pages(self, segments: list[Segment]) -> bool:
        """Writes the rows of the page table that differ from the device's; whether any did."""
        changed = set()
        for i, s in enumerate(segments):
            pages = tuple(s.sequence.pages)
            if i == len(self._pages):
                self._pages.append(())
            if pages != self._pages[i]:
                self._pages[i] = pages
                changed.add(i)
        if changed:
            for stale in self._stale:
                stale |= changed
            table, stale = self.tables.host["page_table"], self._stale[self.tables.side]
            while stale:
                i = stale.pop()
                table[i, : len(self._pages[i])] = self._pages[i]
        return bool(changed)

    def fill_logit_rows(self, rows: list[int]) -> None:
        """Sets the rows that the head reads, and their modes."""
        host = self.tables.host
        host["logit_rows"][: len(rows)] = rows
        host["logit_mode"][: len(rows)] = host["row_mode"][rows]


def wanted_rows(segments: list[Segment]) -> tuple[list[int], list[tuple[int, int]]]:
    """The rows of a pass whose logits are asked for, and each segment's part of them."""
    rows: list[int] = []
    spans, at = [], 0
    for s in segments:
        n = len(s.tokens)
        wanted = {"none": 0, "last": 1, "all": n}[s.logits]
        spans.append((len(rows), len(rows) + wanted))
        rows += range(at + n - wanted, at + n)
        at += n
    return rows, spans
