"""Errors of quantized weights, by layer and width."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..checkpoint.config import ModelConfig
from ..checkpoint.tensor_files import Selection
from .search import Quantized, held_blocks

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ErrorReport"]


class _Sums:
    """Squared errors and squared weights of the matrices that one line is about."""

    def __init__(self, kind: str) -> None:
        self.format, self.matrices, self.weights = kind, 0, 0
        self.error: dict[str, float] = {}
        self.plain: dict[str, float] = {}
        self.energy: dict[str, float] = {}

    def add(self, width: str, found: Quantized, inside: Tensor) -> None:
        for sums, values in (
            (self.error, found.error),
            (self.plain, found.plain),
            (self.energy, found.energy),
        ):
            sums[width] = sums.get(width, 0.0) + float((values.double() * inside).sum())

    def take(self, other: _Sums) -> None:
        """Adds the sums of another line."""
        self.matrices += other.matrices
        self.weights += other.weights
        for mine, theirs in (
            (self.error, other.error),
            (self.plain, other.plain),
            (self.energy, other.energy),
        ):
            for width, value in theirs.items():
                mine[width] = mine.get(width, 0.0) + value

    def relative(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {
            width: round(math.sqrt(value / self.energy[width]), 6) if self.energy[width] else 0.0
            for width, value in sums.items()
        }

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "matrices": self.matrices,
            "weights": self.weights,
            "relative_error": self.relative(self.error),
            "relative_error_without_search": self.relative(self.plain),
        }


class ErrorReport:
    """Relative errors ``sqrt(sum (w - q)^2 / sum w^2)`` of a layer's matrices, per width.

    Args:
        config: of the checkpoint.
        widths: its names, in order.

    distilled: what `distill_quantized` told, None without it.
    """

    def __init__(self, config: ModelConfig, widths: list[str]):
        self.config, self.widths = config, widths
        self.distilled: dict[str, Any] | None = None
        self._lines: dict[str, _Sums] = {}

    def add(self, name: str, kind: str, found: Quantized, kept: Mapping[str, Selection]) -> None:
        """Counts a matrix: the experts of a layer are one line.

        Args:
            name: of the tensor.
            kind: its format.
            found: its errors.
            kept: {width: selection}.
        """
        line = re.sub(r"\.experts\.\d+\.", ".experts.*.", name.removesuffix(".weight"))
        sums = self._lines.setdefault(line, _Sums(kind))
        sums.matrices += 1
        sums.weights += found.packed.shape[0] * found.packed.shape[1]
        for width, selection in kept.items():
            sums.add(width, found, held_blocks(found.energy.shape, selection).double())

    @property
    def total(self) -> dict[str, dict[str, Any]]:
        """{format: a line about all its matrices}."""
        out: dict[str, _Sums] = {}
        for sums in self._lines.values():
            out.setdefault(sums.format, _Sums(sums.format)).take(sums)
        return {kind: sums.to_dict() for kind, sums in out.items()}

    @property
    def lines(self) -> dict[str, dict[str, Any]]:
        """{matrix, experts as `experts.*`: format, counts, relative errors by width}."""
        return {line: sums.to_dict() for line, sums in self._lines.items()}

    def to_dict(self) -> dict[str, Any]:
        """As JSON values. Errors are those of the scales' search; what distillation changed of the
        outputs is under "distilled"."""
        out: dict[str, Any] = {"widths": self.widths, "total": self.total, "layers": self.lines}
        return out if self.distilled is None else out | {"distilled": self.distilled}
