"""Checks of values that callers give: each is in its range or refused by name."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sized
from itertools import islice
from typing import Any

from .errors import InvalidRequest, shown

MOST_IDS = 1 << 20  # more than any vocabulary has

__all__ = [
    "check_count",
    "check_int",
    "check_real",
    "check_timeout",
    "elements",
    "is_int",
    "is_one_of",
    "is_real",
]

MOST = 1 << 40  # of anything that is counted


def is_int(value: Any) -> bool:
    """Tells if this is an int and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """True if this is a finite number that a float can hold, and no bool."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -1.7e308 <= value <= 1.7e308 and value == value


def is_one_of(value: Any, words: Collection[str | None]) -> bool:
    """Tells if this is one of a few words, or None where that is among them; also for values that
    compare to no bool, such as arrays."""
    return (value is None or isinstance(value, str)) and value in words


def elements(what: str, value: Any, kind: str, most: int = MOST_IDS) -> tuple:
    """The elements of an iterable, of which no more than `most` are made.

    Args:
        what: begins the message, "<object>: <argument>".
        kind: noun for the entries of the list.

    Raises:
        InvalidRequest: a text, a value that is no iterable, or too many entries.
    """
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise InvalidRequest(f"{what} must be a list of {kind}, got {shown(value)}")
    try:
        found = tuple(islice(value, most + 1))
    except Exception as error:  # a tensor without dimensions, an iterator that fails
        raise InvalidRequest(
            f"{what} must be a list of {kind}, got {shown(value)} ({type(error).__name__})"
        ) from error
    if len(found) > most:
        got = len(value) if isinstance(value, Sized) else shown(value)
        raise InvalidRequest(f"{what} must hold at most {most} {kind}, got {got}")
    return found


def check_count(what: str, value: Any, least: int = 1, most: int = MOST) -> None:
    """Raises InvalidRequest unless `value` is an int in least..most.

    Args:
        what: begins the message, "<object>: <argument>".
    """
    if not is_int(value) or not least <= value <= most:
        kind = "a positive int" if (least, most) == (1, MOST) else f"an int in {least}..{most}"
        raise InvalidRequest(f"{what} must be {kind}, got {shown(value)}")


def check_int(
    what: str, value: Any, least: int, most: int | None = None, optional: bool = False
) -> None:
    """Raises InvalidRequest unless `value` is an int within the bounds (or None, if optional).

    what: begins the message, "<object>: <argument>". most: None for no bound.
    """
    if optional and value is None:
        return
    if not is_int(value) or value < least or (most is not None and value > most):
        none = "None or " if optional else ""
        bounds = f">= {least}" if most is None else f"in [{least}, {most}]"
        raise InvalidRequest(f"{what} must be {none}an int {bounds}, got {shown(value)}")


def check_real(
    what: str, value: Any, least: float = -math.inf, most: float = math.inf, open_: bool = False
) -> None:
    """Raises InvalidRequest unless `value` is a finite number in least..most.

    Args:
        what: begins the message, "<object>: <argument>".
        open_: True if `least` itself is out.
    """
    if not is_real(value) or not least <= value <= most or (open_ and value == least):
        if most == math.inf:
            rule = "positive" if open_ and least == 0 else f"at least {least}"
        else:
            rule = f"in {'(' if open_ else '['}{least}, {most}]"
        rule = "a number" if least == -math.inf else rule
        raise InvalidRequest(f"{what} must be {rule} and finite, got {shown(value)}")


def check_timeout(what: str, value: Any) -> None:
    """Raises InvalidRequest unless `value` is None, a finite number or infinity.

    what: begins the message, "<object>: <argument>".
    """
    if value is not None and value != math.inf and not is_real(value):
        raise InvalidRequest(f"{what} must be None or a number of seconds, got {shown(value)}")
