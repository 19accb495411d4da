"""The router, which gives a budget its sizes: a small network per axis, learnt with the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.config import CHANNEL_GRAIN, LAYER_KEYS, ModelConfig
from ..checkpoint.width_table import parse_widths
from ..checkpoint.widths import Width, full_width
from ..errors import InvalidRequest, WidthError, shown
from ..value_checks import is_real
from .costs import Cost

__all__ = [
    "Router",
    "budget_loss",
    "check_budgets",
    "check_choices",
    "default_choices",
    "logit_scale",
    "temperature",
]

HIDDEN = "hidden_size"
AXES = (HIDDEN, *LAYER_KEYS)
SLOPE = 0.1  # of the leaky ReLU
INIT_STD = 0.1
DEAD_ZONE = 0.05
FULL_WEIGHT = 10.0


def check_budgets(budgets: Sequence[float]) -> tuple[float, ...]:
    """The budgets, largest first.

    Raises:
        InvalidRequest: none, one outside (0, 1], or one twice.
    """
    if not isinstance(budgets, Sequence) or isinstance(budgets, (str, bytes)):
        raise InvalidRequest(f"budgets: must be a list of numbers, got {shown(budgets)}")
    if not budgets:
        raise InvalidRequest("budgets: must hold at least one, got none")
    for value in budgets:
        if not is_real(value) or not 0 < value <= 1:
            raise InvalidRequest(f"budgets: each must lie in (0, 1], got {shown(value)}")
    values = [float(budget) for budget in budgets]
    if len(set(values)) != len(values):
        raise InvalidRequest(f"budgets: each must be given once, got {list(values)}")
    return tuple(sorted(values, reverse=True))


def _grid(config: ModelConfig, axis: str) -> tuple[int, int]:
    """(step, least size) of an axis."""
    if axis == "mamba_num_heads":
        return config.n_groups, config.n_groups
    if axis == "num_attention_heads":
        return config.num_key_value_heads, config.num_key_value_heads
    if axis == "n_routed_experts":
        return 1, config.num_experts_per_tok
    return CHANNEL_GRAIN, CHANNEL_GRAIN


def _present(config: ModelConfig) -> list[str]:
    return [axis for axis in AXES if axis == HIDDEN or LAYER_KEYS[axis] in config.layers]


def default_choices(
    config: ModelConfig, least: float = 0.4, count: int = 6
) -> dict[str, tuple[int, ...]]:
    """Allowed sizes of every axis of a model: at most `count`, evenly spaced, largest first.

    Args:
        config: the parent.
        least: share of the full size below which nothing is offered, in (0, 1).
        count: sizes per axis at most, at least 2.

    Returns:
        {axis: sizes}, the first one full; axes with a single possible size are left out.
    """
    if not 0 < least < 1 or count < 2:
        raise InvalidRequest(
            f"choices: least must lie in (0, 1) and count be at least 2, got {least} and {count}"
        )
    choices = {}
    for axis in _present(config):
        full, (step, smallest) = getattr(config, axis), _grid(config, axis)
        low = max(smallest, math.ceil(least * full / step) * step)
        sizes = list(range(low, full + 1, step))
        if len(sizes) > count:
            places = (round(i * (len(sizes) - 1) / (count - 1)) for i in range(count))
            sizes = [sizes[place] for place in places]
        if len(sizes) > 1:
            choices[axis] = tuple(sorted({*sizes, full}, reverse=True))
    return choices


def check_choices(
    config: ModelConfig, choices: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, ...]]:
    """The choices in falling order, in the order of the axes.

    Raises:
        WidthError: an unknown axis or one that sizes no layer, a size that is no prefix of it
            (groups, multiples of 16, experts below top-k), a size twice, or full not among them.
    """
    known = _present(config)
    if not isinstance(choices, Mapping):
        raise WidthError(f"choices: must be {{axis: allowed sizes}}, got {shown(choices)}")
    for axis, sizes in choices.items():
        if axis not in known:
            raise WidthError(f"choices: axis must be one of {', '.join(known)}, got {shown(axis)}")
        ints = isinstance(sizes, (list, tuple)) and all(type(size) is int for size in sizes)
        if not ints:
            raise WidthError(f"choices: sizes of {axis} must be a list of ints, got {shown(sizes)}")
        for size in sizes:
            parse_widths(config, {f"choice of {axis}": {axis: size}})
        if len(set(sizes)) != len(sizes):
            raise WidthError(f"choices: sizes of {axis} must differ, got {shown(list(sizes))}")
        if getattr(config, axis) not in sizes:
            raise WidthError(
                f"choices: sizes of {axis} must hold the full {getattr(config, axis)}, "
                f"got {shown(list(sizes))}"
            )
    return {axis: tuple(sorted(choices[axis], reverse=True)) for axis in known if axis in choices}


def temperature(progress: float, first: float = 1.0, last: float = 0.05) -> float:
    """first * (last / first)^progress: Gumbel-Softmax temperature, progress in 0..1."""
    return first * (last / first) ** min(1.0, max(0.0, progress))


def logit_scale(progress: float, first: float = 1.0, last: float = 10.0) -> float:
    """first + (last - first) * progress: what logits are multiplied by, progress in 0..1."""
    return first + (last - first) * min(1.0, max(0.0, progress))


class Router(nn.Module):
    """budget -> probabilities over the allowed sizes of every axis.

    Per axis: Linear (no bias) -> LeakyReLU(0.1) -> Linear (no bias), weights of deviation 0.1, on
    the one-hot budget; between two trained budgets the input is the linear interpolation of
    theirs. Homogeneous: one choice per axis; per layer: one per layer of the axis' kind. The
    hidden size is always one for the whole model.

    Sources: Nemotron Elastic (arXiv 2511.16664), router; Megatron-LM, `megatron/elastification`.

    Args:
        config: the sorted parent.
        budgets: trained budgets in (0, 1], any order; kept largest first.
        choices: {axis: allowed sizes}; None = `default_choices`.
        per_layer: whether every layer chooses for itself.
        inner: width of the networks.
        seed: of their first weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        budgets: Sequence[float],
        choices: Mapping[str, Sequence[int]] | None = None,
        *,
        per_layer: bool = False,
        inner: int = 128,
        seed: int = 0,
    ):
        super().__init__()
        self.config, self.per_layer, self.inner = config, bool(per_layer), inner
        self.budgets = check_budgets(budgets)
        choices = default_choices(config) if choices is None else choices
        self.choices = check_choices(config, choices)
        if not self.choices:
            raise WidthError("choices: at least one axis must have several sizes, got none")
        generator = torch.Generator().manual_seed(seed)
        self.networks = nn.ModuleDict()
        for axis, sizes in self.choices.items():
            network = nn.Sequential(
                nn.Linear(len(self.budgets), inner, bias=False),
                nn.LeakyReLU(SLOPE),
                nn.Linear(inner, self.rows(axis) * len(sizes), bias=False),
            )
            with torch.no_grad():
                for weight in network.parameters():
                    weight.copy_(torch.randn(weight.shape, generator=generator) * INIT_STD)
            self.networks[axis] = network
            self.register_buffer(f"prefixes_{axis}", self._prefixes(axis, sizes), persistent=False)

    def rows(self, axis: str) -> int:
        """Number of an axis's independent choices: 1, or one per layer of its kind."""
        if not self.per_layer or axis == HIDDEN:
            return 1
        return len(self.config.layers_of(LAYER_KEYS[axis]))

    def _prefixes(self, axis: str, sizes: Sequence[int]) -> Tensor:
        """[choices, units]: 1 for the units that a size keeps, heads counted inside groups."""
        full = getattr(self.config, axis)
        groups = {
            "mamba_num_heads": self.config.n_groups,
            "num_attention_heads": self.config.num_key_value_heads,
        }.get(axis, 1)
        rank = torch.arange(full) % (full // groups)
        return torch.stack([(rank < size // groups).float() for size in sizes])

    def budget_input(self, budget: float) -> Tensor:
        """[budgets] one-hot, or two neighbours' weights that interpolate linearly.

        Raises:
            InvalidRequest: a budget outside (0, 1] or outside the trained ones.
        """
        budgets = self.budgets
        if not is_real(budget) or not 0 < budget <= 1:
            raise InvalidRequest(f"router: budget must lie in (0, 1], got {shown(budget)}")
        if not budgets[-1] <= budget <= budgets[0]:
            raise InvalidRequest(
                f"router: budget must lie between the trained {budgets[-1]:g} and {budgets[0]:g}, "
                f"got {budget:g}"
            )
        out = torch.zeros(len(budgets))
        if budget in budgets:
            out[budgets.index(budget)] = 1
            return out
        low = next(i for i, trained in enumerate(budgets) if trained < budget)
        share = (budgets[low - 1] - budget) / (budgets[low - 1] - budgets[low])
        out[low - 1], out[low] = 1 - share, share
        return out

    def logits(self, budget: float) -> dict[str, Tensor]:
        """{axis: logits [rows, choices]} of one budget, not scaled."""
        given = self.budget_input(budget)
        out = {}
        for axis, network in self.networks.items():
            flat = network(given.to(network[0].weight.device))
            out[axis] = flat.view(self.rows(axis), -1)
        return out

    def probabilities(
        self,
        budget: float,
        temperature: float = 1.0,
        scale: float = 1.0,
        generator: torch.Generator | None = None,
        hard: bool = False,
    ) -> dict[str, Tensor]:
        """pi = softmax((scale * logits + Gumbel noise) / temperature), per axis [rows, choices].

        Args:
            budget: in (0, 1], between the trained ones.
            temperature: of the schedule.
            scale: of the schedule.
            generator: CPU generator of the noise; None: no noise.
            hard: the forward value is one-hot, the gradient that of pi (straight through).
        """
        out = {}
        for axis, logits in self.logits(budget).items():
            scaled = logits * scale
            if generator is not None:
                uniform = torch.rand(logits.shape, generator=generator).clamp(1e-20, 1 - 1e-7)
                scaled = scaled - (-uniform.log()).log().to(logits.device)
            pi = (scaled / temperature).softmax(-1)
            if hard:
                one = torch.zeros_like(pi).scatter_(-1, pi.argmax(-1, keepdim=True), 1.0)
                pi = one + pi - pi.detach()
            out[axis] = pi
        return out

    def _layers(self, values: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """{axis: values [rows, ...]} as one {axis: values [...]} per layer, for its own axes."""
        out: list[dict[str, Tensor]] = [{} for _ in self.config.layers]
        for axis, kind in LAYER_KEYS.items():
            for row, layer in enumerate(self.config.layers_of(kind)):
                out[layer][axis] = values[axis][0 if len(values[axis]) == 1 else row]
        return out

    def masks(self, pi: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """sum over choices of pi * prefix mask, per layer {axis: [units]}, for `torch_model`.

        Axes without a choice get ones.
        """
        device = next(iter(pi.values())).device
        found: dict[str, Tensor] = {}
        for axis in _present(self.config):
            if axis in pi:
                found[axis] = pi[axis] @ getattr(self, f"prefixes_{axis}").to(device)
            else:
                found[axis] = torch.ones(1, getattr(self.config, axis), device=device)
        return [{**masks, HIDDEN: found[HIDDEN][0]} for masks in self._layers(found)]

    def sizes(self, pi: Mapping[str, Tensor]) -> tuple[Any, list[dict[str, Any]]]:
        """Expected sizes sum(pi * size): the hidden size, and per layer {axis: size}."""
        expected: dict[str, Any] = {}
        for axis in _present(self.config):
            if axis in pi:
                sizes = torch.tensor(self.choices[axis], dtype=torch.float32)
                expected[axis] = pi[axis] @ sizes.to(pi[axis].device)
            else:
                expected[axis] = torch.tensor([float(getattr(self.config, axis))])
        return expected[HIDDEN][0], self._layers(expected)

    @torch.no_grad()
    def width(self, budget: float, name: str = "") -> Width:
        """The width of the likeliest size of every axis; the full model where budget is 1."""
        name = name or f"{budget:g}"
        if budget == 1:
            self.budget_input(budget)
            return full_width(self.config, name)
        return self.widths_at(self.budget_input(budget)[None], name)[0]

    @torch.no_grad()
    def widths_at(self, inputs: Tensor, name: str) -> list[Width]:
        """The different widths of the likeliest sizes for router inputs [points, budgets]."""
        best = []
        for axis, network in self.networks.items():
            flat = network(inputs.to(network[0].weight.device))
            best.append(flat.view(len(inputs), self.rows(axis), -1).argmax(-1).cpu())
        widths = []
        for row in torch.unique(torch.cat(best, 1), dim=0).tolist():
            table: dict[str, Any] = {}
            for axis, sizes in self.choices.items():
                taken, row = row[: self.rows(axis)], row[self.rows(axis) :]
                kept = [sizes[i] for i in taken]
                table[axis] = kept[0] if len(kept) == 1 else kept
            widths.append(parse_widths(self.config, {name: table})[name])
        return widths


def budget_loss(
    router: Router, pi: Mapping[str, Tensor], budget: float, cost: Cost
) -> tuple[Tensor, float]:
    """|cost(expected sizes) / (budget * full cost) - 1|, 0 within 0.05 of it unless budget is 1.

    For budget 1 also 10 * sum over axes of MSE(pi, one-hot of the full size), so that the full
    model stays whole. Source: Megatron-LM, `megatron/elastification`, parameter loss.

    Args:
        router: whose choices pi are
        pi: its probabilities for `budget`.
        budget: share of the full cost
        cost: what is limited.

    Returns:
        The loss, and the cost as a share of the full one.
    """
    config = router.config
    whole = cost.of(config, full_width(config))
    share = cost.of_sizes(config, *router.sizes(pi)) / whole
    loss = (share / budget - 1).abs()
    if budget == 1:
        for probabilities in pi.values():
            first = torch.zeros_like(probabilities)
            first[:, 0] = 1
            loss = loss + FULL_WEIGHT * (probabilities - first).square().mean()
    elif float(loss.detach()) < DEAD_ZONE:
        loss = loss * 0
    return loss, float(share.detach())
