"""Cost of a submodel, for whole sizes and for the expected sizes that a router learns with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoint.config import ATTENTION, LAYER_KEYS, MAMBA, MLP, ModelConfig
from ..checkpoint.counts import kv_bytes_per_token
from ..checkpoint.widths import Width
from ..errors import InvalidRequest, shown
from ..showing import size_text
from ..value_checks import check_count, check_real, is_one_of

__all__ = ["Cost", "parameters", "parse_bytes", "parse_parameters"]

KINDS = ("total", "active", "memory")

# Per layer: width key -> size, a number or a 0-d tensor.
Sizes = Sequence[Mapping[str, Any]]


def sizes_of(config: ModelConfig, width: Width) -> Sizes:
    """The sizes of a width, layer by layer."""
    return [
        {key: getattr(width, key)[i] for key, kind in LAYER_KEYS.items() if kind == layer}
        for i, layer in enumerate(config.layers)
    ]


def parameters(config: ModelConfig, hidden: Any, sizes: Sizes) -> tuple[Any, Any]:
    """(total, active) parameters, as `checkpoint.counts.count_parameters` counts them.

    Polynomial in the sizes, so it also takes expected sizes as tensors and has a gradient. By hand,
    not from the table of tensors: a run repeats only if its float32 sums keep their order.

    Args:
        config: the checkpoint.
        hidden: hidden size.
        sizes: per layer {width key: size}.

    Returns:
        Two numbers or 0-d tensors; active counts both embedding matrices and J experts a layer.
    """
    total = active = hidden
    for layer, size in zip(config.layers, sizes):
        shared, experts, used = hidden, 0, 0
        if layer == MAMBA:
            heads = size["mamba_num_heads"]
            inner, conv = heads * config.mamba_head_dim, config.conv_dim(heads)
            shared = shared + hidden * (inner + conv + heads) + conv * (config.conv_kernel + 1)
            shared = shared + 3 * heads + inner + inner * hidden
        elif layer == ATTENTION:
            rows = size["num_attention_heads"] + config.num_key_value_heads
            shared = shared + 2 * rows * config.head_dim * hidden
        elif layer == MLP:
            shared = shared + 2 * size["intermediate_size"] * hidden
        else:
            count = size["n_routed_experts"]
            expert = 2 * size["moe_intermediate_size"] * hidden
            shared = shared + count * hidden + count
            shared = shared + 2 * size["moe_shared_expert_intermediate_size"] * hidden
            experts, used = count * expert, config.num_experts_per_tok * expert
        total = total + shared + experts
        active = active + shared + used
    embedding = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    return total + embedding, active + embedding


@dataclass(frozen=True)
class Cost:
    """The quantity that a budget limits.

    Attributes:
        kind: "total" or "active" parameters, or "memory" in bytes of a submodel that is loaded
            alone: weights, KV cache and Mamba state of its own heads.
        bits_per_weight: 16 for bfloat16, 4.5 for NVFP4 (memory only).
        context: tokens of KV cache per sequence (memory only).
        sequences: how many sequences at once (memory only).
        kv_itemsize: bytes of one cached K or V value (memory only).
    """

    kind: str = "total"
    bits_per_weight: float = 16.0
    context: int = 131072
    sequences: int = 1
    kv_itemsize: int = 2

    def __post_init__(self):
        if not is_one_of(self.kind, KINDS):
            raise InvalidRequest(
                f"cost: kind must be one of {', '.join(KINDS)}, got {shown(self.kind)}"
            )
        check_real("cost: bits_per_weight", self.bits_per_weight, 0.01)
        for name in ("context", "sequences"):
            check_count(f"cost: {name}", getattr(self, name), 0)
        check_count("cost: kv_itemsize", self.kv_itemsize, 1, 8)

    def of_sizes(self, config: ModelConfig, hidden: Any, sizes: Sizes) -> Any:
        """Cost of (expected) sizes; differentiable where they are tensors.

        memory = parameters * bits / 8 + sequences * (context * KV bytes per token + state bytes).
        """
        total, active = parameters(config, hidden, sizes)
        if self.kind == "total":
            return total
        if self.kind == "active":
            return active
        state = 0
        for layer, size in zip(config.layers, sizes):
            if layer == MAMBA:
                heads = size["mamba_num_heads"]
                inner = heads * config.mamba_head_dim
                state = state + 4 * inner * config.ssm_state_size
                state = state + 2 * config.conv_dim(heads) * (config.conv_kernel - 1)
        cache = self.context * kv_bytes_per_token(config, self.kv_itemsize)
        return total * (self.bits_per_weight / 8) + self.sequences * (cache + state)

    def of(self, config: ModelConfig, width: Width) -> float:
        """Cost of a width: parameters, or bytes."""
        return float(self.of_sizes(config, width.hidden_size, sizes_of(config, width)))

    def text(self, value: float) -> str:
        """A cost for people: "17.9B parameters" or "15.2 GB"."""
        if self.kind == "memory":
            return size_text(value)
        what = "active parameters" if self.kind == "active" else "parameters"
        for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
            if value >= size:
                return f"{value / size:.3g}{unit} {what}"
        return f"{value:.0f} {what}"


_COUNT_UNITS = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_BYTE_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_BYTE_UNITS.update({f"{unit}IB": 1024.0**power for power, unit in enumerate("KMGT", 1)})


def _parse(text: str, units: Mapping[str, float], rule: str) -> float:
    if not isinstance(text, str):
        raise InvalidRequest(f"{rule}, got {shown(text)}")
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = match.group(2).upper() if match else ""
    if match is None or unit not in units or not 0 < float(match.group(1)) * units[unit] < 1e300:
        raise InvalidRequest(f"{rule}, got {shown(text)}")
    return float(match.group(1)) * units[unit]


def parse_parameters(text: str, full: float) -> float:
    """A number of parameters: "18B", "600M", or a share of the full model, "0.6" or "60%".

    Args:
        text: what was asked for
        full: parameters of the full model.

    Raises:
        InvalidRequest: no such number, not positive, or a share above 1.
    """
    rule = "budget: must be a number of parameters such as 18B or a share in (0, 1] such as 0.6"
    text = text.strip() if isinstance(text, str) else text
    if isinstance(text, str) and text.endswith("%"):
        value = _parse(text[:-1], {"": 0.01}, rule)
    else:
        value = _parse(text, _COUNT_UNITS, rule)
    is_share = text.endswith("%") or not text[-1:].isalpha()
    if is_share and value > 1 and ("." in text or text.endswith("%") or value < 100):
        raise InvalidRequest(f"{rule}, got {shown(text)}")
    return value * full if is_share and value <= 1 else value


def parse_bytes(text: str) -> float:
    """A number of bytes: "16GB" (10^9), "16GiB" (2^30), or a plain number.

    Raises:
        InvalidRequest: no such number, or not positive.
    """
    units = {"": 1.0, **_BYTE_UNITS}
    return _parse(text, units, "memory: must be a size such as 16GB or 16GiB")
