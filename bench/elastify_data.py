"""What the miniature of bench/elastify.py trains and is measured on: chains of arithmetic."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from elastic_infer.config import ModelConfig, Width
from elastic_infer.elastify.corpus import Batch
from elastic_infer.elastify.reasoner.data import batches, held_out_batches
from elastic_infer.elastify.reasoner.evaluate import wilson
from elastic_infer.elastify.reasoner.optimiser import MuonAdam
from elastic_infer.elastify.torch_model import ElasticNemotronH, Moe, initialise

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

    def checks(self, each: int) -> list[Any]:
        """`each` held-out problems of every number of operations, with their whole answers."""
        return held_out_batches(CHECK_SEED, each, self.operations)


@torch.no_grad()
def accuracy(
    model: ElasticNemotronH, checks: list[Any], width: Width | None = None, skip: Any = ()
) -> dict[str, Any]:
    """Share of problems whose every token is the likeliest one, and share of such tokens.

    Greedy decoding writes exactly these problems' texts, so `solved` never exceeds its accuracy.
    """
    solved = count = right = tokens = 0
    for batch in checks:
        hit = model(batch.inputs, width, skip=skip).argmax(-1) == batch.targets
        learnt = batch.weights > 0
        solved += int((hit | ~learnt).all(1).sum())
        count += len(hit)
        right += int((hit & learnt).sum())
        tokens += int(learnt.sum())
    low, high = wilson(solved, count)
    return {
        "solved": solved / count,
        "interval": [round(low, 4), round(high, 4)],
        "problems": count,
        "tokens_right": round(right / tokens, 4),
    }


@torch.no_grad()
def balance(model: ElasticNemotronH, rate: float = 1e-3) -> None:
    """Moves every correction bias towards equal load of the experts."""
    for module in model.modules():
        if isinstance(module, Moe):
            load = module.last_load.float()
            module.gate.e_score_correction_bias += rate * torch.sign(load.mean() - load)


def train_plain(
    config: ModelConfig, data: Problems, steps: int, seed: int, decay: float = 0.35
) -> tuple[ElasticNemotronH, int]:
    """A model trained alone, by cross entropy, from scratch.

    Args:
        config: its sizes. data: problems. steps: updates. seed: of the first weights.
        decay: last share of the steps, in which the rates fall linearly to zero.

    Returns:
        The model and the number of tokens that it learnt from.
    """
    model = initialise(replace(config), seed)
    optimiser = MuonAdam(model)
    seen = 0
    generator = random.Random(seed)
    level = 1
    stream: Iterator[Any] = iter(())
    for step in range(steps):
        # Longer chains come in over the first fifth; then all of them.
        level = min(data.operations, 1 + int(5 * step * data.operations / max(1, steps)))
        batch = next(stream, None)
        if batch is None:
            stream = batches(generator.randrange(2**31), data.tokens, max(2, level))
            batch = next(stream)
        keep = batch.weights.flatten() > 0
        logits = model(batch.inputs).flatten(0, 1)[keep]
        loss = F.cross_entropy(logits, batch.targets.flatten()[keep])
        loss.backward()
        balance(model)
        optimiser.set_scale(min(1.0, (step + 1) / 50, (steps - step) / (steps * decay)))
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        seen += int(keep.sum())
    return model, seen
