"""matmul: activations times tiled weights, with a prefix of both sides per row."""

from __future__ import annotations

import torch

from .. import _C
from ..codes import BLOCK
from ._activations import quantized
from ._quantized import dequantize, draw_codes
from ._spec import Arguments, Case, OpSpec, draw_widths, randn, width_rows
from .tiles import NAN_SCALE, TiledWeight

OPTIONS = ("activation_quantization", "kernel")  # arguments that a case may have
INT8 = {"weights": "nvfp4", "activation_quantization": "int8"}  # for the CPU alone


def matmul(
    x: torch.Tensor,
    weight: TiledWeight,
    out: torch.Tensor,
    *,
    activation: str = "none",
    row_width: torch.Tensor | None = None,
    k_sizes: torch.Tensor | None = None,
    n_sizes: torch.Tensor | None = None,
    activation_quantization: str = "none",
    kernel: str = "auto",
    run=None,
) -> torch.Tensor:
    """``out[r, c] = act(sum_{k < k_r} x[r, k] * W[c, k])`` for the first n_r outputs of each
    segment, and exact zero in the rest of it.

    Args:
        x: [R, K] float32 or bfloat16; exactly zero is assumed between a row's own k and the widest
            k of its block, so nothing beyond a row's own k is read.
        weight: the tiled matrix; float32 tiles with float32 x, all others with either x.
        out: [R, N] float32 or bfloat16.
        activation: "none" or "relu2" (the projection is rounded to x's dtype, then relu squared).
        row_width: [R] int32 index of each row's width, or None: every row uses everything.
        k_sizes: [W] int32 columns used at each width, multiples of 16.
        n_sizes: [W, S] int32 rows used of each segment at each width.
        activation_quantization: "none"; or, with an NVFP4 weight, "int8" on the CPU: every 16
            columns of a row become whole numbers of -127..127 (exact sums of integers; about 0.5 %
            of error for normal x); or "nvfp4" on a GPU of compute capability 12.x: rows become
            NVFP4 as well (each with the scale of its own prefix), which tensor cores multiply in
            that form. The latter has never run on a GPU.
        kernel: "auto"; or "wgmma": for bfloat16 x and weight on a GPU of compute capability 9.0,
            the kernel with asynchronous products, which is for many rows. It has never run on one.
        run: None, a Pool or a Step.

    Returns:
        `out`.

    Raises:
        ValueError: names the argument that has the wrong shape, dtype, stride or value.
    """
    segments = [(s.tile_row, s.column, s.rows) for s in weight.segments]
    _C.matmul(
        x,
        weight.image,
        weight.columns,
        weight.scale,
        out,
        segments,
        activation,
        row_width,
        k_sizes,
        n_sizes,
        activation_quantization,
        kernel,
        run,
    )
    return out


def _split(case: Case) -> list[int]:
    return list(case["segments"])


def plain_weight(a: Arguments, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K] of an op's arguments; of codes the values, in `dtype`."""
    if "weight" in a:
        return a["weight"]
    scale = a["scale"].repeat_interleave(torch.tensor(a["segments"]))[:, None]
    return dequantize(a["codes"], a["block_scales"], scale, dtype)


def _reference(a: Arguments) -> dict[str, torch.Tensor]:
    x, out = a["x"], torch.zeros_like(a["out"])
    form = a.get("activation_quantization", "none")
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    w = plain_weight(a, wide)
    for r, k in enumerate(width_rows(a, "k_sizes")):
        own = quantized(form, x[r : r + 1, :k])[0]
        y = torch.nn.functional.linear(own.to(wide), w[:, :k].to(wide))
        if a["activation"] == "relu2":
            y = torch.relu(y.to(x.dtype).to(wide)).square()
        column = 0
        for s, rows in enumerate(a["segments"]):
            n = int(a["n_sizes"][int(a["row_width"][r]), s])
            out[r, column : column + n] = y[column : column + n].to(out.dtype)
            column += rows
    return {"out": out}


def _case(R: int, K: int, segments, k, n, act: str = "none", **more) -> Case:
    """A case: segments, rows of each; k and n, columns and rows of every width."""
    return {"R": R, "K": K, "segments": segments, "k": k, "n": n, "act": act, **more}


def _cases():
    smallest = (1, 16, (16,), (16,), ((16,),))
    uneven = (1, 176, (80, 8), (48, 176), ((40, 4), (80, 8)))
    three = (96, (64, 100, 3), (48, 96), ((16, 100, 1), (64, 100, 3)))
    yield _case(*smallest)
    yield _case(*uneven)
    yield _case(7, 208, (130,), (64, 144, 208), ((32,), (96,), (130,)), "relu2")
    yield _case(37, *three)
    yield _case(300, 80, (72,), (32, 80), ((24,), (72,)))
    for weights in ("fp8", "nvfp4"):
        yield _case(*smallest, weights=weights)
        yield _case(*uneven, weights=weights)
        n = ((32, 8), (96, 40), (130, 1))
        yield _case(29, 208, (130, 40), (64, 144, 208), n, "relu2", weights=weights)
        yield _case(7, *three, weights=weights)
    yield _case(9, 80, (72,), (32, 80), ((24,), (72,)), weights="nvfp4", small=True)
    rows = (4096, 4096, 1024, 1024, 64)
    for R in (1, 8, 256):
        for weights in ({}, {"weights": "fp8"}, {"weights": "nvfp4"}, INT8):
            yield _case(R, 2688, rows, (2688,), (rows,), bench=True, **weights)


def _weights(case: Case, N: int, K: int, dtype: torch.dtype, generator) -> Arguments:
    if "weights" not in case:
        return {"weight": randn(generator, N, K, dtype=dtype, scale=K**-0.5)}
    drawn = draw_codes(generator, N, K, form=case["weights"], small=case.get("small", False))
    steps = torch.arange(1.0, len(case["segments"]) + 1)
    return drawn | {"scale": drawn["scale"] * steps}


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    R, K, N = case["R"], case["K"], sum(case["segments"])
    a = {
        "x": randn(generator, R, K, dtype=dtype),
        **_weights(case, N, K, dtype, generator),
        "segments": case["segments"],
        "out": torch.empty(R, N, dtype=dtype),
        "activation": case["act"],
        "row_width": draw_widths(generator, R, len(case["k"])),
        "k_sizes": torch.tensor(case["k"], dtype=torch.int32),
        "n_sizes": torch.tensor(case["n"], dtype=torch.int32),
    } | {name: case[name] for name in OPTIONS if name in case}
    for r, k in enumerate(width_rows(a, "k_sizes")):
        a["x"][r, k:] = 0
    return a


def _call(a: Arguments, run) -> None:
    given = dict(a)
    segments = list(given.pop("segments"))
    if "weight" in a:
        given["weight"] = TiledWeight.pack(a["weight"], segments)
    else:
        codes, blocks, scale = (given.pop(n) for n in ("codes", "block_scales", "scale"))
        given["weight"] = TiledWeight.pack_codes(codes, blocks, scale, segments, check=False)
    matmul(run=run, **given)


def _poison(a: Arguments) -> None:
    nan = float("nan")
    k_max = max(width_rows(a, "k_sizes"))
    for r, k in enumerate(width_rows(a, "k_sizes")):
        a["x"][r, k:] = nan  # a row's own prefix is all that is read
    _poison_columns(a, k_max)
    used = a["n_sizes"][a["row_width"].long()].max(0).values.tolist()
    at = 0
    for s, rows in enumerate(a["segments"]):
        _poison_rows(a, slice(at + used[s], at + rows))
        at += rows


def _poison_columns(a: Arguments, k: int) -> None:
    if "weight" in a:
        a["weight"][:, k:] = float("nan")
    elif a["block_scales"] is None:
        a["codes"][:, k:] = NAN_SCALE
    else:
        a["block_scales"][:, k // BLOCK :] = NAN_SCALE


def _poison_rows(a: Arguments, rows: slice) -> None:
    if "weight" in a:
        a["weight"][rows] = float("nan")
    elif a["block_scales"] is None:
        a["codes"][rows] = NAN_SCALE
    else:
        a["block_scales"][rows] = NAN_SCALE


def _cut_weight(a: Arguments, rows: torch.Tensor, k: int) -> Arguments:
    if "weight" in a:
        return {"weight": a["weight"][rows][:, :k].contiguous()}
    codes, blocks = a["codes"][rows], a["block_scales"]
    if blocks is None:
        return {"codes": codes[:, :k].contiguous(), "block_scales": None, "scale": a["scale"]}
    return {
        "codes": codes[:, : k // 2].contiguous(),
        "block_scales": blocks[rows][:, : k // BLOCK].contiguous(),
        "scale": a["scale"],
    }


def _sliced(a: Arguments):
    for w, k in enumerate(a["k_sizes"].tolist()):
        rows = (a["row_width"] == w).nonzero().flatten()
        n = a["n_sizes"][w].tolist()
        if not len(rows):
            continue
        starts = [sum(a["segments"][:s]) for s in range(len(n))]
        columns = torch.cat([torch.arange(b, b + m) for b, m in zip(starts, n)])
        cut = {
            "x": a["x"][rows, :k].contiguous(),
            **_cut_weight(a, columns, k),
            "segments": tuple(n),
            "out": torch.empty(len(rows), sum(n), dtype=a["out"].dtype),
            "activation": a["activation"],
            "row_width": None,
            "k_sizes": None,
            "n_sizes": None,
            **{name: a[name] for name in OPTIONS if name in a},
        }
        yield cut, {"out": ((rows[:, None], columns), ...)}


def _row(a: Arguments, r: int):
    one = dict(a)
    for name in ("x", "out", "row_width"):
        one[name] = a[name][r : r + 1].clone()
    return one, {"out": ((r,), (0,))}


def _cost(case: Case, itemsize: int) -> tuple[int, int]:
    R, K, N = case["R"], case["K"], sum(case["segments"])
    weights = N * K * weight_bytes(case, itemsize)
    return int(weights + R * (K + N) * itemsize), 2 * R * N * K


def weight_bytes(case: Case, itemsize: int) -> float:
    """Bytes per weight of a case, whose float weights have `itemsize`."""
    return {"fp8": 1.0, "nvfp4": 0.5625}.get(case.get("weights"), itemsize)


SPECS = [
    OpSpec(
        name="matmul",
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
    )
]
