"""Any budget to a width: what the learnt router answers, kept beside the checkpoint."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import ModelConfig
from ..checkpoint.counts import Counts, count_parameters
from ..checkpoint.derive import write_widths
from ..checkpoint.width_table import width_to_dict
from ..checkpoint.widths import Width, full_width
from ..errors import CheckpointError, InvalidRequest, WidthError, shown
from ..files.reading import foreign, is_file, read_json
from ..files.writing import write_json
from .costs import Cost, parse_bytes, parse_parameters
from .router import Router

__all__ = ["Answer", "LearnedSizes", "add_width", "width_for_budget", "width_for_text"]

logger = logging.getLogger(__name__)

ROUTER_NAME = "elastic_router.json"
VERSION = 1
_WIDEST_NETWORK = 4096  # inner width of a router's networks, before they are made
PATH_POINTS = 400  # router inputs tried between two trained budgets


@dataclass(frozen=True)
class Answer:
    """The width that a budget gets.

    Attributes:
        width: its sizes.
        counts: parameters.
        cost: what was limited.
        value: its cost, at most `limit`.
        predicted_loss: KL(parent | width) per token, interpolated linearly in the trained cost
            between the trained widths' losses.
    """

    width: Width
    counts: Counts
    cost: Cost
    value: float
    limit: float
    predicted_loss: float


@dataclass
class LearnedSizes:
    """The router of an elastic checkpoint and what was measured with it.

    Attributes:
        router: learnt.
        cost: what its budgets limit.
        widths: {name: Width} of the trained budgets.
        losses: {name: KL(parent | width) per token}.
        held_out: True if they are of held-out data.
    """

    router: Router
    cost: Cost
    widths: dict[str, Width]
    losses: dict[str, float]
    held_out: bool = True

    def save(self, folder: str | Path) -> Path:
        """Writes elastic_router.json into a checkpoint folder."""
        router = self.router
        config = router.config
        data = {
            "version": VERSION,
            "budgets": router.budgets,
            "choices": router.choices,
            "per_layer": router.per_layer,
            "inner": router.inner,
            "cost": dataclasses.asdict(self.cost),
            "widths": {name: width_to_dict(config, width) for name, width in self.widths.items()},
            "losses": self.losses,
            "held_out": self.held_out,
            "weights": {
                name: tensor.detach().cpu().tolist() for name, tensor in router.state_dict().items()
            },
        }
        return write_json(Path(folder) / ROUTER_NAME, data, "budget", indent=None)

    @classmethod
    def load(cls, folder: str | Path, config: ModelConfig) -> LearnedSizes:
        """Reads what `save` wrote.

        Raises:
            CheckpointError: there is none, or it is damaged or does not fit the checkpoint.
        """
        path = Path(folder) / ROUTER_NAME
        if not is_file(path):
            raise CheckpointError(
                f"budget: {folder} must hold {ROUTER_NAME}, which `elastic-infer elastify` "
                "writes, got none: a budget needs a learnt router"
            )
        data = read_json(path, kind=dict)
        rule = f"budget: {path} must be the router of this checkpoint"
        try:
            with foreign(rule):
                return cls._from_dict(data, config, path)
        except (WidthError, InvalidRequest) as error:  # sizes that this checkpoint has not
            raise CheckpointError(f"{rule}, got {error}") from error

    @classmethod
    def _from_dict(cls, data: dict[str, Any], config: ModelConfig, path: Path) -> LearnedSizes:
        """Raises what comes of it where a value is missing or of another type."""
        from ..checkpoint.width_table import parse_widths

        if data["version"] != VERSION:
            got = shown(data["version"])
            raise CheckpointError(f"budget: {path} must be of version 1, got {got}")
        options = {"per_layer": data["per_layer"], "inner": data["inner"]}
        if not 0 < options["inner"] <= _WIDEST_NETWORK:
            raise ValueError(f"inner = {shown(options['inner'])}")
        router = Router(config, data["budgets"], data["choices"], **options)
        weights = {name: torch.tensor(rows) for name, rows in data["weights"].items()}
        router.load_state_dict(weights)
        widths = parse_widths(config, data["widths"])
        losses = {name: float(loss) for name, loss in data["losses"].items() if name in widths}
        return cls(router, Cost(**data["cost"]), widths, losses, bool(data["held_out"]))

    def candidates(self) -> list[Width]:
        """Every width that the router gives on the way through its trained budgets.

        Its input moves linearly from each trained budget's one-hot vector to the next one's; the
        likeliest sizes on the way, without repeats, and the trained widths themselves.
        """
        found, trained = list(self.widths.values()), torch.eye(len(self.router.budgets))
        inputs = [trained]
        for high, low in itertools.pairwise(trained):
            inputs.append(torch.lerp(high, low, torch.linspace(0, 1, PATH_POINTS)[:, None]))
        for width in self.router.widths_at(torch.cat(inputs), "learnt"):
            if not any(width.same_sizes(other) for other in found):
                found.append(width)
        return found

    def predicted_loss(self, width: Width) -> float:
        """KL(parent | width) per token by linear interpolation between the trained widths.

        Beyond the cheapest and dearest trained width their own loss is given; NaN where no loss
        was measured.
        """
        config = self.router.config
        points = sorted(
            (self.cost.of(config, self.widths[name]), loss) for name, loss in self.losses.items()
        )
        if not points:
            return float("nan")
        costs, losses = zip(*points)
        return float(np.interp(self.cost.of(config, width), costs, losses))


def width_for_budget(learned: LearnedSizes, limit: float, cost: Cost, name: str = "") -> Answer:
    """The width of the router with the highest cost that is at most `limit`.

    Args:
        learned: of the checkpoint.
        limit: parameters or bytes, as `cost` says; need not be one of the trained budgets.
        cost: what is limited, in any of its kinds.
        name: of the width; "" = the trained width's own name, or the cost as text.

    Raises:
        InvalidRequest: even the smallest width costs more.
    """
    config = learned.router.config
    priced = [(cost.of(config, width), width) for width in learned.candidates()]
    fitting = [(value, i) for i, (value, _) in enumerate(priced) if value <= limit]
    if not fitting:
        least = min(value for value, _ in priced)
        raise InvalidRequest(
            f"budget: must be at least {cost.text(least)}, the smallest learnt width, got "
            f"{cost.text(limit)}"
        )
    value, place = max(fitting, key=lambda pair: (pair[0], -pair[1]))
    width = priced[place][1]
    if not name:
        name = width.name if width.name != "learnt" else cost.text(value).split(" param")[0]
    width = dataclasses.replace(width, name=name.replace(" ", ""))
    counts = count_parameters(config, width)
    return Answer(width, counts, cost, value, limit, learned.predicted_loss(width))


def width_for_text(
    checkpoint: Checkpoint,
    budget: str | None = None,
    memory: str | None = None,
    *,
    active: bool = False,
    bits_per_weight: float = 16.0,
    context: int = 131072,
    sequences: int = 1,
    name: str = "",
) -> Answer:
    """The width for what a person asked for.

    Args:
        checkpoint: an elastic checkpoint with its router.
        budget: parameters: "18B", or a share of the full model, "0.6" or "60%".
        memory: bytes, "16GB" or "16GiB", of weights, KV cache and Mamba state.
        active: count the parameters that one token uses.
        bits_per_weight: of the memory.
        context: of the memory.
        sequences: of the memory.
        name: of the width.

    Raises:
        InvalidRequest: not exactly one of budget and memory, or one that cannot be read or met.
        CheckpointError: the checkpoint has no router.
    """
    if (budget is None) == (memory is None):
        raise InvalidRequest("budget: exactly one of budget and memory must be given")
    learned = LearnedSizes.load(checkpoint.folder, checkpoint.config)
    if memory is not None:
        if active:
            raise InvalidRequest("budget: active must go with budget, got it with memory")
        cost = Cost("memory", bits_per_weight, context, sequences)
        return width_for_budget(learned, parse_bytes(memory), cost, name)
    cost = Cost("active" if active else "total")
    whole = cost.of(checkpoint.config, full_width(checkpoint.config))
    return width_for_budget(learned, parse_parameters(budget, whole), cost, name)


def add_width(checkpoint: Checkpoint, width: Width) -> tuple[str, Path | None]:
    """Adds a width to the checkpoint's table, so that it can be run and sliced by its name.

    The table is written beside config.json, or to the user's config folder for a checkpoint in a
    download cache (see `write_widths`).

    Returns:
        Its name and the file; (name of an equal width, None) if the table has the sizes already.

    Raises:
        WidthError: the name belongs to another width.
    """
    for name, other in checkpoint.widths.items():
        if other.same_sizes(width):
            return name, None
    if width.name in checkpoint.widths:
        raise WidthError(
            f"budget: name must be a new one, got {shown(width.name)}, which has other sizes"
        )
    entries: dict[str, Any] = {
        name: width_to_dict(checkpoint.config, other) for name, other in checkpoint.widths.items()
    }
    entries[width.name] = width_to_dict(checkpoint.config, width)
    table: Mapping[str, Any] = {
        "version": 1,
        "default_width": checkpoint.default_width,
        "widths": entries,
    }
    return width.name, write_widths(table, checkpoint.folder)
