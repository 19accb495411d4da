"""From the logits of a pass to one token per branch."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

import torch

from ..device.device import CPU, Device
from ..device.shared import Shared
from ..model.draw import DRAW_FIELDS, Draw, draw_tables
from ..ops.sample import sample
from ..outputs import TopLogprobs
from ..sampling.params import SamplingParams, row_stats
from ..sampling.processors import top_logprobs
from ..user_calls import as_failure
from .request import Branch


def branch_seed(seed: int, index: int) -> int:
    """Seed of one choice of a request, so that choices differ and repeat."""
    return (seed + index * 0x9E3779B97F4A7C15) % 2**63


MOST_TOP_K = 2**31 - 1  # what the tables can hold; more than there are keeps all


class Drawn:
    """The outcome for one branch. token: -1 if the row held a NaN or nothing finite."""

    __slots__ = ("entropy", "logprobs", "token")

    def __init__(self, token: int, logprobs: TopLogprobs | None, entropy: float | None):
        self.token, self.logprobs, self.entropy = token, logprobs, entropy


def _truncation(params: SamplingParams) -> tuple[float, int, float, float]:
    temperature = 0.0 if params.greedy else params.temperature
    return temperature, min(params.top_k, MOST_TOP_K), params.top_p, params.min_p


def entropy_of(row: torch.Tensor, temperature: float, run=None) -> float:
    """Entropy in nats of softmax(row / temperature); of softmax(row) when sampling is greedy.

    Args:
        row: float32 [V].
        run: a Pool, or None for one thread: it changes no bit.
    """
    return row_stats(row, temperature or 1.0, run)[1]


class Sampler:
    """Draws tokens with one native call per pass. run: the model's Pool. device: where the logits
    are; only rows that the host must see come to its memory. It keeps tables from draw to draw, so
    that only the engine's worker may call it."""

    def __init__(self, run, device: Device = CPU):
        self._run, self._device = run, device
        self._tables: Shared | None = None  # of as many rows as the largest draw so far had

    @staticmethod
    def parameters(branch: Branch, unknown: int = 0) -> Draw:
        """Drawing of a branch's next token from its row. unknown: tokens before it that the
        branch does not have yet."""
        temperature, top_k, top_p, min_p = _truncation(branch.request.params)
        seed = branch_seed(branch.request.seed, branch.index)
        position = len(branch.token_ids) + unknown
        return Draw(temperature, top_k, top_p, min_p, seed, position)

    def draw(
        self,
        logits: torch.Tensor,
        rows: Seq[int],
        branches: Seq[Branch],
        drawn: Seq[int] | None = None,
    ) -> list[Drawn]:
        """One token for each branch from its row.

        Args:
            logits: float32 [n, V], not changed.
            rows: each branch's row; branches may share one.
            drawn: what the pass drew from its rows as `parameters` says; it is taken where no row
                is processed before.
        """
        if drawn is not None and all(branch.needs_no_logits for branch in branches):
            return [Drawn(drawn[r], None, None) for r in rows]
        untouched = list(rows) == list(range(len(rows)))
        source = self._device.to(logits[: len(rows)] if untouched else logits[list(rows)])
        raw = self._on_host(source, branches)
        processed, failures = self._process(raw, branches)
        drawn_from = source
        if processed:
            drawn_from = source.clone()
            drawn_from[list(processed)] = self._device.to(torch.stack(list(processed.values())))
        if drawn is not None and not processed:
            ids = [drawn[r] for r in rows]
        else:
            ids = self._ids(drawn_from, branches)
        result = []
        for i, branch in enumerate(branches):
            params, wanted = branch.request.params, branch.request.params.logprobs
            if i in failures:
                branch.request.error = failures[i]
            token = -1 if i in failures else ids[i]
            logprobs, entropy = None, None
            if wanted is not None and token >= 0:
                logprobs = top_logprobs(raw[i], token, wanted, self._run)
            if branch.request.plan.needs_entropy and token >= 0:
                temperature, *_ = _truncation(params)
                entropy = entropy_of(processed.get(i, raw[i]), temperature, self._run)
                entropy = entropy if math.isfinite(entropy) else None
            result.append(Drawn(token, logprobs, entropy))
        return result

    def _on_host(self, source: torch.Tensor, branches: Seq[Branch]) -> dict[int, torch.Tensor]:
        """The rows that the host must see, by branch: not to be changed."""
        needed = [i for i, branch in enumerate(branches) if not branch.needs_no_logits]
        if not needed:
            return {}
        if self._device.is_cpu:
            return {i: source[i] for i in needed}
        copied = (source if len(needed) == len(branches) else source[needed]).cpu()
        return dict(zip(needed, copied))

    @staticmethod
    def _process(
        raw: dict[int, torch.Tensor], branches: Seq[Branch]
    ) -> tuple[dict[int, torch.Tensor], dict[int, Exception]]:
        """Rows after penalties, processors and the like, and whose processors failed."""
        processed, failures = {}, {}
        for i, branch in enumerate(branches):
            if branch.processors.active:
                row = raw[i].clone()
                try:
                    branch.processors.apply(row, branch.token_ids, branch.phase)
                    processed[i] = row
                except BaseException as error:  # its request ends, not the batch
                    failures[i] = as_failure(branch.request.request_id, error)
        return processed, failures

    def _ids(self, rows: torch.Tensor, branches: Seq[Branch]) -> list[int]:
        draws, n = [self.parameters(b) for b in branches], len(branches)
        if self._tables is None or len(self._tables.seed) < n:
            self._tables = Shared(self._device, draw_tables(n))
        tables = self._tables
        tables.settle()
        for name in DRAW_FIELDS:
            tables.write(name, [getattr(d, name) for d in draws])
        tables.upload("min_p")
        ids = torch.empty(n, dtype=torch.int32, device=self._device.place)
        given = {name: getattr(tables, name)[:n] for name in DRAW_FIELDS}
        sample(rows, ids, **given, run=self._run)
        return ids.tolist()
