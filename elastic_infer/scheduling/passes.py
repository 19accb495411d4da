"""Passes of the model as the scheduler sees them: launched, and later read out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ..device.shared import ReadBack
from ..model.batch import Result, Segment
from ..model.draw import Draw
from ..model.model import Model
from .batching import StepCosts
from .reader import Reader
from .reads import Read
from .request import Branch
from .sampler import Sampler


@dataclass
class Part:
    """The tokens that one row reads in a pass.

    Attributes:
        count: tokens of `read`, from its first on.
        feed: the row of what the pass before drew that holds the token; -1 where `read` does.
        samples: True if the row's next token follows.
    """

    row: Branch | Reader
    read: Read
    count: int = 0
    feed: int = -1
    samples: bool = False

    @property
    def logits(self) -> str:
        """The logits that the pass gives the row."""
        if isinstance(self.row, Reader) and self.row.logits == "all":
            return "all"
        return "last" if self.samples else "none"


@dataclass
class Flight:
    """A pass that was launched and not read out.

    Attributes:
        ids: waits for what it drew; None where it draws nothing itself.
        started: when it was launched.
        widest: index of its widest width where its time says what such a pass costs, else None.
    """

    parts: list[Part]
    result: Result
    ids: Callable[[], list[int]] | None
    started: float
    widest: int | None

    @property
    def wanted(self) -> bool:
        """True if any of its rows has not ended."""
        return any(isinstance(p.row, Reader) or p.row.finish_reason is None for p in self.parts)


class Passes:
    """Launches passes. On a CPU they have run then; a device was told what to do.

    Args:
        costs: takes the measured times.
        max_num_seqs: sequences of the largest pass.
    """

    def __init__(self, model: Model, sampler: Sampler, costs: StepCosts, max_num_seqs: int):
        self._model, self._sampler, self._costs = model, sampler, costs
        self._read_back = ReadBack(model.device, max_num_seqs)
        self._width_index = {name: i for i, name in enumerate(model.widths)}
        self._ended = 0.0  # when a pass was known to have ended, the last time

    def launch(self, parts: list[Part]) -> Flight:
        """Starts a pass."""
        segments = [self._segment(part) for part in parts]
        steps = all(s.kind == "step" for s in segments)
        # The first pass of a size also records it, which says nothing of its cost.
        known = steps and self._model.step_names(len(segments))
        started = time.perf_counter()
        result = self._model.forward(segments)
        ids = None if result.drawn is None else self._read_back.begin(result.drawn)
        widest = max(self._width_index[s.width] for s in segments) if known else None
        flight = Flight(parts, result, ids, started, widest)
        if ids is None:
            self._measure(flight)
        return flight

    def read_out(self, flight: Flight) -> list[int] | None:
        """Waits for the tokens that the pass drew, by row of its logits; None if it drew none."""
        if flight.ids is None:
            return None
        ids = flight.ids()
        self._measure(flight)
        return ids

    def _segment(self, part: Part) -> Segment:
        row, read, draw = part.row, part.read, Draw()
        if isinstance(row, Branch) and not self._model.device.is_cpu:
            # There the pass draws the tokens itself.
            draw = self._sampler.parameters(row, unknown=int(part.feed >= 0))
        tokens = read.tokens[: part.count]
        return Segment(row.sequence, tokens, read.width, read.kind, part.logits, draw, part.feed)

    def _measure(self, flight: Flight) -> None:
        """Takes the time of a pass that ends now, from its launch or the end of the one before."""
        now = time.perf_counter()
        if flight.widest is not None:
            seconds = now - max(flight.started, self._ended)
            self._costs.record(flight.widest, len(flight.parts), seconds)
        self._ended = now
