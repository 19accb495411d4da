"""Markdown that tables are made of."""

from __future__ import annotations

from collections.abc import Iterable


def grid(head: Iterable[str], rows: Iterable[Iterable[str]], align: str = "---:") -> str:
    """A Markdown table; the first column is aligned to the left, the others by `align`."""
    head = list(head)
    lines = [head, ["---", *[align] * (len(head) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
