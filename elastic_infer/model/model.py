"""The model: runs one pass over a batch of segments, each at its own width.

A pass reads the next tokens of several sequences: `step` segments (one token each, decode) come
first, then `prefill` segments. All widths share the same ops; a row's mode says how much of every
weight it uses. A pass of steps only is recorded once per batch size and then replayed with one
native call.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from .. import _C
from ..cache.cache import Cache
from ..checkpoint.config import ModelConfig
from ..checkpoint.widths import Width
from ..device.device import CPU, Device
from ..ops.embed import embed
from ..ops.sample import sample
from ..rounding import round_up
from .batch import Batch, Result, Segment, Shape, wanted_rows
from .buffers import Buffers, logit_rows
from .draw import DRAW_FIELDS
from .layers import Pass, head, run_layers
from .modes import WidthTables
from .weights import Weights


class Model:
    """Weights, cache and buffers of one served model.

    Args:
        widths: served widths in index order.
        max_num_batched_tokens: rows of the largest pass.
        max_num_seqs: sequences of the largest pass.
        max_length: tokens of the longest sequence.
        device: where weights and cache are.
        graphs: True if passes of steps are captured on the device.
        dependent_launch: True if the kernels of a captured pass may overlap (see `Step`).
        activation_quantization: form of activations in products with NVFP4 weights.

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
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
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
        self.modes = WidthTables(config, widths, weights.served, device.place)
        self.max_num_batched_tokens, self.max_num_seqs = max_num_batched_tokens, max_num_seqs
        self.max_length = max_length
        self.logit_rows = logit_rows(max_num_seqs)
        self.buffers = Buffers(
            config, weights.served, weights.dtype, max_num_batched_tokens, max_num_seqs, device
        )
        self.batch = Batch(device, self.modes, max_num_batched_tokens, max_num_seqs, max_length)
        self.last: Result | None = None  # of the last pass
        self._recorded: dict[int, _C.Step] = {}

    # -- passes ------------------------------------------------------------------------------

    def forward(self, segments: Seq[Segment]) -> Result:
        """Reads the segments' tokens into the cache.

        Returns:
            The logits after the tokens that each segment asks for.

        Raises:
            OutOfCapacity: when pages run out (nothing is read then).
        """
        order = sorted(range(len(segments)), key=lambda i: self._place(segments[i]))
        ordered = [segments[i] for i in order]
        self._check_fed(ordered)
        self._reserve(ordered)
        steps = sum(s.kind == "step" for s in ordered)
        shape = Shape(sum(len(s.tokens) for s in ordered), steps, len(ordered))
        self.batch.fill(ordered, shape, self.recorded_size(steps))
        drawn = None
        if shape.rows == steps:
            self._replay(steps)
            logits, spans = self.buffers.logits[:steps], [(i, i + 1) for i in range(steps)]
            drawn = None if self.device.is_cpu else self.buffers.drawn[:steps]
        else:
            logits, spans = self._run(ordered, shape)
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
        return s.kind != "step", self.modes.mode(s.width, s.sequence.track)

    def _reserve(self, segments: list[Segment]) -> None:
        """Pages for the whole pass, or none."""
        if self.cache.k:
            needed = sum(self.cache.pages_needed(s.sequence, len(s.tokens)) for s in segments)
            if needed > self.cache.pages.free:
                self.cache.pages.take(needed)  # raises, with the numbers
        for s in segments:
            self.cache.reserve(s.sequence, len(s.tokens))

    def recorded_size(self, steps: int) -> int:
        """Rows of the recorded pass that serves `steps` sequences: all sizes have their own on a
        CPU; on a GPU those up to 16, then multiples of 4 to 64, of 16 to 256 and of 32 beyond."""
        if self.device.is_cpu or steps <= 16:
            return steps
        grain = 4 if steps <= 64 else 16 if steps <= 256 else 32
        return min(round_up(steps, grain), max(steps, self.max_num_seqs))

    def _replay(self, steps: int) -> None:
        """Runs a pass of `steps` one-token segments, recording it the first time."""
        size = self.recorded_size(steps)
        if size not in self._recorded:
            step = _C.Step(self.pool, graph=self.graphs, dependent_launch=self.dependent_launch)
            self.run_steps(step, size)
            if not self.device.is_cpu:
                tables = {name: getattr(self.batch.tables, name)[:size] for name in DRAW_FIELDS}
                sample(self.buffers.logits[:size], self.buffers.drawn[:size], **tables, run=step)
            self._recorded[size] = step
        self._recorded[size].run()

    def _run(
        self, segments: list[Segment], shape: Shape
    ) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """Runs a pass that reads prompts, op by op."""
        run_layers(self.ops_of(self.pool, shape))
        return self._logits(segments)

    def run_steps(self, run: _C.Pool | _C.Step, steps: int) -> None:
        """Runs or records the layers and the head of a pass of one-token segments."""
        p = self.ops_of(run, Shape(steps, steps, steps))
        run_layers(p)
        head(p, self.buffers.normed[:steps], p.batch.row_mode[:steps])

    def ops_of(self, run: _C.Pool | _C.Step, shape: Shape) -> Pass:
        """The ops of a pass of this shape, run on a Pool or recorded in a Step."""
        fed = shape.steps == shape.rows and not self.device.is_cpu
        return Pass(
            run,
            shape,
            self.config,
            self.weights,
            self.cache,
            self.modes,
            self.buffers,
            self.batch.tables,
            fed,
            self.activation_quantization,
        )

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

    def _logits(self, segments: list[Segment]) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """Logits of a pass that was just run, in blocks of at most logit_rows rows (in host memory
        when there are several), and the rows of each segment."""
        rows, spans = wanted_rows(segments)
        b, batch, blocks = self.buffers, self.batch.tables, []
        p = self.ops_of(self.pool, Shape(len(rows), 0, 0))
        for start in range(0, len(rows), self.logit_rows):
            part = rows[start : start + self.logit_rows]
            n = len(part)
            if start:  # the first ones came with the tables of the pass
                batch.settle()
                self.batch.fill_logit_rows(part)
                batch.upload("logit_mode")
            embed(batch.logit_rows[:n], b.normed, b.gathered[:n], run=self.pool)
            head(p, b.gathered[:n], batch.logit_mode[:n])
            logits = b.logits[:n]
            blocks.append(logits.to("cpu", copy=True) if len(rows) > self.logit_rows else logits)
        if len(blocks) > 1:
            return torch.cat(blocks), spans
        return (blocks[0] if blocks else b.logits[:0]), spans
