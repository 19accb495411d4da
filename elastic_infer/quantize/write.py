"""Post-training quantization: an elastic checkpoint with NVFP4 or FP8 matrices, as ModelOpt's.

The result is again one checkpoint of all widths: blocks lie inside every width, so codes and block
scales are cut like weights and the scale of a matrix is that of its every prefix.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import MLP, ModelConfig
from ..checkpoint.layout import EMBEDDING, tensor_selections
from ..checkpoint.published import SIDECAR, modelopt_config
from ..checkpoint.slicing import SHARD_BYTES, copy_side_files, with_kv_factors
from ..checkpoint.stored import PLAIN_NAMES, check_fused
from ..checkpoint.tensor_files import Selection, write_safetensors
from ..checkpoint.width_table import width_to_dict
from ..codes import BLOCK, FORMATS, Packed
from ..errors import CheckpointError, InvalidRequest, shown
from ..files.writing import new_folder, require_new, write_json
from ..torch_modes import plain_torch
from ..value_checks import check_count, is_real
from ..version import __version__
from .report import ErrorReport
from .search import Quantized, block_importance, quantize_fp8, quantize_nvfp4

__all__ = ["DEFAULT_GROUPS", "GROUPS", "Quantizer", "choose_formats", "quantize_checkpoint"]

logger = logging.getLogger(__name__)

GROUPS = ("experts", "shared", "mlp", "head", "mamba", "attention")
DEFAULT_GROUPS = ("experts", "shared", "mlp", "head")
REPORT = "quantization.json"
_HEAD = "lm_head.weight"
_ROUTER = "elastic_router.json"  # what `elastify` learned of sizes goes along
_MIXERS = {
    "in_proj": "mamba",
    "out_proj": "mamba",
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "o_proj": "attention",
}


def group_of(config: ModelConfig, name: str) -> str | None:
    """The group of a matrix by its checkpoint name; None for what is never quantized."""
    if name == _HEAD:
        return "head"
    if not name.endswith(".weight") or name.endswith(PLAIN_NAMES) or ".mixer." not in name:
        return None
    if ".shared_experts." in name:
        return "shared"
    if ".experts." in name:
        return "experts"
    kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if kind in ("up_proj", "down_proj") and config.layers[int(name.split(".")[2])] == MLP:
        return "mlp"
    return _MIXERS.get(kind)


def choose_formats(
    config: ModelConfig, names: Iterable[str], groups: Mapping[str, str], keep: Sequence[str] = ()
) -> dict[str, str]:
    """{name: format} of the matrices to quantize.

    Args:
        config: of the checkpoint.
        names: its tensors.
        groups: {one of GROUPS: "nvfp4" or "fp8"}.
        keep: patterns (with * and ?) of names that stay as they are, with or without ".weight".

    Raises:
        InvalidRequest: an unknown group or format, a pattern that no matrix has, or nothing left.
        CheckpointError: matrices that are one in memory and would differ.
    """
    for group, found in groups.items():
        if group not in GROUPS or not isinstance(found, str) or found not in FORMATS:
            raise InvalidRequest(
                f"quantize: groups must be of {', '.join(GROUPS)} with {' or '.join(FORMATS)}, got "
                f"{shown(group)}: {shown(found)}"
            )
    if not isinstance(keep, (list, tuple)) or not all(isinstance(text, str) for text in keep):
        raise InvalidRequest(f"quantize: keep must be a list of patterns, got {shown(keep)}")
    matrices = {name: group_of(config, name) for name in names}
    out, used = {}, set()
    for name, group in matrices.items():
        if group not in groups:
            continue
        module = name.removesuffix(".weight")
        matched = [p for p in keep if fnmatchcase(module, p) or fnmatchcase(name, p)]
        used.update(matched)
        if not matched:
            out[name] = groups[group]
    unused = [p for p in keep if p not in used]
    if unused:
        raise InvalidRequest(
            f"quantize: keep must match a matrix of {', '.join(groups)}, got {shown(unused[0])}"
        )
    if not out:
        raise InvalidRequest("quantize: at least one matrix must be left to quantize, got none")
    check_fused(config, out)
    return out


class Quantizer:
    """Quantizes the matrices of a checkpoint, one at a time, and keeps account of the errors.

    Args:
        checkpoint: the open one.
        formats: {name: format} of `choose_formats`.
        weights: {width: how much its error counts}, None: all the same.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        formats: Mapping[str, str],
        weights: Mapping[str, float] | None = None,
    ):
        self.checkpoint, self.formats, self.weights = checkpoint, dict(formats), weights
        if weights is not None and (
            not isinstance(weights, Mapping)
            or set(weights) != set(checkpoint.widths)
            or not all(is_real(w) and 0 <= w <= 1e9 for w in weights.values())
            or not any(weights.values())
        ):
            raise InvalidRequest(
                f"quantize: weights must be numbers >= 0, not all 0, of "
                f"{', '.join(checkpoint.widths)}, got {shown(weights)}"
            )
        config, table = checkpoint.config, checkpoint.widths
        self._kept = {name: tensor_selections(config, width) for name, width in table.items()}
        self.report = ErrorReport(config, list(table))

    def selections(self, name: str) -> dict[str, Selection]:
        """{width: what it keeps} of one matrix."""
        source = self.source(name)
        return {w: kept[source] for w, kept in self._kept.items() if source in kept}

    def source(self, name: str) -> str:
        """The tensor that a matrix comes from: a tied head from the embedding."""
        tied = name == _HEAD and self.checkpoint.config.tie_word_embeddings
        return EMBEDDING if tied else name

    def search(self, name: str) -> Quantized:
        """The matrix `name` with the scales of least error.

        Raises:
            CheckpointError: a weight that is not finite.
        """
        weight = self.checkpoint.tensor(self.source(name)).float()
        if not bool(weight.isfinite().all()):
            raise CheckpointError(f"quantize: {name} must be finite, got NaN or infinity in it")
        energy = weight.square().view(weight.shape[0], -1, BLOCK).sum(-1)
        importance = block_importance(energy, self.selections(name), self.weights)
        quantize = quantize_nvfp4 if self.formats[name] == "nvfp4" else quantize_fp8
        return quantize(weight, importance)

    def each(self, threads: int = 1) -> Iterator[tuple[str, Packed]]:
        """(name, codes) of all matrices in checkpoint order, their errors added to `report`.

        Args:
            threads: matrices that are searched at once; each search runs on one thread, since its
                pieces are too small to share.
        """
        names = [n for n in (*self.checkpoint.names, _HEAD) if n in self.formats]
        names = list(dict.fromkeys(names))
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(threads) as pool:
                waiting: deque[Future[Quantized]] = deque()
                for i, name in enumerate(names):
                    while len(waiting) <= threads and i + len(waiting) < len(names):
                        waiting.append(pool.submit(self.search, names[i + len(waiting)]))
                    found = waiting.popleft().result()
                    self.report.add(name, self.formats[name], found, self.selections(name))
                    yield name, found.packed
        finally:
            torch.set_num_threads(before)


def packed_parts(module: str, packed: Packed) -> dict[str, Tensor]:
    """ModelOpt's tensors of a matrix."""
    scale = torch.tensor(packed.scale, dtype=torch.float32)
    if packed.block_scales is None:
        codes = packed.codes.view(torch.float8_e4m3fn)
        return {f"{module}.weight": codes, f"{module}.weight_scale": scale}
    return {
        f"{module}.weight": packed.codes,
        f"{module}.weight_scale": packed.block_scales.view(torch.float8_e4m3fn),
        f"{module}.weight_scale_2": scale,
    }


def _part_specs(module: str, shape: tuple[int, ...], kind: str) -> dict[str, tuple]:
    rows, columns = shape
    if kind == "fp8":
        return {
            f"{module}.weight": (shape, torch.float8_e4m3fn),
            f"{module}.weight_scale": ((), torch.float32),
        }
    return {
        f"{module}.weight": ((rows, columns // 2), torch.uint8),
        f"{module}.weight_scale": ((rows, columns // BLOCK), torch.float8_e4m3fn),
        f"{module}.weight_scale_2": ((), torch.float32),
    }


def check_source(checkpoint: Checkpoint, out: Path) -> None:
    """Refuses a checkpoint that is quantized already, and a folder that holds something."""
    checkpoint.require_plain("quantize")
    require_new(out, "quantize")


@plain_torch()
def quantize_checkpoint(
    checkpoint: Checkpoint,
    out: str | Path,
    formats: Mapping[str, str],
    *,
    weights: Mapping[str, float] | None = None,
    packed: Mapping[str, Packed] | None = None,
    state: Mapping[str, Tensor] | None = None,
    report: ErrorReport | None = None,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> ErrorReport:
    """Writes a checkpoint whose matrices are quantized, and the errors per width beside it.

    The folder appears whole (`writing.new_folder`). Without `packed` no more than `threads` + 2
    matrices are in memory.

    Args:
        checkpoint: what to quantize.
        out: new or empty folder.
        formats: of `choose_formats`.
        weights: {width: how much its error counts}, None: all the same.
        packed: {name: codes} to write in place of searching them.
        state: {name: tensor} in place of the checkpoint's, for what is not quantized.
        report: to write where `packed` is given.
        threads: matrices that are quantized at once.
        progress: called with (bytes written, bytes in all).
        shard_bytes: size at which the next safetensors file is begun.

    Returns:
        The report, also written to out/quantization.json.

    Raises:
        CheckpointError: quantized already, weights that are not finite, or a folder that is in use
            or cannot be written.
        InvalidRequest: `weights` that do not fit.
    """
    out = Path(out)
    check_source(checkpoint, out)
    check_count("quantize: threads", threads, 1, 4096)
    quantizer = Quantizer(checkpoint, formats, weights)
    specs: dict[str, tuple] = {}
    owner: dict[str, str] = {}
    names = list(checkpoint.names)
    if _HEAD in formats and _HEAD not in names:
        names.append(_HEAD)
    for name in names:
        if name in formats:
            shape = checkpoint.shape_of(quantizer.source(name))
            own = _part_specs(name.removesuffix(".weight"), shape, formats[name])
        else:
            own = {name: (checkpoint.shape_of(name), checkpoint.dtype_of(name))}
        specs |= own
        owner |= dict.fromkeys(own, name)
    ready: dict[str, Tensor] = {}
    searched = quantizer.each(threads)

    def tensor(part: str) -> Tensor:
        name = owner[part]
        if name not in formats:
            found = checkpoint.tensor(name) if state is None else state[name]
            return found.to(specs[part][1])
        if part not in ready:
            ready.clear()
            made = next(searched)[1] if packed is None else packed[name]
            ready.update(packed_parts(name.removesuffix(".weight"), made))
        return ready[part]

    with new_folder(out, "quantize") as fresh:
        stored = with_kv_factors(checkpoint, specs, tensor)
        try:
            write_safetensors(fresh, *stored, shard_bytes, progress)
        finally:
            searched.close()
        report = quantizer.report if report is None else report
        write_json(fresh / REPORT, report.to_dict(), "quantize", indent=1)
        _write_configs(checkpoint, fresh, formats, names)
    return report


def _write_configs(
    checkpoint: Checkpoint, out: Path, formats: Mapping[str, str], names: list[str]
) -> None:
    config = checkpoint.config
    left = [
        name.removesuffix(".weight")
        for name in names
        if name not in formats and group_of(config, name) is not None
    ]
    gates = [name.removesuffix(".weight") for name in names if name.endswith(".gate.weight")]
    modules = {name.removesuffix(".weight"): found for name, found in formats.items()}
    stated = checkpoint.published
    inline, sidecar = modelopt_config(
        modules, [*left, *gates], __version__, stated and stated.kv_cache
    )
    raw: dict[str, Any] = {**config.raw, "quantization_config": inline}
    if _HEAD in formats and config.tie_word_embeddings:
        raw["tie_word_embeddings"] = False
        logger.info("quantize: the tied head is written out, quantized, as lm_head.weight")
    if len(checkpoint.widths) > 1:
        table = {name: width_to_dict(config, width) for name, width in checkpoint.widths.items()}
        raw["elastic"] = {"version": 1, "default_width": checkpoint.default_width, "widths": table}
    copy_side_files(checkpoint.folder, out, (_ROUTER,))
    write_json(out / SIDECAR, sidecar, "quantize")
    write_json(out / "config.json", raw, "quantize")
