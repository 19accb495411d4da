"""Cases beyond the ops' own: sizes of real models, and those where another CUDA kernel takes over.

Tests run them on the emulated GPU, `bench/gpu.py` on a real one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def _products():
    """Three widths on both sides, two segments, rows that end inside a tile."""
    base = {
        "K": 208,
        "segments": (144, 72),
        "k": (64, 144, 208),
        "n": ((40, 8), (144, 72), (130, 72)),
        "act": "none",
    }
    for rows in (2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 129):
        yield base | {"R": rows}
    yield base | {"R": 12, "act": "relu2"}
    long = {"K": 2688, "k": (1920, 2688, 1936)}
    for rows in (1, 6):
        yield base | long | {"R": rows}
    for weights, counts in (("nvfp4", (2, 8, 9, 17, 33, 65)), ("fp8", (3, 5, 12, 70))):
        for rows in counts:
            yield base | {"R": rows, "weights": weights}
        for rows in (1, 6):
            yield base | long | {"R": rows, "weights": weights}


def _experts():
    """2 to 90 entries of an expert, and experts with more than one block of them."""
    base = {"D": 144, "F": 80, "k": (80, 144), "f": (48, 80), "shared": True}
    for R, E, J in (
        (4, 12, 3),
        (5, 12, 3),
        (40, 14, 2),
        (20, 9, 3),
        (40, 4, 2),
        (60, 3, 2),
        (90, 2, 2),
    ):
        yield base | {"R": R, "E": E, "J": J}
    for weights, R, E, J in (
        ("nvfp4", 4, 12, 3),
        ("nvfp4", 40, 14, 2),
        ("nvfp4", 40, 4, 2),
        ("nvfp4", 90, 2, 2),
        ("fp8", 4, 12, 3),
        ("fp8", 20, 9, 3),
        ("fp8", 60, 3, 2),
    ):
        yield base | {"R": R, "E": E, "J": J, "weights": weights}


@dataclass(frozen=True)
class Native:
    """Cases of `op` for kernels of one kind of card: of this compute capability (major * 10 +
    minor), or of all with its major number (`family`). dtype: what they are held to float64 in."""

    op: str
    capability: int
    family: bool
    cases: tuple[dict, ...]
    dtype: torch.dtype = torch.bfloat16

    def lacks(self, module, device: str) -> str:
        """Obstacle to a run on `device` with the kernels of `module`; empty if there is none."""
        return module.cuda_lacks(torch.device(device).index or 0, self.capability, self.family)


def _native():
    """Several K tiles, cut ones, more than a ring holds; more than one block each way."""
    base = {
        "K": 208,
        "segments": (144, 72),
        "k": (64, 144, 208),
        "n": ((40, 8), (144, 72), (130, 72)),
        "act": "none",
    }
    long = {"K": 720, "segments": (70,), "k": (432, 720), "n": ((64,), (70,)), "act": "relu2"}
    for rows in (9, 129):
        yield base | {"R": rows}
        yield long | {"R": rows}


def _segments():
    """Prompts that CUDA cuts into segments of 512 tokens, their ends at and around one."""
    base = {"H": 2, "P": 16, "N": 32, "G": 1, "widths": (2, 1), "slow": True}
    yield base | {"lengths": (1537, 520)}
    yield base | {"lengths": (520, 1600), "state": "f16"}
    yield {"lengths": (1100,), "H": 1, "P": 64, "N": 128, "G": 1, "widths": (1,), "slow": True}


SHAPES: dict[str, list[dict]] = {
    "matmul": list(_products()),
    "moe_matmul": list(_experts()),
    "ssm_scan": [
        {"lengths": (150, 64, 1), "H": 2, "P": 64, "N": 128, "G": 1, "widths": (2, 1)},
        {
            "lengths": (150, 64, 1),
            "H": 2,
            "P": 64,
            "N": 128,
            "G": 1,
            "widths": (2, 1),
            "state": "f16",
        },
        *_segments(),
        {"lengths": (70,), "H": 1, "P": 80, "N": 144, "G": 1, "widths": (1,)},  # beyond chunks
        {"lengths": (70,), "H": 1, "P": 80, "N": 144, "G": 1, "widths": (1,), "state": "f16"},
        {"lengths": (9,), "H": 1, "P": 80, "N": 64, "G": 1, "widths": (1,)},
        {"lengths": (9,), "H": 1, "P": 80, "N": 64, "G": 1, "widths": (1,), "state": "f16"},
    ],
    "ssm_step": [
        {"lengths": (1, 1), "H": 4, "P": 64, "N": 128, "G": 2, "widths": (2, 4), "step": True},
        {"lengths": (1,), "H": 1, "P": 16, "N": 256, "G": 1, "widths": (1,), "step": True},
        {
            "lengths": (1, 1),
            "H": 4,
            "P": 64,
            "N": 256,
            "G": 2,
            "widths": (2, 4),
            "step": True,
            "state": "f16",
        },
    ],
    "mamba_step": [
        {"S": 2, "H": 16, "P": 64, "N": 128, "G": 8, "widths": (8, 16), "tracked": (16, 16)},
        {"S": 1, "H": 2, "P": 16, "N": 256, "G": 1, "widths": (2,)},
        {"S": 2, "H": 4, "P": 112, "N": 144, "G": 2, "widths": (2, 4), "state": "f16"},
    ],
    "attention_decode": [
        {"lengths": (200, 64), "Hq": 32, "Hkv": 2, "K": 128, "widths": (32, 16)},
        {"lengths": (200, 64), "Hq": 32, "Hkv": 2, "K": 128, "widths": (32, 16), "kv": "fp8"},
        {"lengths": (70,), "Hq": 2, "Hkv": 1, "K": 192, "widths": None},
        {"lengths": (70,), "Hq": 2, "Hkv": 1, "K": 192, "widths": None, "kv": "fp8"},
    ],
    "attention_prefill": [
        {"tokens": (9, 30), "context": (128, 3), "Hq": 16, "Hkv": 2, "K": 128, "widths": (8, 16)},
        {
            "tokens": (9, 30),
            "context": (128, 3),
            "Hq": 16,
            "Hkv": 2,
            "K": 128,
            "widths": (8, 16),
            "kv": "fp8",
        },
        {"tokens": (5,), "context": (64,), "Hq": 2, "Hkv": 1, "K": 192, "widths": None},
        {"tokens": (5,), "context": (9,), "Hq": 2, "Hkv": 1, "K": 192, "widths": None, "kv": "fp8"},
    ],
    "moe_route": [
        {"R": 9, "D": 2688, "E": 128, "J": 6, "k": (1920, 2688), "e": (128, 100), "ties": False}
    ],
    "rms_norm": [{"R": 2, "D": 2688, "widths": (1920, 2688), "delta": True}],
    "gated_norm": [{"R": 2, "H": 64, "P": 64, "G": 8, "widths": (56, 64)}],
    "causal_conv": [
        {"lengths": (30, 4, 31, 1, 33, 2, 1, 65), "x": 96, "bc": 32, "widths": (48, 96)}
    ],
}

NATIVE = {
    "wgmma": Native("matmul", 90, False, tuple(c | {"kernel": "wgmma"} for c in _native())),
    "nvfp4 activations": Native(
        "matmul",
        120,
        True,
        tuple(c | {"weights": "nvfp4", "activation_quantization": "nvfp4"} for c in _native()),
    ),
    # A middle that is rounded to bfloat16 has other codes, here and there, than that of the oracle.
    "nvfp4 experts": Native(
        "moe_matmul",
        120,
        True,
        tuple(
            c | {"activation_quantization": "nvfp4"}
            for c in _experts()
            if c.get("weights") == "nvfp4"
        ),
        torch.float32,
    ),
}
