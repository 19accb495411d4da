"""What the tests of NVFP4 activations share with the check of their mutants: cases, the op with
that option, and its oracle in numpy."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from emulated import ORDERS
from quantized import dequantise, numpy_nvfp4

from elastic_infer.ops import _laws, registry
from elastic_infer.ops import matmul as module

# One K tile, several, and more than the ring holds; every block shape; cut tiles; segments.
CASES = [
    {"R": 1, "K": 64, "segments": (16,), "k": (64,), "n": ((16,),), "act": "none"},
    {"R": 7, "K": 208, "segments": (80, 8), "k": (64, 144, 208),
     "n": ((40, 4), (64, 8), (80, 8)), "act": "none"},
    {"R": 13, "K": 1600, "segments": (40,), "k": (1024, 1600), "n": ((32,), (40,)), "act": "none"},
    {"R": 29, "K": 320, "segments": (130, 40), "k": (64, 192, 320),
     "n": ((32, 8), (96, 40), (130, 1)), "act": "relu2"},
    {"R": 50, "K": 128, "segments": (72,), "k": (16, 128), "n": ((24,), (72,)), "act": "none"},
    {"R": 140, "K": 256, "segments": (150,), "k": (128, 256), "n": ((64,), (150,)), "act": "none"},
]  # fmt: skip


def _call(arguments, run):
    given = dict(arguments)
    segments = list(given.pop("segments"))
    codes, blocks, scale = (given.pop(n) for n in ("codes", "block_scales", "scale"))
    weight = module.TiledWeight.pack_codes(codes, blocks, scale, segments, check=False)
    module.matmul(run=run, weight=weight, activation_quantization="nvfp4", **given)


MATMUL = dataclasses.replace(registry()["matmul"], call=_call)


def make(case, dtype):
    """Seeded arguments; x has outliers, so that scales of blocks and rows differ."""
    a = _laws.make(MATMUL, {**case, "weights": "nvfp4"}, dtype)
    g = torch.Generator().manual_seed(len(a["x"]))
    a["x"] *= torch.rand(a["x"].shape, generator=g).mul(3).exp().to(dtype)
    a["x"] *= torch.rand(len(a["x"]), 1, generator=g).mul(9).exp().to(dtype)
    return a


def run(arguments):
    """The output for a copy of the arguments."""
    return _laws.run(MATMUL, arguments)["out"]


def quantised_rows(a):
    """float64 [R, K]: each row's own prefix, quantised as numpy does it."""
    found = np.zeros(a["x"].shape)
    for r, values in enumerate(a["x"].float().numpy()):
        k = int(a["k_sizes"][a["row_width"][r]])
        g = np.float32(np.abs(values[:k]).max() / np.float32(6 * 448))
        if g > 0:
            found[r, :k] = dequantise(*numpy_nvfp4(values[None, :k], g), float(g))[0]
    return found


def reference(a):
    """float64 [R, N] of the op: quantised rows times dequantised weights."""
    N = a["codes"].shape[0]
    scale = np.repeat(a["scale"].double().numpy(), a["segments"])[:, None]
    weight = dequantise(a["codes"].numpy(), a["block_scales"].numpy(), 1.0) * scale
    y = torch.from_numpy(quantised_rows(a) @ weight.T)
    if a["activation"] == "relu2":
        y = torch.relu(y.to(a["x"].dtype).double()).square()
    wanted, column = torch.zeros(len(y), N, dtype=torch.bool), 0
    for s, rows in enumerate(a["segments"]):
        for r, w in enumerate(a["row_width"].tolist()):
            wanted[r, column : column + int(a["n_sizes"][w, s])] = True
        column += rows
    return torch.where(wanted, y, 0.0)


def check_products(module, arguments):
    """The op against its oracle, and equal bits in three orders of threads and blocks."""
    want, bits = reference(arguments), None
    for threads, blocks in ORDERS:
        module.configure(threads=threads, blocks=blocks)
        got = run(arguments)
        bits = got if bits is None else bits
        assert _laws.same_bits(got, bits)
    module.configure()
    wide = arguments["x"].dtype == torch.float32
    limit = 1e-5 if wide else 2e-3 * (2 if arguments["activation"] == "relu2" else 1)
    assert (bits.double() - want).norm() <= limit * want.norm() and want.norm() > 0


def check_poison(clean):
    """What lies beyond the prefixes is NaN, or large, and nothing changes; nothing is written
    outside."""
    for given in [clean, *_laws.one_width(clean)]:
        want, dirty, large = run(given), _laws.copy(given), _laws.copy(given)
        MATMUL.poison(dirty)
        dirty["out"], flat = _laws._framed(dirty["out"])
        MATMUL.call(dirty, None)
        guards = torch.cat([flat[: _laws.GUARD], flat[-_laws.GUARD :]])
        assert _laws.same_bits(dirty["out"], want) and (guards == _laws.SENTINEL).all()
        for r, w in enumerate(large["row_width"].tolist()):
            large["x"][r, int(large["k_sizes"][w]) :] = 1e6
        assert _laws.same_bits(run(large), want)


def check_all(module):
    """Everything above, for every case."""
    module.device(compute_capability=120)
    for case in CASES:
        arguments = make(case, torch.bfloat16)
        check_products(module, arguments)
        check_poison(arguments)
