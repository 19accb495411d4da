"""Chat templates: messages to prompt text, in a sandbox."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any, NamedTuple

import jinja2

from ..errors import InvalidRequest, printable, shown
from .messages import FinalMessage, checked_messages, final_field, iterates_over_parts, plain
from .sandbox import Sandbox, TooMuch
from .unicode import encodable

__all__ = ["ChatTemplates"]

_REMEDY = (
    "add chat_template.jinja to the checkpoint folder, pass chat_template=, or give generate()"
    " a ready prompt"
)
_LONGEST_SOURCE = 1 << 20
# Arguments of transformers' function that are no variables of a template.
_NOT_HERE = (
    "conversation",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
)


class _Compiled(NamedTuple):
    """A template, and whether it looks into lists of content parts."""

    template: jinja2.Template
    parts: bool


class ChatTemplates:
    """The chat templates of one tokenizer, compiled on first use."""

    def __init__(self, templates: str | Mapping[str, str] | None = None) -> None:
        """templates: one template, or {name: template}; None if there is none."""
        if isinstance(templates, str):
            templates = {"default": templates}
        self.templates = dict(templates or {})
        self._sandbox = Sandbox()
        self._compiled: dict[str, _Compiled] = {}
        self._lock = Lock()

    def source(self, chat_template: str | None, with_tools: bool) -> str:
        """The template's text: the named or given one, else "tool_use" for tools, "default"."""
        if chat_template is not None:
            if not isinstance(chat_template, str):
                raise InvalidRequest(
                    f"chat: chat_template must be a template or a name, got {shown(chat_template)}"
                )
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
        add_generation_prompt: bool | None,
        continue_final_message: bool | str,
        variables: Mapping[str, Any],
    ) -> str:
        """The prompt text.

        Args:
            messages: list of dicts with role and content.
            tools: list of dicts, or None.
            documents: list of dicts, or None.
            chat_template: a name, a template, or None.
            add_generation_prompt: None for True unless the last message is continued.
            continue_final_message: whether, or which field of, the last message is continued.
            variables: everything else the template sees.
        """
        field, prompt = final_field(continue_final_message, add_generation_prompt)
        for name in _NOT_HERE:
            if name in variables:
                raise InvalidRequest(
                    f"chat: {name} must not be given: the prompt's text or ids are all that is made"
                )
        source = self.source(chat_template, tools is not None)
        compiled = self._compile(source)
        talk = checked_messages(messages, compiled.parts)
        given: dict[str, Any] = {"messages": talk, "add_generation_prompt": prompt}
        for name, entries in (("tools", tools), ("documents", documents)):
            if entries is not None:
                entries = plain(entries, name)
                if not isinstance(entries, (list, tuple)) or not all(
                    isinstance(entry, dict) for entry in entries
                ):
                    raise InvalidRequest(
                        f"chat: {name} must be a list of dicts, got {shown(entries)}"
                    )
                entries = list(entries)
            given[name] = entries
        final = FinalMessage(talk, field, source) if field else None
        rest = {key: plain(value, key) for key, value in variables.items()}
        text = self._run(compiled.template, {**rest, **given})
        return text if final is None else final.cut(text)

    def _run(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        try:
            text = self._sandbox.run(template, variables)
        except jinja2.exceptions.TemplateError as error:
            raise InvalidRequest(f"chat: the chat template refused this: {error}") from error
        except TooMuch as error:
            raise InvalidRequest(f"chat: the chat template went too far: {error}") from error
        except Exception as error:  # whatever a template does with its values
            raise InvalidRequest(
                f"chat: the chat template failed on the messages: {type(error).__name__}: {error}"
            ) from error
        if not encodable(text):
            raise InvalidRequest(
                "chat: the chat template must make text that UTF-8 can hold, got a lone surrogate"
            )
        return text

    def _compile(self, source: str) -> _Compiled:
        with self._lock:
            compiled = self._compiled.get(source)
            if compiled is None:
                compiled = self._compile_new(source)
                if len(self._compiled) >= 32:  # templates given per request must not pile up
                    self._compiled.clear()
                self._compiled[source] = compiled
            return compiled

    def _compile_new(self, source: str) -> _Compiled:
        if len(source) > _LONGEST_SOURCE or not encodable(source):
            raise InvalidRequest(
                f"chat: chat_template must be at most {_LONGEST_SOURCE} characters that UTF-8 can "
                f"hold, got {len(source)}: {shown(source)}"
            )
        try:
            with warnings.catch_warnings():  # Python's own word on what a template compiles to
                warnings.simplefilter("ignore")
                return _Compiled(
                    self._sandbox.from_string(source),
                    iterates_over_parts(self._sandbox.parse(source)),
                )
        except Exception as error:  # also Python's, for what it cannot compile
            why = printable(str(error)) or type(error).__name__
            raise InvalidRequest(
                f"chat: chat_template must be a Jinja template, got {why}"
            ) from error
