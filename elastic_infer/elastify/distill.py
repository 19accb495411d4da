"""Nested distillation: all widths and the router learn at once from the frozen parent.

Every micro-step draws one budget; the student at that budget is taught by the parent through the
forward divergence KL(parent | student) on the logits, the router also by the budget loss.
Sources: Nemotron Elastic (arXiv 2511.16664); Star Elastic (arXiv 2605.07182).
"""

from __future__ import annotations

import copy
import json
import logging
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.counts import count_parameters
from ..checkpoint.widths import Width, full_width
from ..errors import CheckpointError, InvalidRequest, NonFiniteLoss
from ..files.reading import parse_json
from ..files.writing import append_line, make_folder, write_whole
from .corpus import Batch, as_data
from .distributed import Group
from .losses import divergence, switch_places
from .optimizer import MuonAdam
from .router import DEAD_ZONE, Router, budget_loss, logit_scale, temperature
from .settings import Settings
from .torch_model import ElasticNemotronH

__all__ = ["Distiller", "Result", "evaluate"]

logger = logging.getLogger(__name__)

STATE, METRICS = "state.pt", "metrics.jsonl"


def _positions(batch: Batch) -> Tensor:
    ids, weights = batch
    count = ids.numel() if weights is None else int((weights > 0).sum())
    return torch.tensor(float(count), device=ids.device)


@torch.no_grad()
def evaluate(
    model: ElasticNemotronH,
    teacher: ElasticNemotronH,
    widths: Mapping[str, Width],
    batches: list[Batch],
    group: Group | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Mean KL(teacher | student) per position of every width over some batches.

    Args:
        model: the student
        teacher: the parent.
        widths: {name: width}, run as prefixes, as they are exported.
        batches: the same on every process, which split each of them where its rows allow it.
        group: the processes.
        dtype: of autocast.
    """
    group = group or Group()
    sums, count = dict.fromkeys(widths, 0.0), 0.0
    for batch in batches:
        split = len(batch.ids) % group.size == 0
        part = group.part(batch) if split else batch.to(group.device)
        share = 1.0 if split else 1.0 / group.size  # every process has the whole batch
        count += share * float(group.sum(_positions(part)))
        with group.autocast(dtype):
            wanted = teacher(part.ids)
            for name, width in widths.items():
                loss = divergence(wanted, model(part.ids, width), part.weights)
                sums[name] += share * float(group.sum(loss))
    return {name: total / max(1.0, count) for name, total in sums.items()}


@dataclass
class Result:
    """Results of a run.

    Attributes:
        widths: {name: Width}, by active parameters.
        budgets: {name: share}.
        losses: {name: mean KL per position}, on held-out data, or the mean of the last training
            steps where there is none (`held_out` says which).
        weights: state_dict of the student on the CPU (empty beyond rank 0).
    """

    widths: dict[str, Width]
    budgets: dict[str, float]
    losses: dict[str, float]
    held_out: bool
    weights: dict[str, Tensor]


def is_finished(out: Path, settings: Settings, choices: Mapping[str, Any] | None) -> bool:
    """True if the folder holds a run of these settings, with a router of these choices, at its end.

    Raises:
        CheckpointError: a state.pt that is damaged.
    """
    if not (out / STATE).is_file():
        return False
    state = _load_state(out / STATE)
    same = state["identity"] == _identity(settings, None, choices)
    return same and state["step"] == settings.steps


def _identity(
    settings: Settings, picked: Mapping[str, Width] | None, choices: Mapping[str, Any] | None
) -> str:
    """Settings that a run must share with the one that it continues."""
    sizes = None if picked is None else {name: vars(width) for name, width in picked.items()}
    return json.dumps([settings.identity(), sizes, choices], sort_keys=True, default=str)


def _load_state(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not {"identity", "step"} <= state.keys():
            raise KeyError("identity")
    except Exception as error:  # torch has no common error for files that are no archives
        raise CheckpointError(
            f"distill: {path} must be the state of a run, got a file that cannot be read "
            f"({type(error).__name__}); delete it to begin again"
        ) from error
    return state


class Distiller:
    """One run in one folder; run again with the same arguments it continues where it was.

    Args:
        parent: the sorted parent in float32; it becomes the student.
        data: batches (see `corpus`), or a Corpus.
        out: folder of the run: state.pt, metrics.jsonl.
        settings: of the run.
        router: learns the sizes; None: made from the settings unless `widths` is given.
        widths: {name: Width} for settings.names, hand-picked sizes in place of a router.
        teacher: a model of the same vocabulary, which is frozen; None: a frozen copy of `parent`.
        group: the processes that train together.
    """

    def __init__(
        self,
        parent: ElasticNemotronH,
        data: Any,
        out: str | Path,
        settings: Settings,
        *,
        router: Router | None = None,
        widths: Mapping[str, Width] | None = None,
        teacher: ElasticNemotronH | None = None,
        group: Group | None = None,
    ):
        self.group = group or Group.current()
        self.out, self.settings, self.data = Path(out), settings, as_data(data)
        if widths is not None:
            if router is not None or set(widths) != set(settings.names):
                raise InvalidRequest(
                    f"distill: widths must be {', '.join(settings.names)} without a router, got "
                    f"{', '.join(widths)}"
                )
        elif router is None:
            router = Router(
                parent.config,
                settings.budgets,
                settings.choices,
                per_layer=settings.per_layer,
                inner=settings.router_inner,
                seed=settings.seed,
            )
        self.router, self.picked = router, widths
        device, cuda = self.group.device, self.group.device.type == "cuda"
        bfloat16 = settings.precision == "bfloat16" or (settings.precision == "auto" and cuda)
        self.dtype = torch.bfloat16 if bfloat16 else torch.float32
        self.model = parent.to(device)
        self.teacher = copy.deepcopy(self.model) if teacher is None else teacher.to(device)
        self.teacher.requires_grad_(False).eval()
        self.group.shard(self.teacher)
        self.group.shard(self.model, stay_whole=settings.switch_probability > 0)
        self.optimizer = self._make_optimizer()
        self.router_optimizer = None
        if router is not None:
            router.to(device)
            group = {"params": router.parameters(), "base_lr": settings.router_lr}
            self.router_optimizer = torch.optim.AdamW(
                [group], lr=settings.router_lr, weight_decay=0.0
            )
        self.step, self.tokens = 0, 0
        self.saved: int | None = None
        self.recent: dict[str, list[float]] = defaultdict(list)
        if self.group.first:
            make_folder(self.out, "distill")
        self.group.barrier()
        self._resume()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        settings = self.settings
        if settings.optimizer == "muon":
            if self.group.size > 1:
                raise InvalidRequest(
                    f"distill: optimizer must be adamw with {self.group.size} processes, got muon, "
                    "which needs whole matrices"
                )
            return MuonAdam(self.model, settings.muon_lr, settings.lr, decay=settings.weight_decay)
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [
            {"params": params, "weight_decay": decay, "base_lr": settings.lr}
            for params, decay in ((matrices, settings.weight_decay), (vectors, 0.0))
        ]
        return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95))

    # The run's state on disk --------------------------------------------------------------------

    def _identity(self) -> str:
        choices = None if self.router is None else self.router.choices
        return _identity(self.settings, self.picked, choices)

    def _resume(self) -> None:
        path = self.out / STATE
        if not path.is_file():
            if self.group.first:
                _drop_lines(self.out / METRICS, 0)
            return
        state = _load_state(path)
        if state["identity"] != self._identity():
            raise CheckpointError(
                f"distill: {self.out} must hold a run with the same settings, got another one; "
                "name another folder, or delete its state.pt to begin again"
            )
        self.group.load_state(self.model, state["model"], self.optimizer, state["optimizer"])
        if self.router is not None:
            self.router.load_state_dict(state["router"])
            self.router_optimizer.load_state_dict(state["router_optimizer"])
        self.step, self.tokens, self.saved = state["step"], state["tokens"], state["step"]
        self.recent.update(state["recent"])
        if self.group.first:
            _drop_lines(self.out / METRICS, self.step)
        logger.info("distill: continuing at step %d of %d", self.step, self.settings.steps)

    def save(self) -> None:
        """Writes state.pt in one piece; a run that is killed meanwhile keeps the old one."""
        weights, moments = self.group.whole_state(self.model, self.optimizer)
        if self.group.first:
            state = {"identity": self._identity(), "step": self.step, "tokens": self.tokens}
            state |= {"model": weights, "optimizer": moments, "recent": dict(self.recent)}
            if self.router is not None:
                state["router"] = self.router.state_dict()
                state["router_optimizer"] = self.router_optimizer.state_dict()
            write_whole(self.out / STATE, lambda stream: torch.save(state, stream), "distill")
        self.saved = self.step
        self.group.barrier()

    # Widths -------------------------------------------------------------------------------------

    @property
    def learning_sizes(self) -> bool:
        """True if the router still learns; afterwards, and without one, widths are fixed."""
        last = self.settings.router_steps
        return self.router is not None and (last is None or self.step < last)

    def widths(self) -> dict[str, Width]:
        """{name: Width} of the budgets as they are now, by active parameters."""
        if self.picked is not None:
            found = list(self.picked.items())
        else:
            pairs = zip(self.settings.names, self.settings.budgets)
            found = [(name, self.router.width(budget, name)) for name, budget in pairs]
        config = self.model.config
        return dict(sorted(found, key=lambda item: count_parameters(config, item[1]).active))

    # Training -----------------------------------------------------------------------------------

    def _probabilities(self, budget: float, micro: int, hard: bool) -> dict[str, Tensor]:
        settings = self.settings
        last = settings.router_steps or settings.steps
        progress = self.step / max(1, last - 1)
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + micro)
        return self.router.probabilities(
            budget,
            temperature(progress, *settings.temperature),
            logit_scale(progress, *settings.logit_scale),
            generator,
            hard,
        )

    def _micro_step(self, batch: Batch, micro: int, line: dict[str, Any]) -> None:
        """Gradients of one budget on one batch; what is drawn depends on seed and number only."""
        settings = self.settings
        draw = random.Random(f"{settings.seed} {micro}")
        odds = settings.stages[settings.stage_of(self.step)[0]].probabilities
        place = draw.choices(range(len(settings.budgets)), weights=odds)[0]
        budget, name = settings.budgets[place], settings.names[place]
        writer, at = None, None
        if draw.random() < settings.switch_probability:
            writer = draw.choice([other for other in settings.names if other != name])
            at, batch = switch_places(batch, settings.seed * 1_000_003 + micro)
            at = self.group.rows(at)
        part = self.group.part(batch)
        count = self.group.sum(_positions(part))
        width, masks, cost_loss, share = None, None, None, None
        if writer is None and self.learning_sizes:
            pi = self._probabilities(budget, micro, draw.random() < settings.hard_share)
            masks = self.router.masks(pi)
            cost_loss, share = budget_loss(self.router, pi, budget, settings.cost)
        else:
            width = self.widths()[name]
        with self.group.autocast(self.dtype):
            with torch.no_grad():
                wanted = self.teacher(part.ids)
            if writer is None:
                given = self.model(part.ids, width, masks)
            else:
                given = self.model.switched(part.ids, self.widths()[writer], width, at)
        # Averaging the gradients over the processes makes this the mean over all positions.
        loss = divergence(wanted, given, part.weights) * (self.group.size / count)
        value = float(self.group.sum(loss)) / self.group.size
        total = loss if cost_loss is None else loss + settings.budget_weight * cost_loss
        if not math.isfinite(value) or not math.isfinite(float(total.detach())):
            self._refuse_step(f"the loss of budget {budget:g} ({name}) is {value}")
        (total / settings.accumulate).backward()
        self.group.scatter(self.model)
        self.tokens += int(count)
        label = name if writer is None else f"{writer}->{name}"
        line["loss"].setdefault(label, []).append(value)
        if share is not None:
            line["budget_loss"].setdefault(name, []).append(float(cost_loss.detach()))
            line["share"].setdefault(name, []).append(share)

    def _refuse_step(self, what: str) -> None:
        kept = "no checkpoint was written yet"
        if self.saved is not None:
            kept = f"the last good checkpoint is {self.out / STATE} of step {self.saved}"
        raise NonFiniteLoss(
            f"distill: the loss must stay finite, got {what} at step {self.step}; {kept}"
        )

    def _update(self) -> float:
        """One step of both optimizers; returns the norm of the weights' gradient."""
        settings, rate = self.settings, self.settings.rate(self.step)
        for optimizer in (self.optimizer, self.router_optimizer):
            if optimizer is not None:
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * rate
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not math.isfinite(norm):
            self._refuse_step(f"a gradient of norm {norm}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.learning_sizes:
            self.group.average_gradients(self.router.parameters())
            torch.nn.utils.clip_grad_norm_(self.router.parameters(), settings.clip)
            self.router_optimizer.step()
            self.router_optimizer.zero_grad()
        return norm

    def _batches(self) -> Iterator[Batch]:
        """Batches from the current step on, each stage's own."""
        settings = self.settings
        stage, first = settings.stage_of(self.step)
        before = first * settings.accumulate
        skip = (self.step - first) * settings.accumulate
        for number in range(stage, len(settings.stages)):
            now = settings.stages[number]
            count = now.steps * settings.accumulate
            stream = self.data.batches(
                now.batch_size, now.sequence_length, settings.seed + number, skip, before
            )
            for _ in range(count - skip):
                yield next(stream)
            before, skip = before + count, 0

    def run(self, progress: Callable[[int, int, dict[str, Any]], None] | None = None) -> Result:
        """Trains to the end of the last stage.

        Args:
            progress: called with (step, steps, line of metrics) after every update.

        Raises:
            NonFiniteLoss: NaN or infinite loss or gradient; the run's folder keeps the last
                checkpoint from before.
            InvalidRequest: the data ends too early or has a batch of the wrong kind.
        """
        settings, batches = self.settings, self._batches()
        while self.step < settings.steps:
            start, number = time.monotonic(), settings.stage_of(self.step)[0]
            line: dict[str, Any] = {"step": self.step + 1, "stage": number + 1}
            line |= {"loss": {}, "budget_loss": {}, "share": {}}
            for i in range(settings.accumulate):
                self._micro_step(next(batches), self.step * settings.accumulate + i, line)
            line["grad_norm"] = self._update()
            line["rate"] = settings.rate(self.step)
            for name, losses in line["loss"].items():
                self.recent[name] = [*self.recent[name], *losses][-50:]
            self.step += 1
            self._report(line, time.monotonic() - start)
            if self.step % settings.save_every == 0 or self.step == settings.steps:
                self.save()
            if progress is not None:
                progress(self.step, settings.steps, line)
        return self._result()

    def _report(self, line: dict[str, Any], seconds: float) -> None:
        for key in ("loss", "budget_loss", "share"):
            line[key] = {name: sum(v) / len(v) for name, v in line[key].items()}
        line |= {"tokens": self.tokens, "seconds": round(seconds, 4)}
        if self.router is not None:
            line["sizes"] = {
                name: _mean_sizes(self.model.config, width) for name, width in self.widths().items()
            }
        if self.group.first:
            append_line(self.out / METRICS, json.dumps(line), "distill")

    def _result(self) -> Result:
        settings, last = self.settings, self.settings.stages[-1]
        widths = self.widths()
        batches = self.data.validation(
            last.batch_size, last.sequence_length, settings.validation_batches
        )
        if batches:
            losses = evaluate(self.model, self.teacher, widths, batches, self.group, self.dtype)
        else:
            logger.warning("distill: no held-out data: losses are those of the last steps")
            losses = {n: sum(v) / len(v) for n, v in self.recent.items() if v}
        self._warn_of_budgets(widths)
        weights, _ = self.group.whole_state(self.model)
        weights = {name: tensor.cpu() for name, tensor in weights.items()}
        budgets = dict(zip(settings.names, settings.budgets))
        return Result(widths, budgets, losses, bool(batches), weights)

    def _warn_of_budgets(self, widths: Mapping[str, Width]) -> None:
        """Says which widths the router left far from their budgets."""
        settings, config = self.settings, self.model.config
        if self.router is None:
            return
        whole = settings.cost.of(config, full_width(config))
        for name, budget in zip(settings.names, settings.budgets):
            share = settings.cost.of(config, widths[name]) / whole
            if abs(share / budget - 1) > 2 * DEAD_ZONE:
                logger.warning(
                    "distill: width %s has %.2f of the full cost, its budget is %.2f; train the "
                    "router longer, or offer sizes nearer to it",
                    name,
                    share,
                    budget,
                )


def _mean_sizes(config: Any, width: Width) -> dict[str, float]:
    """Hidden size, and per axis the mean size over its layers."""
    from ..checkpoint.config import LAYER_KEYS

    out: dict[str, float] = {"hidden_size": width.hidden_size}
    for key, kind in LAYER_KEYS.items():
        sizes = [getattr(width, key)[i] for i in config.layers_of(kind)]
        if sizes:
            out[key] = sum(sizes) / len(sizes)
    return out


def _drop_lines(path: Path, step: int) -> None:
    """Forgets metrics of steps after the checkpoint: they are taken again."""
    if not path.is_file():
        return
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            if parse_json(text, "a line", dict)["step"] <= step:
                kept.append(text)
        except (CheckpointError, KeyError, TypeError):  # cut off when the run was killed
            continue
    write_whole(path, "".join(f"{text}\n" for text in kept), "distill")
