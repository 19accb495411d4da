"""Calls of a user's functions and of a tokenizer, and the errors of a request that failed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any

from .errors import ElasticError, InvalidRequest, RequestFailed, printable
from .files.reading import foreign

_MARK = "_raised_by_a_user_of_elastic_infer"


def call_user(function: Callable, *given: Any) -> Any:
    """Calls a plan's function or a logits processor; its exceptions are known as the user's own."""
    try:
        return function(*given)
    except Exception as error:
        with suppress(Exception):  # some exceptions take no attributes
            setattr(error, _MARK, True)
        raise


def text_of(error: BaseException) -> str:
    """The message of an exception, also of one that cannot print itself."""
    try:
        text = printable(str(error))
    except Exception:
        return type(error).__name__
    return text or type(error).__name__


def as_failure(name: str, error: BaseException) -> Exception:
    """The error that callers get who wait for the request `name`: errors of this library and
    exceptions that a user's function raised as they are, anything else as their cause."""
    if isinstance(error, ElasticError) or (
        isinstance(error, Exception) and getattr(error, _MARK, False)
    ):
        return error
    failed = RequestFailed(
        f"{name}: ended by {type(error).__name__}: {text_of(error)}; its cause is chained"
    )
    failed.__cause__ = error
    return failed


def tokenizer_errors(what: str) -> AbstractContextManager[None]:
    """Makes what the tokenizer raises an error of this library; its panics are no Exceptions."""
    return foreign(f"{what}: the tokenizer must take what it is given", InvalidRequest)
