"""Checks of sampling parameters, in the types in which the tables of a pass hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .. import value_checks
from ..errors import InvalidRequest, shown
from ..text.unicode import encodable
from ..value_checks import MOST_IDS, elements, is_int, is_real

__all__ = [
    "MOST_BAD_WORDS",
    "MOST_LOGPROBS",
    "MOST_STOPS",
    "biases_of",
    "check_int",
    "fail",
    "functions_of",
    "ids_of",
    "number_of",
    "texts_of",
]

# A value must be normal in float32: what rounds to zero or infinity there is not what was asked.
FLOAT32_LEAST, FLOAT32_MOST = 2.0**-126, (2.0 - 2.0**-23) * 2.0**127
MOST_LOGPROBS = 128  # each is compared with the whole row, on the thread that runs the passes
MOST_STOPS, MOST_BAD_WORDS = 64, 1024  # each is looked for after every token
LONGEST_TEXT = 512  # characters of a stop string or bad word
MOST_FUNCTIONS = 64


def fail(name: str, rule: str, value: Any) -> InvalidRequest:
    """The error for a parameter that breaks a rule."""
    return InvalidRequest(f"SamplingParams: {name} must {rule}, got {shown(value)}")


def check_int(
    name: str, value: Any, least: int, most: int | None = None, optional: bool = False
) -> None:
    """Raises InvalidRequest unless `value` is an int within the bounds (or None, if optional)."""
    value_checks.check_int(f"SamplingParams: {name}", value, least, most, optional)


def number_of(
    name: str, value: Any, rule: str, holds: Callable[[float], bool], positive: bool = False
) -> float:
    """A finite number that obeys the rule, in float32 too, as a float: torch takes no longer ints.

    Args:
        positive: True if zero would break the rule.

    Raises:
        InvalidRequest: anything else.
    """
    if not is_real(value) or not holds(value):
        raise fail(name, f"be a finite number {rule}", value)
    if value > FLOAT32_MOST or (positive and value < FLOAT32_LEAST):
        bounds = f"{FLOAT32_LEAST if positive else 0:.4g} to {FLOAT32_MOST:.4g}"
        raise fail(name, f"be a finite number {rule} that float32 can hold ({bounds})", value)
    return float(value)


def ids_of(name: str, value: Any) -> tuple[int, ...]:
    """The token ids of a list, each once."""
    ids = elements(f"SamplingParams: {name}", value, "token ids")
    for token_id in ids:
        if not is_int(token_id) or token_id < 0:
            raise fail(name, "hold token ids (ints >= 0) only", token_id)
    return tuple(dict.fromkeys(ids))


def texts_of(name: str, value: Any, most: int) -> tuple[str, ...]:
    """The texts of a str or a list of them."""
    if value is None:
        return ()
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)):
        raise fail(name, "be a str or a list of str", value)
    texts = elements(f"SamplingParams: {name}", texts, "texts", most)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise fail(name, "hold non-empty str only", text)
        if len(text) > LONGEST_TEXT:
            raise fail(name, f"hold texts of at most {LONGEST_TEXT} characters", text)
        if not encodable(text):
            raise fail(name, "hold texts that UTF-8 can encode (no lone surrogates)", text)
    return texts


def biases_of(name: str, value: Any) -> dict[int, float]:
    """{token id: number} as it was given."""
    bias = {} if value is None else value
    if not isinstance(bias, Mapping):
        raise fail(name, "be {token id: number}", bias)
    if len(bias) > MOST_IDS:
        raise fail(name, f"hold at most {MOST_IDS} token ids", len(bias))
    bias = dict(bias)
    for token_id, number in bias.items():
        if not is_int(token_id) or token_id < 0:
            raise fail(name, "have token ids (ints >= 0) as keys", token_id)
        if not is_real(number) or not -100 <= number <= 100:
            raise fail(f"{name}[{shown(token_id)}]", "be a number in [-100, 100]", number)
    return bias


def functions_of(name: str, value: Any) -> tuple[Callable, ...]:
    """The functions of a list."""
    functions = () if value is None else value
    if not isinstance(functions, (list, tuple)):
        raise fail(name, "be a list of functions", functions)
    found = elements(f"SamplingParams: {name}", functions, "functions", MOST_FUNCTIONS)
    if not all(map(callable, found)):
        raise fail(name, "be a list of functions", functions)
    return found
