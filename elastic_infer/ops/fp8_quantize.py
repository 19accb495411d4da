"""fp8_quantize: weights to E4M3 codes with one scale."""

from __future__ import annotations

import torch

from .. import _C
from ..codes import E4M3_MAX
from ._spec import Arguments, Case, OpSpec, randn
from .nvfp4_quantize import largest_over, poison_gaps


def fp8_scale(weight: torch.Tensor) -> float:
    """``amax / 448`` in float32: the scale at which the largest weight is E4M3's largest. 1 for a
    matrix of zeros, or one whose largest is not finite.

    Args:
        weight: float32 or bfloat16 of any shape.

    Source: ModelOpt's weight_scale.
    """
    return largest_over(weight, E4M3_MAX)


def fp8_quantize(
    weight: torch.Tensor, codes: torch.Tensor, *, scale: float | None = None, run=None
) -> float:
    """``code = e4m3(weight / scale)`` in float32, rounded to nearest with ties to even,
    saturating. A weight is then code * scale.

    Args:
        weight: [N, K] float32 or bfloat16, finite.
        codes: [N, K] uint8 that take E4M3 bit patterns.
        scale: positive float32, or None: :func:`fp8_scale` of `weight`.
        run: None, a Pool or a Step.

    Returns:
        The scale.

    Raises:
        ValueError: names the argument that has the wrong shape, dtype, stride or value.

    Source: ModelOpt's FP8.
    """
    if scale is None:
        scale = fp8_scale(weight) if isinstance(weight, torch.Tensor) else 1.0
    _C.fp8_quantize(weight, codes, scale, run)
    return scale


def _reference(a: Arguments) -> dict[str, torch.Tensor]:
    ratio = a["weight"].float() / torch.tensor(a["scale"])  # the op is defined in float32
    return {"codes": ratio.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)}


def _cases():
    yield {"N": 1, "K": 16, "scale": "own"}
    yield {"N": 7, "K": 83, "scale": "own"}
    yield {"N": 5, "K": 64, "scale": "small"}
    yield {"N": 6, "K": 64, "scale": "large"}
    yield {"N": 1024, "K": 2688, "scale": "own", "bench": True}


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    N, K = case["N"], case["K"]
    weight = randn(generator, N, K + 16, dtype=dtype)[:, :K]
    return {
        "weight": weight,
        "codes": torch.empty(N, K, dtype=torch.uint8),
        # small: codes saturate; large: they are subnormal or zero.
        "scale": fp8_scale(weight)
        * {"own": 1.0, "small": 2.0**-3, "large": 2.0**15}[case["scale"]],
    }


def _call(a: Arguments, run) -> None:
    fp8_quantize(run=run, **a)


def _sliced(a: Arguments):
    N, K = a["weight"].shape
    n, k = N // 2 + 1, K // 2 + 1
    cut = {
        "weight": a["weight"][:n, :k].contiguous(),
        "codes": torch.empty(n, k, dtype=torch.uint8),
        "scale": a["scale"],
    }
    yield cut, {"codes": ((slice(n), slice(k)), ...)}


def _row(a: Arguments, r: int):
    one = {n: v[r : r + 1].clone() if n != "scale" else v for n, v in a.items()}
    return one, {"codes": ((r,), (0,))}


def _cost(case: Case, itemsize: int) -> tuple[int, int]:
    return case["N"] * case["K"] * (itemsize + 1), case["N"] * case["K"]


SPECS = [
    OpSpec(
        name="fp8_quantize",
        call=_call,
        reference=_reference,
        cases=_cases,
        inputs=_inputs,
        outputs=("codes",),
        cost=_cost,
        poison=poison_gaps,
        sliced=_sliced,
        row=_row,
        rows=lambda a: a["weight"].shape[0],
    )
]
