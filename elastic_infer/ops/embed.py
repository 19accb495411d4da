"""embed: rows of a table by index, each row's own channel prefix."""

from __future__ import annotations

import torch

from .. import _C
from ._spec import Arguments, Case, OpSpec, draw_widths, randn, width_rows


def embed(
    ids: torch.Tensor,
    table: torch.Tensor,
    out: torch.Tensor,
    *,
    row_width: torch.Tensor | None = None,
    sizes: torch.Tensor | None = None,
    drawn: torch.Tensor | None = None,
    feed: torch.Tensor | None = None,
    run=None,
) -> torch.Tensor:
    """``out[r, :n] = table[id[r], :n]``, where n is row r's active prefix; `out` beyond n stays as
    it is. Also gathers rows of any other matrix.

    ``id[r] = ids[r]``, or ``drawn[feed[r]]`` where a `feed` is given and not -1: a token that
    `sample` drew on the device is read on without a way through the host.

    Args:
        ids: [R] int32 indices in [0, V).
        table: [V, D] float32 or bfloat16; only the prefixes of the rows asked for are read.
        out: [R, D], dtype of `table`, not overlapping it.
        row_width: [R] int32 index of each row's width, or None for all of D.
        sizes: [W] int32 active channels of each width, multiples of 16.
        drawn: [N] int32 ids in [-1, V) that another op wrote; -1 (nothing could be drawn) leaves a
            row fed with it as it is.
        feed: [R] int32 in [-1, N): where in `drawn` a row's id is, -1 for `ids`. Comes with
            `drawn`.
        run: None, a Pool or a Step.

    Returns:
        `out`.

    Raises:
        ValueError: names the argument that has the wrong shape, dtype, stride or value; an id
            outside the table is found at the call, or at the replay of a recorded call.
    """
    _C.embed(ids, table, out, row_width, sizes, drawn, feed, run)
    return out


def _ids(a: Arguments) -> list[int]:
    """The id of each row, -1 for none."""
    ids = a["ids"].tolist()
    if a["feed"] is None:
        return ids
    return [int(a["drawn"][j]) if j >= 0 else ids[r] for r, j in enumerate(a["feed"].tolist())]


def _widths(a: Arguments) -> list[int]:
    if a["row_width"] is None:
        return [a["out"].shape[1]] * a["out"].shape[0]
    return width_rows(a)


def _reference(a: Arguments) -> dict[str, torch.Tensor]:
    out = a["out"].clone()
    for r, (i, n) in enumerate(zip(_ids(a), _widths(a))):
        if i >= 0:
            out[r, :n] = a["table"][i, :n]
    return {"out": out}


def _cases():
    yield {"R": 1, "V": 1, "D": 16, "widths": None}
    yield {"R": 9, "V": 21, "D": 48, "widths": None}
    yield {"R": 70, "V": 33, "D": 208, "widths": (48, 112, 208)}
    yield {"R": 2000, "V": 130, "D": 80, "widths": (16, 80)}
    yield {"R": 40, "V": 21, "D": 48, "widths": (16, 48), "drawn": 7}
    yield {"R": 64, "V": 131072, "D": 2688, "widths": (1920, 2688), "bench": True}


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    R, V, D, widths = case["R"], case["V"], case["D"], case["widths"]
    # A column view of a wider matrix, as the runtime's gathers use.
    table = randn(generator, V, D + 32, dtype=dtype)[:, 16 : D + 16]
    N, drawn, feed = case.get("drawn"), None, None
    if N:
        drawn = torch.randint(0, V, (N,), generator=generator, dtype=torch.int32)
        drawn[N // 2] = -1
        feed = torch.randint(-1, N, (R,), generator=generator, dtype=torch.int32)
    return {
        "ids": torch.randint(0, V, (R,), generator=generator, dtype=torch.int32),
        "table": table,
        "out": randn(generator, R, D, dtype=dtype),
        "row_width": draw_widths(generator, R, len(widths), sort=False) if widths else None,
        "sizes": torch.tensor(widths, dtype=torch.int32) if widths else None,
        "drawn": drawn,
        "feed": feed,
    }


def _call(a: Arguments, run) -> None:
    embed(run=run, **a)


def _poison(a: Arguments) -> None:
    used = torch.zeros(a["table"].shape, dtype=torch.bool)
    for i, n in zip(_ids(a), _widths(a)):
        if i >= 0:
            used[i, :n] = True
    a["table"][~used] = float("nan")


def _sliced(a: Arguments):
    full = a["out"].shape[1]
    table = [full] if a["sizes"] is None else a["sizes"].tolist()
    for w, n in enumerate(table):
        rows = torch.arange(len(a["ids"]))
        if a["row_width"] is not None:
            rows = (a["row_width"] == w).nonzero().flatten()
        if not len(rows):
            continue
        cut = {
            "ids": a["ids"][rows],
            "table": a["table"][:, :n].contiguous(),
            "out": a["out"][rows, :n].clone(),
            "row_width": None,
            "sizes": None,
            "drawn": a["drawn"],
            "feed": None if a["feed"] is None else a["feed"][rows],
        }
        yield cut, {"out": ((rows[:, None], torch.arange(n)), ...)}


def _row(a: Arguments, r: int):
    one = dict(a)
    for name in ("ids", "out", "row_width", "feed"):
        one[name] = None if a[name] is None else a[name][r : r + 1].clone()
    return one, {"out": ((r,), (0,))}


def _cost(case: Case, itemsize: int) -> tuple[int, int]:
    return 2 * case["R"] * case["D"] * itemsize, 0


SPECS = [
    OpSpec(
        name="embed",
        call=_call,
        reference=_reference,
        cases=_cases,
        inputs=_inputs,
        outputs=("out",),
        cost=_cost,
        poison=_poison,
        sliced=_sliced,
        row=_row,
        rows=lambda a: a["out"].shape[0],
    )
]
