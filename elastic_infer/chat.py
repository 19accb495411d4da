"""Chat templates: messages to prompt text, in a sandbox."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from threading import Lock
from typing import Any, ClassVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from elastic_infer.errors import InvalidRequest

__all__ = ["ChatTemplates"]

_REMEDY = (
    "add chat_template.jinja to the checkpoint folder, pass chat_template=, or give generate()"
    " a ready prompt"
)
# Names under which messages carry reasoning; templates read the first (gpt-oss's the second).
_REASONING = ("reasoning_content", "thinking", "reasoning")


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
    return datetime.now().strftime(form)


def _make_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _PlainNamespace
    environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
    return environment


def _plain(value: Any, where: str) -> Any:
    """The value rebuilt from JSON types, so that a template cannot call anything of the caller's.

    Mappings, dataclasses and objects with model_dump() become dicts; other objects are refused.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):  # subclasses (enums, …) carry methods of their own
            return kind.__str__(value) if kind is str else kind(value)
    if callable(getattr(value, "model_dump", None)):
        return _plain(value.model_dump(), where)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {_plain(k, where): _plain(v, f"{where}[{k!r}]") for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_plain(item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(value, list):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise InvalidRequest(f"chat: {where} must be made of JSON types, got {type(value).__name__}")


def _checked(messages: Any) -> list[dict[str, Any]]:
    """The messages as fresh dicts without None values, or InvalidRequest naming the first fault."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidRequest(
            'chat: messages must be a list of {"role": …, "content": …}, got '
            + type(messages).__name__
        )
    if not messages:
        raise InvalidRequest("chat: messages must hold at least one message, got an empty list")
    result = []
    for i, raw in enumerate(messages):
        where = f"messages[{i}]"
        message = _plain(raw, where)
        if not isinstance(message, dict):
            raise InvalidRequest(f"chat: {where} must be a dict, got {type(raw).__name__}")
        message = {key: value for key, value in message.items() if value is not None}
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise InvalidRequest(
                f'chat: {where}["role"] must be a str such as "user", got {role!r}'
            )
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise InvalidRequest(
                f'chat: {where}["content"] must be a str or a list of parts, got nothing'
                " (only a message with tool_calls can do without)"
            )
        parts = isinstance(content, (list, tuple)) and all(isinstance(p, dict) for p in content)
        if content is not None and not isinstance(content, str) and not parts:
            raise InvalidRequest(
                f'chat: {where}["content"] must be a str or a list of parts (dicts), got '
                + type(content).__name__
            )
        reasoning = next((message[k] for k in _REASONING if message.get(k) is not None), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        result.append(message)
    return result


class ChatTemplates:
    """The chat templates of one tokenizer, compiled on first use."""

    def __init__(self, templates: str | Mapping[str, str] | None = None) -> None:
        """templates: one template, or {name: template}; None if there is none."""
        if isinstance(templates, str):
            templates = {"default": templates}
        self.templates = dict(templates or {})
        self._environment = _make_environment()
        self._compiled: dict[str, jinja2.Template] = {}
        self._lock = Lock()

    def source(self, chat_template: str | None, with_tools: bool) -> str:
        """The template's text: the named or given one, else "tool_use" for tools, "default"."""
        if chat_template is not None:
            return self.templates.get(chat_template, chat_template)
        if with_tools and "tool_use" in self.templates:
            return self.templates["tool_use"]
        if "default" in self.templates:
            return self.templates["default"]
        if self.templates:
            names = ", ".join(sorted(self.templates))
            raise InvalidRequest(
                f"chat: chat_template must be one of {names} (there is no default), got None"
            )
        raise InvalidRequest(f"chat: this tokenizer must have a chat template, got none; {_REMEDY}")

    def render(
        self,
        messages: Any,
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        chat_template: str | None,
        variables: Mapping[str, Any],
    ) -> str:
        """The prompt text.

        messages: list of dicts with role and content.
        tools, documents: lists of dicts, or None.
        chat_template: a name, a template, or None.
        variables: everything else the template sees.
        """
        template = self._compile(self.source(chat_template, tools is not None))
        given: dict[str, Any] = {"messages": _checked(messages)}
        for name, entries in (("tools", tools), ("documents", documents)):
            if entries is not None:
                entries = _plain(list(entries), name)
                if not all(isinstance(entry, dict) for entry in entries):
                    raise InvalidRequest(f"chat: {name} must be a list of dicts, got {entries!r}")
            given[name] = entries
        rest = {key: _plain(value, key) for key, value in variables.items()}
        try:
            return template.render(**given, **rest)
        except jinja2.exceptions.TemplateError as error:
            raise InvalidRequest(f"chat: the chat template refused this: {error}") from error
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise InvalidRequest(
                f"chat: the chat template failed on the messages: {type(error).__name__}: {error}"
            ) from error

    def _compile(self, source: str) -> jinja2.Template:
        with self._lock:
            template = self._compiled.get(source)
            if template is None:
                try:
                    template = self._environment.from_string(source)
                except jinja2.exceptions.TemplateError as error:
                    raise InvalidRequest(
                        f"chat: chat_template must be a Jinja template, got {error}"
                    ) from error
                if len(self._compiled) >= 32:  # templates given per request must not pile up
                    self._compiled.clear()
                self._compiled[source] = template
            return template
