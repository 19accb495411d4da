"""Quantized weights in safetensors files: which tensors they are, and any rows and columns of them.

ModelOpt, NVFP4: X.weight uint8 [N, K/2], X.weight_scale E4M3 [N, K/16], X.weight_scale_2 = amax /
(6 * 448). compressed-tensors, NVFP4: X.weight_packed, X.weight_scale, and X.weight_global_scale,
which divides. Both, FP8: X.weight E4M3 [N, K] and one X.weight_scale. Scales of activations beside
them (X.input_scale, ...) are kept by a slice and otherwise not used: activations are not quantized
here. Factors of 8-bit keys and values lie beside attention that is quantized or not (`kv_factors`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codes import BLOCK, Packed
from ..errors import CheckpointError
from .config import ATTENTION, MOE, ModelConfig
from .published import SUPPORTED, Published
from .tensor_files import Axis, Selection, TensorFiles, axis_ranges

__all__ = [
    "PLAIN_NAMES",
    "StoredWeight",
    "check_fused",
    "find_stored",
    "kv_factors",
    "read_packed",
    "stated_formats",
    "stored_selections",
    "stored_weights",
]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_EXTRAS = ("input_scale", "input_global_scale", "k_scale", "v_scale", "weight_shape")
PLAIN_NAMES = (".embeddings.weight", ".gate.weight")  # never quantized
_TEXT = {torch.uint8: "uint8", torch.float8_e4m3fn: "float8_e4m3fn"}


@dataclass(frozen=True)
class StoredWeight:
    """Places of the parts of one quantized matrix.

    Attributes:
        name: the plain checkpoint name, X.weight.
        format: "nvfp4" or "fp8".
        shape: (N, K).
        codes: tensor of the codes, by name.
        block_scales: tensor of the block scales, by name.
        scale: tensor of the whole matrix's scale, by name.
        divides: the scale divides instead of multiplying.
        extras: scalars beside them that are no part of the weight.
    """

    name: str
    format: str
    shape: tuple[int, int]
    codes: str
    block_scales: str | None
    scale: str
    divides: bool
    extras: tuple[str, ...]

    @property
    def parts(self) -> list[str]:
        """Names of all tensors that belong to the weight."""
        found = [self.codes, self.block_scales, self.scale, *self.extras]
        return [name for name in found if name is not None]


def find_stored(
    files: TensorFiles, name: str, shape: tuple[int, ...], published: Published | None
) -> StoredWeight | None:
    """The parts of weight `name` if it is quantized; None for a plain tensor, or for none at all.

    The tensors decide what it is; the checkpoint's config must not contradict them.

    Args:
        files: the checkpoint's.
        name: X.weight.
        shape: (N, K) by config.json.
        published: its own statement.

    Raises:
        CheckpointError: quantized in a way that is not supported, or a part that is missing, of
            the wrong shape or dtype, or of another format than the checkpoint states.
    """
    module = name.removesuffix(".weight")
    packed = f"{module}.weight_packed"
    if name in files and packed in files:
        _refuse(files, name, f"be stored once, got it and {packed}")
    codes = packed if packed in files else name
    if codes not in files or module == name:
        return None
    dtype = files.dtype_of(codes)
    if dtype in _FLOATS:
        _check_plain(files, name, module, published)
        return None
    if len(shape) != 2 or name.endswith(PLAIN_NAMES):
        _refuse(
            files,
            codes,
            "be float32, bfloat16 or float16 (embedding, router, convolution and vectors are not "
            f"read quantized), got {_TEXT.get(dtype, dtype)}",
        )
    if dtype not in _TEXT:
        _refuse(files, codes, f"be a float, E4M3 or packed uint8 tensor, got {dtype}")
    if published is None:
        _refuse(
            files,
            codes,
            "come with a quantization_config in config.json that says what its bytes mean "
            f"({SUPPORTED}), got {_TEXT[dtype]} and no such key",
        )
    if dtype == torch.float8_e4m3fn:
        stored = _fp8(files, name, module, shape)
    else:
        stored = _nvfp4(files, name, module, codes, shape)
    stated = published.format_of(module)
    if stated != stored.format:
        said = "not quantized" if stated is None else stated
        _refuse(files, codes, f"be {said} as {published.source} states, got {stored.format}")
    return stored


def _refuse(files: TensorFiles, name: str, rule: str):
    where = f" in {files.file_of(name).name}" if name in files else f" in {files.folder}"
    raise CheckpointError(f"checkpoint: {name} must {rule}{where}")


def _check_plain(files: TensorFiles, name: str, module: str, published: Published | None) -> None:
    scales = [
        s
        for s in ("weight_scale", "weight_scale_2", "weight_global_scale")
        if f"{module}.{s}" in files
    ]
    if scales:
        _refuse(
            files,
            name,
            f"be quantized where there is {module}.{scales[0]}, got {files.dtype_of(name)}",
        )
    if published is not None and published.explicit(module):
        _refuse(
            files,
            name,
            f"be {published.format_of(module)} as {published.source} states, got "
            f"{files.dtype_of(name)}",
        )


def _extras(files: TensorFiles, module: str) -> tuple[str, ...]:
    return tuple(f"{module}.{e}" for e in _EXTRAS if f"{module}.{e}" in files)


def _scalar(files: TensorFiles, name: str, of: str) -> str:
    """The name of a scale of one element, after it was checked."""
    if name not in files:
        _refuse(files, of, f"come with {name}, got none")
    shape, dtype = files.shape_of(name), files.dtype_of(name)
    if math.prod(shape) != 1:
        _refuse(
            files,
            name,
            "be one number (a scale per channel or per block of FP8 is not supported), got shape "
            f"{list(shape)}",
        )
    if dtype not in _FLOATS:
        _refuse(files, name, f"be float32, bfloat16 or float16, got {dtype}")
    return name


def _shape(files: TensorFiles, name: str, shape: list[int]) -> None:
    got = list(files.shape_of(name))
    if got != shape:
        _refuse(files, name, f"have shape {shape}, got {got}")


def _fp8(files: TensorFiles, name: str, module: str, shape: tuple[int, ...]) -> StoredWeight:
    _shape(files, name, list(shape))
    scale = _scalar(files, f"{module}.weight_scale", name)
    return StoredWeight(
        name, "fp8", (shape[0], shape[1]), name, None, scale, False, _extras(files, module)
    )


def _nvfp4(
    files: TensorFiles, name: str, module: str, codes: str, shape: tuple[int, ...]
) -> StoredWeight:
    rows, columns = shape
    if columns % BLOCK:
        _refuse(files, codes, f"have K a multiple of {BLOCK} for NVFP4, got K = {columns}")
    _shape(files, codes, [rows, columns // 2])
    blocks = f"{module}.weight_scale"
    if blocks not in files:
        _refuse(files, codes, f"come with {blocks}, got none")
    if files.dtype_of(blocks) not in (torch.float8_e4m3fn, torch.uint8):
        _refuse(files, blocks, f"be E4M3 for NVFP4, got {files.dtype_of(blocks)}")
    _shape(files, blocks, [rows, columns // BLOCK])
    divides = codes != name
    scale = _scalar(
        files, f"{module}.{'weight_global_scale' if divides else 'weight_scale_2'}", codes
    )
    return StoredWeight(
        name, "nvfp4", (rows, columns), codes, blocks, scale, divides, _extras(files, module)
    )


def _columns(axis: Axis, size: int, name: str, per: int) -> Axis:
    """A selection of K in units of `per` weights.

    Raises:
        ValueError: one that cuts a block of 16.
    """
    if axis is None:
        return None
    runs = axis_ranges(axis, size, f"cols of {name}")
    for start, stop in runs:
        if start % BLOCK or stop % BLOCK:
            raise ValueError(
                f"tensor: cols of {name} must keep whole blocks of {BLOCK} (NVFP4), got "
                f"{start}..{stop}"
            )
    if len(runs) == 1:
        return slice(runs[0][0] // per, runs[0][1] // per)
    return [i for start, stop in runs for i in range(start // per, stop // per)]


def stored_selections(stored: StoredWeight, kept: Selection) -> dict[str, Selection]:
    """Parts of a quantized matrix's tensors that a selection keeps; scalars are whole.

    Args:
        stored: the matrix.
        kept: rows and columns of its values.

    Raises:
        ValueError: columns that cut a block of 16.
    """
    whole = Selection(None, None)
    if stored.block_scales is None:
        out = {stored.codes: kept}
    else:
        columns = stored.shape[1]
        out = {
            stored.codes: Selection(kept.rows, _columns(kept.cols, columns, stored.name, 2)),
            stored.block_scales: Selection(
                kept.rows, _columns(kept.cols, columns, stored.name, BLOCK)
            ),
        }
    return out | {name: whole for name in (stored.scale, *stored.extras)}


def kv_factors(files: TensorFiles, config: ModelConfig) -> dict[tuple[int, str], list[str]]:
    """{(layer, "k" or "v"): the tensors that hold what the codes of an 8-bit cache are multiplied
    by} of all attention layers: ModelOpt's mixer.k_proj.k_scale, compressed-tensors'
    mixer.k_scale; none where a checkpoint has no factor.

    Raises:
        CheckpointError: one that is not one float.
    """
    out = {}
    for layer in config.layers_of(ATTENTION):
        at = f"backbone.layers.{layer}.mixer."
        for kind in "kv":
            names = [f"{at}{kind}_proj.{kind}_scale", f"{at}{kind}_scale"]
            out[layer, kind] = [_scalar(files, n, n) for n in names if n in files]
    return out


def read_scale(files: TensorFiles, stored: StoredWeight) -> float:
    """The factor of the whole matrix.

    Raises:
        CheckpointError: one that is not finite, negative, or zero where it divides.
    """
    value = float(files.tensor(stored.scale).float().reshape(()))
    if not math.isfinite(value) or value < 0 or (stored.divides and value == 0):
        rule = "above 0" if stored.divides else "not negative"
        _refuse(files, stored.scale, f"be a finite number {rule}, got {value}")
    if not stored.divides:
        return value
    one, divisor = torch.tensor([1.0, value], dtype=torch.float32)
    factor = float(one / divisor)
    if not math.isfinite(factor):
        _refuse(files, stored.scale, f"have a finite reciprocal in float32, got {value}")
    return factor


def read_packed(
    files: TensorFiles, stored: StoredWeight, rows: Axis = None, cols: Axis = None
) -> Packed:
    """Rows and columns of a quantized matrix as they are stored, checked.

    Args:
        files: hold the matrix.
        stored: its parts.
        rows: selection of the values' rows, as of `TensorFiles.tensor`.
        cols: selection of their columns.

    Raises:
        CheckpointError: a scale that is negative or no number, or a code that is no number.
        ValueError: columns that cut a block of 16, or an index outside the matrix.
    """
    kept = stored_selections(stored, Selection(rows, cols))  # type: ignore[arg-type]
    codes = files.tensor(stored.codes, *kept[stored.codes]).view(torch.uint8)
    scale = read_scale(files, stored)
    if stored.block_scales is None:
        _check_bits(files, stored.codes, codes, signed=True)
        return Packed(codes, None, scale)
    blocks = files.tensor(stored.block_scales, *kept[stored.block_scales]).view(torch.uint8)
    _check_bits(files, stored.block_scales, blocks, signed=False)
    return Packed(codes, blocks, scale)


def _check_bits(files: TensorFiles, name: str, bits: Tensor, signed: bool) -> None:
    """Refuses E4M3 patterns that are no number, and negative ones where they cannot be."""
    bad = (bits & 127) == 127 if signed else bits >= 127
    if not bool(bad.any()):
        return
    row, column = (int(i) for i in bad.nonzero()[0])
    value = float(bits[row, column].view(torch.float8_e4m3fn))
    rule = "hold numbers" if signed else "hold numbers that are not negative"
    _refuse(files, name, f"{rule}, got {value} (row {row}, column {column} of what was read)")


def stored_weights(
    files: TensorFiles, expected: Mapping[str, tuple[int, ...]], published: Published | None
) -> dict[str, StoredWeight]:
    """{name: parts} of all quantized weights among `expected` {name: shape}.

    Raises:
        CheckpointError: see `find_stored`.
    """
    out = {}
    for name, shape in expected.items():
        found = find_stored(files, name, shape, published)
        if found is not None:
            out[name] = found
    return out


def stated_formats(
    expected: Mapping[str, tuple[int, ...]], published: Published | None
) -> dict[str, str]:
    """{name: format} that a checkpoint's config alone lets expect of `expected` {name: shape};
    what the files hold decides (`stored_weights`)."""
    out = {}
    if published is None:
        return {}
    for name, shape in expected.items():
        if len(shape) != 2 or name.endswith(PLAIN_NAMES):
            continue
        found = published.format_of(name.removesuffix(".weight"))
        if found is not None:
            out[name] = found
    return out


def check_fused(config: ModelConfig, formats: Mapping[str, str]) -> None:
    """Refuses matrices that are one in memory but differ in their format: q, k and v of a layer,
    and all experts of a layer, up and down.

    Args:
        config: of the checkpoint.
        formats: {name: "nvfp4" or "fp8"} of the quantized matrices.

    Raises:
        CheckpointError: names two that differ.
    """
    for layer, kind in enumerate(config.layers):
        at = f"backbone.layers.{layer}.mixer."
        if kind == ATTENTION:
            names = [f"{at}{part}_proj.weight" for part in "qkv"]
        elif kind == MOE:
            experts = [f"{at}experts.{e}." for e in range(config.n_routed_experts)]
            names = [f"{e}{part}_proj.weight" for e in experts for part in ("up", "down")]
        else:
            continue
        first = formats.get(names[0])
        for name in names:
            if formats.get(name) != first:
                raise CheckpointError(
                    f"checkpoint: {name} must have the format of {names[0]}, with which it is one "
                    f"matrix in memory: {first or 'not quantized'}, got "
                    f"{formats.get(name) or 'not quantized'}"
                )
