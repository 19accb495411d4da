"""Quantized weights and their formats, as a published checkpoint states them.

Read: NVIDIA ModelOpt's `quantization_config` of config.json, or its older hf_quant_config.json, and
compressed-tensors' `quantization_config`. Both name modules: a weight without its `.weight`.
Sources: the ModelOpt and compressed-tensors libraries' exporters, vLLM's readers of both.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..codes import BLOCK
from ..errors import CheckpointError, shown
from ..files.reading import read_json
from .patterns import matches, regex_problem

__all__ = ["SIDECAR", "Published", "modelopt_config", "read_published"]

SIDECAR = "hf_quant_config.json"
SUPPORTED = (
    "ModelOpt FP8, NVFP4, W4A16_NVFP4 and MIXED_PRECISION of these; compressed-tensors "
    "nvfp4-pack-quantized, and float-quantized with one scale per tensor"
)
_ALGORITHMS = {"FP8": "fp8", "NVFP4": "nvfp4", "W4A16_NVFP4": "nvfp4"}
_MIXED = "MIXED_PRECISION"


@dataclass(frozen=True)
class Published:
    """A checkpoint's own statement about its weights.

    Attributes:
        method: "modelopt" or "compressed-tensors".
        source: file, for messages.
        default: format of every matrix that nothing else speaks of, None = left as it is.
        ignored: patterns of modules that are not quantized.
        named: {module, or a module above it: format or None}.
        targets: (pattern, format) pairs.
        kv_cache: what keys and values are said to be kept in ("FP8"), None: nothing is said.
    """

    method: str
    source: str
    default: str | None = None
    ignored: tuple[str, ...] = ()
    named: Mapping[str, str | None] = field(default_factory=dict)
    targets: tuple[tuple[str, str], ...] = ()
    kv_cache: str | None = None

    def is_ignored(self, module: str) -> bool:
        """True if a pattern leaves this module as it is.

        "re:" begins a regular expression; else `*` and `?` are wildcards, and ModelOpt's patterns
        also stand for everything below the module that they name.
        """
        wildcards = self.method == "modelopt"
        return any(matches(pattern, module, wildcards) for pattern in self.ignored)

    def explicit(self, module: str) -> bool:
        """True if the module itself is listed as quantized."""
        return self.named.get(module) is not None

    def format_of(self, module: str) -> str | None:
        """Stated format of this module's weight, "nvfp4" or "fp8"; None if it is not quantized."""
        if self.is_ignored(module):
            return None
        above = module
        while above:
            if above in self.named:
                return self.named[above]
            above = above.rpartition(".")[0]
        for pattern, found in self.targets:
            if pattern == "Linear" or matches(pattern, module, self.method == "modelopt"):
                return found
        return self.default


def read_published(raw: Mapping[str, Any], folder: Path) -> Published | None:
    """The quantization that a checkpoint states, None for one that states none.

    Args:
        raw: its config.json.
        folder: where hf_quant_config.json may lie.

    Raises:
        CheckpointError: a method, algorithm or layout that is not supported; names it and what is.
    """
    data, source = raw.get("quantization_config"), "config.json"
    if data is None:
        if not os.path.lexists(folder / SIDECAR):
            return None
        data, source = read_json(folder / SIDECAR), SIDECAR
    if not isinstance(data, Mapping):
        _refuse(source, "quantization_config", "be an object", type(data).__name__)
    method = data.get("quant_method")
    if method is None and ("quantization" in data or "quant_algo" in data):
        method = "modelopt"
    if isinstance(method, str) and method.startswith("modelopt"):
        return _modelopt(data, source, folder)
    if method == "compressed-tensors":
        return _compressed_tensors(data, source)
    _refuse(source, "quant_method", f"be supported ({SUPPORTED})", method)


def _refuse(source: str, key: str, rule: str, got: Any):
    raise CheckpointError(f"checkpoint: {key} of {source} must {rule}, got {shown(got)}")


def _patterns(data: Mapping[str, Any], key: str, source: str) -> tuple[str, ...]:
    value = data.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        _refuse(source, key, "be a list of patterns", value)
    for item in value:
        problem = regex_problem(item[3:]) if item.startswith("re:") else None
        if problem is not None:
            _refuse(source, key, f"hold regular expressions that can be used ({problem})", item)
    return tuple(value)


def _algorithm(data: Mapping[str, Any], source: str, key: str = "quant_algo") -> str:
    name = data.get("quant_algo")
    found = _ALGORITHMS.get(str(name).upper())
    if found is None:
        _refuse(source, key, f"be supported ({SUPPORTED})", name)
    size = data.get("group_size")
    if found == "nvfp4" and size not in (None, BLOCK):
        _refuse(source, "group_size", f"be {BLOCK} for NVFP4", size)
    return found


def _modelopt(data: Mapping[str, Any], source: str, folder: Path | None) -> Published:
    inner = data.get("quantization", data)
    if not isinstance(inner, Mapping):
        _refuse(source, "quantization", "be an object", inner)
    key = "exclude_modules" if "exclude_modules" in inner else "ignore"
    ignored = _patterns(inner, key, source)
    cache = _kv_cache(inner)
    algorithm = inner.get("quant_algo")
    if algorithm is None and cache is not None:  # keys and values alone
        return Published("modelopt", source, None, ignored, kv_cache=cache)
    if str(algorithm).upper() != _MIXED:
        return Published("modelopt", source, _algorithm(inner, source), ignored, kv_cache=cache)
    named, targets = _mixed(inner, source, folder)
    return Published("modelopt", source, None, ignored, named, targets, cache)


def _kv_cache(data: Mapping[str, Any]) -> str | None:
    """Formats of keys and values in a quantization_config."""
    name = data.get("kv_cache_quant_algo")
    if isinstance(name, str) and name.upper() != "NONE":
        return name
    scheme = data.get("kv_cache_scheme")
    if isinstance(scheme, Mapping) and (scheme.get("type"), scheme.get("num_bits")) == ("float", 8):
        return "FP8"
    return None if scheme is None else "another format"


def _mixed(
    data: Mapping[str, Any], source: str, folder: Path | None
) -> tuple[dict[str, str | None], tuple[tuple[str, str], ...]]:
    """The layers of a MIXED_PRECISION checkpoint: ModelOpt has listed them in config.json, in the
    file beside it alone, or as groups of targets."""
    layers = data.get("quantized_layers")
    if layers is None and folder is not None and os.path.lexists(folder / SIDECAR):
        beside = read_json(folder / SIDECAR, kind=dict)
        inner = beside.get("quantization", beside)
        layers = inner.get("quantized_layers") if isinstance(inner, Mapping) else None
        if layers is not None:
            source = SIDECAR
    if layers is None and data.get("config_groups"):
        return {}, _groups(data, source)
    if not isinstance(layers, Mapping) or not layers:
        _refuse(source, "quantized_layers", f"name the layers of {_MIXED}", layers)
    named: dict[str, str | None] = {}
    for module, how in layers.items():
        if not isinstance(how, Mapping):
            _refuse(source, f"quantized_layers[{module!r}]", "be an object", how)
        if module.startswith("mtp."):  # skipped with its tensors, whatever its layout
            continue
        if how.get("quant_algo") in (None, "UNQUANTIZED"):
            named[module] = None
        else:
            named[module] = _algorithm(how, source, f"quant_algo of {module}")
    return named, ()


def _groups(data: Mapping[str, Any], source: str) -> tuple[tuple[str, str], ...]:
    """(pattern, format) of all groups' targets, the class that all matrices belong to last."""
    groups = data.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        _refuse(source, "config_groups", "hold at least one group", groups)
    targets = []
    for name, group in groups.items():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            _refuse(source, f"config_groups[{name!r}]", "say how its weights are stored", group)
        where = _patterns(group, "targets", source)
        if where and all(pattern.startswith("mtp.") for pattern in where):
            continue  # skipped with its tensors, whatever its layout
        layout = group.get("format") or data.get("format")
        if layout == "mixed-precision":  # says that the groups differ: each tells its own
            layout = None
        found = _layout(group["weights"], layout, source, f"config_groups[{name!r}]")
        targets += [(pattern, found) for pattern in where]
    return tuple(sorted(targets, key=lambda pair: pair[0] == "Linear"))


def _compressed_tensors(data: Mapping[str, Any], source: str) -> Published:
    for key in ("sparsity_config", "transform_config"):
        if data.get(key):
            _refuse(source, key, "be empty (no other value is implemented)", data[key])
    if data.get("quantization_status", "compressed") not in ("compressed", "frozen"):
        _refuse(source, "quantization_status", "be 'compressed'", data["quantization_status"])
    targets, ignored = _groups(data, source), _patterns(data, "ignore", source)
    return Published(
        "compressed-tensors", source, None, ignored, {}, targets, kv_cache=_kv_cache(data)
    )


def _layout(weights: Mapping[str, Any], layout: Any, source: str, key: str) -> str:
    """Format of the weights of one compressed-tensors group, "nvfp4" or "fp8"."""
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    strategy, size = weights.get("strategy"), weights.get("group_size")
    block = (kind, bits, size) == ("float", 4, BLOCK) and strategy in (None, "tensor_group")
    whole = (kind, bits) == ("float", 8) and strategy in (None, "tensor")
    if block and layout in ("nvfp4-pack-quantized", None):
        return "nvfp4"
    if whole and layout in ("float-quantized", "naive-quantized", None):
        return "fp8"
    told = {
        "format": layout,
        "type": kind,
        "num_bits": bits,
        "strategy": strategy,
        "group_size": size,
    }
    _refuse(source, key, f"be supported ({SUPPORTED})", told)


def modelopt_config(
    formats: Mapping[str, str], unquantized: list[str], version: str, kv_cache: str | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The statement that ModelOpt's exporter writes for these weights.

    One format gives `quant_algo` NVFP4 (weights alone: W4A16_NVFP4) or FP8 and a list of the
    modules that are left; several give MIXED_PRECISION and a list of the modules that are not.

    Args:
        formats: {module: "nvfp4" or "fp8"}.
        unquantized: modules of the other matrices.
        version: of this library.
        kv_cache: what keys and values are said to be kept in.

    Returns:
        (`quantization_config` of config.json, hf_quant_config.json)
    """
    names = {"nvfp4": "W4A16_NVFP4", "fp8": "FP8"}
    producer = {"name": "elastic_infer", "version": version}
    kinds = sorted(set(formats.values()))
    inner: dict[str, Any] = {"kv_cache_quant_algo": kv_cache}
    if len(kinds) == 1:
        inner["quant_algo"] = names[kinds[0]]
        if kinds[0] == "nvfp4":
            inner["group_size"] = BLOCK
    else:
        each = {
            "nvfp4": {"quant_algo": names["nvfp4"], "group_size": BLOCK},
            "fp8": {"quant_algo": names["fp8"]},
        }
        inner["quant_algo"] = _MIXED
        inner["quantized_layers"] = {module: each[kind] for module, kind in formats.items()}
    flat = {"quant_method": "modelopt", "producer": producer, "ignore": list(unquantized)}
    flat |= {
        key: value
        for key, value in inner.items()
        if key != "kv_cache_quant_algo" or value is not None
    }
    return flat, {"producer": producer, "quantization": {**inner, "exclude_modules": unquantized}}
