"""rms_norm: residual add and root-mean-square norm over each row's own channel prefix."""

from __future__ import annotations

import torch

from .. import _C
from ._spec import Arguments, Case, OpSpec, draw_widths, randn, width_rows


def rms_norm(
    residual: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    eps: float = 1e-5,
    delta: torch.Tensor | None = None,
    row_width: torch.Tensor | None = None,
    sizes: torch.Tensor | None = None,
    run=None,
) -> torch.Tensor:
    """``residual += delta; out[r, :n] = residual[r, :n] * rsqrt(mean(residual[r, :n]^2) + eps) *
    weight[:n]``, and exact zero beyond n, where n is row r's active prefix.

    Args:
        residual: [R, D] float32 or bfloat16, updated in place when `delta` is given. Channels
            beyond a row's prefix are neither read nor written. D is a multiple of 16.
        weight: [D] float32 or bfloat16.
        out: [R, D], dtype of `residual`.
        eps: added to the mean of squares; does not depend on the width.
        delta: [R, D], dtype of `residual`, or None: what the last mixer adds to the residual.
        row_width: [R] int32 index of each row's width, or None for all of D.
        sizes: [W] int32 active channels of each width, multiples of 16.
        run: None, a Pool or a Step.

    Returns:
        `out`.

    Raises:
        ValueError: names the argument that has the wrong shape, dtype, stride or value.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization"; rounding as in transformers'
    nemotron_h (sum rounded to the residual's dtype, norm in float32, one rounding at the end).
    """
    _C.rms_norm(residual, weight, out, eps, delta, row_width, sizes, run)
    return out


def _reference(a: Arguments) -> dict[str, torch.Tensor]:
    residual = a["residual"].clone()
    out = torch.zeros_like(residual)
    for r, n in enumerate(width_rows(a)):
        if a["delta"] is not None:
            residual[r, :n] += a["delta"][r, :n]
        wide = residual[r, :n].to(torch.promote_types(residual.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean() + a["eps"])
        out[r, :n] = (normed * a["weight"][:n].to(wide.dtype)).to(out.dtype)
    return {"residual": residual, "out": out}


def _cases():
    yield {"R": 1, "D": 16, "widths": (16,), "delta": False}
    yield {"R": 5, "D": 176, "widths": (48, 80, 176), "delta": True}
    yield {"R": 70, "D": 192, "widths": (96, 192), "delta": True}
    yield {"R": 64, "D": 2688, "widths": (1920, 2688), "delta": True, "bench": True}


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    R, D = case["R"], case["D"]
    return {
        "residual": randn(generator, R, D, dtype=dtype),
        "weight": 1 + randn(generator, D, dtype=dtype, scale=0.1),
        "out": torch.empty(R, D, dtype=dtype),
        "eps": 1e-5,
        "delta": randn(generator, R, D, dtype=dtype) if case["delta"] else None,
        "row_width": draw_widths(generator, R, len(case["widths"])),
        "sizes": torch.tensor(case["widths"], dtype=torch.int32),
    }


def _call(a: Arguments, run) -> None:
    rms_norm(run=run, **a)


def _poison(a: Arguments) -> None:
    for r, n in enumerate(width_rows(a)):
        a["residual"][r, n:] = float("nan")
        if a["delta"] is not None:
            a["delta"][r, n:] = float("nan")
    a["weight"][max(width_rows(a)) :] = float("nan")


def _sliced(a: Arguments):
    for w, n in enumerate(a["sizes"].tolist()):
        rows = (a["row_width"] == w).nonzero().flatten()
        if not len(rows):
            continue
        cut = {
            "residual": a["residual"][rows, :n].contiguous(),
            "weight": a["weight"][:n].contiguous(),
            "out": torch.empty(len(rows), n, dtype=a["out"].dtype),
            "eps": a["eps"],
            "delta": None if a["delta"] is None else a["delta"][rows, :n].contiguous(),
            "row_width": None,
            "sizes": None,
        }
        where = (rows[:, None], torch.arange(n))
        yield cut, {"out": (where, ...), "residual": (where, ...)}


def _row(a: Arguments, r: int):
    one = dict(a)
    for name in ("residual", "out", "delta"):
        one[name] = None if a[name] is None else a[name][r : r + 1].clone()
    one["row_width"] = a["row_width"][r : r + 1].clone()
    n = width_rows(a)[r]
    return one, {"out": ((r,), (0,)), "residual": ((r, slice(n)), (0, slice(n)))}


def _cost(case: Case, itemsize: int) -> tuple[int, int]:
    elements = case["R"] * case["D"]
    return elements * itemsize * (4 if case["delta"] else 2) + case["D"] * itemsize, 4 * elements


SPECS = [
    OpSpec(
        name="rms_norm",
        call=_call,
        reference=_reference,
        cases=_cases,
        inputs=_inputs,
        outputs=("residual", "out"),
        cost=_cost,
        poison=_poison,
        sliced=_sliced,
        row=_row,
        rows=lambda a: a["residual"].shape[0],
    )
]
