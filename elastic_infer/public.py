"""The mark of a public class: it says that it is `elastic_infer`'s, wherever its module stands."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import TypeVar, get_type_hints

_Kind = TypeVar("_Kind", bound=type)


def public(kind: _Kind) -> _Kind:
    """Lets `help()`, tracebacks and pickles name a class as callers import it.

    Types of a dataclass's fields are resolved first: tools that ask for them look names up in the
    module that the class tells.
    """
    if is_dataclass(kind):
        kind.__annotations__ = get_type_hints(kind, include_extras=True)
    kind.__module__ = "elastic_infer"
    return kind
