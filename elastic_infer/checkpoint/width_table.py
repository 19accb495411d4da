"""Width tables: from JSON to widths and back, and the config of a slice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import WidthError, shown
from ..value_checks import is_int
from .config import CHANNEL_GRAIN, LAYER_KEYS
from .counts import count_parameters
from .widths import MOST_WIDTHS, Width, full_width

if TYPE_CHECKING:
    from .config import ModelConfig

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


def parse_widths(config: ModelConfig, table: Mapping[str, Any] | None = None) -> dict[str, Width]:
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


def width_to_dict(config: ModelConfig, width: Width) -> dict[str, int | list[int]]:
    """The table entry of a width: an int where all layers agree, absent where full.

    Args:
        config: the checkpoint whose sizes count as full.
        width: a width of it.

    Returns:
        {Hugging Face name: size}; lists have one int per layer of the key's kind.
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

    Args:
        config: the checkpoint that is sliced; its `raw` supplies every other key.
        width: a width of it.

    Returns:
        A new dictionary; `config.raw` is left alone.
    """
    data = dict(config.raw)
    data.pop("num_local_experts", None)  # the older name of n_routed_experts, set below
    data.pop("elastic", None)
    data["hidden_size"] = width.hidden_size
    uniform = True
    for key, kind in LAYER_KEYS.items():
        sizes = {getattr(width, key)[i] for i in config.layers_of(kind)}
        if sizes:
            data[key] = max(sizes)
            uniform = uniform and len(sizes) == 1
    if not uniform:
        base = type(config).from_dict(data)
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
            raise WidthError(f"widths: version must be 1, got {shown(version)}")
        unknown = set(table) - {"version", "default_width", "widths"}
        if unknown:
            raise WidthError(
                "widths: table must hold only version, default_width and widths, "
                f"got {shown(sorted(unknown, key=str)[0])}"
            )
        entries = table.get("widths")
        if not isinstance(entries, Mapping):
            raise WidthError(
                f"widths: widths must be an object of named widths, got {shown(entries)}"
            )
    if not 1 <= len(entries) <= MOST_WIDTHS:
        raise WidthError(
            f"widths: table must hold at least one width and at most {MOST_WIDTHS}, got "
            f"{len(entries) or 'none'}"
        )
    default = table.get("default_width") if entries is not table else None
    if default is not None and (not isinstance(default, str) or default not in entries):
        raise WidthError(
            f"widths: default_width must be one of {shown(list(entries))}, got {shown(default)}"
        )
    return entries


def _parse_width(config: ModelConfig, name: str, sizes: Any) -> Width:
    if not isinstance(name, str) or not name:
        raise WidthError(f"widths: name must be a non-empty string, got {shown(name)}")
    if not isinstance(sizes, Mapping):
        raise WidthError(f"width {shown(name)}: sizes must be an object, got {shown(sizes)}")
    for key in sizes:
        if key in _SKIP_KEYS:
            raise WidthError(f"width {shown(name)}: {key} must be absent: {_SKIP_REASON}")
        if key != "hidden_size" and key not in LAYER_KEYS:
            known = ["hidden_size", *LAYER_KEYS]
            raise WidthError(f"width {shown(name)}: {key} must be one of {known}, got {shown(key)}")
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
        for size in value:
            if not is_int(size) or size < 0:
                raise WidthError(
                    f"width {shown(name)}: {key} must hold integers, 0 only where the layer is of "
                    f"another kind, got {shown(size)}"
                )
        if len(value) == config.num_layers:
            values = {i: value[i] for i in own}
        elif len(value) == len(own):
            values = dict(zip(own, value))
        else:
            raise WidthError(
                f"width {shown(name)}: {key} must hold {config.num_layers} values (one per layer) "
                f"or {len(own)} (one per layer that has it), got {len(value)}"
            )
    else:
        # A key that sizes no layer is harmless, but a wrong value there is surely a mistake.
        if not own and value != getattr(config, key):
            _check_width_size(config, name, key, value)
        values = dict.fromkeys(own, value)
    for size in values.values():
        _check_width_size(config, name, key, size)
    return tuple(values.get(i, 0) for i in range(config.num_layers))


def _check_width_size(config: ModelConfig, name: str, key: str, value: Any) -> None:
    def refuse(rule: str) -> None:
        raise WidthError(f"width {shown(name)}: {key} must {rule}, got {shown(value)}")

    if not is_int(value):
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
        step, why = CHANNEL_GRAIN, "the channel step"
    if value % step:
        refuse(f"be a multiple of {step} ({why})")
