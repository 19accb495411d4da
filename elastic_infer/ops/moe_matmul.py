"""moe_matmul: each row through its own experts, summed by routing weight."""

from __future__ import annotations

import torch

from .. import _C
from ..codes import BLOCK
from ._activations import quantized
from ._quantized import dequantize, draw_codes
from ._spec import Arguments, Case, OpSpec, draw_widths, randn, width_rows
from .matmul import INT8, OPTIONS, weight_bytes
from .tiles import (
    NAN_SCALE,
    ExpertWeights,
)


def moe_workspace_bytes(R: int, J: int, E: int, D: int, F: int, dtype: torch.dtype) -> int:
    """Bytes of workspace that :func:`moe_matmul` needs for R rows of J experts out of E."""
    return _C.moe_workspace_bytes(R, J, E, D, F, torch.empty(0, dtype=dtype).element_size())


def moe_matmul(
    x: torch.Tensor,
    up: ExpertWeights,
    down: ExpertWeights,
    ids: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    *,
    workspace: torch.Tensor,
    shared: torch.Tensor | None = None,
    row_width: torch.Tensor | None = None,
    k_sizes: torch.Tensor | None = None,
    f_sizes: torch.Tensor | None = None,
    activation_quantization: str = "none",
    run=None,
) -> torch.Tensor:
    """``out[r, :k] = sum_j weights[r, j] * down_e(relu(up_e x[r, :k])^2) + shared[r, :k]`` with
    e = ids[r, j], over the first f of each expert's width, and exact zero beyond k.

    Args:
        x: [R, D] float32 or bfloat16; nothing beyond a row's own k is read.
        up: E matrices [F, D]; float32 tiles with float32 x, all others with either x.
        down: E matrices [D, F], tiles as `up`.
        ids: [R, J] int32 experts of each row, in [0, E). Experts that no row names are not read.
        weights: [R, J] float32.
        out: [R, D], dtype of x.
        workspace: [at least moe_workspace_bytes(...)] uint8, overwritten.
        shared: [R, D], dtype of x, added last, or None.
        row_width: [R] int32 index of each row's width, or None: every row uses everything.
        k_sizes: [W] int32 hidden channels at each width, multiples of 16.
        f_sizes: [W] int32 expert channels at each width, multiples of 16.
        activation_quantization: as of :func:`matmul`, for x and for what the down product reads.
        run: None, a Pool or a Step.

    Returns:
        `out`.

    Raises:
        ValueError: names the argument that has the wrong shape, dtype, stride or value.

    Source: transformers' nemotron_h. The up product, its activation and the down product are
    rounded to x's dtype; the sum runs in float32 by ascending expert and is rounded once.
    """
    if (up.rows, up.columns) != (down.columns, down.rows):
        raise ValueError(
            f"moe_matmul: down must have shape [D, F] where up has [F, D] = "
            f"{[up.rows, up.columns]}, got {[down.rows, down.columns]}"
        )
    _C.moe_matmul(
        x,
        up.image,
        down.image,
        up.columns,
        up.rows,
        up.scale,
        down.scale,
        ids,
        weights,
        out,
        shared,
        workspace,
        row_width,
        k_sizes,
        f_sizes,
        activation_quantization,
        run,
    )
    return out


def plain_weights(a: Arguments, name: str, dtype: torch.dtype) -> torch.Tensor:
    """The matrices `name` ("up" or "down") [E, N, K] of an op's arguments; of codes the values,
    in `dtype`."""
    if name in a:
        return a[name]
    scale = a[f"{name}_scale"][:, None, None]
    return dequantize(a[f"{name}_codes"], a[f"{name}_block_scales"], scale, dtype)


def _reference(a: Arguments) -> dict[str, torch.Tensor]:
    x, out = a["x"], torch.zeros_like(a["out"])
    wide = torch.promote_types(x.dtype, torch.float32)
    up, down = (plain_weights(a, name, wide) for name in ("up", "down"))
    linear, form = torch.nn.functional.linear, a.get("activation_quantization", "none")
    for r, (k, f) in enumerate(zip(width_rows(a, "k_sizes"), width_rows(a, "f_sizes"))):
        total = torch.zeros(k, dtype=wide)
        own = quantized(form, x[r : r + 1, :k])[0].to(wide)
        for j in torch.argsort(a["ids"][r], stable=True).tolist():
            e = int(a["ids"][r, j])
            middle = linear(own, up[e, :f, :k].to(wide)).to(x.dtype)
            middle = quantized(form, torch.relu(middle).square()[None])[0]
            y = linear(middle.to(wide), down[e, :k, :f].to(wide)).to(x.dtype)
            total += y.to(wide) * a["weights"][r, j].to(wide)
        if a["shared"] is not None:
            total += a["shared"][r, :k].to(wide)
        out[r, :k] = total.to(out.dtype)
    return {"out": out}


def _cases():
    yield {"R": 1, "D": 16, "E": 1, "J": 1, "F": 16, "k": (16,), "f": (16,), "shared": False}
    yield {"R": 1, "D": 80, "E": 5, "J": 3, "F": 48, "k": (48, 80), "f": (32, 48), "shared": True}
    yield {
        "R": 19,
        "D": 144,
        "E": 12,
        "J": 4,
        "F": 96,
        "k": (64, 112, 144),
        "f": (96, 16, 80),
        "shared": True,
    }
    yield {
        "R": 150,
        "D": 80,
        "E": 3,
        "J": 2,
        "F": 80,
        "k": (48, 80),
        "f": (80, 64),
        "shared": False,
    }
    for weights in ("fp8", "nvfp4"):
        yield {
            "R": 1,
            "D": 80,
            "E": 5,
            "J": 3,
            "F": 48,
            "k": (48, 80),
            "f": (32, 48),
            "shared": True,
            "weights": weights,
        }
        yield {
            "R": 19,
            "D": 144,
            "E": 12,
            "J": 4,
            "F": 96,
            "k": (64, 112, 144),
            "f": (96, 16, 80),
            "shared": True,
            "weights": weights,
        }
        yield {
            "R": 70,
            "D": 80,
            "E": 3,
            "J": 2,
            "F": 80,
            "k": (48, 80),
            "f": (80, 64),
            "shared": False,
            "weights": weights,
        }
    for R in (1, 8, 256):
        for weights in ({}, {"weights": "nvfp4"}, INT8):
            yield {
                "R": R,
                "D": 1024,
                "E": 64,
                "J": 6,
                "F": 512,
                "k": (1024,),
                "f": (512,),
                "shared": True,
                "bench": True,
            } | weights


def _weights(case: Case, name: str, shape, dtype: torch.dtype, generator) -> Arguments:
    if "weights" not in case:
        return {name: randn(generator, *shape, dtype=dtype, scale=shape[-1] ** -0.5)}
    drawn = draw_codes(generator, *shape, form=case["weights"])
    return {f"{name}_{part}": value for part, value in drawn.items()}


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    R, D, E, J, F = (case[name] for name in "RDEJF")
    draw = torch.rand(R, E, generator=generator)
    return {
        "x": randn(generator, R, D, dtype=dtype),
        **_weights(case, "up", (E, F, D), dtype, generator),
        **_weights(case, "down", (E, D, F), dtype, generator),
        "ids": draw.argsort(1)[:, :J].to(torch.int32).contiguous(),
        "weights": torch.rand(R, J, generator=generator),
        "out": torch.empty(R, D, dtype=dtype),
        "shared": randn(generator, R, D, dtype=dtype) if case["shared"] else None,
        "row_width": draw_widths(generator, R, len(case["k"])),
        "k_sizes": torch.tensor(case["k"], dtype=torch.int32),
        "f_sizes": torch.tensor(case["f"], dtype=torch.int32),
    } | {name: case[name] for name in OPTIONS if name in case}


def _call(a: Arguments, run) -> None:
    given = dict(a)
    for name in ("up", "down"):
        if name in a:
            given[name] = ExpertWeights.pack(a[name])
            continue
        parts = [given.pop(f"{name}_{part}") for part in ("codes", "block_scales", "scale")]
        given[name] = ExpertWeights.pack_codes(*parts, check=False)
    up = given["up"]
    ids, x = (v if isinstance(v, torch.Tensor) else torch.empty(0) for v in (a["ids"], a["x"]))
    R, J = (*ids.shape, 1, 1)[:2]  # moe_matmul itself refuses what is no tensor or of other rank
    size = moe_workspace_bytes(R, J, up.experts, up.columns, up.rows, x.dtype)
    moe_matmul(run=run, workspace=torch.full((size,), 255, dtype=torch.uint8), **given)


def _poison(a: Arguments) -> None:
    nan = float("nan")
    ks, fs = width_rows(a, "k_sizes"), width_rows(a, "f_sizes")
    for r, k in enumerate(ks):
        a["x"][r, k:] = nan
        if a["shared"] is not None:
            a["shared"][r, k:] = nan
    for e in range(
        (a["up"] if "up" in a else a["up_codes"]).shape[0]
    ):  # what none of an expert's own rows uses
        rows = (a["ids"] == e).any(1).nonzero().flatten().tolist()
        k, f = max((ks[r] for r in rows), default=0), max((fs[r] for r in rows), default=0)
        _poison_expert(a, "up", e, f, k)
        _poison_expert(a, "down", e, k, f)


def _poison_expert(a: Arguments, name: str, e: int, rows: int, columns: int) -> None:
    blocks = a.get(f"{name}_block_scales")
    if name in a:
        matrix, value, columns = a[name][e], float("nan"), columns
    elif blocks is None:
        matrix, value, columns = a[f"{name}_codes"][e], NAN_SCALE, columns
    else:
        matrix, value, columns = blocks[e], NAN_SCALE, columns // BLOCK
    matrix[rows:] = value
    matrix[:, columns:] = value


def _cut_experts(a: Arguments, name: str, rows: int, columns: int) -> Arguments:
    if name in a:
        return {name: a[name][:, :rows, :columns].contiguous()}
    blocks, per_byte = a[f"{name}_block_scales"], 1
    if blocks is not None:
        blocks, per_byte = blocks[:, :rows, : columns // BLOCK].contiguous(), 2
    return {
        f"{name}_codes": a[f"{name}_codes"][:, :rows, : columns // per_byte].contiguous(),
        f"{name}_block_scales": blocks,
        f"{name}_scale": a[f"{name}_scale"],
    }


def _sliced(a: Arguments):
    for w, (k, f) in enumerate(zip(a["k_sizes"].tolist(), a["f_sizes"].tolist())):
        rows = (a["row_width"] == w).nonzero().flatten()
        if not len(rows):
            continue
        cut = {
            "x": a["x"][rows, :k].contiguous(),
            **_cut_experts(a, "up", f, k),
            **_cut_experts(a, "down", k, f),
            "ids": a["ids"][rows].clone(),
            "weights": a["weights"][rows].clone(),
            "out": torch.empty(len(rows), k, dtype=a["out"].dtype),
            "shared": None if a["shared"] is None else a["shared"][rows, :k].contiguous(),
            "row_width": None,
            "k_sizes": None,
            "f_sizes": None,
            **{name: a[name] for name in OPTIONS if name in a},
        }
        yield cut, {"out": ((rows[:, None], torch.arange(k)), ...)}


def _row(a: Arguments, r: int):
    one = dict(a)
    for name in ("x", "ids", "weights", "out", "shared", "row_width"):
        one[name] = None if a[name] is None else a[name][r : r + 1].clone()
    return one, {"out": ((r,), (0,))}


def _cost(case: Case, itemsize: int) -> tuple[int, int]:
    R, D, E, J, F = (case[name] for name in "RDEJF")
    read = E * (1 - (1 - J / E) ** R)  # experts that some row names, for evenly spread rows
    rows = R * D * (3 if case["shared"] else 2) * itemsize
    traffic = 2 * read * D * F * weight_bytes(case, itemsize) + rows
    return int(traffic) + R * J * 8, 4 * R * J * D * F


SPECS = [
    OpSpec(
        name="moe_matmul",
        call=_call,
        reference=_reference,
        cases=_cases,
        inputs=_inputs,
        outputs=("out",),
        cost=_cost,
        poison=_poison,
        sliced=_sliced,
        row=_row,
        rows=lambda a: a["x"].shape[0],
        keep_dtype=("weights",),
    )
]
