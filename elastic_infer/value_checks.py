"""Checks of numbers that callers give: any value is either in its range or refused by name."""

from __future__ import annotations

import math
from typing import Any

from .errors import InvalidRequest, shown

MOST_IDS = 1 << 20  # more than any vocabulary has

__all__ = ["check_count", "check_real", "is_real"]

MOST = 1 << 40  # of anything that is counted


def is_real(value: Any) -> bool:
    """True if this is a finite number that a float can hold, and no bool."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -1.7e308 <= value <= 1.7e308 and value == value


def check_count(what: str, value: Any, least: int = 1, most: int = MOST) -> None:
    """Raises InvalidRequest unless `value` is an int in least..most.

    what: begins the message, "<object>: <argument>".
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        kind = "a positive int" if (least, most) == (1, MOST) else f"an int in {least}..{most}"
        raise InvalidRequest(f"{what} must be {kind}, got {shown(value)}")


def check_real(
    what: str, value: Any, least: float = -math.inf, most: float = math.inf, open_: bool = False
) -> None:
    """Raises InvalidRequest unless `value` is a finite number in least..most.

    what: begins the message, "<object>: <argument>". open_: whether `least` itself is out.
    """
    if not is_real(value) or not least <= value <= most or (open_ and value == least):
        if most == math.inf:
            rule = "positive" if open_ and least == 0 else f"at least {least}"
        else:
            rule = f"in {'(' if open_ else '['}{least}, {most}]"
        rule = "a number" if least == -math.inf else rule
        raise InvalidRequest(f"{what} must be {rule} and finite, got {shown(value)}")
