"""What the tests of NVFP4 activations share with the check of their mutants: cases, the ops with
that option, and their oracles in numpy."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from elastic_infer.ops import matmul as module, registry
from elastic_infer.ops.moe_matmul import plain_weights
from elastic_infer.ops.testing import laws as _laws
from support.emulated import ORDERS, check_overlap
from support.quantized import dequantize, numpy_nvfp4

# One K tile, several, and more than the ring holds; every block shape; cut tiles; segments.
CASES = [
    {"R": 1, "K": 64, "segments": (16,), "k": (64,), "n": ((16,),), "act": "none"},
    {
        "R": 7,
        "K": 208,
        "segments": (80, 8),
        "k": (64, 144, 208),
        "n": ((40, 4), (64, 8), (80, 8)),
        "act": "none",
    },
    {"R": 13, "K": 1600, "segments": (40,), "k": (1024, 1600), "n": ((32,), (40,)), "act": "none"},
    {
        "R": 29,
        "K": 320,
        "segments": (130, 40),
        "k": (64, 192, 320),
        "n": ((32, 8), (96, 40), (130, 1)),
        "act": "relu2",
    },
    {"R": 50, "K": 128, "segments": (72,), "k": (16, 128), "n": ((24,), (72,)), "act": "none"},
    {"R": 140, "K": 256, "segments": (150,), "k": (128, 256), "n": ((64,), (150,)), "act": "none"},
]
# Experts: every block shape, up and down; several blocks of entries of one; experts that no row
# names; more K tiles than the ring holds in both directions; cut tiles; rows of three widths.
EXPERTS = [
    {"R": 1, "D": 16, "E": 1, "J": 1, "F": 16, "k": (16,), "f": (16,), "shared": False},
    {"R": 3, "D": 80, "E": 12, "J": 3, "F": 48, "k": (48, 80), "f": (32, 48), "shared": True},
    {"R": 40, "D": 144, "E": 14, "J": 2, "F": 80, "k": (80, 144), "f": (48, 80), "shared": True},
    {"R": 7, "D": 1680, "E": 2, "J": 1, "F": 1616, "k": (1680,), "f": (1616,), "shared": False},
    {"R": 12, "D": 96, "E": 3, "J": 2, "F": 208, "k": (80, 96), "f": (208, 16), "shared": True},
    {
        "R": 19,
        "D": 208,
        "E": 6,
        "J": 4,
        "F": 144,
        "k": (64, 112, 208),
        "f": (144, 16, 80),
        "shared": True,
    },
    {"R": 40, "D": 80, "E": 3, "J": 2, "F": 80, "k": (48, 80), "f": (80, 64), "shared": False},
    {"R": 90, "D": 144, "E": 2, "J": 2, "F": 80, "k": (80, 144), "f": (48, 80), "shared": True},
]


def _call(arguments, run):
    given = dict(arguments)
    segments = list(given.pop("segments"))
    codes, blocks, scale = (given.pop(n) for n in ("codes", "block_scales", "scale"))
    weight = module.TiledWeight.pack_codes(codes, blocks, scale, segments, check=False)
    module.matmul(run=run, weight=weight, activation_quantization="nvfp4", **given)


MATMUL = dataclasses.replace(registry()["matmul"], call=_call)
_experts = registry()["moe_matmul"]
MOE = dataclasses.replace(
    _experts, call=lambda a, run: _experts.call(a | {"activation_quantization": "nvfp4"}, run)
)


def make(case, dtype):
    """Seeded arguments; x has outliers, so that scales of blocks and rows differ."""
    a = _laws.make(MOE if "E" in case else MATMUL, {**case, "weights": "nvfp4"}, dtype)
    g = torch.Generator().manual_seed(len(a["x"]))
    a["x"] *= torch.rand(a["x"].shape, generator=g).mul(3).exp().to(dtype)
    a["x"] *= torch.rand(len(a["x"]), 1, generator=g).mul(9).exp().to(dtype)
    return a


def spec_of(arguments):
    """The op, with the option, that has these arguments."""
    return MOE if "ids" in arguments else MATMUL


def run(arguments):
    """The output for a copy of the arguments."""
    return _laws.run(spec_of(arguments), arguments)["out"]


def quantized(values):
    """float64 of a row of float32, quantized as numpy does it."""
    g = np.float32(np.abs(values).max(initial=0) / np.float32(6 * 448))
    if g == 0:
        return np.zeros(values.shape)
    return dequantize(*numpy_nvfp4(values[None], g), float(g))[0]


def quantized_rows(a):
    """float64 [R, K]: each row's own prefix, quantized."""
    found = np.zeros(a["x"].shape)
    for r, values in enumerate(a["x"].float().numpy()):
        k = int(a["k_sizes"][a["row_width"][r]])
        found[r, :k] = quantized(values[:k])
    return found


def reference(a):
    """float64 of the op's output: quantized rows times dequantized weights."""
    if "ids" in a:
        return expert_reference(a)
    N = a["codes"].shape[0]
    scale = np.repeat(a["scale"].double().numpy(), a["segments"])[:, None]
    weight = dequantize(a["codes"].numpy(), a["block_scales"].numpy(), 1.0) * scale
    y = torch.from_numpy(quantized_rows(a) @ weight.T)
    if a["activation"] == "relu2":
        y = torch.relu(y.to(a["x"].dtype).double()).square()
    wanted, column = torch.zeros(len(y), N, dtype=torch.bool), 0
    for s, rows in enumerate(a["segments"]):
        for r, w in enumerate(a["row_width"].tolist()):
            wanted[r, column : column + int(a["n_sizes"][w, s])] = True
        column += rows
    return torch.where(wanted, y, 0.0)


def expert_reference(a):
    """float64 [R, D]: what every expert of a row gives it from its quantized prefix is rounded,
    activated, rounded and quantized over the row's own expert channels."""
    up, down = (plain_weights(a, name, torch.float64).numpy() for name in ("up", "down"))
    dtype, x, out = a["x"].dtype, quantized_rows(a), torch.zeros(a["out"].shape).double()
    for r, width in enumerate(a["row_width"].tolist()):
        k, f = int(a["k_sizes"][width]), int(a["f_sizes"][width])
        for e, weight in zip(a["ids"][r].tolist(), a["weights"][r].tolist()):
            middle = torch.from_numpy(up[e, :f, :k] @ x[r, :k]).to(dtype).float()
            middle = torch.relu(middle).square().to(dtype).float()
            y = torch.from_numpy(down[e, :k, :f] @ quantized(middle.numpy())).to(dtype)
            out[r, :k] += weight * y.double()
        if a["shared"] is not None:
            out[r, :k] += a["shared"][r, :k].double()
    return out


def limit_of(arguments):
    """How far a row may be from its oracle, as a part of its norm. In bfloat16 the rounding of
    a middle moves some of its codes by one."""
    if arguments["x"].dtype == torch.float32:
        return 1e-5
    if "ids" in arguments:
        return 6e-3
    return 4e-3 * (3 if arguments["activation"] == "relu2" else 1)  # what rounding may do


def check_products(module, arguments):
    """The op against its oracle, and equal bits in three orders of threads and blocks."""
    want, bits = reference(arguments), None
    for threads, blocks in ORDERS:
        module.configure(threads=threads, blocks=blocks)
        got = run(arguments)
        bits = got if bits is None else bits
        assert _laws.same_bits(got, bits)
    module.configure()
    error, size = (bits.double() - want).norm(dim=1), want.norm(dim=1)  # rows differ in size
    assert (error <= limit_of(arguments) * size).all() and size.max() > 0


def check_poison(clean):
    """What lies beyond the prefixes is NaN, or large, and nothing changes; nothing is written
    outside."""
    for given in [clean, *_laws.one_width(clean)]:
        want, dirty, large = run(given), _laws.copy(given), _laws.copy(given)
        spec_of(given).poison(dirty)
        dirty["out"], flat = _laws._framed(dirty["out"])
        spec_of(given).call(dirty, None)
        guards = torch.cat([flat[: _laws.GUARD], flat[-_laws.GUARD :]])
        assert _laws.same_bits(dirty["out"], want) and (guards == _laws.SENTINEL).all()
        for r, w in enumerate(large["row_width"].tolist()):
            large["x"][r, int(large["k_sizes"][w]) :] = 1e6
        assert _laws.same_bits(run(large), want)


def check_all(module, cases):
    """Everything above."""
    module.device(compute_capability=120)
    for case in cases:
        arguments = make(case, torch.float32 if "E" in case else torch.bfloat16)
        check_products(module, arguments)
        check_poison(arguments)
    if "E" in cases[2]:
        check_overlap(module, MOE, {**cases[2], "weights": "nvfp4"})
