"""Chains of arithmetic: the problems of the miniature in bench/elastify/run.py."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from elastic_infer.checkpoint.config import ModelConfig
from elastic_infer.checkpoint.widths import Width
from elastic_infer.elastify.corpus import Batch
from elastic_infer.elastify.optimizer import MuonAdam
from elastic_infer.elastify.torch_model import ElasticNemotronH, Moe, initialize
from elastic_infer.files.writing import write_whole
from elastic_infer.reasoner.data import batches, held_out_batches
from elastic_infer.reasoner.evaluate import wilson
from elastic_infer.reasoner.task import Problem, held_out_problems

CHECK_SEED = 1234


class Problems:
    """Training batches for `Distiller`: problems of up to `operations` operations.

    Every batch holds about `tokens` positions; the weights leave out the prompts.
    """

    def __init__(self, tokens: int, operations: int):
        self.tokens, self.operations = tokens, operations

    def batches(
        self, batch_size: int, length: int, seed: int, skip: int = 0, before: int = 0
    ) -> Iterator[Batch]:
        """Endless; sizes are those of the problems, not `batch_size` and `length`."""
        pool, position = 0, 0
        while True:
            pool += 1
            for batch in batches(1_000_003 * (seed + 1) + pool, self.tokens, self.operations):
                position += 1
                if position > skip + before:
                    yield Batch(batch.inputs, batch.weights)

    def sequences(self, length: int) -> int | None:
        """Unlimited."""
        return None

    def validation(self, batch_size: int, length: int, count: int) -> list[Batch]:
        """Held-out problems, a batch per number of operations."""
        return [Batch(b.inputs, b.weights) for b in self.checks(64)]

    def problems(self, count: int, seed: int = CHECK_SEED) -> list[Problem]:
        """Held-out problems in the mixture of training: n operations with weight n + 1."""
        total = sum(size + 1 for size in range(1, self.operations + 1))
        found = []
        for size in range(self.operations, 0, -1):
            each = count - len(found) if size == 1 else round(count * (size + 1) / total)
            found += held_out_problems(seed, each, size)
        return found

    def checks(self, each: int) -> list[Any]:
        """`each` held-out problems of every number of operations, with their whole answers."""
        return held_out_batches(CHECK_SEED, each, self.operations)


@torch.no_grad()
def score(logits_of: Callable[[Any], torch.Tensor], checks: list[Any]) -> dict[str, Any]:
    """Share of problems whose every token is the likeliest one, and share of such tokens.

    Greedy decoding writes exactly these problems' texts, so `solved` never exceeds its accuracy.

    Args:
        logits_of: batch -> logits [B, T, V]. checks: problems with their whole answers.
    """
    solved = count = right = tokens = 0
    for batch in checks:
        hit = logits_of(batch).argmax(-1) == batch.targets
        learnt = batch.weights > 0
        solved += int((hit | ~learnt).all(1).sum())
        count += len(hit)
        right += int((hit & learnt).sum())
        tokens += int(learnt.sum())
    low, high = wilson(solved, count)
    return {
        "solved": round(solved / count, 5),
        "interval": [round(low, 4), round(high, 4)],
        "problems": count,
        "tokens_right": round(right / tokens, 4),
    }


def accuracy(
    model: ElasticNemotronH, checks: list[Any], width: Width | None = None, skip: Any = ()
) -> dict[str, Any]:
    """`score` of a model at a width, without some of its layers."""
    return score(lambda batch: model(batch.inputs, width, skip=skip), checks)


@torch.no_grad()
def balance(model: ElasticNemotronH, rate: float = 1e-3) -> None:
    """Moves every correction bias towards equal load of the experts."""
    for module in model.modules():
        if isinstance(module, Moe):
            load = module.last_load.float()
            module.gate.e_score_correction_bias += rate * torch.sign(load.mean() - load)


class PlainTraining:
    """Training of a dense model by cross entropy, in a folder that a killed run continues from.

    Args:
        config: sizes of the model. data: problems. steps: updates. seed: of weights and problems.
        folder: keeps state.pt and metrics.jsonl.
        decay: last share of the steps, in which the rates fall linearly to zero.
    """

    SAVE_EVERY, REPORT_EVERY = 100, 20

    def __init__(
        self,
        config: ModelConfig,
        data: Problems,
        steps: int,
        seed: int,
        folder: Path,
        decay: float = 0.35,
    ):
        self.data, self.steps, self.seed, self.decay = data, steps, seed, decay
        self.model = initialize(config, seed)
        self.optimizer = MuonAdam(self.model)
        # Where it stands: updates, learnt tokens, the pool of problems and its batches used up.
        self.at = {"step": 0, "tokens": 0, "pool": 0, "taken": 0, "level": 0}
        folder.mkdir(parents=True, exist_ok=True)
        self.state, self.metrics = folder / "state.pt", folder / "metrics.jsonl"
        self.identity = f"{steps} {seed} {decay} {data.tokens} {data.operations} {config.raw}"
        if self.state.is_file():
            kept = torch.load(self.state, weights_only=True)
            if kept["identity"] != self.identity:
                raise SystemExit(f"{folder} holds another training; delete it to begin again")
            self.model.load_state_dict(kept["model"])
            self.optimizer.load_state_dict(kept["optimizer"])
            self.at = kept["at"]

    def save(self) -> None:
        """Writes state.pt in one piece."""
        state = {"identity": self.identity, "model": self.model.state_dict(), "at": self.at}
        state |= {"optimizer": self.optimizer.state_dict()}
        write_whole(self.state, lambda stream: torch.save(state, stream))

    def batches(self) -> Iterator[Any]:
        """Training batches from where it stands; longer chains come in over the first fifth."""
        at = self.at
        while True:
            if at["level"] == 0:
                share = 5 * at["step"] * self.data.operations / max(1, self.steps)
                at["level"] = min(self.data.operations, max(2, 1 + int(share)))
            seed = 1_000_003 * (self.seed + 1) + at["pool"]
            pool = list(batches(seed, self.data.tokens, at["level"]))
            while at["taken"] < len(pool):
                at["taken"] += 1
                yield pool[at["taken"] - 1]
            at["pool"], at["taken"], at["level"] = at["pool"] + 1, 0, 0

    def update(self, batch: Any) -> dict[str, float]:
        """One step; returns its loss and the share of tokens that were right."""
        keep, step, steps = batch.weights.flatten() > 0, self.at["step"], self.steps
        targets = batch.targets.flatten()[keep]
        logits = self.model(batch.inputs).flatten(0, 1)[keep]
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        balance(self.model)
        scale = min(1.0, (step + 1) / 50, (steps - step) / (steps * self.decay))
        self.optimizer.set_scale(scale)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.at["step"] += 1
        self.at["tokens"] += int(keep.sum())
        right = (logits.argmax(-1) == targets).float().mean()
        return {"loss": round(loss.item(), 4), "right": round(right.item(), 4)}

    def run(self) -> tuple[ElasticNemotronH, int]:
        """Trains to the end; returns the model and the number of tokens that it learnt from."""
        stream = self.batches()
        while self.at["step"] < self.steps:
            found = self.update(next(stream))
            if self.at["step"] % self.REPORT_EVERY == 0:
                line = {
                    "step": self.at["step"],
                    "level": self.at["level"],
                    **found,
                    "time": round(time.time()),
                }
                with open(self.metrics, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            if self.at["step"] % self.SAVE_EVERY == 0 or self.at["step"] == self.steps:
                self.save()
        return self.model, self.at["tokens"]
