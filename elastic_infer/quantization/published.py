"""Which weights a published checkpoint says are quantised, and how.

Read: NVIDIA ModelOpt's `quantization_config` of config.json, or its older hf_quant_config.json, and
compressed-tensors' `quantization_config`. Both name modules: a weight without its `.weight`.
Sources: the ModelOpt and compressed-tensors libraries' exporters, vLLM's readers of both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from elastic_infer.errors import CheckpointError
from elastic_infer.quantization.formats import BLOCK
from elastic_infer.tensor_files import read_json

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
    """What a checkpoint says of its own weights.

    method: "modelopt" or "compressed-tensors". source: file, for messages. default: format of
    every matrix that nothing else speaks of, None = left as it is. ignored: patterns of modules
    that are not quantised. named: {module, or a module above it: format or None}. targets:
    (pattern, format) pairs.
    """

    method: str
    source: str
    default: str | None = None
    ignored: tuple[str, ...] = ()
    named: Mapping[str, str | None] = field(default_factory=dict)
    targets: tuple[tuple[str, str], ...] = ()

    def is_ignored(self, module: str) -> bool:
        """Whether a pattern leaves this module as it is.

        "re:" begins a regular expression; else `*` and `?` are wildcards, and ModelOpt's patterns
        also stand for everything below the module that they name.
        """
        for pattern in self.ignored:
            if pattern.startswith("re:"):
                if re.match(pattern[3:], module):
                    return True
            elif self.method == "compressed-tensors":
                if pattern == module:
                    return True
            elif fnmatchcase(module, pattern) or module.startswith(pattern + "."):
                return True
        return False

    def explicit(self, module: str) -> bool:
        """Whether the module itself is listed as quantised."""
        return self.named.get(module) is not None

    def format_of(self, module: str) -> str | None:
        """"nvfp4" or "fp8" that this module's weight is said to have, None = not quantised."""
        if self.is_ignored(module):
            return None
        above = module
        while above:
            if above in self.named:
                return self.named[above]
            above = above.rpartition(".")[0]
        for pattern, found in self.targets:
            if pattern == "Linear" or pattern == module:
                return found
            if pattern.startswith("re:") and re.match(pattern[3:], module):
                return found
        return self.default


def read_published(raw: Mapping[str, Any], folder: Path) -> Published | None:
    """The quantisation that a checkpoint states, None for one that states none.

    Args:
        raw: its config.json. folder: where hf_quant_config.json may lie.

    Raises:
        CheckpointError: a method, algorithm or layout that is not supported; names it and what is.
    """
    data, source = raw.get("quantization_config"), "config.json"
    if data is None:
        if not (folder / SIDECAR).is_file():
            return None
        data, source = read_json(folder / SIDECAR), SIDECAR
    if not isinstance(data, Mapping):
        _refuse(source, "quantization_config", "be an object", type(data).__name__)
    method = data.get("quant_method")
    if method is None and ("quantization" in data or "quant_algo" in data):
        method = "modelopt"
    if isinstance(method, str) and method.startswith("modelopt"):
        return _modelopt(data, source)
    if method == "compressed-tensors":
        return _compressed_tensors(data, source)
    _refuse(source, "quant_method", f"be supported ({SUPPORTED})", method)


def _refuse(source: str, key: str, rule: str, got: Any):
    raise CheckpointError(f"checkpoint: {key} of {source} must {rule}, got {got!r}")


def _patterns(data: Mapping[str, Any], key: str, source: str) -> tuple[str, ...]:
    value = data.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        _refuse(source, key, "be a list of patterns", value)
    for item in value:
        if item.startswith("re:"):
            try:
                re.compile(item[3:])
            except re.error as error:
                _refuse(source, key, f"hold regular expressions ({error})", item)
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


def _modelopt(data: Mapping[str, Any], source: str) -> Published:
    inner = data.get("quantization", data)
    if not isinstance(inner, Mapping):
        _refuse(source, "quantization", "be an object", inner)
    key = "exclude_modules" if "exclude_modules" in inner else "ignore"
    ignored = _patterns(inner, key, source)
    if str(inner.get("quant_algo")).upper() != _MIXED:
        return Published("modelopt", source, _algorithm(inner, source), ignored)
    layers = inner.get("quantized_layers")
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
    return Published("modelopt", source, None, ignored, named)


def _compressed_tensors(data: Mapping[str, Any], source: str) -> Published:
    for key in ("sparsity_config", "transform_config"):
        if data.get(key):
            _refuse(source, key, "be empty (no other value is implemented)", data[key])
    if data.get("quantization_status", "compressed") not in ("compressed", "frozen"):
        _refuse(source, "quantization_status", "be 'compressed'", data["quantization_status"])
    groups = data.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        _refuse(source, "config_groups", "hold at least one group", groups)
    targets = []
    for name, group in groups.items():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            _refuse(source, f"config_groups[{name!r}]", "say how its weights are stored", group)
        layout = group.get("format") or data.get("format")
        found = _layout(group["weights"], layout, source, f"config_groups[{name!r}]")
        where = _patterns(group, "targets", source)
        # Names come before the class that all matrices belong to.
        targets += [(pattern, found) for pattern in sorted(where, key=lambda p: p == "Linear")]
    targets.sort(key=lambda pair: pair[0] == "Linear")
    ignored = _patterns(data, "ignore", source)
    return Published("compressed-tensors", source, None, ignored, {}, tuple(targets))


def _layout(weights: Mapping[str, Any], layout: Any, source: str, key: str) -> str:
    """"nvfp4" or "fp8" of the weights of one compressed-tensors group."""
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    strategy, size = weights.get("strategy"), weights.get("group_size")
    block = (kind, bits, size) == ("float", 4, BLOCK) and strategy in (None, "tensor_group")
    whole = (kind, bits) == ("float", 8) and strategy in (None, "tensor")
    if block and layout in ("nvfp4-pack-quantized", None):
        return "nvfp4"
    if whole and layout in ("float-quantized", "naive-quantized", None):
        return "fp8"
    told = {"format": layout, "type": kind, "num_bits": bits, "strategy": strategy,
            "group_size": size}  # fmt: skip
    _refuse(source, key, f"be supported ({SUPPORTED})", told)


def modelopt_config(
    formats: Mapping[str, str], unquantized: list[str], version: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ModelOpt's exporter writes for these weights.

    One format gives `quant_algo` NVFP4 (weights alone: W4A16_NVFP4) or FP8 and a list of the
    modules that are left; several give MIXED_PRECISION and a list of the modules that are not.

    Args:
        formats: {module: "nvfp4" or "fp8"}.
        unquantized: modules of the other matrices.
        version: of this library.

    Returns:
        (`quantization_config` of config.json, hf_quant_config.json)
    """
    names = {"nvfp4": "W4A16_NVFP4", "fp8": "FP8"}
    producer = {"name": "elastic_infer", "version": version}
    kinds = sorted(set(formats.values()))
    inner: dict[str, Any] = {"kv_cache_quant_algo": None}
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
    flat |= {key: value for key, value in inner.items() if key != "kv_cache_quant_algo"}
    return flat, {"producer": producer, "quantization": {**inner, "exclude_modules": unquantized}}
