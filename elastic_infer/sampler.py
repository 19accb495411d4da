"""From the logits of a pass to one token per branch."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

import torch

from .ops.sample import sample
from .outputs import TopLogprobs
from .request import Branch
from .sampling import SamplingParams, top_logprobs


def branch_seed(seed: int, index: int) -> int:
    """Seed of one choice of a request, so that choices differ and repeat."""
    return (seed + index * 0x9E3779B97F4A7C15) % 2**63


class Drawn:
    """The outcome for one branch. token: -1 if the row held a NaN or nothing finite."""

    __slots__ = ("entropy", "logprobs", "token")

    def __init__(self, token: int, logprobs: TopLogprobs | None, entropy: float | None):
        self.token, self.logprobs, self.entropy = token, logprobs, entropy


def _truncation(params: SamplingParams) -> tuple[float, int, float, float]:
    temperature = 0.0 if params.greedy else params.temperature
    return temperature, params.top_k, params.top_p, params.min_p


def entropy_of(row: torch.Tensor, temperature: float) -> float:
    """Entropy in nats of softmax(row / temperature); of softmax(row) when sampling is greedy."""
    logp = torch.log_softmax(row / (temperature or 1.0), 0)
    return float(-(logp.exp() * logp).nan_to_num(0.0).sum())


class Sampler:
    """Draws tokens with one native call per pass. run: the model's Pool."""

    def __init__(self, run):
        self._run = run

    def draw(self, logits: torch.Tensor, rows: Seq[int], branches: Seq[Branch]) -> list[Drawn]:
        """One token for each branch from its row.

        logits: float32 [n, V], not changed. rows: each branch's row; branches may share one.
        """
        untouched = list(rows) == list(range(len(rows)))
        active = [b.processors.active for b in branches]
        source = logits[: len(rows)] if untouched else logits[list(rows)]
        drawn_from = source.clone() if untouched and any(active) else source
        failures: dict[int, Exception] = {}
        for i, branch in enumerate(branches):
            if active[i]:
                try:
                    branch.processors.apply(drawn_from[i], branch.token_ids, branch.phase)
                except Exception as error:  # a user's function: its request ends, not the batch
                    failures[i] = error
        ids = self._ids(drawn_from, branches)
        result = []
        for i, branch in enumerate(branches):
            params, wanted = branch.request.params, branch.request.params.logprobs
            if i in failures:
                branch.request.error = failures[i]
            token = -1 if i in failures else ids[i]
            raw = logits[rows[i]]
            logprobs, entropy = None, None
            if wanted is not None and token >= 0:
                logprobs = top_logprobs(raw, token, wanted)
            if branch.plan.plan.needs_entropy and token >= 0:
                entropy = entropy_of(drawn_from[i], _truncation(params)[0])
                entropy = entropy if math.isfinite(entropy) else None
            result.append(Drawn(token, logprobs, entropy))
        return result

    def _ids(self, rows: torch.Tensor, branches: Seq[Branch]) -> list[int]:
        temperature, top_k, top_p, min_p = zip(*(_truncation(b.request.params) for b in branches))
        seeds = [branch_seed(b.request.seed, b.index) for b in branches]
        ids = torch.empty(len(branches), dtype=torch.int32)
        sample(
            rows, ids,
            temperature=torch.tensor(temperature), top_k=torch.tensor(top_k, dtype=torch.int32),
            top_p=torch.tensor(top_p), min_p=torch.tensor(min_p),
            seed=torch.tensor(seeds, dtype=torch.int64),
            position=torch.tensor([len(b.token_ids) for b in branches], dtype=torch.int64),
            run=self._run,
        )  # fmt: skip
        return ids.tolist()
