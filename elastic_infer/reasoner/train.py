"""Trains the reasoner: all widths together, the widest one teaching the others.

``python -m elastic_infer.reasoner.train --out DIR --minutes N``. A killed run continues
where its last checkpoint was. DIR/control.json may hold any field of ``Settings`` and is read
again while training runs. Progress is one JSON object per line in DIR/metrics.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint.width_table import parse_widths
from ..checkpoint.widths import Width
from ..elastify.torch_model import ElasticNemotronH, Moe, initialize
from ..errors import ElasticError
from ..files.reading import read_json
from ..files.writing import append_line, make_folder, write_whole
from .data import Batch, batches, held_out_batches
from .design import reasoner_config
from .task import MAX_OPERATIONS
from .vocabulary import END_THINK_ID

logger = logging.getLogger(__name__)

CHECK_SEED = 77
LONGEST_STEP = 10.0  # seconds; a longer step was a suspended process and counts as this


@dataclasses.dataclass
class Settings:
    """Settings of a run, at its start or in control.json.

    Attributes:
        minutes: training time, suspended time not counted.
        decay: last share of it, in which the learning rates fall linearly to zero.
        tokens: positions per batch.
        small: share of the steps in which S is trained beside L.
        medium: share of the steps in which M is trained beside L.
        carry: share of the steps in which one width goes on from what another has left in the
            cache.
        divergence: weight of KL(teacher | student).
    """

    minutes: float = 60.0
    decay: float = 0.35
    warmup: int = 50
    tokens: int = 3072
    small: float = 0.35
    medium: float = 0.35
    carry: float = 0.35
    divergence: float = 1.0
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    balance: float = 1e-3


class Trainer:
    """One run in one folder."""

    def __init__(self, out: Path, settings: Settings, seed: int = 0) -> None:
        from ..elastify.optimizer import MuonAdam

        make_folder(out, "train")
        self.out, self.settings = out, settings
        config = reasoner_config()
        self.widths: dict[str, Width] = parse_widths(config, config.elastic)
        self.model: ElasticNemotronH = initialize(config, seed)
        self.optimizer = MuonAdam(self.model, settings.muon_lr, settings.adam_lr)
        self.step, self.spent, self.pool, self.level = 0, 0.0, 0, 1
        self.tokens_seen, self.learnt = 0, 0.0
        self.random = random.Random(seed)
        self.check = held_out_batches(CHECK_SEED, 40)
        self.resume()

    # The run's state on disk --------------------------------------------------------------------

    def resume(self) -> None:
        """Continues from state.pt where there is one."""
        path = self.out / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("step", "spent", "pool", "level", "tokens_seen", "learnt"):
            setattr(self, name, state[name])
        self.random.seed(self.step)
        logger.info("continuing at step %d, %.1f minutes", self.step, self.spent / 60)

    def save(self) -> None:
        """Writes state.pt in one piece."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        for name in ("step", "spent", "pool", "level", "tokens_seen", "learnt"):
            state[name] = getattr(self, name)
        write_whole(self.out / "state.pt", lambda stream: torch.save(state, stream), "train")

    def read_control(self) -> None:
        """Takes settings from control.json; a wrong name is an error."""
        path = self.out / "control.json"
        if path.exists():
            told = read_json(path, kind=dict)
            self.settings = dataclasses.replace(self.settings, **told)
        rates = {"muon": self.settings.muon_lr, "adam": self.settings.adam_lr}
        for group in self.optimizer.param_groups:
            group["base_lr"] = rates[group["kind"]]

    def report(self, **values: Any) -> None:
        """Appends one line to metrics.jsonl."""
        line = {"step": self.step, "minutes": round(self.spent / 60, 2)} | values
        append_line(self.out / "metrics.jsonl", json.dumps(line), "train")

    # Training -----------------------------------------------------------------------------------

    def scale(self) -> float:
        """Share of the base learning rates at this moment."""
        total = self.settings.minutes * 60
        left = max(0.0, total - self.spent) / (total * self.settings.decay)
        return min(1.0, (self.step + 1) / self.settings.warmup, left)

    def balance(self, count: int) -> None:
        """Moves the correction bias of the first `count` experts towards equal load."""
        for module in self.model.modules():
            if isinstance(module, Moe):
                load = module.last_load.float()
                bias = module.gate.e_score_correction_bias[:count]
                bias += self.settings.balance * self.scale() * torch.sign(load.mean() - load)

    def train_step(self, batch: Batch) -> dict[str, float]:
        """Gradients of the widest, then of one narrower width, and one update of the weights."""
        keep = batch.weights.flatten() > 0
        targets = batch.targets.flatten()[keep]
        names = list(self.widths)  # ordered by active parameters
        losses: dict[str, float] = {}
        logits = self.model(batch.inputs, self.widths["L"]).flatten(0, 1)[keep]
        self.balance(self.widths["L"].n_routed_experts[-1])
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        losses["L"] = loss.item()
        right = (logits.argmax(-1) == targets).float().mean().item()
        self.learnt += 0.02 * (right - self.learnt)
        student = self.draw_student()
        if student is not None:
            assert student in names
            loss = self.student_loss(batch, self.widths[student], keep, targets, logits.detach())
            loss.backward()
            losses[student] = loss.item()
        if self.random.random() < self.settings.carry:
            loss = self.carry_loss(batch)
            loss.backward()
            losses["carry"] = loss.item()
        self.optimizer.set_scale(self.scale())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not all(value == value for value in losses.values()):
            raise ElasticError(f"train: losses must be finite, got {losses} at step {self.step}")
        return losses

    def draw_student(self) -> str | None:
        draw = self.random.random()
        if draw < self.settings.small:
            return "S"
        return "M" if draw < self.settings.small + self.settings.medium else None

    def student_loss(
        self, batch: Batch, width: Width, keep: Tensor, targets: Tensor, teacher: Tensor
    ) -> Tensor:
        """Cross entropy with the data plus KL(teacher | student), over the learnt positions."""
        logits = self.model(batch.inputs, width).flatten(0, 1)[keep]
        self.balance(width.n_routed_experts[-1])
        divergence = F.kl_div(
            logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean"
        )
        return F.cross_entropy(logits, targets) + self.settings.divergence * divergence

    def carry_loss(self, batch: Batch) -> Tensor:
        """Cross entropy of a width that goes on from another's cache: half of the samples switch
        where thinking ends, the others anywhere in what is to be learnt."""
        writer, reader = self.random.choices((("S", "L"), ("M", "L"), ("S", "M")), (3, 1, 1))[0]
        rows, length = batch.inputs.shape
        place = torch.arange(length)[None]
        ends = torch.where(batch.inputs == END_THINK_ID, place, length).amin(1)
        learnt = torch.where(batch.weights > 0, place, length)
        first, last = learnt.amin(1), torch.where(batch.weights > 0, place, 0).amax(1)
        drawn = first + (torch.rand(rows) * (last - first + 1)).long()
        at = torch.where(torch.rand(rows) < 0.5, ends.clamp(max=length), drawn)
        logits = self.model.switched(
            batch.inputs, self.widths[writer], self.widths[reader], torch.minimum(at, last)
        )
        keep = (batch.weights > 0) & (place >= torch.minimum(at, last)[:, None])
        return F.cross_entropy(logits[keep], batch.targets[keep])

    def advance_level(self) -> None:
        """Longer chains once the shorter ones are mostly learnt, or their time is over."""
        share = self.spent / (self.settings.minutes * 60)
        if self.level < MAX_OPERATIONS and (self.learnt > 0.93 or share > 0.05 * self.level):
            self.level += 1
            self.learnt = 0.0

    def run(self) -> None:
        """Trains until the time is used up."""
        saved = checked = self.spent
        while self.spent < self.settings.minutes * 60:
            self.pool += 1
            for batch in batches(self.pool, self.settings.tokens, max(2, self.level)):
                start = time.monotonic()
                losses = self.train_step(batch)
                self.step += 1
                self.tokens_seen += int((batch.targets != 0).sum())
                if self.step % 20 == 0:
                    self.read_control()
                    self.report(
                        tokens=self.tokens_seen,
                        level=self.level,
                        learnt=round(self.learnt, 4),
                        scale=round(self.scale(), 4),
                        loss={name: round(value, 4) for name, value in losses.items()},
                    )
                self.spent += min(time.monotonic() - start, LONGEST_STEP)
                if self.spent >= self.settings.minutes * 60:
                    break
                if self.spent - saved > 120:
                    saved = self.spent
                    self.save()
                if self.spent - checked > 150:
                    checked = self.spent
                    self.report(exact=teacher_forced(self.model, self.widths, self.check))
            self.advance_level()
        self.save()
        self.report(exact=teacher_forced(self.model, self.widths, self.check), finished=True)


@torch.no_grad()
def teacher_forced(
    model: ElasticNemotronH, widths: dict[str, Width], checks: list[Batch]
) -> dict[str, list[float]]:
    """Per width and number of operations: share of problems whose every token is the argmax.

    Greedy decoding then writes exactly that text, so this never exceeds greedy accuracy.
    """
    out: dict[str, list[float]] = {}
    for name, width in widths.items():
        out[name] = []
        for batch in checks:
            hit = model(batch.inputs, width).argmax(-1) == batch.targets
            right = (hit | (batch.weights == 0)).all(1)
            out[name].append(round(right.float().mean().item(), 3))
    return out


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--minutes", type=float, default=60.0, help="training time")
    parser.add_argument("--muon-lr", type=float, default=Settings.muon_lr)
    parser.add_argument("--seed", type=int, default=0, help="of the first weights")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(given.threads)
    torch.set_flush_denormal(True)
    settings = Settings(minutes=given.minutes, muon_lr=given.muon_lr)
    make_folder(given.out, "train")
    write_whole(given.out / "pid", f"{os.getpid()}\n", "train")
    Trainer(given.out, settings, given.seed).run()


if __name__ == "__main__":
    main()
