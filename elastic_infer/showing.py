"""Parts of one-line texts for people: names, sizes, and a `__repr__` that cannot fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from .errors import shown

_BYTE_UNITS = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3))
_MOST_NAMES = 8


def one_line(show: Callable[[Any], str]) -> Callable[[Any], str]:
    """A `__repr__` that also answers for an object whose `__init__` has not ended, as a debugger
    or a log of a failed construction asks for."""

    @wraps(show)
    def guarded(self: Any) -> str:
        try:
            return show(self)
        except AttributeError:
            return f"{type(self).__name__}(not built)"

    return guarded


def name_text(name: object) -> str:
    """A name without quotes, its control characters escaped, cut where it is long."""
    return shown(str(name))[1:-1]


def names_text(names: Sequence[str], between: str) -> str:
    """Names in a row; of many the first and the last."""
    texts = [name_text(name) for name in names]
    if len(texts) > _MOST_NAMES:
        texts = [*texts[: _MOST_NAMES - 2], "…", texts[-1]]
    return between.join(texts)


def size_text(size: float) -> str:
    """Bytes with a decimal unit, such as 58.8 GB."""
    for unit, factor in _BYTE_UNITS:
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} B"


def count_text(count: int, one: str) -> str:
    """A count with its noun, such as "1 token" or "12 tokens"."""
    return f"{count} {one}" if count == 1 else f"{count} {one}s"
