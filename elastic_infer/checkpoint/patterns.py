"""Patterns by which a quantization_config names modules, with a bound on their time."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Any

try:
    from re import _constants as codes, _parser as parser
except ImportError:  # Python 3.10
    import sre_constants as codes
    import sre_parse as parser

__all__ = ["matches", "regex_problem"]

_LENGTH = 64  # of a module's name, for the bound
_MOST = 64 * _LENGTH**3  # ways to try of one match: three wildcards and some alternatives


def matches(pattern: str, module: str, wildcards: bool = False) -> bool:
    """True when a pattern names this module.

    Args:
        pattern: "re:" and a regular expression that matches from the start, or a name.
        module: the name.
        wildcards: `*`, `?` and brackets count in a name, which also stands for all below it.
    """
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    if wildcards:
        return fnmatchcase(module, pattern) or module.startswith(pattern + ".")
    return pattern == module


def regex_problem(text: str) -> str | None:
    """The fault in a regular expression of a file; None for one that can be used.

    Python tries all ways to match before it gives up. Their number grows with a power of the
    name's length for every repeat, and without any limit for repeats inside repeats: both are
    bounded here, before the first match.
    """
    if len(text) > 1000:
        return "it is longer than 1000 characters"
    try:
        re.compile(text)
        ways = _ways(parser.parse(text))
    except (re.error, OverflowError, RecursionError, ValueError, Warning) as error:
        return str(error) or type(error).__name__
    if ways > _MOST:
        return "it has repeats inside repeats, or too many: matching it could take for ever"
    return None


def _ways(parts: Any) -> int:
    """Bound on the number of ways to match a name of `_LENGTH` characters; `_MOST` + 1 stands for
    all larger numbers."""
    total = 1
    for code, value in parts:
        total = min(total * _ways_of(code, value), _MOST + 1)
    return total


def _ways_of(code: Any, value: Any) -> int:
    if code in (codes.MAX_REPEAT, codes.MIN_REPEAT) or str(code) == "POSSESSIVE_REPEAT":
        least, most, inner = value
        counts = 1 + min(int(most), _LENGTH) - min(int(least), _LENGTH)
        inside = _ways(inner)
        if inside == 1:
            return counts
        return _MOST + 1 if most > 3 else counts * inside**most
    if code is codes.BRANCH:
        return min(sum(_ways(branch) for branch in value[1]), _MOST + 1)
    if code is codes.SUBPATTERN:
        return _ways(value[-1])
    if code in (codes.ASSERT, codes.ASSERT_NOT):
        return _ways(value[1])
    if code is codes.GROUPREF_EXISTS:
        return _ways(value[1]) + (_ways(value[2]) if value[2] else 1)
    if str(code) == "ATOMIC_GROUP":
        return _ways(value)
    return 1
