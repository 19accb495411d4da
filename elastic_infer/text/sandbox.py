"""The sandbox that chat templates run in: what they cannot reach, and how much they may do.

A template is data from a checkpoint or a client. Its steps (iterations, calls of macros, filters
and functions), the text and lists that it makes, and its time are limited, so that no template
hangs or fills the memory; operators and calls that could make much at once are checked before.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any, ClassVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

__all__ = ["Sandbox", "TooMuch"]

MOST_STEPS = 500_000
MOST_MADE = 1 << 26  # characters and items, over the whole run
LARGEST = 1 << 24  # characters or items of one value
MOST_SECONDS = 10.0  # of this thread's own time, so that a busy machine changes nothing
_BITS = 1 << 16  # of an integer

# Methods of text, bytes and numbers whose result is as long as a number says.
_PADDING = {"center", "expandtabs", "ljust", "rjust", "to_bytes", "zfill"}
# Filters that print what they are given, and the largest numbers that some may be given.
_PRINTING = {
    "capitalize",
    "center",
    "e",
    "escape",
    "forceescape",
    "format",
    "indent",
    "lower",
    "pprint",
    "replace",
    "safe",
    "string",
    "striptags",
    "title",
    "tojson",
    "trim",
    "truncate",
    "upper",
    "urlencode",
    "urlize",
    "wordcount",
    "wordwrap",
    "xmlattr",
}
_NUMBERS = {
    "batch": 100_000,
    "center": LARGEST,
    "indent": 1000,
    "round": 1000,
    "slice": 100_000,
    "tojson": 64,
}
_DIGITS = re.compile(r"\d+")


class TooMuch(Exception):
    """A template went beyond a limit."""


class _Budget(threading.local):
    """Limits of the template that this thread runs, as far as they are left; no steps outside of a
    run."""

    steps: int | None = None
    made = 0
    ends = 0.0


_budget = _Budget()


@contextmanager
def _limits() -> Iterator[None]:
    before = _budget.steps, _budget.made, _budget.ends
    _budget.steps, _budget.made = MOST_STEPS, MOST_MADE
    _budget.ends = time.thread_time() + MOST_SECONDS
    try:
        yield
    finally:
        _budget.steps, _budget.made, _budget.ends = before


def _step(steps: int = 1) -> None:
    """Counts steps; also called by the compiled template, in every loop and macro."""
    if _budget.steps is None:
        raise TooMuch("nothing is evaluated before the template runs")
    _budget.steps -= steps
    if _budget.steps < 0:
        raise TooMuch(f"it must do at most {MOST_STEPS} steps")
    if time.thread_time() > _budget.ends:
        raise TooMuch(f"it must end within {MOST_SECONDS:.0f} seconds")


def _allow(size: float) -> None:
    """Refuses to make one value of so many characters or items."""
    if size > LARGEST:
        raise TooMuch(f"it must make no text or list longer than {LARGEST}")


def _made(value: Any) -> Any:
    """Counts what a step has made; returns it."""
    if isinstance(value, (str, bytes, list, tuple, dict)):
        _allow(len(value))
        _budget.made -= len(value)
        if _budget.made < 0:
            raise TooMuch(f"it must make at most {MOST_MADE} characters and items")
    elif isinstance(value, int) and value.bit_length() > _BITS:
        raise TooMuch(f"it must make no integers of more than {_BITS} bits")
    return value


def _weigh(value: Any) -> int:
    """Characters and items of a value, all levels of it, as it would be printed. Refuses what is
    longer than a value may be; shared parts count as often as they are there."""
    return _weight(value, {})


def _weight(value: Any, known: dict[int, int]) -> int:
    if isinstance(value, (str, bytes)):
        return len(value)
    if not isinstance(value, (Mapping, list, tuple, set, frozenset)):
        return 1
    found = known.get(id(value))
    if found is None:
        parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
        found = 1
        for part in parts:
            found += 1 + _weight(part, known)
            _allow(found)
        known[id(value)] = found
    return found


# -- operators --------------------------------------------------------------------------------


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple, range)) else 0


def _check_format(text: Any, values: Iterable[Any]) -> None:
    """Refuses formats whose widths, or values for all that is to be filled in, would be long."""
    shape = text if isinstance(text, str) else bytes(text).decode("latin-1")
    widths = [len(digits) > 7 or int(digits) for digits in _DIGITS.findall(shape)]
    if True in widths:
        raise TooMuch("it must format no text to a width of eight digits")
    if re.search(r"%[^a-zA-Z%]*\*|:[^{}]*\{", shape):
        raise TooMuch("it must format no text to a width that is a value")
    longest = max(map(_weigh, values), default=0) + max(widths, default=0)
    places = max(shape.count("%"), shape.count("{"))
    _allow(len(shape) + places * longest)


def _check_operator(operator: str, left: Any, right: Any) -> None:
    if operator == "*":
        for some, times in ((left, right), (right, left)):
            if isinstance(times, int):
                _allow(_size(some) * max(0, times))
    elif operator == "+":
        _allow(_size(left) + _size(right))
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * max(0, right) > _BITS:
            raise TooMuch(f"it must make no integers of more than {_BITS} bits")
    elif operator == "%" and isinstance(left, (str, bytes)):
        _check_format(left, right if isinstance(right, tuple) else (right,))


# -- calls ------------------------------------------------------------------------------------


def _check_method(owner: Any, name: str, args: tuple[Any, ...]) -> None:
    """Refuses methods of text and numbers that would make much at once."""
    if name in _PADDING:
        times = max(1, _size(owner)) if name == "expandtabs" else 1
        _allow(times * max((abs(n) for n in args if isinstance(n, int)), default=8))
    elif name == "replace" and len(args) >= 2 and isinstance(args[1], (str, bytes)):
        _allow(len(owner) + owner.count(args[0]) * len(args[1]))
    elif name == "translate" and args and isinstance(args[0], Mapping):
        _allow(len(owner) * max(map(_size, args[0].values()), default=1))


def _joined_size(separator: Any, values: list[Any]) -> int:
    return sum(map(_weigh, values)) + _size(separator) * len(values)


def _check_filter(name: str, values: tuple[Any, ...], given: list[Any]) -> None:
    """Refuses filters that would print or make much at once.

    Args:
        values: what is filtered, and the arguments by position.
        given: all the arguments.
    """
    most = _NUMBERS.get(name)
    if most is not None and any(isinstance(v, int) and abs(v) > most for v in given):
        raise TooMuch(f"its numbers for {name} must be at most {most}")
    if name not in _PRINTING:
        return
    size = max(map(_weigh, values), default=0)
    if name == "indent":
        widths = [_size(v) or v for v in given if isinstance(v, (str, int))]
        _allow(size + str(values[0]).count("\n") * max(widths, default=4))
    elif name == "tojson":
        _allow(size * sum(_size(v) or v for v in given if isinstance(v, (str, int))))
        _allow(size * max((_weigh(v) for v in given if isinstance(v, (tuple, list))), default=1))
    elif name == "replace" and len(values) >= 3:
        _check_method(str(values[0]), "replace", tuple(map(str, values[1:3])))
    elif name == "format":
        _check_format(str(values[0]), given)


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that counts as a step, and is refused what it could make too much of."""

    def call(*args: Any, **kwargs: Any) -> Any:
        at = bool(args) and isinstance(args[0], _PASSED)
        values = args[at:]
        _step(1 + _size(values[0]) // 64 if values else 1)
        given = [*values[1:], *kwargs.values()]
        _check_filter(name, values, given)
        if name == "join" and values:
            items = list(values[0])
            _allow(_joined_size(max(given, key=_size, default=""), items))
            args = (*args[:at], items, *args[at + 1 :])
        return _made(function(*args, **kwargs))

    if hasattr(function, "jinja_pass_arg"):  # which of context, environment and so on it is given
        call.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
    return call


_PASSED = (jinja2.runtime.Context, jinja2.nodes.EvalContext, jinja2.Environment)


def _concat(parts: Iterable[str]) -> str:
    """The pieces that a template, a macro or a block has put out, as one text."""
    _step()
    made, size = [], 0
    for part in parts:
        size += len(part)
        _allow(size)
        made.append(part)
    return _made("".join(made))


def _text_of(value: Any) -> Any:
    """A value that is about to be put out; what it looks like must not be too long."""
    if not isinstance(value, str):
        _weigh(value)
    return value


def _join_texts(values: tuple[Any, ...]) -> str:
    """`a ~ b`."""
    _allow(_joined_size("", list(values)))
    return "".join(map(str, values))


# -- what templates may use -------------------------------------------------------------------


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text; it renders as it is."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Any) -> str:
        return caller()


class _PlainNamespace(Namespace):
    """A template's namespace() that refuses names reaching into Python's own attributes."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Unlike Jinja's own filter, nothing is escaped for HTML: this is a prompt.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(form: str) -> str:
    _check_format(form, ())
    return datetime.now().strftime(form)


class _Counter(NodeTransformer):
    """Puts a step into loops and macros, and makes a filter of `a ~ b`, which can be checked."""

    def _with_step(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        line = node.lineno
        call = nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None, lineno=line)
        node.body.insert(0, nodes.ExprStmt(call, lineno=line))
        return node

    visit_For = visit_Macro = visit_CallBlock = _with_step

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        values = nodes.Tuple(node.nodes, "load", lineno=node.lineno)
        return nodes.Filter(values, "joined texts", [], [], None, None, lineno=node.lineno)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja for chat templates: nothing of Python's can be reached, and there are limits.

    Raises TooMuch, or what a template raises, out of `run`.
    """

    intercepted_binops = frozenset(["*", "+", "**", "%"])
    concat = staticmethod(_concat)
    step = staticmethod(_step)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, loopcontrols],
            finalize=_text_of,
        )
        self.filters["tojson"] = _to_json
        self.filters["joined texts"] = _join_texts
        for table in (self.filters, self.tests):
            for name, function in list(table.items()):
                table[name] = _counted(name, function)
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["namespace"] = _PlainNamespace
        self.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)

    def run(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """The text of a template."""
        with _limits():
            return _concat(template.root_render_func(template.new_context(dict(variables))))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Counter().visit(super()._parse(source, name, filename))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The format methods of text, checked before they run."""
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, (*args, *kwargs.values()))
            return formatted(*args, **kwargs)

        return checked

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Computes an operator that could make much of little."""
        _check_operator(operator, left, right)
        return _made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls what a template calls."""
        self = __self
        if __obj is _step:
            return _step()
        _step()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, (str, bytes, int)):
            _check_method(owner, name, (*args, *kwargs.values()))
            if name == "join" and args:
                args = (list(args[0]), *args[1:])
                _allow(_joined_size(owner, args[0]))
        return _made(super(Sandbox, self).call(__context, __obj, *args, **kwargs))
