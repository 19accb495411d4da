"""Quantized checkpoints for tests, written and read back without the library: numpy and struct."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from support import tiny

# Every value of a format by its code, from the definition of its fields.
E4M3 = np.array(
    [m * 2.0**-9 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][
        :127
    ]
)
E2M1 = np.array(
    [m / 2 if e == 0 else (1 + m / 2) * 2.0 ** (e - 1) for e in range(4) for m in (0, 1)]
)
EVERY_MATRIX = (
    "in_proj",
    "out_proj",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "up_proj",
    "down_proj",
    "lm_head",
)


def e4m3(bits: np.ndarray) -> np.ndarray:
    """float64 values of E4M3 bit patterns, from the definition of the format."""
    bits = bits.astype(np.int64)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    value = np.where((bits & 127) == 127, np.nan, value)
    return np.where(bits & 128, -value, value)


def dequantize(codes: np.ndarray, blocks: np.ndarray | None, scale: float) -> np.ndarray:
    """float64 values of a stored matrix: NVFP4 with block scales, FP8 without."""
    if blocks is None:
        return e4m3(codes) * scale
    nibbles = np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1)
    values = np.where(nibbles & 8, -1.0, 1.0) * E2M1[nibbles & 7]
    return values * np.repeat(e4m3(blocks), 16, 1) * scale


def nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Codes of the nearest values of an ascending table to magnitudes, ties to the even code; the
    largest beyond it."""
    x = values.astype(np.float64)
    below = np.clip(np.searchsorted(table, x, side="right") - 1, 0, len(table) - 1)
    above = np.minimum(below + 1, len(table) - 1)
    down, up = x - table[below], table[above] - x
    return np.where((up < down) | ((up == down) & (below % 2 == 1)), above, below).astype(np.uint8)


def numpy_nvfp4(weight: np.ndarray, scale: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Codes [N, K/2] and block scales [N, K/16] of float32 weights."""
    blocks = weight.reshape(weight.shape[0], -1, 16)
    amax = np.abs(blocks).max(-1)
    block_scales = nearest(amax / (np.float32(6) * scale), E4M3)
    step = (E4M3[block_scales].astype(np.float32) * scale)[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = nearest(np.abs(blocks / step), E2M1) | (np.signbit(blocks) * 8).astype(np.uint8)
    codes = np.where(step == 0, 0, codes).reshape(weight.shape).astype(np.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4, block_scales


def identity(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and block scales of the identity matrix in NVFP4, which holds it exactly."""
    codes = torch.zeros(size, size // 2, dtype=torch.uint8)
    for k in range(size):
        codes[k, k // 2] = 2 << k % 2 * 4  # the code of 1
    return codes, torch.full((size, size // 16), 0x38, dtype=torch.uint8)  # 1 as E4M3


def matrix_format(name: str, formats: dict[str, str]) -> str | None:
    """The format of the first key of `formats` that occurs in a tensor name."""
    if not name.endswith(".weight") or not any(f"{m}.weight" in name for m in EVERY_MATRIX):
        return None
    return next((found for key, found in formats.items() if key in name), None)


def random_parts(
    shape: tuple[int, int], kind: str, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None, float]:
    """Random codes and scales of a matrix whose values have a deviation of about 1/sqrt(K)."""
    rows, columns = shape
    if kind == "fp8":
        values = torch.from_numpy(generator.normal(size=shape) * 30).to(torch.float8_e4m3fn)
        scale = np.float32(1 / 30 / np.sqrt(columns))
        return values.view(torch.uint8).numpy(), None, float(scale)
    codes = generator.integers(0, 256, (rows, columns // 2), np.uint8)
    blocks = generator.integers(0x38, 0x58, (rows, columns // 16), np.uint8)  # 1 to 16
    blocks[generator.random(blocks.shape) < 0.05] = 0  # blocks of nothing
    return codes, blocks, float(np.float32(1 / 22 / np.sqrt(columns)))


def write_quantized(
    folder: Path,
    config: dict[str, Any],
    widths: dict[str, Any] | None,
    formats: dict[str, str],
    *,
    layout: str = "modelopt",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Writes a tiny checkpoint whose matrices are quantized as `formats` says.

    Args:
        folder: to write. config, widths: of `tiny`. formats: {part of a tensor name: "nvfp4" or
            "fp8"}, the first that matches counts. layout: "modelopt" or "compressed-tensors".
        dtype: of the other tensors. seed: of everything that is drawn.

    Returns:
        {plain name: float64 tensor} of all weights, dequantized.
    """
    generator = np.random.default_rng(seed)
    compressed = layout == "compressed-tensors"
    state, stored, true, named = tiny.tiny_state_dict(config, dtype, seed), {}, {}, {}
    for name, tensor in state.items():
        kind = matrix_format(name, formats)
        if kind is None:
            stored[name], true[name] = tensor, tensor.double()
            continue
        module = name.removesuffix(".weight")
        codes, blocks, scale = random_parts(tuple(tensor.shape), kind, generator)
        named[module] = kind
        if kind == "nvfp4":
            own = "weight_packed" if compressed else "weight"
            factor = "weight_global_scale" if compressed else "weight_scale_2"
            if compressed:  # the reciprocal is what is stored; a power of two has an exact one
                scale = float(2.0 ** np.round(np.log2(scale)))
            stored[f"{module}.{own}"] = torch.from_numpy(codes)
            stored[f"{module}.weight_scale"] = torch.from_numpy(blocks).view(torch.float8_e4m3fn)
            stored[f"{module}.{factor}"] = torch.tensor([1 / scale] if compressed else scale)
        else:
            stored[name] = torch.from_numpy(codes).view(torch.float8_e4m3fn)
            stored[f"{module}.weight_scale"] = torch.tensor([scale] if compressed else scale)
        if not compressed:
            stored[f"{module}.input_scale"] = torch.tensor(0.25)
        true[name] = torch.from_numpy(dequantize(codes, blocks, scale))
    raw = tiny._json_config(config, widths, dtype, False)
    raw["quantization_config"] = _config(named, compressed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw, indent=1))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return true


def _config(named: dict[str, str], compressed: bool) -> dict[str, Any]:
    """The quantization_config that goes with {module: format}."""
    if not compressed:
        algorithms = {
            "nvfp4": {"quant_algo": "NVFP4", "group_size": 16},
            "fp8": {"quant_algo": "FP8"},
        }
        return {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "ignore": ["mtp*"],
            "quantized_layers": {module: algorithms[kind] for module, kind in named.items()},
        }
    weights = {
        "nvfp4": ("nvfp4-pack-quantized", 4, "tensor_group", 16),
        "fp8": ("float-quantized", 8, "tensor", None),
    }
    groups = {}
    for kind, (layout, bits, strategy, size) in weights.items():
        groups[kind] = {
            "format": layout,
            "targets": [module for module, found in named.items() if found == kind],
            "weights": {
                "num_bits": bits,
                "type": "float",
                "strategy": strategy,
                "group_size": size,
                "symmetric": True,
                "dynamic": False,
            },
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
    }


def plain_folder(
    folder: Path,
    config: dict[str, Any],
    widths: dict[str, Any] | None,
    true: dict[str, torch.Tensor],
) -> Path:
    """The same model with its dequantized weights in float32, for transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(tiny._json_config(config, widths, torch.float32, False))
    (folder / "config.json").write_text(text)
    tiny.write_state_dict(folder, {name: tensor.float() for name, tensor in true.items()})
    return folder
