"""gated_norm: gate by silu(z), then a root-mean-square norm per group over the kept heads."""

from __future__ import annotations

import torch

from .. import _C
from ._segments import compute_dtype
from ._spec import Arguments, Case, OpSpec, draw_widths, randn, width_rows


def gated_norm(
    y: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    groups: int,
    head_dim: int,
    eps: float = 1e-5,
    row_width: torch.Tensor | None = None,
    h_sizes: torch.Tensor | None = None,
    run=None,
) -> torch.Tensor:
    """``u = y * silu(z); out = u * rsqrt(mean(u^2 over the group's kept channels) + eps) * weight``
    on each row's kept heads, and exact zero on the others.

    Args:
        y: [R, H*P] float32 or bfloat16, the scan's output; nothing of the other heads is read.
        z: [R, H*P], dtype of `y`, the gate.
        weight: [H*P] float32 or bfloat16.
        out: [R, H*P], dtype of `y`.
        groups: G, a divisor of H; head n is in group n % G.
        head_dim: P, a multiple of 16.
        eps: added to the mean of squares; does not depend on the width.
        row_width: [R] int32 index of each row's width, or None for all heads.
        h_sizes: [W] int32 kept heads of each width, multiples of G.
        run: None, a Pool or a Step.

    Returns:
        `out`.

    Raises:
        ValueError: names the argument that has the wrong shape, dtype, stride or value.

    Source: Dao and Gu, "Transformers are SSMs" (Mamba-2 block, grouped norm).
    """
    _C.gated_norm(y, z, weight, out, groups, head_dim, eps, row_width, h_sizes, run)
    return out


def _reference(a: Arguments) -> dict[str, torch.Tensor]:
    P, G = a["head_dim"], a["groups"]
    out = torch.zeros_like(a["out"])
    dtype = compute_dtype(a["y"])
    for r, n in enumerate(width_rows(a, "h_sizes")):
        y, z = a["y"][r, : n * P].to(dtype), a["z"][r, : n * P].to(dtype)
        u = (y * torch.nn.functional.silu(z)).view(n // G, G, P)
        u = u * torch.rsqrt(u.square().mean((0, 2), keepdim=True) + a["eps"])
        out[r, : n * P] = (u.flatten() * a["weight"][: n * P].to(dtype)).to(out.dtype)
    return {"out": out}


def _cases():
    yield {"R": 1, "H": 1, "P": 16, "G": 1, "widths": (1,)}
    yield {"R": 5, "H": 12, "P": 48, "G": 4, "widths": (4, 12, 8)}
    yield {"R": 70, "H": 6, "P": 80, "G": 2, "widths": (0, 4, 6), "w": "f32"}
    for R in (1, 256):
        yield {"R": R, "H": 32, "P": 64, "G": 8, "widths": (32,), "bench": True}


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    R, channels = case["R"], case["H"] * case["P"]
    weight_dtype = torch.float32 if case.get("w") == "f32" else dtype
    return {
        "y": randn(generator, R, channels, dtype=dtype),
        "z": randn(generator, R, 2 * channels, dtype=dtype, scale=2.0)[:, :channels],
        "weight": 1 + randn(generator, channels, dtype=weight_dtype, scale=0.1),
        "out": torch.empty(R, channels, dtype=dtype),
        "groups": case["G"],
        "head_dim": case["P"],
        "eps": 1e-5,
        "row_width": draw_widths(generator, R, len(case["widths"]), sort=False),
        "h_sizes": torch.tensor(case["widths"], dtype=torch.int32),
    }


def _call(a: Arguments, run) -> None:
    gated_norm(run=run, **a)


def _poison(a: Arguments) -> None:
    P, nan = a["head_dim"], float("nan")
    for r, n in enumerate(width_rows(a, "h_sizes")):
        a["y"][r, n * P :] = nan
        a["z"][r, n * P :] = nan
    a["weight"][max(width_rows(a, "h_sizes")) * P :] = nan


def _sliced(a: Arguments):
    for w, n in enumerate(a["h_sizes"].tolist()):
        rows = (a["row_width"] == w).nonzero().flatten()
        if not len(rows) or n == 0:
            continue
        kept = n * a["head_dim"]
        cut = dict(a, row_width=None, h_sizes=None)
        cut |= {name: a[name][rows, :kept].contiguous() for name in ("y", "z", "out")}
        cut["weight"] = a["weight"][:kept].contiguous()
        yield cut, {"out": ((rows[:, None], torch.arange(kept)), ...)}


def _row(a: Arguments, r: int):
    one = dict(a)
    for name in ("y", "z", "out", "row_width"):
        one[name] = a[name][r : r + 1].clone()
    return one, {"out": ((r,), (0,))}


def _cost(case: Case, itemsize: int) -> tuple[int, int]:
    channels = case["H"] * case["P"]
    return (3 * case["R"] + 1) * channels * itemsize, 20 * case["R"] * channels


SPECS = [
    OpSpec(
        name="gated_norm",
        call=_call,
        reference=_reference,
        cases=_cases,
        inputs=_inputs,
        outputs=("out",),
        cost=_cost,
        poison=_poison,
        sliced=_sliced,
        row=_row,
        rows=lambda a: a["y"].shape[0],
    )
]
