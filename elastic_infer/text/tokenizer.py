"""Text and token ids: the tokenizer of a checkpoint folder, and its chat template."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from ..errors import CheckpointError, InvalidRequest, shown
from ..files.reading import (
    CHAT_TEMPLATE,
    CHAT_TEMPLATES,
    GENERATION_CONFIG,
    SPECIAL_TOKENS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    foreign,
    parse_json,
    read_json,
    read_text,
)
from ..user_calls import tokenizer_errors
from ..value_checks import is_int
from .chat import ChatTemplates
from .growth import check_growth
from .stream_rule import StreamRule
from .unicode import encodable

__all__ = ["Tokenizer", "eos_ids_from_folder"]

# The named special tokens, which chat templates can refer to.
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_NAMED += ("mask_token",)
_SHORT = 2048  # characters that are tokenized in less time than a thread waits for its turn
_TOKENIZER_BYTES = 1 << 30
_TEMPLATE_BYTES = 4 << 20


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, f"{path.name}:", dict) if os.path.lexists(path) else {}


def _content(token: Any) -> str | None:
    """The text of a special token as configs write it: a string, or {"content": …}."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def eos_ids_from_folder(folder: str | Path) -> tuple[int, ...]:
    """The end-of-sequence ids that a checkpoint states, in order, without a tokenizer.

    Args:
        folder: holds generation_config.json, or else config.json, with eos_token_id (int or list).

    Returns:
        The ids; empty if none is stated.

    Raises:
        CheckpointError: if they are not ids.
    """
    for name in (GENERATION_CONFIG, "config.json"):
        value = _read_json(Path(folder) / name).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        for token_id in ids:
            if not is_int(token_id) or token_id < 0:
                raise CheckpointError(f"{name}: eos_token_id must be ids >= 0, got {shown(value)}")
        return tuple(dict.fromkeys(ids))
    return ()


class Tokenizer:
    """Encodes and decodes text and renders chats. Safe to use from several threads.

    Attributes:
        backend: the tokenizers.Tokenizer underneath.
        special_tokens: {"bos_token": text, …}, by the names that chat templates use.
        eos_ids: tokens that end a sequence.
        special_ids: tokens that `decode` leaves out unless asked not to.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | Mapping[str, str] | None = None,
        eos_ids: Iterable[int] = (),
    ) -> None:
        """Wrap a tokenizer.

        Args:
            backend: a tokenizers.Tokenizer; its truncation and padding are switched off.
            special_tokens: named special tokens; vocabulary entries among them become special.
            chat_template: one template, or {name: template} with "default" and maybe "tool_use".
            eos_ids: ids that end a sequence, beside special_tokens["eos_token"].
        """
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        _mark_special(backend, self.special_tokens.values())
        named = self.token_id(self.special_tokens.get("eos_token", ""))
        ids = [*eos_ids] if named is None else [named, *eos_ids]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(ids))
        special = {
            index: token.content
            for index, token in backend.get_added_tokens_decoder().items()
            if token.special
        }
        self.special_ids: frozenset[int] = frozenset(special)
        self._special_texts = tuple(text for text in special.values() if text)
        self._templates = ChatTemplates(chat_template)

    def most_characters(self, tokens: int) -> int:
        """The most characters of text in so many tokens, if the tokenizer drops none."""
        return tokens * self._longest

    @cached_property
    def _longest(self) -> int:
        """Characters of the longest token; what a normalizer may compose is counted apart."""
        longest = max(map(len, self.backend.get_vocab(with_added_tokens=True)), default=1)
        return longest * (1 if self.backend.normalizer is None else 4)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer | None:
        """The tokenizer of a checkpoint folder, None if it has no tokenizer.json.

        Args:
            folder: holds tokenizer.json and, where present, tokenizer_config.json,
                special_tokens_map.json, chat_template.jinja, additional_chat_templates/*.jinja,
                generation_config.json and config.json.

        Raises:
            CheckpointError: a file that cannot be read.
        """
        folder = Path(folder)
        path = folder / TOKENIZER
        if not os.path.lexists(path):
            return None
        with foreign(f"{TOKENIZER}: must be a tokenizer"):
            # Before it is loaded: added tokens are normalized then.
            _check_growth(path)
            backend = tokenizers.Tokenizer.from_file(str(path))
        config = _read_json(folder / TOKENIZER_CONFIG)
        special_map = _read_json(folder / SPECIAL_TOKENS)
        named: dict[str, str] = {}
        for name in _NAMED:
            text = _content(config.get(name)) or _content(special_map.get(name))
            if text:
                named[name] = text
        templates, eos_ids = _read_templates(folder, config), eos_ids_from_folder(folder)
        with foreign(f"{TOKENIZER_CONFIG}: must name tokens that {TOKENIZER} can take"):
            _add_tokens(backend, config, special_map)
            return cls(backend, special_tokens=named, chat_template=templates, eos_ids=eos_ids)

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included (a model's vocabulary may be padded)."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def stream_rule(self) -> StreamRule:
        """Places where this tokenizer's text may be cut; used by `Detokenizer`."""
        return StreamRule(self.backend)

    def token_id(self, text: str) -> int | None:
        """The id of the token that is exactly this text, None if there is none."""
        if not isinstance(text, str):
            raise InvalidRequest(f"token_id: text must be a str, got {shown(text)}")
        return self.backend.token_to_id(text) if encodable(text) else None

    def special_texts_in(self, text: str) -> list[str]:
        """The special tokens that are written out in a text."""
        return [token for token in self._special_texts if token in text]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text. Special tokens written out in it become their ids.

        Args:
            text: any text.
            add_special_tokens: add the special tokens of the tokenizer's post-processor (a BOS for
                some models, nothing for others). False for text from `apply_chat_template`, which
                has its own.
        """
        if not isinstance(text, str):
            raise InvalidRequest(f"encode: text must be a str, got {type(text).__name__}")
        if not encodable(text):
            raise InvalidRequest(
                f"encode: text must be what UTF-8 can hold, got {shown(text)} with a lone surrogate"
            )
        with tokenizer_errors("encode"):
            if len(text) <= _SHORT:
                return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
            # The same, but other threads (the model's among them) run meanwhile.
            batch = self.backend.encode_batch([text], add_special_tokens=add_special_tokens)
            return batch[0].ids

    def decode(
        self,
        token_ids: Sequence[int],
        skip_special_tokens: bool = True,
        keep: Collection[int] = (),
    ) -> str:
        """The text of token ids; ids outside the vocabulary have none.

        Args:
            token_ids: the tokens.
            skip_special_tokens: leave special tokens out.
            keep: special ids that stay in all the same.
        """
        with tokenizer_errors("decode"):
            if skip_special_tokens:
                skip = self.special_ids - set(keep)
                token_ids = [index for index in token_ids if index not in skip]
            return self.backend.decode(list(token_ids), skip_special_tokens=False)

    def apply_chat_template(
        self,
        /,  # a template may have a variable of this name, too
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        continue_final_message: bool | str = False,
        **kwargs: Any,
    ) -> str:
        """The prompt text of a chat; encode it with add_special_tokens=False.

        Args:
            messages: dicts with "role" and "content" (or "tool_calls"), oldest first. Content may
                be a list of text parts; a template that takes text gets them joined by newlines.
                Arguments of tool calls may be JSON in a string.
            add_generation_prompt: end with the opening of the assistant's turn; None for True
                unless the last message is continued.
            tools: JSON schemas of tools; passed to the template.
            documents: dicts that are passed to the template.
            chat_template: a template, or the name of one of the tokenizer's; None for its default.
                It runs in a sandbox with limits of steps, time and length.
            continue_final_message: end in the middle of the last message, which the model goes on
                with; the name of a field continues that one, such as "reasoning_content".
            kwargs: variables of the template, such as enable_thinking=False.

        Raises:
            InvalidRequest: a malformed message, a missing template, or a refusal by the template
                itself.
        """
        return self._templates.render(
            messages,
            tools=tools,
            documents=documents,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables={**self.special_tokens, **kwargs},
        )

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> tuple[str, int]:
        """The prompt of a chat, and where in it begins what the template puts after the last
        message, or the message that is continued.

        Args:
            messages: as in `apply_chat_template`.
            tools: as in `apply_chat_template`.
            arguments: further ones of it, by name.
        """
        given = _chat_arguments(tools, arguments)
        text = self.apply_chat_template(messages, **given)
        return text, self._tail(text, messages, given)

    def _tail(self, text: str, messages: Any, given: dict[str, Any]) -> int:
        before, shorter = messages, {**given, "add_generation_prompt": False}
        if shorter.pop("continue_final_message", False):
            before = messages[:-1]
        elif given.get("add_generation_prompt") is False:
            return len(text)
        if not before:
            return 0
        try:
            return _common(text, self.apply_chat_template(before, **shorter))
        except InvalidRequest:  # a template that renders no such chat: tags count anywhere
            return 0


def _common(a: str, b: str) -> int:
    """Length of the longest common beginning of two texts."""
    if a.startswith(b):
        return len(b)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))


def _chat_arguments(tools: Any, arguments: Any) -> dict[str, Any]:
    """The arguments of `apply_chat_template` beside the messages, checked for what must not be."""
    if arguments is not None and not (
        isinstance(arguments, Mapping) and all(isinstance(name, str) for name in arguments)
    ):
        raise InvalidRequest(
            f"chat: chat_template_kwargs must be a dict of names, got {shown(arguments)}"
        )
    given = dict(arguments or {})
    if "messages" in given or (tools is not None and given.get("tools") is not None):
        twice = "messages" if "messages" in given else "tools"
        raise InvalidRequest(
            f"chat: {twice} must be given once, got {twice} in chat_template_kwargs as well"
        )
    return given if tools is None else {**given, "tools": tools}


def _check_growth(path: Path) -> None:
    """Refuses a tokenizer.json that could make very much of little text."""
    content = read_text(path, f"{TOKENIZER}:", _TOKENIZER_BYTES)
    if "Replace" in content or "\\u" in content:  # else there is no need to read it twice
        made = parse_json(content, f"{TOKENIZER}:", dict)
        for part in ("normalizer", "decoder"):
            check_growth(part, made.get(part))


def _add_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], special_map: Mapping[str, Any]
) -> None:
    """Adds the tokens that only tokenizer_config.json knows, and marks the special ones."""
    listed = config.get("added_tokens_decoder") or {}
    if not isinstance(listed, Mapping) or not all(key.isdecimal() for key in listed):
        raise CheckpointError(
            f"{TOKENIZER_CONFIG}: added_tokens_decoder must be an object of ids, got "
            f"{shown(listed)}"
        )
    for key, token in sorted(listed.items(), key=lambda item: int(item[0])):
        text = _content(token)
        if text is None or backend.token_to_id(text) is not None:
            continue
        flags = {
            flag: bool(token[flag])
            for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")
            if isinstance(token, Mapping) and flag in token
        }
        backend.add_tokens([AddedToken(text, **flags)])
        if backend.token_to_id(text) != int(key):
            raise CheckpointError(
                f"tokenizer_config.json: added token {text!r} must have id"
                f" {backend.token_to_id(text)} to follow tokenizer.json, got {key}"
            )
    extra: list[Any] = []
    for file, source in ((TOKENIZER_CONFIG, config), (SPECIAL_TOKENS, special_map)):
        for name in ("additional_special_tokens", "extra_special_tokens"):
            value = source.get(name) or []
            if not isinstance(value, (Mapping, list)):
                raise CheckpointError(
                    f"{file}: {name} must be a list or object of tokens, got {shown(value)}"
                )
            extra.extend(value.values() if isinstance(value, Mapping) else value)
    _mark_special(backend, map(_content, extra))


def _mark_special(backend: tokenizers.Tokenizer, texts: Iterable[str | None]) -> None:
    """Makes plain vocabulary entries special; for added tokens tokenizer.json has decided."""
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    plain = [t for t in texts if t and t not in added and backend.token_to_id(t) is not None]
    if plain:
        backend.add_special_tokens(plain)


def _read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """{name: template}: the .jinja files, or else tokenizer_config.json's chat_template."""
    found: dict[str, str] = {}
    main = folder / CHAT_TEMPLATE
    if os.path.lexists(main):
        found["default"] = read_text(main, f"{main.name}:", _TEMPLATE_BYTES)
    for path in sorted(folder.glob(CHAT_TEMPLATES)):
        found[path.stem] = read_text(path, f"{path.name}:", _TEMPLATE_BYTES)
    if found:
        return found
    value = config.get("chat_template")
    if value is None:
        return {}
    entries = [{"name": "default", "template": value}] if isinstance(value, str) else value
    if isinstance(entries, list) and all(
        isinstance(entry, Mapping)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("template"), str)
        for entry in entries
    ):
        return {entry["name"]: entry["template"] for entry in entries}
    raise CheckpointError(
        f"{TOKENIZER_CONFIG}: chat_template must be text or a list of objects with name and "
        f"template, got {shown(value)}"
    )
