"""One op as the library knows it beyond its function: reference, cases, inputs, cost.

Tests, benchmarks and documentation iterate :func:`registry`; adding an op means adding its module
to this package and its folder to ``csrc/ops``, and edits no list.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

Case = dict[str, Any]
Arguments = dict[str, Any]


@dataclass(frozen=True)
class OpSpec:
    """One op, as tests and benchmarks see it.

    Attributes:
        name: the op's name, everywhere.
        call: ``call(arguments, run)`` runs the native op on `arguments`, writing the tensors named
            in `outputs`.
        reference: ``reference(arguments)`` defines the op in plain torch: it computes in the
            floating dtype of its arguments (float64 gives the oracle) and returns the expected
            outputs by name, without touching its arguments.
        cases: ``cases()`` yields sizes: the smallest, the awkward, a real model's (marked
            ``bench=True``).
        inputs: ``inputs(case, dtype, generator)`` makes seeded arguments, outputs included; weights
            are plain tensors there, and `call` packs them.
        outputs: names of the tensors that `call` writes.
        cost: ``cost(case, itemsize)`` is (bytes moved, flops).
        poison: ``poison(arguments)`` puts NaN, in place, wherever the op must not read.
        sliced: ``sliced(arguments)`` yields pairs (arguments of the same problem on contiguous
            copies cut to one width, {output: (index into the original's output, index into the
            copy's)}).
        row: ``row(arguments, r)`` is the problem of row r alone, with {output: (index into the
            original, index into the copy)}.
        rows: ``rows(arguments)`` counts the rows.
    """

    name: str
    call: Callable[[Arguments, Any], None]
    reference: Callable[[Arguments], dict[str, torch.Tensor]]
    cases: Callable[[], Iterable[Case]]
    inputs: Callable[[Case, torch.dtype, torch.Generator], Arguments]
    outputs: tuple[str, ...]
    cost: Callable[[Case, int], tuple[int, int]]
    poison: Callable[[Arguments], None] | None = None
    sliced: Callable[[Arguments], Iterable[tuple[Arguments, dict]]] | None = None
    row: Callable[[Arguments, int], tuple[Arguments, dict]] | None = None
    rows: Callable[[Arguments], int] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    keep_dtype: tuple[str, ...] = field(default=())  # arguments that stay float32 in every dtype


@cache
def registry() -> dict[str, OpSpec]:
    """All ops by name, found by importing the modules of this package."""
    package = importlib.import_module(__package__)
    found = {}
    for info in pkgutil.iter_modules(package.__path__):
        if not info.name.startswith("_"):
            module = importlib.import_module(f"{__package__}.{info.name}")
            for spec in getattr(module, "SPECS", ()):
                found[spec.name] = spec
    return found


def case_id(case: Case) -> str:
    """A case as a short, filterable test name: ``R=3 D=48``."""
    return " ".join(f"{k}={v}" for k, v in case.items() if k != "bench")


def randn(generator: torch.Generator, *shape: int, dtype: torch.dtype, scale: float = 1.0):
    """Normal values of the given shape, drawn in float32 so that every dtype sees the same."""
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def width_rows(arguments: Arguments, sizes: str = "sizes") -> list[int]:
    """The active size of each row according to the width table `sizes` ([W], or None)."""
    row_width, table = arguments["row_width"], arguments[sizes]
    return [int(table[int(w)]) for w in row_width]


def draw_widths(generator: torch.Generator, rows: int, widths: int, sort: bool = True):
    """[rows] int32 width indices, every width present when there are rows enough, sorted as the
    runtime sorts them (so that rows of equal width share blocks)."""
    drawn = torch.randint(0, widths, (rows,), generator=generator, dtype=torch.int32)
    drawn[: min(widths, rows)] = torch.arange(min(widths, rows), dtype=torch.int32)
    return drawn.sort().values.to(torch.int32) if sort else drawn
