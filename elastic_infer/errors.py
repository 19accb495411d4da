"""Errors that this library raises on purpose, and limits of their messages."""

from __future__ import annotations

import builtins
import reprlib
from typing import Any

from .public import public

_LONGEST_VALUE = 80  # characters of one value in a message
_LONGEST_MESSAGE = 4000


class _Values(reprlib.Repr):
    """`repr` that never fails and never builds much more than a message shows."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxarray = 16
        self.maxdict, self.maxlevel = 8, 4
        self.maxstring = self.maxlong = self.maxother = _LONGEST_VALUE

    def repr_int(self, x: int, level: int) -> str:
        bits = int.bit_length(x)
        if bits > 4 * _LONGEST_VALUE:  # Python refuses to print the longest ones
            return f"<an int of {bits} bits>" if x > 0 else f"<a negative int of {bits} bits>"
        return _cut(builtins.repr(x), self.maxlong)

    def repr_bytes(self, x: bytes, level: int) -> str:
        return _cut(builtins.repr(x[: self.maxother]), self.maxother)

    repr_bytearray = repr_bytes


_values = _Values()


def _cut(text: str, longest: int, kept_of_the_end: float = 0.4) -> str:
    if len(text) <= longest:
        return text
    end = int((longest - 1) * kept_of_the_end)
    return f"{text[: longest - 1 - end]}…{text[len(text) - end :]}"


def printable(text: str) -> str:
    """The text with lone surrogates escaped: what UTF-8 cannot hold cannot be printed."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shown(value: Any, longest: int = _LONGEST_VALUE) -> str:
    """A value as an error message shows it: its `repr` in at most `longest` characters, with
    surrogates escaped; also for values whose own `repr` fails or would be very long."""
    try:
        text = _values.repr(value)
    except Exception as error:  # a caller's __repr__ may raise anything
        text = f"<{type(value).__name__} whose repr raises {type(error).__name__}>"
    return _cut(printable(text), longest)


@public
class ElasticError(Exception):
    """Base of all errors of this library. A message can be printed and has a limited length."""

    def __init__(self, *args: object):
        super().__init__(
            *(_cut(printable(a), _LONGEST_MESSAGE) if isinstance(a, str) else a for a in args)
        )


@public
class InvalidRequest(ElasticError, ValueError):
    """A request, prompt, plan or sampling parameter that cannot be served."""


@public
class CheckpointError(ElasticError, ValueError):
    """A checkpoint folder, its config.json or one of its tensors that cannot be used."""


@public
class WidthError(ElasticError, ValueError):
    """A width or width table that does not fit its checkpoint, or an unknown width name."""


@public
class OutOfCapacity(ElasticError, RuntimeError):
    """The request needs more cache than the engine has; states the amounts needed, free
    and fitting."""


@public
class EngineFull(ElasticError, RuntimeError):
    """The waiting queue has reached its limit; try again later."""


@public
class RequestCancelled(ElasticError, RuntimeError):
    """The request was cancelled before it was finished."""


@public
class RequestFailed(ElasticError, RuntimeError):
    """The request ended by an error that is none of the above; that one is its cause."""


@public
class EngineFault(ElasticError, RuntimeError):
    """The engine itself failed in a pass, or its thread could not start; names the cause. The
    engine goes on."""


@public
class NonFiniteLogits(ElasticError, RuntimeError):
    """The model returned NaN or infinite logits for this request."""


class NonFiniteLoss(ElasticError, RuntimeError):
    """A training step had a NaN or infinite loss; names it and the state that was kept."""
