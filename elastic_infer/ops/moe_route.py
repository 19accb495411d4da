"""moe_route: the experts of each row and their weights."""

from __future__ import annotations

import torch

from .. import _C
from ._spec import Arguments, Case, OpSpec, draw_widths, randn, width_rows
from .tiles import TiledWeight


def moe_route(
    x: torch.Tensor,
    gate: TiledWeight,
    bias: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    scaling_factor: float,
    row_width: torch.Tensor | None = None,
    k_sizes: torch.Tensor | None = None,
    e_sizes: torch.Tensor | None = None,
    run=None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``s = sigmoid(x[r, :k] gate[:e, :k]^T)``; `ids[r]` are the J largest of ``s + bias`` and
    ``weights[r, j] = s[ids[r, j]] / (sum_j s[ids[r, j]] + 1e-20) * scaling_factor``.

    Args:
        x: [R, D] float32 or bfloat16; nothing beyond a row's own k is read.
        gate: tiled float32 matrix [E, D].
        bias: [E] float32, added for the choice only.
        ids: [R, J] int32, written: the chosen experts by descending ``s + bias``; of equal ones
            the lowest index comes first.
        weights: [R, J] float32, written.
        scaling_factor: sum of a row's weights.
        row_width: [R] int32 index of each row's width, or None: every row uses everything.
        k_sizes: [W] int32 hidden channels at each width, multiples of 16.
        e_sizes: [W] int32 experts that may be chosen at each width, at least J.
        run: None, a Pool or a Step.

    Returns:
        `ids`, `weights`.

    Raises:
        ValueError: names the argument that has the wrong shape, dtype, stride or value.

    Source: DeepSeek-AI, "DeepSeek-V3 Technical Report", section 2.1 (sigmoid scores, bias for the
    choice only), with one group; transformers' nemotron_h.
    """
    if len(gate.segments) != 1:
        raise ValueError(
            f"moe_route: gate must be one segment, got {[s.rows for s in gate.segments]} rows"
        )
    _C.moe_route(
        x,
        gate.image,
        gate.rows,
        gate.columns,
        bias,
        ids,
        weights,
        scaling_factor,
        row_width,
        k_sizes,
        e_sizes,
        run,
    )
    return ids, weights


def _reference(a: Arguments) -> dict[str, torch.Tensor]:
    wide = torch.promote_types(a["x"].dtype, torch.float32)
    ids, weights = torch.empty_like(a["ids"]), torch.empty_like(a["weights"])
    J = ids.shape[1]
    for r, (k, e) in enumerate(zip(width_rows(a, "k_sizes"), width_rows(a, "e_sizes"))):
        score = torch.sigmoid(a["gate"][:e, :k].to(wide) @ a["x"][r, :k].to(wide))
        select = score + a["bias"][:e].to(wide)
        chosen = torch.sort(select, descending=True, stable=True).indices[:J]
        ids[r] = chosen.to(ids.dtype)
        weights[r] = (score[chosen] / (score[chosen].sum() + 1e-20) * a["scaling_factor"]).to(
            weights.dtype
        )
    return {"ids": ids, "weights": weights}


def _cases():
    yield {"R": 1, "D": 16, "E": 1, "J": 1, "k": (16,), "e": (1,), "ties": False}
    yield {"R": 5, "D": 80, "E": 20, "J": 3, "k": (48, 80), "e": (3, 20), "ties": False}
    yield {
        "R": 70,
        "D": 176,
        "E": 130,
        "J": 6,
        "k": (64, 112, 176),
        "e": (70, 64, 130),
        "ties": False,
    }
    yield {"R": 7, "D": 64, "E": 24, "J": 4, "k": (32, 64), "e": (10, 24), "ties": True}
    for R in (1, 256):
        yield {
            "R": R,
            "D": 1024,
            "E": 64,
            "J": 6,
            "k": (1024,),
            "e": (64,),
            "ties": False,
            "bench": True,
        }


def _close_call(a: Arguments, r: int) -> bool:
    """True if rounding alone could change the choice of row r (exact ties are no close call)."""
    one = {**a, "x": a["x"][r : r + 1], "row_width": a["row_width"][r : r + 1]}
    k, e = width_rows(one, "k_sizes")[0], width_rows(one, "e_sizes")[0]
    logits = a["gate"][:e, :k].double() @ a["x"][r, :k].double()
    select = torch.sort(torch.sigmoid(logits) + a["bias"][:e].double(), descending=True).values
    gaps = -select.diff()[: a["ids"].shape[1]]
    return bool(((gaps > 0) & (gaps < 1e-5)).any())


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    R, D, E, J = case["R"], case["D"], case["E"], case["J"]
    a = {
        "x": randn(generator, R, D, dtype=dtype),
        "gate": randn(generator, E, D, dtype=torch.float32, scale=D**-0.5),
        "bias": randn(generator, E, dtype=torch.float32, scale=0.1),
        "ids": torch.empty(R, J, dtype=torch.int32),
        "weights": torch.empty(R, J, dtype=torch.float32),
        "scaling_factor": 2.5,
        "row_width": draw_widths(generator, R, len(case["k"])),
        "k_sizes": torch.tensor(case["k"], dtype=torch.int32),
        "e_sizes": torch.tensor(case["e"], dtype=torch.int32),
    }
    if case["ties"]:  # every second expert scores exactly 1/2, with a bias that wins
        a["gate"][1::2] = 0
        a["bias"][1::2] = 1.5
    for r in range(R):
        while _close_call(a, r):
            a["x"][r] = randn(generator, D, dtype=dtype)
    return a


def _call(a: Arguments, run) -> None:
    given = dict(a)
    given["gate"] = TiledWeight.pack(a["gate"])
    moe_route(run=run, **given)


def _poison(a: Arguments) -> None:
    nan = float("nan")
    for r, k in enumerate(width_rows(a, "k_sizes")):
        a["x"][r, k:] = nan
    a["gate"][:, max(width_rows(a, "k_sizes")) :] = nan
    a["gate"][max(width_rows(a, "e_sizes")) :] = nan
    a["bias"][max(width_rows(a, "e_sizes")) :] = nan


def _sliced(a: Arguments):
    for w, (k, e) in enumerate(zip(a["k_sizes"].tolist(), a["e_sizes"].tolist())):
        rows = (a["row_width"] == w).nonzero().flatten()
        if not len(rows):
            continue
        cut = {
            "x": a["x"][rows, :k].contiguous(),
            "gate": a["gate"][:e, :k].contiguous(),
            "bias": a["bias"][:e].contiguous(),
            "ids": torch.empty(len(rows), a["ids"].shape[1], dtype=torch.int32),
            "weights": torch.empty(len(rows), a["ids"].shape[1], dtype=torch.float32),
            "scaling_factor": a["scaling_factor"],
            "row_width": None,
            "k_sizes": None,
            "e_sizes": None,
        }
        yield cut, {"ids": (rows, ...), "weights": (rows, ...)}


def _row(a: Arguments, r: int):
    one = dict(a)
    for name in ("x", "ids", "weights", "row_width"):
        one[name] = a[name][r : r + 1].clone()
    return one, {"ids": ((r,), (0,)), "weights": ((r,), (0,))}


def _cost(case: Case, itemsize: int) -> tuple[int, int]:
    R, D, E, J = case["R"], case["D"], case["E"], case["J"]
    return E * D * 4 + R * D * itemsize + R * J * 8, 2 * R * E * D


SPECS = [
    OpSpec(
        name="moe_route",
        call=_call,
        reference=_reference,
        cases=_cases,
        inputs=_inputs,
        outputs=("ids", "weights"),
        cost=_cost,
        poison=_poison,
        sliced=_sliced,
        row=_row,
        rows=lambda a: a["x"].shape[0],
        keep_dtype=("gate", "bias", "weights"),
    )
]
