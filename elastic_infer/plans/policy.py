"""Policies: the fate of the cache when the width changes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import InvalidRequest, shown
from ..public import public
from ..showing import one_line
from ..value_checks import check_int, is_one_of

DEFAULT_WINDOW = 256


@public
@dataclass(frozen=True)
class Policy:
    """Treatment of the cache when the width changes.

    Attributes:
        kind: "carry" keeps it, "exact" rebuilds it from the tokens, "window" rebuilds its last
            part.
        n: tokens between two snapshots for "window" (n to 2n tokens are rebuilt, soon after a
            prompt up to 63 more because prompts are cut on a grid of 64), None otherwise.
    """

    kind: str
    n: int | None = None

    def __post_init__(self) -> None:
        if not is_one_of(self.kind, ("carry", "exact", "window")):
            raise InvalidRequest(
                f"policy: must be 'carry', 'exact' or 'window(n)', got {shown(self.kind)}"
            )
        if self.kind == "window":
            n = DEFAULT_WINDOW if self.n is None else self.n
            check_int("policy: n of 'window(n)'", n, 1)
            object.__setattr__(self, "n", n)
        elif self.n is not None:
            raise InvalidRequest(f"policy: {self.kind!r} must have no n, got {shown(self.n)}")

    @classmethod
    def parse(cls, value: str | Policy) -> Policy:
        """Reads "carry", "exact", "window", "window(128)" or "window:128"; a Policy stays."""
        if isinstance(value, Policy):
            return value
        if not isinstance(value, str):
            raise InvalidRequest(
                f"policy: must be 'carry', 'exact', 'window(n)' or a Policy, got {shown(value)}"
            )
        match = re.fullmatch(r"(\w+)(?:\((-?\d{1,18})\)|:(-?\d{1,18}))?", value.strip())
        if match is None:
            raise InvalidRequest(
                f"policy: must be 'carry', 'exact' or 'window(n)', got {shown(value)}"
            )
        n = match.group(2) or match.group(3)
        return cls(match.group(1), None if n is None else int(n))

    @one_line
    def __repr__(self) -> str:
        return f"Policy({self})"

    def __str__(self) -> str:
        return self.kind if self.n is None else f"{self.kind}({self.n})"


CARRY = Policy("carry")
