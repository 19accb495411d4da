"""Settings of a distillation run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import InvalidRequest, shown
from ..value_checks import MOST, check_count, check_real, is_one_of, is_real
from .costs import Cost
from .router import check_budgets

__all__ = ["Settings", "Stage"]


@dataclass(frozen=True)
class Stage:
    """Steps with one sequence length.

    Attributes:
        steps: updates of the weights.
        sequence_length: tokens.
        batch_size: sequences of a micro-step, over all processes.
        probabilities: of the budgets, largest first; None: all equal.
    """

    steps: int
    sequence_length: int
    batch_size: int = 8
    probabilities: tuple[float, ...] | None = None

    def check(self, budgets: int) -> None:
        """Raises InvalidRequest unless the stage fits a number of budgets."""
        for name in ("steps", "sequence_length", "batch_size"):
            check_count(f"stage: {name}", getattr(self, name))
        odds = self.probabilities
        if odds is None:
            return
        usable = isinstance(odds, (list, tuple)) and len(odds) == budgets
        usable = usable and all(is_real(p) and 0 <= p <= 1e9 for p in odds) and sum(odds) > 0
        if not usable:
            raise InvalidRequest(
                f"stage: probabilities must be {budgets} numbers >= 0, one per budget, not all 0, "
                f"got {shown(odds)}"
            )


@dataclass(frozen=True)
class Settings:
    """All of a run but its data; the published values where nothing else is said.

    Attributes:
        budgets: shares of the full cost in (0, 1].
        names: of their widths, largest first.
        cost: what the budgets limit.
        choices: {axis: allowed sizes}, None = `router.default_choices`.
        per_layer: True if every layer chooses its own sizes.
        stages: one after another (8K tokens with equal probabilities, then 49K with 0.5, 0.3, 0.2
            in the publication).
        accumulate: micro-steps per update; each has a budget of its own.
        optimizer: "adamw", or "muon" for the matrices inside mixers with AdamW for all else (one
            process).
        lr: AdamW's learning rate of the weights.
        router_lr: AdamW's learning rate of the router.
        muon_lr: Muon's learning rate.
        warmup: updates of linear rise.
        final_lr: share of the rates at the end of the cosine.
        weight_decay: of matrices.
        clip: largest norm of the gradient.
        temperature: first and last temperature of the choices.
        logit_scale: first and last factor of the router's logits.
        budget_weight: of the budget loss.
        router_inner: width of the router.
        hard_share: share of micro-steps with a hard choice.
        router_steps: updates after which the router and the widths stay fixed, None = never.
        switch_probability: share of micro-steps in which the drawn width, at its exported sizes,
            goes on from the cache that another width left, as after a switch by "carry" (the router
            learns nothing in them).
        precision: "float32", "bfloat16" or "auto" (bfloat16 on CUDA).
        save_every: updates between checkpoints of the run.
        validation_batches: held-out batches.
    """

    stages: tuple[Stage, ...]
    budgets: tuple[float, ...] = (1.0, 0.7, 0.4)
    names: tuple[str, ...] | None = None
    cost: Cost = field(default_factory=Cost)
    choices: Mapping[str, Sequence[int]] | None = None
    per_layer: bool = False
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 1e-4
    muon_lr: float = 0.02
    router_lr: float = 1e-2
    warmup: int = 60
    final_lr: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    temperature: tuple[float, float] = (1.0, 0.05)
    logit_scale: tuple[float, float] = (1.0, 10.0)
    budget_weight: float = 1.0
    router_inner: int = 128
    hard_share: float = 0.004
    router_steps: int | None = None
    switch_probability: float = 0.0
    precision: str = "auto"
    seed: int = 0
    save_every: int = 100
    validation_batches: int = 16

    def __post_init__(self):
        object.__setattr__(self, "budgets", check_budgets(self.budgets))
        stages = self.stages
        known = isinstance(stages, (list, tuple)) and all(isinstance(s, Stage) for s in stages)
        if not known or not stages:
            raise InvalidRequest(
                f"settings: stages must be a list of at least one stage, got {shown(stages)}"
            )
        for stage in self.stages:
            stage.check(len(self.budgets))
        names = width_names(self.budgets) if self.names is None else self.names
        texts = isinstance(names, (list, tuple)) and all(isinstance(n, str) and n for n in names)
        if not texts or len(names) != len(self.budgets) or len(set(names)) != len(names):
            raise InvalidRequest(
                f"settings: names must be {len(self.budgets)} different ones, one per budget, "
                f"got {shown(names)}"
            )
        object.__setattr__(self, "names", tuple(names))
        if not isinstance(self.cost, Cost):
            raise InvalidRequest(f"settings: cost must be a Cost, got {shown(self.cost)}")
        if not is_one_of(self.precision, ("auto", "float32", "bfloat16")):
            raise InvalidRequest(
                "settings: precision must be auto, float32 or bfloat16, got "
                f"{shown(self.precision)}"
            )
        if not is_one_of(self.optimizer, ("adamw", "muon")):
            raise InvalidRequest(
                f"settings: optimizer must be adamw or muon, got {shown(self.optimizer)}"
            )
        self._check_numbers()
        if self.switch_probability and len(self.budgets) < 2:
            raise InvalidRequest(
                "settings: switch_probability must be 0 with one budget, got "
                f"{self.switch_probability}"
            )

    def _check_numbers(self) -> None:
        for name in ("lr", "muon_lr", "router_lr", "clip"):
            check_real(f"settings: {name}", getattr(self, name), 0, open_=True)
        for name in ("final_lr", "weight_decay", "budget_weight"):
            check_real(f"settings: {name}", getattr(self, name), 0)
        for name in ("hard_share", "switch_probability"):
            check_real(f"settings: {name}", getattr(self, name), 0, 1)
        for name in ("accumulate", "save_every"):
            check_count(f"settings: {name}", getattr(self, name))
        for name in ("warmup", "validation_batches"):
            check_count(f"settings: {name}", getattr(self, name), 0)
        check_count("settings: router_inner", self.router_inner, 1, 1 << 16)
        check_count("settings: seed", self.seed, -MOST, MOST)  # generators take 64 bits
        if self.router_steps is not None:
            check_count("settings: router_steps", self.router_steps, 0)
        for name in ("temperature", "logit_scale"):
            pair = getattr(self, name)
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise InvalidRequest(f"settings: {name} must be two numbers, got {shown(pair)}")
            for value in pair:
                check_real(f"settings: {name}", value, 1e-6, 1e6)

    @property
    def steps(self) -> int:
        """Updates of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def longest(self) -> int:
        """The longest sequence of any stage."""
        return max(stage.sequence_length for stage in self.stages)

    def stage_of(self, step: int) -> tuple[int, int]:
        """(stage, first step of it) of update `step`."""
        first = 0
        for i, stage in enumerate(self.stages):
            if step < first + stage.steps:
                return i, first
            first += stage.steps
        return len(self.stages) - 1, first - self.stages[-1].steps

    def rate(self, step: int) -> float:
        """Share of the learning rates at update `step`: linear warm-up, then cosine."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        share = max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        fall = self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * share))
        return rise * fall

    def identity(self) -> dict[str, Any]:
        """Settings that must agree where a run is continued."""
        data = dataclasses.asdict(self)
        for name in ("save_every", "validation_batches"):
            del data[name]
        return data


def width_names(budgets: Sequence[float]) -> tuple[str, ...]:
    """Names of the widths of some budgets, largest first: L, M, S; L, S; else p70 for 0.7."""
    if len(budgets) in (2, 3):
        return ("L", "M", "S") if len(budgets) == 3 else ("L", "S")
    return tuple(f"p{100 * budget:g}" for budget in budgets)
