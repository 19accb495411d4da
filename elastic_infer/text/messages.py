"""Messages of a chat as templates take them: plain values, text parts, arguments of tools."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import nodes

from ..errors import InvalidRequest, shown
from .unicode import encodable

__all__ = ["FinalMessage", "checked_messages", "final_field", "iterates_over_parts", "plain"]

# Names under which messages carry reasoning; templates read the first (gpt-oss's the second).
_REASONING = ("reasoning_content", "thinking", "reasoning")
_TEXT_PARTS = ("text", "input_text", "output_text")
_DEEPEST = 64  # lists and dicts in one another


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """The value rebuilt from JSON types, so that a template cannot call anything of the caller's.

    Mappings, dataclasses and objects with model_dump() become dicts; other objects are refused.
    """
    if depth > _DEEPEST:
        raise InvalidRequest(
            f"chat: {where} must hold at most {_DEEPEST} lists and dicts in one another"
        )
    if isinstance(value, str):  # subclasses (enums, …) carry methods of their own
        text = value if type(value) is str else str.__str__(value)
        if not encodable(text):
            raise InvalidRequest(
                f"chat: {where} must be text that UTF-8 can hold, got {shown(text)} with a "
                "lone surrogate"
            )
        return text
    if value is None or type(value) in (int, float, bool):
        return value
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    if callable(getattr(value, "model_dump", None)):
        return plain(value.model_dump(), where, depth + 1)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    deeper = depth + 1
    if isinstance(value, Mapping):
        return {
            _key(k, where): plain(v, f"{where}[{shown(k, 40)}]", deeper) for k, v in value.items()
        }
    if isinstance(value, (tuple, list)):
        items = [plain(item, f"{where}[{i}]", deeper) for i, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise InvalidRequest(f"chat: {where} must be made of JSON types, got {type(value).__name__}")


def _key(key: Any, where: str) -> Any:
    if key is None or isinstance(key, (str, int, float)):
        return plain(key, where)
    raise InvalidRequest(f"chat: keys of {where} must be str, got {type(key).__name__}")


def checked_messages(messages: Any, parts: bool) -> list[dict[str, Any]]:
    """The messages as fresh dicts without None values, as a template takes them.

    Arguments of tool calls that are JSON in a string, as OpenAI's clients send them, are parsed.

    Args:
        messages: of the caller.
        parts: True if the template takes content as a list of parts; one that takes text gets the
            parts' texts joined by newlines.

    Raises:
        InvalidRequest: names the first fault.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidRequest(
            'chat: messages must be a list of {"role": …, "content": …}, got '
            + type(messages).__name__
        )
    if not messages:
        raise InvalidRequest("chat: messages must hold at least one message, got an empty list")
    return [_checked(raw, f"messages[{i}]", parts) for i, raw in enumerate(messages)]


def _checked(raw: Any, where: str, parts: bool) -> dict[str, Any]:
    message = plain(raw, where)
    if not isinstance(message, dict):
        raise InvalidRequest(f"chat: {where} must be a dict, got {type(raw).__name__}")
    message = {key: value for key, value in message.items() if value is not None}
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(
            f'chat: {where}["role"] must be a str such as "user", got {shown(role)}'
        )
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise InvalidRequest(
            f'chat: {where}["content"] must be a str or a list of parts, got nothing'
            " (only a message with tool_calls can do without)"
        )
    if content is not None and not isinstance(content, str):
        message["content"] = _content(content, f'{where}["content"]', parts)
    reasoning = next((message[k] for k in _REASONING if message.get(k) is not None), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    _parse_arguments(message.get("tool_calls"), f'{where}["tool_calls"]')
    return message


def _content(content: Any, where: str, parts: bool) -> Any:
    """A list of text parts, or their text for a template that takes text."""
    if not isinstance(content, (list, tuple)) or not all(isinstance(p, dict) for p in content):
        raise InvalidRequest(
            f"chat: {where} must be a str or a list of parts (dicts), got {type(content).__name__}"
        )
    for i, part in enumerate(content):
        kind = part.get("type", "text")
        if kind not in _TEXT_PARTS:
            raise InvalidRequest(
                f'chat: {where}[{i}]["type"] must be "text", got {shown(kind)}; the model reads '
                "text alone"
            )
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(
                f'chat: {where}[{i}]["text"] must be a str, got {shown(part.get("text"))}'
            )
        if kind != "text":
            part["type"] = "text"
    return content if parts else "\n".join(part["text"] for part in content)


def _parse_arguments(calls: Any, where: str) -> None:
    """Makes objects of the arguments of tool calls that are JSON in a string, in place."""
    for i, call in enumerate(calls if isinstance(calls, (list, tuple)) else ()):
        function = call.get("function", call) if isinstance(call, dict) else None
        text = function.get("arguments") if isinstance(function, dict) else None
        if not isinstance(text, str):
            continue
        try:
            value = json.loads(text) if text.strip() else {}
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise InvalidRequest(
                f'chat: {where}[{i}]["function"]["arguments"] must be a JSON object, got '
                + shown(text)
            )
        function["arguments"] = plain(value, where)


# -- what a template takes --------------------------------------------------------------------


def iterates_over_parts(template: nodes.Template) -> bool:
    """Tells if a template looks into a list of content parts: if it loops over the content of a
    message, or picks from it, be it by way of variables and macros."""
    names = _content_names(template)
    for loop in template.find_all(nodes.For):
        if _is_content(loop.iter, names):
            return True
    return any(
        each.name in ("map", "selectattr", "rejectattr", "select", "reject")
        and each.node is not None
        and _is_content(each.node, names)
        for each in template.find_all(nodes.Filter)
    )


def _content_names(template: nodes.Template) -> set[str]:
    """Variables and macro parameters that hold the content of a message."""
    names: set[str] = {"content"}
    macros = {macro.name: macro for macro in template.find_all(nodes.Macro)}
    while True:
        found = set(names)
        for each in template.find_all(nodes.Assign):
            if isinstance(each.target, nodes.Name) and _is_content(each.node, names):
                found.add(each.target.name)
        for call in template.find_all(nodes.Call):
            macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
            for parameter, given in zip(macro.args if macro else (), call.args, strict=False):
                if _is_content(given, names):
                    found.add(parameter.name)
        if found == names:
            return names
        names = found


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    """Tells if an expression is the content of a message: itself, a part of the list, a filtered
    list, or one of two choices."""
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        if isinstance(node.arg, nodes.Const):
            return node.arg.value == "content"
        return isinstance(node.arg, nodes.Slice) and _is_content(node.node, names)
    if isinstance(node, nodes.Filter):
        return _is_content(node.node, names)
    if isinstance(node, nodes.CondExpr):
        return _is_content(node.expr1, names) or _is_content(node.expr2, names)
    if isinstance(node, (nodes.Or, nodes.And)):
        return _is_content(node.left, names) or _is_content(node.right, names)
    return False


# -- going on with the last message -----------------------------------------------------------


class FinalMessage:
    """The last message of a chat that is to be continued: marked before a template renders it, and
    cut off after it, as transformers does."""

    _MARK = "CONTINUE_FINAL_MESSAGE_TAG "

    def __init__(self, messages: list[dict[str, Any]], field: bool | str, source: str) -> None:
        """Marks the end of the last message in place.

        Args:
            messages: as `checked_messages` makes them.
            field: what of it is continued; True for "content".
            source: the template.

        Raises:
            InvalidRequest: where there is no such text, or the template does not read it.
        """
        name = field if isinstance(field, str) else "content"
        last, what = messages[-1], f"chat: continue_final_message={shown(field)}"
        value = last.get(name)
        if value is None:
            raise InvalidRequest(f'{what} must find "{name[:64]}" in the last message, got none')
        fields = [name]
        if name in _REASONING:
            fields = [other for other in _REASONING if last.get(other) == value]
        if not any(each in source for each in fields):
            raise InvalidRequest(
                f'{what} must name what the template reads, and it has no "{name[:64]}"'
            )
        if isinstance(value, (list, tuple)):
            texts = [part for part in value if isinstance(part, dict) and "text" in part]
            if not texts:
                raise InvalidRequest(f"{what} must find text in the last message, got none")
            value = texts[-1]["text"]
            texts[-1]["text"] += self._MARK
        elif isinstance(value, str):
            for each in fields:
                last[each] = value + self._MARK
        else:
            raise InvalidRequest(f"{what} must find text in the last message, got {shown(value)}")
        self._what, self._text = what, value

    def cut(self, rendered: str) -> str:
        """The text up to the mark."""
        at = rendered.rfind(self._MARK.strip())
        if at < 0 or self._text.strip() not in rendered:
            raise InvalidRequest(
                f"{self._what} must find the last message in the prompt, and the template leaves "
                "it or a part of it out"
            )
        spaced = rendered[at : at + len(self._MARK)] == self._MARK
        return rendered[:at] if spaced else rendered[:at].rstrip()


def final_field(value: Any, add_generation_prompt: bool | None) -> tuple[bool | str, bool]:
    """(continue_final_message, add_generation_prompt), checked against each other.

    Args:
        add_generation_prompt: None for what follows: True unless the last message is continued.
    """
    if not isinstance(value, (bool, str)) or value == "":
        raise InvalidRequest(
            "chat: continue_final_message must be True, False or the name of a message's field, "
            f"got {shown(value)}"
        )
    if add_generation_prompt is None:
        return value, not value
    if not isinstance(add_generation_prompt, bool):
        raise InvalidRequest(
            f"chat: add_generation_prompt must be True or False, got {shown(add_generation_prompt)}"
        )
    if value and add_generation_prompt:
        raise InvalidRequest(
            "chat: add_generation_prompt must be False where continue_final_message goes on with "
            "the last message, got True"
        )
    return value, add_generation_prompt
