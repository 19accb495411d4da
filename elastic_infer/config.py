"""What a checkpoint is (ModelConfig), which submodels it holds (Width), and what they cost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .errors import CheckpointError, WidthError

MAMBA, ATTENTION, MLP, MOE = "M", "*", "-", "E"

_KIND_NAMES = {
    "mamba": MAMBA,
    "mamba2": MAMBA,
    "linear_attention": MAMBA,
    "attention": ATTENTION,
    "full_attention": ATTENTION,
    "mlp": MLP,
    "moe": MOE,
}

# Width key -> the layer kind that it sizes.
LAYER_KEYS = {
    "mamba_num_heads": MAMBA,
    "num_attention_heads": ATTENTION,
    "n_routed_experts": MOE,
    "moe_intermediate_size": MOE,
    "moe_shared_expert_intermediate_size": MOE,
    "intermediate_size": MLP,
}
_SKIP_KEYS = (
    "layers",
    "skip_layers",
    "skipped_layers",
    "layer_skip",
    "num_hidden_layers",
    "num_layers",
    "hybrid_override_pattern",
    "layers_block_type",
    "layer_types",
)
_SKIP_REASON = (
    "layer skipping is not a width: a skipped layer would have no cache for the other widths; "
    "remove it from the table"
)
CHANNEL_STEP = 16

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
class Width:
    """One named submodel: a prefix length on every axis.

    Per-layer tuples have one entry per layer of the whole model, 0 where the layer is of
    another kind.
    """

    name: str
    hidden_size: int
    mamba_num_heads: tuple[int, ...]
    num_attention_heads: tuple[int, ...]
    n_routed_experts: tuple[int, ...]
    moe_intermediate_size: tuple[int, ...]
    moe_shared_expert_intermediate_size: tuple[int, ...]
    intermediate_size: tuple[int, ...]

    def same_sizes(self, other: Width) -> bool:
        """True when both keep the same prefixes, whatever their names."""
        return self.hidden_size == other.hidden_size and all(
            getattr(self, key) == getattr(other, key) for key in LAYER_KEYS
        )

    def fits_in(self, other: Width) -> bool:
        """True when every prefix of this width is inside that of `other`."""
        return self.hidden_size <= other.hidden_size and all(
            a <= b for key in LAYER_KEYS for a, b in zip(getattr(self, key), getattr(other, key))
        )


class Counts(NamedTuple):
    """Parameters of a width.

    `active` counts the experts of one token and both embedding matrices;
    `active_without_embedding` leaves out the input embedding, of which a token reads one row.
    """

    total: int
    active: int
    active_without_embedding: int


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
    eos_token_id: int | list[int] | None
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

        Raises CheckpointError when it is missing, is not JSON or describes a model that this
        library does not run.
        """
        file = Path(path) / "config.json"
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(
                f"config: folder must hold config.json, got {Path(path)} without it"
            ) from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"config: {file} must be readable JSON, got: {error}") from error
        return cls.from_dict(data)

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
        raw = _decode_floats(dict(data))
        values = dict(raw)
        for old, new in _ALIASES.items():
            if old in values and values.get(new) is None:
                values[new] = values[old]
        layers = _read_layers(values)
        _check_required_values(values, layers)
        sizes = _read_sizes(values)
        config = cls(
            layers=layers,
            routed_scaling_factor=_real(values, "routed_scaling_factor", 1.0),
            layer_norm_epsilon=_real(values, "layer_norm_epsilon", 1e-5),
            tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
            bos_token_id=values.get("bos_token_id", 1),
            eos_token_id=values.get("eos_token_id", 2),
            pad_token_id=values.get("pad_token_id", 0),
            dtype=str(values.get("dtype") or "float32").removeprefix("torch."),
            raw=raw,
            **sizes,
        )
        _check_sizes(config)
        return config


# Reading config.json ----------------------------------------------------------------------------


def _refuse(key: str, rule: str, value: object) -> None:
    raise CheckpointError(f"config: {key} must {rule}, got {value!r}")


def _decode_floats(value: Any) -> Any:
    """Replaces {"__float__": "Infinity"} (how Hugging Face writes it) by the number."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(str(value["__float__"]).replace("Infinity", "inf"))
        return {key: _decode_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode_floats(item) for item in value]
    return value


def _read_layers(values: Mapping[str, Any]) -> tuple[str, ...]:
    names = values.get("layers_block_type") or values.get("layer_types")
    pattern = values.get("hybrid_override_pattern")
    if names is not None:
        unknown = [name for name in names if name not in _KIND_NAMES]
        if unknown:
            _refuse("layers_block_type", f"hold only {sorted(_KIND_NAMES)}", unknown[0])
        layers = tuple(_KIND_NAMES[name] for name in names)
        if pattern is not None and tuple(pattern) != layers:
            _refuse("hybrid_override_pattern", f"agree with layers_block_type {layers}", pattern)
    elif pattern is not None:
        unknown = [kind for kind in pattern if kind not in "M*-E"]
        if unknown:
            _refuse("hybrid_override_pattern", "hold only 'M', '*', '-' and 'E'", pattern)
        layers = tuple(pattern)
    else:
        raise CheckpointError(
            "config: hybrid_override_pattern or layers_block_type must be given, got neither"
        )
    if not layers:
        _refuse("hybrid_override_pattern", "name at least one layer", pattern)
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
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            _refuse(key, "be a positive integer", value)
        sizes[key] = value
    return sizes


def _real(values: Mapping[str, Any], key: str, default: float) -> float:
    value = values.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        _refuse(key, "be a finite number", value)
    return float(value)


def _check_sizes(config: ModelConfig) -> None:
    steps = {"hidden_size": CHANNEL_STEP}
    if MAMBA in config.layers:
        steps["mamba_head_dim"] = CHANNEL_STEP
        steps["mamba_num_heads"] = config.n_groups
    if ATTENTION in config.layers:
        steps["head_dim"] = CHANNEL_STEP
        steps["num_attention_heads"] = config.num_key_value_heads
    if MLP in config.layers:
        steps["intermediate_size"] = CHANNEL_STEP
    if MOE in config.layers:
        steps["moe_intermediate_size"] = CHANNEL_STEP
        steps["moe_shared_expert_intermediate_size"] = CHANNEL_STEP
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


# Widths -----------------------------------------------------------------------------------------


def full_width(config: ModelConfig, name: str = "full") -> Width:
    """The width that keeps everything the checkpoint has."""
    per_layer = {
        key: tuple(getattr(config, key) if layer == kind else 0 for layer in config.layers)
        for key, kind in LAYER_KEYS.items()
    }
    return Width(name=name, hidden_size=config.hidden_size, **per_layer)


def parse_widths(
    config: ModelConfig, table: Mapping[str, Any] | None = None
) -> dict[str, Width]:
    """Reads and checks a width table.

    Args:
        config: the checkpoint that the widths are prefixes of.
        table: {"version": 1, "default_width": ..., "widths": {name: {key: size}}} or only its
            inner {name: {key: size}}; sizes are an int or a list with one int per layer of the
            whole model or per layer of the key's kind. None: the `elastic` key of config.json;
            without one there is one width, "full".

    Returns:
        name -> Width by active parameters, smallest first.

    Raises:
        WidthError: naming the width, the key, the rule and the value.
    """
    if table is None:
        table = config.elastic
    if table is None:
        return {"full": full_width(config)}
    entries = _table_entries(table)
    widths = [_parse_width(config, name, sizes) for name, sizes in entries.items()]
    widths.sort(key=lambda w: (count_parameters(config, w).active, w.hidden_size, w.name))
    return {width.name: width for width in widths}


def default_width_name(widths: Mapping[str, Width], table: Mapping[str, Any] | None) -> str:
    """The table's `default_width`, else the width with the most active parameters.

    `widths` is what `parse_widths` returned for `table`.
    """
    if table is not None and "widths" in table and table.get("default_width") is not None:
        return str(table["default_width"])
    return list(widths)[-1]


def widest(widths: Mapping[str, Width] | Sequence[Width], name: str = "widest") -> Width:
    """The axis-wise maximum of some widths, which need not be one of them.

    Returns the width itself, under its own name, when one of them contains all the others.
    """
    items = list(widths.values() if isinstance(widths, Mapping) else widths)
    if not items:
        raise WidthError("widest: widths must hold at least one width, got none")
    per_layer = {
        key: tuple(max(sizes) for sizes in zip(*(getattr(w, key) for w in items)))
        for key in LAYER_KEYS
    }
    union = Width(name=name, hidden_size=max(w.hidden_size for w in items), **per_layer)
    for width in items:
        if width.same_sizes(union):
            return width
    return union


def width_to_dict(config: ModelConfig, width: Width) -> dict[str, int | list[int]]:
    """The table entry of a width: an int where all layers agree, absent where full.

    Lists have one int per layer of the key's kind.
    """
    entry: dict[str, int | list[int]] = {}
    if width.hidden_size != config.hidden_size:
        entry["hidden_size"] = width.hidden_size
    for key, kind in LAYER_KEYS.items():
        sizes = [getattr(width, key)[i] for i in config.layers_of(kind)]
        if all(size == getattr(config, key) for size in sizes):
            continue
        entry[key] = sizes[0] if len(set(sizes)) == 1 else sizes
    return entry


def slice_config(config: ModelConfig, width: Width) -> dict[str, Any]:
    """config.json of the exported slice.

    An ordinary `nemotron_h` config where every layer of a kind has the same sizes. Otherwise
    an elastic one: its sizes are the largest of any layer, and a table with this one width
    says what each layer has.
    """
    data = dict(config.raw)
    for alias in _ALIASES:
        if _ALIASES[alias] in LAYER_KEYS:
            data.pop(alias, None)
    data.pop("elastic", None)
    data["hidden_size"] = width.hidden_size
    uniform = True
    for key, kind in LAYER_KEYS.items():
        sizes = {getattr(width, key)[i] for i in config.layers_of(kind)}
        if sizes:
            data[key] = max(sizes)
            uniform = uniform and len(sizes) == 1
    if not uniform:
        base = ModelConfig.from_dict(data)
        data["elastic"] = {
            "version": 1,
            "default_width": width.name,
            "widths": {width.name: width_to_dict(base, width)},
        }
    return data


def _table_entries(table: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(table, Mapping):
        raise WidthError(f"widths: table must be an object, got {type(table).__name__}")
    entries = table
    if "widths" in table or "version" in table:
        version = table.get("version", 1)
        if version != 1:
            raise WidthError(f"widths: version must be 1, got {version!r}")
        unknown = set(table) - {"version", "default_width", "widths"}
        if unknown:
            raise WidthError(
                "widths: table must hold only version, default_width and widths, "
                f"got {sorted(unknown)[0]!r}"
            )
        entries = table.get("widths")
        if not isinstance(entries, Mapping):
            raise WidthError(
                f"widths: widths must be an object of named widths, got {entries!r}"
            )
    if not entries:
        raise WidthError("widths: table must hold at least one width, got none")
    default = table.get("default_width") if entries is not table else None
    if default is not None and default not in entries:
        raise WidthError(
            f"widths: default_width must be one of {sorted(entries)}, got {default!r}"
        )
    return entries


def _parse_width(config: ModelConfig, name: str, sizes: Any) -> Width:
    if not isinstance(name, str) or not name:
        raise WidthError(f"widths: name must be a non-empty string, got {name!r}")
    if not isinstance(sizes, Mapping):
        raise WidthError(f"width {name!r}: sizes must be an object, got {sizes!r}")
    for key in sizes:
        if key in _SKIP_KEYS:
            raise WidthError(f"width {name!r}: {key} must be absent: {_SKIP_REASON}")
        if key != "hidden_size" and key not in LAYER_KEYS:
            known = ["hidden_size", *LAYER_KEYS]
            raise WidthError(f"width {name!r}: {key} must be one of {known}, got {key!r}")
    hidden = sizes.get("hidden_size", config.hidden_size)
    _check_width_size(config, name, "hidden_size", hidden)
    per_layer = {
        key: _layer_sizes(config, name, key, sizes.get(key, getattr(config, key)))
        for key in LAYER_KEYS
    }
    return Width(name=name, hidden_size=hidden, **per_layer)


def _layer_sizes(config: ModelConfig, name: str, key: str, value: Any) -> tuple[int, ...]:
    own = config.layers_of(LAYER_KEYS[key])
    if isinstance(value, (list, tuple)):
        if len(value) == config.num_layers:
            values = {i: value[i] for i in own}
        elif len(value) == len(own):
            values = dict(zip(own, value))
        else:
            raise WidthError(
                f"width {name!r}: {key} must hold {config.num_layers} values (one per layer) or "
                f"{len(own)} (one per layer that has it), got {len(value)}"
            )
    else:
        values = {i: value for i in own}
    for size in values.values():
        _check_width_size(config, name, key, size)
    return tuple(values.get(i, 0) for i in range(config.num_layers))


def _check_width_size(config: ModelConfig, name: str, key: str, value: Any) -> None:
    def refuse(rule: str) -> None:
        raise WidthError(f"width {name!r}: {key} must {rule}, got {value!r}")

    if not isinstance(value, int) or isinstance(value, bool):
        refuse("be an integer" if key == "hidden_size" else "be an integer or a list of them")
    if value == 0:
        refuse(f"be positive ({_SKIP_REASON})")
    if value < 0:
        refuse("be positive")
    full = getattr(config, key)
    if value > full:
        refuse(f"be at most {full}, what the checkpoint has")
    if key == "mamba_num_heads":
        step, why = config.n_groups, "n_groups"
    elif key == "num_attention_heads":
        step, why = config.num_key_value_heads, "num_key_value_heads"
    elif key == "n_routed_experts":
        if value < config.num_experts_per_tok:
            refuse(f"be at least num_experts_per_tok ({config.num_experts_per_tok})")
        return
    else:
        step, why = CHANNEL_STEP, "the channel step"
    if value % step:
        refuse(f"be a multiple of {step} ({why})")


# Costs ------------------------------------------------------------------------------------------


def count_parameters(config: ModelConfig, width: Width) -> Counts:
    """Parameters of a width: all of them, and those that one token uses."""
    hidden = width.hidden_size
    total = active = hidden  # final norm
    for i, layer in enumerate(config.layers):
        shared = hidden  # the layer's own norm
        experts = used = 0
        if layer == MAMBA:
            heads = width.mamba_num_heads[i]
            inner = heads * config.mamba_head_dim
            conv = config.conv_dim(heads)
            shared += hidden * (inner + conv + heads) + conv * (config.conv_kernel + 1)
            shared += 3 * heads + inner + inner * hidden
        elif layer == ATTENTION:
            rows = width.num_attention_heads[i] + config.num_key_value_heads
            shared += 2 * rows * config.head_dim * hidden
        elif layer == MLP:
            shared += 2 * width.intermediate_size[i] * hidden
        else:
            count = width.n_routed_experts[i]
            expert = 2 * width.moe_intermediate_size[i] * hidden
            shared += count * hidden + count
            shared += 2 * width.moe_shared_expert_intermediate_size[i] * hidden
            experts, used = count * expert, config.num_experts_per_tok * expert
        total += shared + experts
        active += shared + used
    embedding = config.vocab_size * hidden
    lookup = 0 if config.tie_word_embeddings else embedding
    return Counts(total + embedding + lookup, active + embedding + lookup, active + embedding)


def kv_bytes_per_token(config: ModelConfig, itemsize: int = 2) -> int:
    """Bytes of K and V of one token over all attention layers; the same at every width."""
    layers = len(config.layers_of(ATTENTION))
    return layers * 2 * config.num_key_value_heads * config.head_dim * itemsize


def state_bytes(config: ModelConfig, conv_itemsize: int = 2) -> int:
    """Bytes of one sequence's Mamba state: SSM float32 [H, P, N] and conv [C, 3] per layer."""
    ssm = config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size * 4
    conv = config.conv_dim() * (config.conv_kernel - 1) * conv_itemsize
    return len(config.layers_of(MAMBA)) * (ssm + conv)
