"""config.json of a `nemotron_h` checkpoint: read, checked, typed."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ..errors import CheckpointError, shown
from ..files.reading import read_json
from ..value_checks import is_int

MAMBA, ATTENTION, MLP, MOE = "M", "*", "-", "E"
# Width key -> the layer kind that it sizes.
LAYER_KEYS = {
    "mamba_num_heads": MAMBA,
    "num_attention_heads": ATTENTION,
    "n_routed_experts": MOE,
    "moe_intermediate_size": MOE,
    "moe_shared_expert_intermediate_size": MOE,
    "intermediate_size": MLP,
}
CHANNEL_GRAIN = 16

__all__ = ["ATTENTION", "CHANNEL_GRAIN", "LAYER_KEYS", "MAMBA", "MLP", "MOE", "ModelConfig"]

_KIND_NAMES = {
    "mamba": MAMBA,
    "mamba2": MAMBA,
    "linear_attention": MAMBA,
    "attention": ATTENTION,
    "full_attention": ATTENTION,
    "mlp": MLP,
    "moe": MOE,
}

# Sizes with the default that Hugging Face gives an absent key (it omits defaults when saving).
_SIZES = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "chunk_size": 128,
    "intermediate_size": 21504,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688,
    "max_position_embeddings": 4096,
}
_LARGEST = 2**31 - 1  # of a size: kernels and tables hold 32-bit integers
_MOST_LAYERS = 1024
_FLOAT32_MAX = 3.4028234663852886e38
_ALIASES = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_chunk_size": "chunk_size",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_dt_limit": "time_step_limit",
    "num_local_experts": "n_routed_experts",
    "torch_dtype": "dtype",
}
# (key, default, the only accepted value, which layer kinds must exist for it to matter)
_REQUIRED_VALUES = (
    ("n_group", 1, 1, MOE),
    ("norm_topk_prob", True, True, MOE),
    ("moe_latent_size", None, None, MOE),
    ("mlp_bias", False, False, MLP + MOE),
    ("mlp_hidden_act", "relu2", "relu2", MLP + MOE),
    ("attention_bias", False, False, ATTENTION),
    ("sliding_window", None, None, ATTENTION),
    ("mamba_proj_bias", False, False, MAMBA),
    ("use_bias", False, False, MAMBA),
    ("use_conv_bias", True, True, MAMBA),
    ("mamba_hidden_act", "silu", "silu", MAMBA),
    ("conv_kernel", 4, 4, MAMBA),
    ("residual_in_fp32", False, False, MAMBA + ATTENTION + MLP + MOE),
)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a `nemotron_h` checkpoint under their Hugging Face names (widest model)."""

    vocab_size: int
    hidden_size: int
    layers: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mamba_num_heads: int
    mamba_head_dim: int
    ssm_state_size: int
    n_groups: int
    conv_kernel: int
    chunk_size: int
    intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    moe_shared_expert_intermediate_size: int
    routed_scaling_factor: float
    layer_norm_epsilon: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_id: int | list[int] | None = field(hash=False)
    pad_token_id: int | None
    dtype: str
    raw: dict[str, Any] = field(repr=False, compare=False, hash=False)

    @property
    def num_layers(self) -> int:
        """Number of layers of every kind together."""
        return len(self.layers)

    @property
    def pattern(self) -> str:
        """The layer kinds as one string, for example `MEM*E`."""
        return "".join(self.layers)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All end-of-sequence token ids, possibly none."""
        if self.eos_token_id is None:
            return ()
        if isinstance(self.eos_token_id, int):
            return (self.eos_token_id,)
        return tuple(self.eos_token_id)

    @property
    def elastic(self) -> dict[str, Any] | None:
        """The width table stored in config.json, or None."""
        return self.raw.get("elastic")

    def layers_of(self, kind: str) -> tuple[int, ...]:
        """Indices of the layers of `kind` ('M', '*', '-' or 'E')."""
        return tuple(i for i, layer in enumerate(self.layers) if layer == kind)

    def conv_dim(self, mamba_num_heads: int | None = None) -> int:
        """Conv channels C = H*P + 2*G*N at `mamba_num_heads` heads (default: all)."""
        heads = self.mamba_num_heads if mamba_num_heads is None else mamba_num_heads
        return heads * self.mamba_head_dim + 2 * self.n_groups * self.ssm_state_size

    @classmethod
    def from_folder(cls, path: str | Path) -> ModelConfig:
        """Reads `config.json` of a checkpoint folder.

        Raises:
            CheckpointError: when it is missing, is not JSON or describes a model that this library
                does not run.
        """
        file = Path(path) / "config.json"
        if not os.path.lexists(file):
            raise CheckpointError(
                f"config: folder must hold config.json, got {Path(path)} without it"
            )
        return cls.from_dict(read_json(file, f"config: {file}"))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Checks a config.json dictionary and keeps what the library needs.

        Accepts both `hybrid_override_pattern` and `layers_block_type`, older key names, plain
        Infinity and {"__float__": "Infinity"}. Raises CheckpointError naming the key, the rule
        and the value.
        """
        if not isinstance(data, Mapping):
            raise CheckpointError(
                f"config: config.json must be an object, got {type(data).__name__}"
            )
        model_type = data.get("model_type", "nemotron_h")
        if model_type != "nemotron_h":
            _refuse("model_type", "be 'nemotron_h'", model_type)
        raw = {key: _decode_floats(value) for key, value in data.items()}
        values = dict(raw)
        for old, new in _ALIASES.items():
            if values.get(old) is None:
                continue
            if values.get(new) not in (None, values[old]):
                _refuse(old, f"agree with {new} = {shown(values[new])}", values[old])
            values[new] = values[old]
        layers = _read_layers(values)
        _check_required_values(values, layers)
        sizes = _read_sizes(values)
        config = cls(
            layers=layers,
            routed_scaling_factor=_real(values, "routed_scaling_factor", 1.0),
            layer_norm_epsilon=_real(values, "layer_norm_epsilon", 1e-5, least=0.0),
            tie_word_embeddings=_flag(values, "tie_word_embeddings"),
            bos_token_id=_token_id(values, "bos_token_id", 1),
            eos_token_id=_token_id(values, "eos_token_id", 2, many=True),
            pad_token_id=_token_id(values, "pad_token_id", 0),
            dtype=str(values.get("dtype") or "float32").removeprefix("torch."),
            raw=raw,
            **sizes,
        )
        _check_sizes(config)
        return config


# Reading config.json ----------------------------------------------------------------------------


def _refuse(key: str, rule: str, value: object) -> NoReturn:
    raise CheckpointError(f"config: {key} must {rule}, got {shown(value)}")


def _decode_floats(value: Any) -> Any:
    """Replaces {"__float__": "Infinity"} (how Hugging Face writes it) by the number."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            try:
                return float(value["__float__"])
            except (TypeError, ValueError, OverflowError):
                _refuse("__float__", "be a number, Infinity or NaN", value["__float__"])
        return {key: _decode_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode_floats(item) for item in value]
    return value


def _read_layers(values: Mapping[str, Any]) -> tuple[str, ...]:
    names = values.get("layers_block_type") or values.get("layer_types")
    pattern = values.get("hybrid_override_pattern")
    if names is not None:
        if not isinstance(names, (list, tuple)):
            _refuse("layers_block_type", "be a list of layer kinds", names)
        unknown = [name for name in names if name not in tuple(_KIND_NAMES)]
        if unknown:
            _refuse("layers_block_type", f"hold only {sorted(_KIND_NAMES)}", unknown[0])
        layers = tuple(_KIND_NAMES[name] for name in names)
        if pattern is not None and pattern != "".join(layers):
            rule = f"agree with layers_block_type {shown(''.join(layers))}"
            _refuse("hybrid_override_pattern", rule, pattern)
    elif pattern is not None:
        if not isinstance(pattern, str):
            _refuse("hybrid_override_pattern", "be a string such as 'MEM*E'", pattern)
        unknown = [kind for kind in pattern if kind not in "M*-E"]
        if unknown:
            _refuse("hybrid_override_pattern", "hold only 'M', '*', '-' and 'E'", pattern)
        layers = tuple(pattern)
    else:
        raise CheckpointError(
            "config: hybrid_override_pattern or layers_block_type must be given, got neither"
        )
    if not 1 <= len(layers) <= _MOST_LAYERS:
        rule = f"name at least one layer and at most {_MOST_LAYERS}"
        _refuse("hybrid_override_pattern", rule, pattern)
    count = values.get("num_hidden_layers")
    if count is not None and count != len(layers):
        _refuse("num_hidden_layers", f"be {len(layers)}, the length of the pattern", count)
    return layers


def _check_required_values(values: Mapping[str, Any], layers: Sequence[str]) -> None:
    for key, default, accepted, kinds in _REQUIRED_VALUES:
        value = values.get(key, default)
        if value is None and accepted is False:
            value = False
        if value != accepted and any(kind in layers for kind in kinds):
            _refuse(key, f"be {accepted!r} (no other value is implemented)", value)
    limit = values.get("time_step_limit")
    if limit is not None and MAMBA in layers:
        usable = (
            isinstance(limit, (list, tuple))
            and len(limit) == 2
            and all(isinstance(bound, (int, float)) for bound in limit)
            and limit[0] <= 0.0
            and limit[1] == math.inf
        )
        if not usable:
            _refuse("time_step_limit", "be (0, Infinity): dt is never clamped", limit)


def _read_sizes(values: Mapping[str, Any]) -> dict[str, int]:
    sizes = {}
    for key, default in _SIZES.items():
        value = values.get(key, default)
        if value is None and key == "num_key_value_heads":
            value = sizes["num_attention_heads"]
        if not is_int(value) or not 1 <= value <= _LARGEST:
            _refuse(key, f"be a positive integer of at most {_LARGEST}", value)
        sizes[key] = value
    return sizes


def _real(
    values: Mapping[str, Any], key: str, default: float, least: float = -_FLOAT32_MAX
) -> float:
    """A number that kernels take: its float32 is finite."""
    value = values.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        _refuse(key, "be a finite number", value)
    if not least <= value <= _FLOAT32_MAX:
        _refuse(key, f"be a finite number in [{least:g}, {_FLOAT32_MAX:g}]", value)
    return float(value)


def _flag(values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key)
    if value is not None and not isinstance(value, bool):
        _refuse(key, "be true or false", value)
    return bool(value)


def _token_id(
    values: Mapping[str, Any], key: str, default: int, many: bool = False
) -> int | list[int] | None:
    value = values.get(key, default)
    ids = value if many and isinstance(value, (list, tuple)) else [value]
    for item in ids:
        if item is not None and (not is_int(item) or abs(item) > _LARGEST):
            _refuse(key, "be a token id" + (", a list of them" if many else "") + " or null", value)
    return list(value) if isinstance(value, tuple) else value


def _check_sizes(config: ModelConfig) -> None:
    steps = {"hidden_size": CHANNEL_GRAIN}
    if MAMBA in config.layers:
        steps["mamba_head_dim"] = CHANNEL_GRAIN
        steps["ssm_state_size"] = CHANNEL_GRAIN
        steps["mamba_num_heads"] = config.n_groups
    if ATTENTION in config.layers:
        steps["head_dim"] = CHANNEL_GRAIN
        steps["num_attention_heads"] = config.num_key_value_heads
    if MLP in config.layers:
        steps["intermediate_size"] = CHANNEL_GRAIN
    if MOE in config.layers:
        steps["moe_intermediate_size"] = CHANNEL_GRAIN
        steps["moe_shared_expert_intermediate_size"] = CHANNEL_GRAIN
        if config.n_routed_experts < config.num_experts_per_tok:
            _refuse(
                "n_routed_experts",
                f"be at least num_experts_per_tok ({config.num_experts_per_tok})",
                config.n_routed_experts,
            )
    for key, step in steps.items():
        value = getattr(config, key)
        if value % step:
            _refuse(key, f"be a multiple of {step}", value)
