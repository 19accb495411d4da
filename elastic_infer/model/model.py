"""The model: runs one pass over a batch of segments, each at its own width.

A pass reads the next tokens of several sequences: `step` segments (one token each, decode) come
first, then `prefill` segments. All widths share the same ops; a row's mode says how much of every
weight it uses. A pass of steps only is recorded once per batch size and then replayed with one
native call.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from .. import _C
from ..cache.cache import Cache
from ..cache.dtypes import FP8
from ..cache.pages import PAGE
from ..cache.sequence import Sequence
from ..checkpoint.config import ModelConfig
from ..checkpoint.widths import Width
from ..device.device import CPU, Device
from ..device.shared import Shared
from ..ops.attention_decode import attention_decode
from ..ops.attention_prefill import attention_prefill
from ..ops.embed import embed
from ..ops.kv_append import kv_append
from ..ops.matmul import matmul
from ..ops.moe_matmul import moe_matmul
from ..ops.moe_route import moe_route
from ..ops.rms_norm import rms_norm
from ..ops.sample import sample
from ..ops.tiles import NVFP4, ExpertWeights, TiledWeight
from . import mamba
from .buffers import Buffers, batch_tables, logit_rows
from .draw import DRAW_FIELDS, Draw
from .modes import WidthTables
from .weights import Weights


@dataclass
class Segment:
    """The next tokens of one sequence in a pass.

    kind: "step" (exactly one token) or "prefill". logits: "none", "last" (after the last token)
    or "all" (after every token). draw: for a step, how to draw the token after it; a device does
    that in the same pass. feed: for a step on a device, the row of what the last pass drew that
    holds its token (-1: `tokens` does); `tokens` then has any one id in its place, and the caller
    tells the cache (`advance`) once it knows the token.
    """

    sequence: Sequence
    tokens: list[int]
    width: str
    kind: str = "step"
    logits: str = "last"
    draw: Draw = Draw()
    feed: int = -1


@dataclass
class Result:
    """Logits of a pass: float32 [rows, V], and per segment (in the order given) its rows of it.

    A view of a buffer that the next pass overwrites, except for more than `Model.logit_rows` rows.
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


class Model:
    """Weights, cache and buffers of one served model.

    widths: served widths in index order. max_tokens: rows of the largest pass. max_segments:
    sequences of the largest pass. max_length: tokens of the longest sequence. device: where
    weights and cache are. graphs, dependent_launch: whether passes of steps are captured there, and
    whether their kernels may overlap (see `Step`). activation_quantization: what products do
    to activations where weights are NVFP4.

    On a GPU everything that `forward` does goes to the current stream: call it inside
    `device.running()`. Its logits are there too; reading them waits for the pass.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        widths: Seq[Width],
        cache: Cache,
        pool: _C.Pool,
        max_tokens: int,
        max_segments: int,
        max_length: int,
        device: Device = CPU,
        graphs: bool = True,
        dependent_launch: bool = False,
        activation_quantization: str = "none",
    ):
        self.config, self.weights, self.cache, self.pool = config, weights, cache, pool
        self.widths = {w.name: w for w in widths}
        self.device, self.graphs, self.dependent_launch = device, graphs, dependent_launch
        self.activation_quantization = activation_quantization
        self.tables = WidthTables(config, widths, weights.served, device.place)
        self.max_tokens, self.max_segments, self.max_length = max_tokens, max_segments, max_length
        self.logit_rows = logit_rows(max_segments)
        self.buffers = Buffers(
            config, weights.served, weights.dtype, max_tokens, max_segments, device
        )
        self.batch = Shared(device, batch_tables(max_tokens, max_segments, max_length), sides=2)
        self._pages: list[tuple[int, ...]] = []  # what the device's page table holds, by row
        # Rows in which a side of the host has an older page table than the device.
        self._stale: list[set[int]] = [set() for _ in range(self.batch.sides)]
        self.last: Result | None = None  # of the last pass
        self._recorded: dict[int, _C.Step] = {}

    # -- passes ------------------------------------------------------------------------------

    def forward(self, segments: Seq[Segment]) -> Result:
        """Reads the segments' tokens into the cache.

        Returns: the logits after the tokens that each segment asks for.

        Raises: OutOfCapacity when pages run out (nothing is read then).
        """
        order = sorted(range(len(segments)), key=lambda i: self._place(segments[i]))
        ordered = [segments[i] for i in order]
        self._check_fed(ordered)
        self._reserve(ordered)
        steps = sum(s.kind == "step" for s in ordered)
        shape = Shape(sum(len(s.tokens) for s in ordered), steps, len(ordered))
        self._fill(ordered, shape)
        drawn = None
        if shape.rows == steps:
            self._replay(steps)
            logits, spans = self.buffers.logits[:steps], [(i, i + 1) for i in range(steps)]
            drawn = None if self.device.is_cpu else self.buffers.drawn[:steps]
        else:
            self._record(self.pool, shape)
            logits, spans = self._logits(ordered)
        for s in ordered:
            if s.feed < 0:
                self.cache.advance(s.sequence, s.tokens, s.width, s.kind)
        by_segment = dict(zip(order, spans))
        self.last = Result(logits, [by_segment[i] for i in range(len(segments))], drawn)
        return self.last

    def _check_fed(self, segments: list[Segment]) -> None:
        """Tokens can be fed where the last pass has drawn some and this one reads steps alone."""
        fed = [s.feed for s in segments if s.feed >= 0]
        drawn = self.last.drawn if self.last else None
        if fed and (
            drawn is None or max(fed) >= len(drawn) or any(s.kind != "step" for s in segments)
        ):
            raise ValueError(
                "model: feed must be -1 unless the last pass drew tokens and all segments are "
                f"steps, got {max(fed)} after {0 if drawn is None else len(drawn)} tokens"
            )

    def _place(self, s: Segment) -> tuple[bool, int]:
        return s.kind != "step", self.tables.mode(s.width, s.sequence.track)

    def _reserve(self, segments: list[Segment]) -> None:
        """Pages for the whole pass, or none."""
        if self.cache.k:
            needed = sum(self.cache.pages_needed(s.sequence, len(s.tokens)) for s in segments)
            if needed > self.cache.pages.free:
                self.cache.pages.take(needed)  # raises, with the numbers
        for s in segments:
            self.cache.reserve(s.sequence, len(s.tokens))

    def _fill(self, segments: list[Segment], shape: Shape) -> None:
        """Writes the tables of a pass and brings them to the device."""
        self.batch.turn()
        write = self.batch.write
        ids, row_mode, mapping, cu = [], [], [], [0]
        seq_mode, lengths, context, slots = [], [], [], []
        for s in segments:
            sequence, n, pages = s.sequence, len(s.tokens), s.sequence.pages
            mode, start = self.tables.mode(s.width, sequence.track), sequence.length
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
            # Rows up to the size that is recorded: nobody's, they read and write no cache.
            for _ in range(self.recorded_size(shape.steps) - shape.steps):
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
        if shape.rows == shape.steps and not self.device.is_cpu:
            for name in DRAW_FIELDS:
                write(name, [getattr(s.draw, name) for s in segments])
            write("feed", [s.feed for s in segments] + [-1] * (len(ids) - shape.steps))
        if shape.rows > shape.steps:
            self._fill_logit_rows(self._wanted_rows(segments)[0][: self.logit_rows])
        self.batch.upload("page_table" if new_pages else "logit_mode")

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
            table, stale = self.batch.host["page_table"], self._stale[self.batch.side]
            while stale:
                i = stale.pop()
                table[i, : len(self._pages[i])] = self._pages[i]
        return bool(changed)

    def _fill_logit_rows(self, rows: list[int]) -> None:
        """Which rows the head is to read, and their modes."""
        host = self.batch.host
        host["logit_rows"][: len(rows)] = rows
        host["logit_mode"][: len(rows)] = host["row_mode"][rows]

    def recorded_size(self, steps: int) -> int:
        """Rows of the recorded pass that serves `steps` sequences: all sizes have their own on a
        CPU; on a GPU those up to 16, then multiples of 4 to 64, of 16 to 256 and of 32 beyond."""
        if self.device.is_cpu or steps <= 16:
            return steps
        grain = 4 if steps <= 64 else 16 if steps <= 256 else 32
        return min(-(-steps // grain) * grain, max(steps, self.max_segments))

    def _replay(self, steps: int) -> None:
        """Runs a pass of `steps` one-token segments, recording it the first time."""
        size = self.recorded_size(steps)
        if size not in self._recorded:
            step = _C.Step(
                self.pool, graph=self.graphs, dependent_launch=self.dependent_launch
            )
            self._record(step, Shape(size, size, size))
            self._head(step, self.buffers.normed[:size], self.batch.row_mode[:size])
            if not self.device.is_cpu:
                tables = {name: getattr(self.batch, name)[:size] for name in DRAW_FIELDS}
                sample(self.buffers.logits[:size], self.buffers.drawn[:size], **tables, run=step)
            self._recorded[size] = step
        self._recorded[size].run()

    @property
    def captures(self) -> int:
        """Graphs captured so far: one per size of pass, whatever widths its rows had."""
        return sum(step.captures for step in self._recorded.values())

    def step_names(self, steps: int) -> list[str]:
        """Ops of the recorded pass of `steps` sequences, in order (empty before its first use)."""
        step = self._recorded.get(self.recorded_size(steps))
        return step.names() if step else []

    def profile_step(self, steps: int) -> list[tuple[str, float]]:
        """Replays the recorded pass and gives (op, seconds) in order."""
        return self._recorded[self.recorded_size(steps)].profile()

    @staticmethod
    def _wanted_rows(segments: list[Segment]) -> tuple[list[int], list[tuple[int, int]]]:
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

    def _logits(self, segments: list[Segment]) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """Logits of a pass that was just run, in blocks of at most logit_rows rows (in host memory
        when there are several), and the rows of each segment."""
        rows, spans = self._wanted_rows(segments)
        b, batch, blocks = self.buffers, self.batch, []
        for start in range(0, len(rows), self.logit_rows):
            part = rows[start : start + self.logit_rows]
            n = len(part)
            if start:  # the first ones came with the tables of the pass
                batch.settle()
                self._fill_logit_rows(part)
                batch.upload("logit_mode")
            embed(batch.logit_rows[:n], b.normed, b.gathered[:n], run=self.pool)
            self._head(self.pool, b.gathered[:n], batch.logit_mode[:n])
            logits = b.logits[:n]
            blocks.append(logits.to("cpu", copy=True) if len(rows) > self.logit_rows else logits)
        if len(blocks) > 1:
            return torch.cat(blocks), spans
        return (blocks[0] if blocks else b.logits[:0]), spans

    # -- ops of one pass ---------------------------------------------------------------------

    def _record(self, run, shape: Shape) -> None:
        """Runs (on a Pool) or records (in a Step) embedding, all layers and the final norm; the
        normed rows are left in ``buffers.normed``."""
        b, w, t, R = self.buffers, self.weights, self.tables, shape.rows
        batch = self.batch
        modes, fed = batch.row_mode[:R], {}
        if shape.steps == R and not self.device.is_cpu:
            fed = {"drawn": b.drawn, "feed": batch.feed[:R]}
        embed(batch.ids[:R], w.embedding, b.residual[:R], row_width=modes, sizes=t.hidden, run=run,
              **fed)  # fmt: skip
        delta, kv, state = None, 0, 0
        for i, kind in enumerate(self.config.layers):
            self._norm(run, R, w.layers[i].norm, delta)
            if kind == "M":
                self._mamba(run, shape, i, state)
                state += 1
            elif kind == "*":
                self._attention(run, shape, i, kv)
                kv += 1
            elif kind == "-":
                self._ffn(run, R, w.layers[i].up, w.layers[i].down, i, b.delta)
            else:
                self._moe(run, R, i)
            delta = b.delta[:R]
        self._norm(run, R, w.final_norm, delta)

    def _matmul(self, x: torch.Tensor, weight: TiledWeight, out: torch.Tensor, **given) -> None:
        matmul(x, weight, out, activation_quantization=self._wish(weight), **given)

    def _wish(self, weight: TiledWeight | ExpertWeights) -> str:
        return self.activation_quantization if weight.dtype == NVFP4 else "none"

    def _norm(self, run, R: int, weight: torch.Tensor, delta: torch.Tensor | None) -> None:
        b, batch = self.buffers, self.batch
        rms_norm(
            b.residual[:R], weight, b.normed[:R], eps=self.config.layer_norm_epsilon, delta=delta,
            row_width=batch.row_mode[:R], sizes=self.tables.hidden, run=run,
        )  # fmt: skip

    def _mamba(self, run, shape: Shape, layer: int, state: int) -> None:
        b, c, w = self.buffers, self.config, self.weights.layers[layer]
        batch = self.batch
        t, R, B = self.tables.layers[layer], shape.rows, shape.steps
        modes, hidden = batch.row_mode[:R], self.tables.hidden
        H = w.A_log.shape[0]
        inner, bc = H * c.mamba_head_dim, c.n_groups * c.ssm_state_size
        projected = b.projected[:R, : 2 * inner + 2 * bc + H]
        self._matmul(
            b.normed[:R], w.in_proj, projected, row_width=modes, k_sizes=hidden, n_sizes=t.rows,
            run=run,
        )  # fmt: skip
        if R == B:
            mamba.mix_steps(self, run, B, layer, state, projected)
        else:
            mamba.mix_tokens(self, run, shape, layer, state, projected)
        self._matmul(
            b.inner[:R, :inner], w.out_proj, b.delta[:R], row_width=modes, k_sizes=t.inner,
            n_sizes=self.tables.hidden_rows, run=run,
        )  # fmt: skip

    def _attention(self, run, shape: Shape, layer: int, kv: int) -> None:
        b, c, w = self.buffers, self.config, self.weights.layers[layer]
        batch = self.batch
        t, R, B, S = self.tables.layers[layer], shape.rows, shape.steps, shape.segments
        q_width, kv_width = (w.qkv.segments[i].rows for i in (0, 1))
        modes, hidden = batch.row_mode[:R], self.tables.hidden
        projected = b.projected[:R, : q_width + 2 * kv_width]
        self._matmul(
            b.normed[:R], w.qkv, projected, row_width=modes, k_sizes=hidden, n_sizes=t.rows,
            run=run,
        )  # fmt: skip
        q, k, v = projected.split([q_width, kv_width, kv_width], 1)
        pages = (self.cache.k[kv], self.cache.v[kv])
        coded = pages[0].dtype == FP8
        scales = {"k_scale": w.k_scale, "v_scale": w.v_scale} if coded else {}
        kv_append(k, v, *pages, slot_mapping=batch.slot_mapping[:R], run=run, **scales)
        out, scale = b.inner[:R, :q_width], c.head_dim**-0.5
        if B:
            attention_decode(
                q[:B], *pages, out[:B], page_table=batch.page_table[:B], lengths=batch.lengths[:B],
                scale=scale, seq_width=batch.seq_mode[:B], q_sizes=t.q_heads, run=run,
                **scales,
            )  # fmt: skip
        if S > B:
            attention_prefill(
                q[B:], *pages, out[B:], page_table=batch.page_table[B:S],
                cu_seqlens=batch.cu_prefill[: S - B + 1], context=batch.context[B:S], scale=scale,
                seq_width=batch.seq_mode[B:S], q_sizes=t.q_heads, run=run,
                **scales,
            )  # fmt: skip
        self._matmul(
            out, w.o_proj, b.delta[:R], row_width=modes, k_sizes=t.inner,
            n_sizes=self.tables.hidden_rows, run=run,
        )  # fmt: skip

    def _ffn(self, run, R: int, up, down, layer: int, out: torch.Tensor) -> None:
        """out = down(relu(up normed)^2)."""
        b, batch, t = self.buffers, self.batch, self.tables.layers[layer]
        modes = batch.row_mode[:R]
        middle = b.projected[:R, : up.rows]
        self._matmul(
            b.normed[:R], up, middle, activation="relu2", row_width=modes,
            k_sizes=self.tables.hidden, n_sizes=t.rows, run=run,
        )  # fmt: skip
        self._matmul(
            middle, down, out[:R], row_width=modes, k_sizes=t.inner,
            n_sizes=self.tables.hidden_rows, run=run,
        )  # fmt: skip

    def _moe(self, run, R: int, layer: int) -> None:
        b, w, t = self.buffers, self.weights.layers[layer], self.tables.layers[layer]
        modes, hidden = self.batch.row_mode[:R], self.tables.hidden
        ids, weights = b.expert_ids[:R], b.expert_weights[:R]
        moe_route(
            b.normed[:R], w.gate, w.correction_bias, ids, weights,
            scaling_factor=self.config.routed_scaling_factor, row_width=modes, k_sizes=hidden,
            e_sizes=t.experts, run=run,
        )  # fmt: skip
        self._ffn(run, R, w.shared_up, w.shared_down, layer, b.shared)
        moe_matmul(
            b.normed[:R], w.up, w.down, ids, weights, b.delta[:R], shared=b.shared[:R],
            workspace=b.workspace, row_width=modes, k_sizes=hidden, f_sizes=t.expert,
            activation_quantization=self._wish(w.up), run=run,
        )  # fmt: skip

    def _head(self, run, rows: torch.Tensor, modes: torch.Tensor) -> None:
        """Logits of `rows` [n, D] into ``buffers.logits``."""
        self._matmul(
            rows, self.weights.head, self.buffers.logits[: rows.shape[0]], row_width=modes,
            k_sizes=self.tables.hidden, n_sizes=self.tables.vocabulary, run=run,
        )  # fmt: skip
