"""moe_matmul: each row through its own experts, summed by routing weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import _C
from ._spec import Arguments, Case, OpSpec, draw_widths, randn, width_rows
from .matmul import TILE, tile_count


@dataclass(frozen=True)
class ExpertWeights:
    """One matrix per expert, each stored once as 64x64 tiles, zero-padded.

    image: [E, row tiles, column tiles, tile bytes] uint8. rows, columns: of every expert's matrix.
    """

    image: torch.Tensor
    rows: int
    columns: int

    @property
    def experts(self) -> int:
        return self.image.shape[0]

    @staticmethod
    def empty(
        experts: int, rows: int, columns: int, dtype: torch.dtype, memory=None
    ) -> ExpertWeights:
        """Room for `experts` matrices [rows, columns] of float32 or bfloat16. memory: a
        `WeightMemory` to take it from, or None."""
        itemsize = torch.empty(0, dtype=dtype).element_size()
        shape = (experts, tile_count(rows), tile_count(columns), TILE * TILE * itemsize)
        image = memory.empty(*shape) if memory else torch.empty(shape, dtype=torch.uint8)
        return ExpertWeights(image, rows, columns)

    def fill(self, expert: int, source: torch.Tensor, run=None) -> None:
        """Packs `source` [rows, columns] (float32 or bfloat16) as the matrix of one expert."""
        if tuple(source.shape) != (self.rows, self.columns):
            raise ValueError(
                f"matmul_pack: source must have shape {[self.rows, self.columns]}, "
                f"got {list(source.shape)}"
            )
        if not 0 <= expert < self.experts:
            raise ValueError(f"matmul_pack: expert must be in [0, {self.experts}), got {expert}")
        _C.matmul_pack(source, self.image[expert], 0, run)

    @staticmethod
    def pack(weight: torch.Tensor, run=None) -> ExpertWeights:
        """Tiles of `weight` [E, rows, columns] float32 or bfloat16."""
        if not isinstance(weight, torch.Tensor) or weight.ndim != 3:
            got = list(weight.shape) if isinstance(weight, torch.Tensor) else type(weight).__name__
            raise ValueError(f"matmul_pack: weight must have shape [E, rows, columns], got {got}")
        packed = ExpertWeights.empty(*weight.shape, weight.dtype)
        for e in range(weight.shape[0]):
            packed.fill(e, weight[e], run)
        return packed


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
    run=None,
) -> torch.Tensor:
    """``out[r, :k] = sum_j weights[r, j] * down_e(relu(up_e x[r, :k])^2) + shared[r, :k]`` with
    e = ids[r, j], over the first f of each expert's width, and exact zero beyond k.

    Args:
        x: [R, D] float32 or bfloat16; nothing beyond a row's own k is read.
        up: E matrices [F, D]; bfloat16 tiles with either x, float32 tiles with float32 x.
        down: E matrices [D, F], tiles as `up`.
        ids: [R, J] int32 experts of each row, in [0, E). Experts that no row names are not read.
        weights: [R, J] float32.
        out: [R, D], dtype of x.
        workspace: [at least moe_workspace_bytes(...)] uint8, overwritten.
        shared: [R, D], dtype of x, added last, or None.
        row_width: [R] int32 index of each row's width, or None: every row uses everything.
        k_sizes: [W] int32 hidden channels at each width, multiples of 16.
        f_sizes: [W] int32 expert channels at each width, multiples of 16.
        run: None, a Pool or a Step.

    Returns: `out`.

    Raises: ValueError naming the argument that has the wrong shape, dtype, stride or value.

    Source: transformers' nemotron_h. The up product, its activation and the down product are
    rounded to x's dtype; the sum runs in float32 by ascending expert and is rounded once.
    """
    if (up.rows, up.columns) != (down.columns, down.rows):
        raise ValueError(
            f"moe_matmul: down must have shape [D, F] where up has [F, D] = "
            f"{[up.rows, up.columns]}, got {[down.rows, down.columns]}"
        )
    _C.moe_matmul(
        x, up.image, down.image, up.columns, up.rows, ids, weights, out, shared, workspace,
        row_width, k_sizes, f_sizes, run,
    )  # fmt: skip
    return out


def _reference(a: Arguments) -> dict[str, torch.Tensor]:
    x, out = a["x"], torch.zeros_like(a["out"])
    wide = torch.promote_types(x.dtype, torch.float32)
    linear = torch.nn.functional.linear
    for r, (k, f) in enumerate(zip(width_rows(a, "k_sizes"), width_rows(a, "f_sizes"))):
        total = torch.zeros(k, dtype=wide)
        for j in torch.argsort(a["ids"][r], stable=True).tolist():
            e = int(a["ids"][r, j])
            middle = linear(x[r, :k].to(wide), a["up"][e, :f, :k].to(wide)).to(x.dtype)
            middle = torch.relu(middle).square()
            y = linear(middle.to(wide), a["down"][e, :k, :f].to(wide)).to(x.dtype)
            total += y.to(wide) * a["weights"][r, j].to(wide)
        if a["shared"] is not None:
            total += a["shared"][r, :k].to(wide)
        out[r, :k] = total.to(out.dtype)
    return {"out": out}


def _cases():
    yield {"R": 1, "D": 16, "E": 1, "J": 1, "F": 16, "k": (16,), "f": (16,), "shared": False}
    yield {"R": 1, "D": 80, "E": 5, "J": 3, "F": 48, "k": (48, 80), "f": (32, 48),
           "shared": True}  # fmt: skip
    yield {"R": 19, "D": 144, "E": 12, "J": 4, "F": 96, "k": (64, 112, 144),
           "f": (96, 16, 80), "shared": True}  # fmt: skip
    yield {"R": 150, "D": 80, "E": 3, "J": 2, "F": 80, "k": (48, 80), "f": (80, 64),
           "shared": False}  # fmt: skip
    for R in (1, 8, 256):
        yield {"R": R, "D": 1024, "E": 64, "J": 6, "F": 512, "k": (1024,), "f": (512,),
               "shared": True, "bench": True}  # fmt: skip


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    R, D, E, J, F = (case[name] for name in "RDEJF")
    draw = torch.rand(R, E, generator=generator)
    return {
        "x": randn(generator, R, D, dtype=dtype),
        "up": randn(generator, E, F, D, dtype=dtype, scale=D**-0.5),
        "down": randn(generator, E, D, F, dtype=dtype, scale=F**-0.5),
        "ids": draw.argsort(1)[:, :J].to(torch.int32).contiguous(),
        "weights": torch.rand(R, J, generator=generator),
        "out": torch.empty(R, D, dtype=dtype),
        "shared": randn(generator, R, D, dtype=dtype) if case["shared"] else None,
        "row_width": draw_widths(generator, R, len(case["k"])),
        "k_sizes": torch.tensor(case["k"], dtype=torch.int32),
        "f_sizes": torch.tensor(case["f"], dtype=torch.int32),
    }


def _call(a: Arguments, run) -> None:
    given = dict(a)
    up = given["up"] = ExpertWeights.pack(a["up"])
    given["down"] = ExpertWeights.pack(a["down"])
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
    for e in range(a["up"].shape[0]):  # what none of an expert's own rows uses
        rows = (a["ids"] == e).any(1).nonzero().flatten().tolist()
        k, f = max((ks[r] for r in rows), default=0), max((fs[r] for r in rows), default=0)
        a["up"][e, f:] = nan
        a["up"][e, :, k:] = nan
        a["down"][e, k:] = nan
        a["down"][e, :, f:] = nan


def _sliced(a: Arguments):
    for w, (k, f) in enumerate(zip(a["k_sizes"].tolist(), a["f_sizes"].tolist())):
        rows = (a["row_width"] == w).nonzero().flatten()
        if not len(rows):
            continue
        cut = {
            "x": a["x"][rows, :k].contiguous(),
            "up": a["up"][:, :f, :k].contiguous(),
            "down": a["down"][:, :k, :f].contiguous(),
            "ids": a["ids"][rows].clone(),
            "weights": a["weights"][rows].clone(),
            "out": torch.empty(len(rows), k, dtype=a["out"].dtype),
            "shared": None if a["shared"] is None else a["shared"][rows, :k].contiguous(),
            "row_width": None, "k_sizes": None, "f_sizes": None,
        }  # fmt: skip
        yield cut, {"out": ((rows[:, None], torch.arange(k)), ...)}


def _row(a: Arguments, r: int):
    one = dict(a)
    for name in ("x", "ids", "weights", "out", "shared", "row_width"):
        one[name] = None if a[name] is None else a[name][r : r + 1].clone()
    return one, {"out": ((r,), (0,))}


def _cost(case: Case, itemsize: int) -> tuple[int, int]:
    R, D, E, J, F = (case[name] for name in "RDEJF")
    read = E * (1 - (1 - J / E) ** R)  # experts that some row names, for evenly spread rows
    traffic = 2 * read * D * F + R * D * (3 if case["shared"] else 2)
    return int(traffic * itemsize) + R * J * 8, 4 * R * J * D * F


SPECS = [
    OpSpec(
        name="moe_matmul", call=_call, reference=_reference, cases=_cases, inputs=_inputs,
        outputs=("out",), cost=_cost, poison=_poison, sliced=_sliced, row=_row,
        rows=lambda a: a["x"].shape[0], keep_dtype=("weights",),
    )
]  # fmt: skip
