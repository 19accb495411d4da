"""Plans written as text, for the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import InvalidRequest, shown
from . import parsing as plan_text
from .plan import Plan

__all__ = ["read_plan"]

# What each kind of plan may say on the command line; the first word tells the kind.
_KEYS: dict[str, tuple[str, ...]] = {
    "width": (),
    "schedule": ("policy",),
    "think": ("answer", "budget", "grace", "policy", "start_tag", "end_tag", "prompt_phase"),
    "narrow": ("wide", "threshold", "hold", "policy"),
}
_FORMS = "width=S | schedule=0:S+12:L | think=M,answer=L,budget=64 | narrow=S,wide=L,threshold=1.5"


def read_plan(text: str) -> Plan:
    """`parse_plan`: key=value pairs joined by commas."""
    words: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key or not value:
            raise InvalidRequest(f"plan: {shown(part)} must be key=value; a plan is {_FORMS}")
        if key in words:
            raise InvalidRequest(f"plan: {key} must be given once, got {shown(text)}")
        words[key] = value
    kinds = [key for key in words if key in _KEYS]
    if len(kinds) != 1:
        raise InvalidRequest(
            f"plan: must have exactly one of {', '.join(_KEYS)}, got {shown(', '.join(words))}; "
            f"a plan is {_FORMS}"
        )
    kind = kinds[0]
    for key in words:
        if key != kind and key not in _KEYS[kind]:
            allowed = ", ".join(_KEYS[kind]) or "(nothing)"
            raise InvalidRequest(
                f"plan: what comes with {kind}= must be among {allowed}, got "
                f"{shown(f'{key}={words[key]}')}"
            )
    return _FROM_WORDS[kind](words)


def _number(words: Mapping[str, str], key: str, convert: Callable[[str], Any]) -> Any:
    try:
        return convert(words[key])
    except ValueError:
        kind = "an integer" if convert is int else "a number"
        raise InvalidRequest(f"plan: {key} must be {kind}, got {shown(words[key])}") from None


def _need(words: Mapping[str, str], kind: str, key: str) -> str:
    if key not in words:
        raise InvalidRequest(f"plan: {kind}= must come with {key}=, got none; a plan is {_FORMS}")
    return words[key]


def _read_schedule(words: Mapping[str, str]) -> Plan:
    steps = []
    for part in words["schedule"].split("+"):
        start, colon, width = (piece.strip() for piece in part.partition(":"))
        if not colon or not start.isdecimal():
            raise InvalidRequest(
                f"plan: schedule must be start:width joined by +, like 0:S+12:L, got {shown(part)}"
            )
        steps.append((_number({"start of a step": start}, "start of a step", int), width))
    return Plan.schedule(steps, policy=words.get("policy", "carry"))


def _read_think(words: Mapping[str, str]) -> Plan:
    extra: dict[str, Any] = {
        key: words[key]
        for key in ("policy", "start_tag", "end_tag", "prompt_phase")
        if key in words
    }
    if "budget" in words:
        extra["think_tokens"] = _number(words, "budget", int)
    if "grace" in words:
        extra["grace"] = _number(words, "grace", int)
    return Plan.think_answer(words["think"], _need(words, "think", "answer"), **extra)


def _read_narrow(words: Mapping[str, str]) -> Plan:
    wide = _need(words, "narrow", "wide")
    _need(words, "narrow", "threshold")
    extra: dict[str, Any] = {"hold": _number(words, "hold", int)} if "hold" in words else {}
    return Plan.by_uncertainty(
        words["narrow"],
        wide,
        _number(words, "threshold", float),
        policy=words.get("policy", "carry"),
        **extra,
    )


_FROM_WORDS: dict[str, Callable[[Mapping[str, str]], Plan]] = {
    "width": lambda words: Plan.fixed(words["width"]),
    "schedule": _read_schedule,
    "think": _read_think,
    "narrow": _read_narrow,
}


def parse_plan(text: str) -> Plan:
    """Reads a plan from the command line.

    Args:
        text: "width=S", "schedule=0:S+12:L", "think=M,answer=L,budget=64,grace=16,policy=exact" or
            "narrow=S,wide=L,threshold=1.5,hold=8"; `policy` is carry, exact, window or window(n).

    Raises:
        InvalidRequest: names the allowed keys.
    """
    return plan_text.read_plan(text)
