"""matmul: activations times tiled weights, with a prefix of both sides per row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import _C
from ._spec import Arguments, Case, OpSpec, draw_widths, randn, width_rows

TILE = 64


def tile_count(n: int) -> int:
    """Tiles of 64 that n rows or columns occupy."""
    return -(-n // TILE)


@dataclass(frozen=True)
class Segment:
    """A run of weight rows: where its tiles start, where its outputs go, how many rows it has."""

    tile_row: int
    column: int
    rows: int


@dataclass(frozen=True)
class TiledWeight:
    """A matrix stored once, as 64x64 tiles ``[rows/64][columns/64]``, zero-padded.

    image: [row tiles, column tiles, tile bytes] uint8. columns: K, the row length in elements.
    segments: the runs of rows; each starts its own tile, so every prefix of each is whole tiles.
    """

    image: torch.Tensor
    columns: int
    segments: tuple[Segment, ...]

    @property
    def rows(self) -> int:
        return sum(s.rows for s in self.segments)

    @staticmethod
    def empty(
        segment_rows: list[int], columns: int, dtype: torch.dtype, memory=None
    ) -> TiledWeight:
        """Room for a matrix whose segments have `segment_rows` rows, outputs side by side.
        memory: a `WeightMemory` to take it from, or None."""
        segments, tile, column = [], 0, 0
        for rows in segment_rows:
            segments.append(Segment(tile, column, rows))
            tile, column = tile + tile_count(rows), column + rows
        itemsize = torch.empty(0, dtype=dtype).element_size()
        shape = (tile, tile_count(columns), TILE * TILE * itemsize)
        image = memory.empty(*shape) if memory else torch.empty(shape, dtype=torch.uint8)
        return TiledWeight(image, columns, tuple(segments))

    def fill(self, segment: int, source: torch.Tensor, run=None) -> None:
        """Packs `source` [rows, columns] (float32 or bfloat16) into one segment."""
        expected = (self.segments[segment].rows, self.columns)
        if tuple(source.shape) != expected:
            raise ValueError(
                f"matmul_pack: source must have shape {list(expected)}, got {list(source.shape)}"
            )
        _C.matmul_pack(source, self.image, self.segments[segment].tile_row, run)

    @staticmethod
    def pack(weight: torch.Tensor, segment_rows: list[int] | None = None, run=None) -> TiledWeight:
        """Tiles of `weight` [N, K] float32 or bfloat16; K a multiple of 16 for `matmul`."""
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
            got = list(weight.shape) if isinstance(weight, torch.Tensor) else type(weight).__name__
            raise ValueError(f"matmul_pack: weight must be a tensor of shape [N, K], got {got}")
        rows = segment_rows or [weight.shape[0]]
        if sum(rows) != weight.shape[0]:
            raise ValueError(
                f"matmul_pack: segment_rows must add up to the weight's {weight.shape[0]} rows, "
                f"got {rows}"
            )
        tiled = TiledWeight.empty(rows, weight.shape[1], weight.dtype)
        at = 0
        for i, n in enumerate(rows):
            tiled.fill(i, weight[at : at + n], run)
            at += n
        return tiled


def matmul(
    x: torch.Tensor,
    weight: TiledWeight,
    out: torch.Tensor,
    *,
    activation: str = "none",
    row_width: torch.Tensor | None = None,
    k_sizes: torch.Tensor | None = None,
    n_sizes: torch.Tensor | None = None,
    run=None,
) -> torch.Tensor:
    """``out[r, c] = act(sum_{k < k_r} x[r, k] * W[c, k])`` for the first n_r outputs of each
    segment, and exact zero in the rest of it.

    Args:
        x: [R, K] float32 or bfloat16; exactly zero is assumed between a row's own k and the widest
            k of its block, so nothing beyond a row's own k is read.
        weight: the tiled matrix; bfloat16 tiles with either x, float32 tiles with float32 x.
        out: [R, N] float32 or bfloat16.
        activation: "none" or "relu2" (the projection is rounded to x's dtype, then relu squared).
        row_width: [R] int32 index of each row's width, or None: every row uses everything.
        k_sizes: [W] int32 columns used at each width, multiples of 16.
        n_sizes: [W, S] int32 rows used of each segment at each width.
        run: None, a Pool or a Step.

    Returns: `out`.

    Raises: ValueError naming the argument that has the wrong shape, dtype, stride or value.
    """
    segments = [(s.tile_row, s.column, s.rows) for s in weight.segments]
    _C.matmul(
        x, weight.image, weight.columns, out, segments, activation, row_width, k_sizes, n_sizes, run
    )
    return out


def _split(case: Case) -> list[int]:
    return list(case["segments"])


def _reference(a: Arguments) -> dict[str, torch.Tensor]:
    x, w, out = a["x"], a["weight"], torch.zeros_like(a["out"])
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    for r, k in enumerate(width_rows(a, "k_sizes")):
        y = torch.nn.functional.linear(x[r, :k].to(wide), w[:, :k].to(wide))
        if a["activation"] == "relu2":
            y = torch.relu(y.to(x.dtype).to(wide)).square()
        column = 0
        for s, rows in enumerate(a["segments"]):
            n = int(a["n_sizes"][int(a["row_width"][r]), s])
            out[r, column : column + n] = y[column : column + n].to(out.dtype)
            column += rows
    return {"out": out}


def _cases():
    yield {"R": 1, "K": 16, "segments": (16,), "k": (16,), "n": ((16,),), "act": "none"}
    yield {"R": 1, "K": 176, "segments": (80, 8), "k": (48, 176), "n": ((40, 4), (80, 8)),
           "act": "none"}  # fmt: skip
    yield {"R": 7, "K": 208, "segments": (130,), "k": (64, 144, 208),
           "n": ((32,), (96,), (130,)), "act": "relu2"}  # fmt: skip
    yield {"R": 37, "K": 96, "segments": (64, 100, 3), "k": (48, 96),
           "n": ((16, 100, 1), (64, 100, 3)), "act": "none"}  # fmt: skip
    yield {"R": 300, "K": 80, "segments": (72,), "k": (32, 80), "n": ((24,), (72,)),
           "act": "none"}  # fmt: skip
    for R in (1, 8, 256):
        yield {"R": R, "K": 2688, "segments": (4096, 4096, 1024, 1024, 64), "k": (2688,),
               "n": ((4096, 4096, 1024, 1024, 64),), "act": "none", "bench": True}  # fmt: skip


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    R, K, N = case["R"], case["K"], sum(case["segments"])
    a = {
        "x": randn(generator, R, K, dtype=dtype),
        "weight": randn(generator, N, K, dtype=dtype, scale=K**-0.5),
        "segments": case["segments"],
        "out": torch.empty(R, N, dtype=dtype),
        "activation": case["act"],
        "row_width": draw_widths(generator, R, len(case["k"])),
        "k_sizes": torch.tensor(case["k"], dtype=torch.int32),
        "n_sizes": torch.tensor(case["n"], dtype=torch.int32),
    }
    for r, k in enumerate(width_rows(a, "k_sizes")):
        a["x"][r, k:] = 0
    return a


def _call(a: Arguments, run) -> None:
    given = dict(a)
    given["weight"] = TiledWeight.pack(a["weight"], list(given.pop("segments")))
    matmul(run=run, **given)


def _poison(a: Arguments) -> None:
    nan = float("nan")
    k_max = max(width_rows(a, "k_sizes"))
    for r, k in enumerate(width_rows(a, "k_sizes")):
        a["x"][r, k:] = nan  # a row's own prefix is all that is read
    a["weight"][:, k_max:] = nan
    used = a["n_sizes"][a["row_width"].long()].max(0).values.tolist()
    at = 0
    for s, rows in enumerate(a["segments"]):
        a["weight"][at + used[s] : at + rows] = nan
        at += rows


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
            "weight": a["weight"][columns][:, :k].contiguous(),
            "segments": tuple(n),
            "out": torch.empty(len(rows), sum(n), dtype=a["out"].dtype),
            "activation": a["activation"],
            "row_width": None, "k_sizes": None, "n_sizes": None,
        }  # fmt: skip
        yield cut, {"out": ((rows[:, None], columns), ...)}


def _row(a: Arguments, r: int):
    one = dict(a)
    for name in ("x", "out", "row_width"):
        one[name] = a[name][r : r + 1].clone()
    return one, {"out": ((r,), (0,))}


def _cost(case: Case, itemsize: int) -> tuple[int, int]:
    R, K, N = case["R"], case["K"], sum(case["segments"])
    return (N * K + R * (K + N)) * itemsize, 2 * R * N * K


SPECS = [
    OpSpec(
        name="matmul", call=_call, reference=_reference, cases=_cases, inputs=_inputs,
        outputs=("out",), cost=_cost, poison=_poison, sliced=_sliced, row=_row,
        rows=lambda a: a["x"].shape[0],
    )
]  # fmt: skip
