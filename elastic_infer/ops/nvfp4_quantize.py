"""nvfp4_quantize: weights to 4-bit codes with one scale per 16 columns."""

from __future__ import annotations

import math

import torch

from .. import _C
from ..codes import BLOCK, E2M1_MAX, E4M3_MAX, decode_e4m3, encode_e2m1
from ._spec import Arguments, Case, OpSpec, randn


def nvfp4_scale(weight: torch.Tensor) -> float:
    """``amax / (6 * 448)`` in float32: the scale at which the block scale of the largest weight is
    E4M3's largest. 1 for a matrix of zeros, or one whose largest is not finite.

    Args:
        weight: float32 or bfloat16 of any shape.

    Source: ModelOpt's weight_scale_2.
    """
    return largest_over(weight, E2M1_MAX * E4M3_MAX)


def largest_over(weight: torch.Tensor, limit: float) -> float:
    """The largest magnitude of `weight` over `limit`, in float32; 1 where that is no scale."""
    if weight.numel() == 0:
        return 1.0
    scale = (weight.abs().max().float() / limit).item()
    return scale if math.isfinite(scale) and scale > 0 else 1.0


def nvfp4_quantize(
    weight: torch.Tensor,
    codes: torch.Tensor,
    block_scales: torch.Tensor,
    *,
    scale: float | None = None,
    run=None,
) -> float:
    """``block_scale = e4m3(amax_of_16 / (6 scale))``, ``code = e2m1(weight / (block_scale scale))``
    in float32, rounded to nearest with ties to even, saturating; where the product is zero, so are
    the codes. A weight is then code * block_scale * scale.

    Args:
        weight: [N, K] float32 or bfloat16, finite; K a multiple of 16.
        codes: [N, K/2] uint8; each byte takes two E2M1 codes, the low four bits for even k.
        block_scales: [N, K/16] uint8 that take E4M3 bit patterns.
        scale: positive float32, or None: :func:`nvfp4_scale` of `weight`.
        run: None, a Pool or a Step.

    Returns:
        The scale.

    Raises:
        ValueError: names the argument that has the wrong shape, dtype, stride or value.

    Source: ModelOpt's NVFP4.
    """
    if scale is None:
        scale = nvfp4_scale(weight) if isinstance(weight, torch.Tensor) else 1.0
    _C.nvfp4_quantize(weight, codes, block_scales, scale, run)
    return scale


def reference(a: Arguments) -> dict[str, torch.Tensor]:
    """The op in plain torch: codes and block_scales of a["weight"] at a["scale"]."""
    blocks = a["weight"].float().unflatten(1, (-1, BLOCK))  # the op is defined in float32
    scale = torch.tensor(a["scale"])
    amax = blocks.abs().amax(-1)
    wanted = (amax / (E2M1_MAX * scale)).clamp(max=E4M3_MAX)
    block_scales = wanted.to(torch.float8_e4m3fn).view(torch.uint8)
    step = (decode_e4m3(block_scales) * scale)[..., None]
    codes = encode_e2m1(torch.where(step == 0, 0.0, blocks / step).flatten(1))
    return {"codes": codes, "block_scales": block_scales}


def _cases():
    yield {"N": 1, "K": 16, "scale": "own", "kind": "normal"}
    yield {"N": 7, "K": 80, "scale": "own", "kind": "normal"}
    yield {"N": 9, "K": 48, "scale": "own", "kind": "halves"}
    yield {"N": 5, "K": 64, "scale": "small", "kind": "zeros"}
    yield {"N": 6, "K": 64, "scale": "large", "kind": "normal"}
    yield {"N": 1024, "K": 2688, "scale": "own", "kind": "normal", "bench": True}


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    N, K = case["N"], case["K"]
    wider = randn(generator, N, K + BLOCK, dtype=torch.float32)
    if case["kind"] == "halves":  # everything in the middle between two codes, now and then
        wider = (wider * 4).round() / 4
    elif case["kind"] == "zeros":
        wider[:, :BLOCK] = 0.0
        wider[::2] = -0.0
        wider[:, 2 * BLOCK : 3 * BLOCK] *= 1e-5
    weight = wider.to(dtype)[:, :K]
    own = nvfp4_scale(weight)
    return {
        "weight": weight,
        "codes": torch.empty(N, K // 2, dtype=torch.uint8),
        "block_scales": torch.empty(N, K // BLOCK, dtype=torch.uint8),
        # small: block scales saturate; large: they underflow.
        "scale": own * {"own": 1.0, "small": 2.0**-3, "large": 2.0**17}[case["scale"]],
    }


def _call(a: Arguments, run) -> None:
    nvfp4_quantize(run=run, **a)


def poison_gaps(a: Arguments) -> None:
    """NaN between the rows of a strided `weight`."""
    weight = a["weight"]
    (N, K), pitch = weight.shape, weight.stride(0)
    if N > 1 and pitch > K:
        weight.as_strided((N - 1, pitch - K), (pitch, 1), K).fill_(float("nan"))


def _sliced(a: Arguments):
    N, K = a["weight"].shape
    n, k = N // 2 + 1, K // 32 * BLOCK + BLOCK
    cut = {
        "weight": a["weight"][:n, :k].contiguous(),
        "codes": torch.empty(n, k // 2, dtype=torch.uint8),
        "block_scales": torch.empty(n, k // BLOCK, dtype=torch.uint8),
        "scale": a["scale"],
    }
    yield (
        cut,
        {
            "codes": ((slice(n), slice(k // 2)), ...),
            "block_scales": ((slice(n), slice(k // BLOCK)), ...),
        },
    )


def _row(a: Arguments, r: int):
    one = {n: v[r : r + 1].clone() if n != "scale" else v for n, v in a.items()}
    return one, {name: ((r,), (0,)) for name in ("codes", "block_scales")}


def _cost(case: Case, itemsize: int) -> tuple[int, int]:
    weights = case["N"] * case["K"]
    return weights * itemsize + weights * 9 // 16, weights


SPECS = [
    OpSpec(
        name="nvfp4_quantize",
        call=_call,
        reference=reference,
        cases=_cases,
        inputs=_inputs,
        outputs=("codes", "block_scales"),
        cost=_cost,
        poison=poison_gaps,
        sliced=_sliced,
        row=_row,
        rows=lambda a: a["weight"].shape[0],
    )
]
