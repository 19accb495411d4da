"""The text of a sequence while it grows: its thinking and its answer, and the text of steps."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from ..outputs import Phase
from .detokenizer import Detokenizer
from .stops import StopStrings

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

__all__ = ["StepText", "TextStream"]

_LEAD = "lead"  # white space ahead of what may become a thinking block
_TAG = "tag"
_CONTEXT = 8  # tokens of a loaded sequence that may hold the beginning of a character


class _Block:
    """Finds a thinking block in text whose tags are spelled by several tokens.

    thinking: whether the text so far ends in the block. answer: what the push that ended the block
    had after it.
    """

    def __init__(self, start: str, end: str) -> None:
        self._start, self._end, self._text = start, end, ""
        self.answer = ""
        self._done = self.thinking = False

    def push(self, text: str) -> None:
        """Reads more text."""
        if self._done or not text:
            return
        self._text += text
        if not self.thinking:
            begun = self._text.lstrip()
            self.thinking = begun.startswith(self._start)
            self._done = not self.thinking and not self._start.startswith(begun)
            self._text = begun[len(self._start) :] if self.thinking else begun
        if self.thinking and self._end in self._text:
            self.thinking, self._done = False, True
            self.answer = self._text.partition(self._end)[2]
        elif self.thinking:
            self._text = self._text[-len(self._end) :]


class TextStream:
    """The text of one choice, token by token, and which part of it is reasoning or answer.

    Text is given out when it is final. What is held back for a while (half a character, what may
    begin a stop string) comes with a later token and still counts as what it was said in.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        tags: Collection[int],
        skip_special_tokens: bool = True,
        spelled: tuple[str, str] | None = None,
    ) -> None:
        """Starts an empty text.

        Args:
            tokenizer: decodes.
            stop: strings that end the text.
            tags: ids of the think tags, which stay in the text.
            skip_special_tokens: leave other special tokens out.
            spelled: the think tags where the vocabulary has no tokens for them: blocks are found in
                the text then.
        """
        self._block = None if spelled is None else _Block(*spelled)
        self._tokenizer, self._tags = tokenizer, frozenset(tags)
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens, tags)
        self._stops = StopStrings(stop)
        self._said: deque[list] = deque()  # [what, characters] of text that was not given out yet
        self._parts: dict[str, list[str]] = {_LEAD: [], "thinking": [], "answer": [], _TAG: []}
        self._pieces: list[str] = []
        self._now = _LEAD

    def push(
        self, token_id: int, phase: Phase | None, search: bool, inside: bool = False
    ) -> tuple[str, str | None]:
        """Adds a token.

        Args:
            token_id: the token.
            phase: the phase that it belongs to.
            search: True if stop strings may end the text in it; in a block of spelled tags they do
                not, unless `inside`.
            inside: True if stop strings are looked for in thinking.

        Returns:
            (text that is final, stop string found or None).
        """
        if token_id in self._tags:
            before, tag = self._tag(token_id)
            search = search and (inside or phase != "thinking")
            added = self._add([(self._now, before), (_TAG, tag)], search)
            if phase == "thinking" and not inside:
                self._stops.begin_answer()
            return added
        self._now = phase or _LEAD
        text, begins = self._detokenizer.push(token_id), False
        if self._block is not None:
            thinking = self._block.thinking
            self._block.push(text)
            search = search and (inside or not (thinking or self._block.thinking))
            begins = thinking and not (self._block.thinking or self._block.answer.strip())
        added = self._add([(self._now, text)], search and (inside or phase != "thinking"))
        if begins and not inside:
            self._stops.begin_answer()
        return added

    def finish(self, search: bool, inside: bool = False) -> tuple[str, str | None]:
        """Ends the text. Returns (the text that was held back, stop string found in it or None)."""
        thinking = self._block.thinking if self._block is not None else self._now == "thinking"
        search = search and (inside or not thinking)
        shown, hit = self._add([(self._now, self._detokenizer.finish())], search)
        if hit is None:
            shown += self._give(self._stops.finish())
        return shown, hit

    def _tag(self, token_id: int) -> tuple[str, str]:
        """The text that was held back when a think tag came, and the tag's own."""
        detokenizer = self._detokenizer
        if self._tokenizer.stream_rule.kind == "whole":  # parts of such a text are decoded apart
            before = detokenizer.finish()
            return before, detokenizer.push(token_id) + detokenizer.finish()
        text = detokenizer.push(token_id)
        own = self._tokenizer.decode([token_id], skip_special_tokens=False)
        if not text.endswith(own):
            return "", text
        return text[: len(text) - len(own)], own

    def _add(self, texts: list[tuple[str, str]], search: bool) -> tuple[str, str | None]:
        for what, text in texts:
            if text:
                self._said.append([what, len(text)])
        shown, hit = self._stops.push("".join(text for _, text in texts), search)
        return self._give(shown), hit

    def _give(self, shown: str) -> str:
        """Notes what the text that is given out belongs to."""
        if shown:
            self._pieces.append(shown)
        start = 0
        while start < len(shown):
            what, count = self._said[0]
            part = shown[start : start + count]
            self._parts[what].append(part)
            start += len(part)
            if len(part) == count:
                self._said.popleft()
            else:
                self._said[0][1] = count - len(part)
        return shown

    @property
    def text(self) -> str:
        """All that was given out."""
        return "".join(self._pieces)

    def split(self, thinks: bool) -> tuple[str | None, str]:
        """(reasoning or None, answer) of what was given out; think tags are in neither.

        Args:
            thinks: True if there is a thinking block: white space ahead of one belongs to neither.
        """
        answer = "".join(self._parts["answer"])
        if not thinks:
            return None, "".join(self._parts[_LEAD]) + answer
        return "".join(self._parts["thinking"]).strip(), answer.lstrip()


class StepText:
    """The text of tokens that are drawn one by one, among tokens that their owner appends.

    Between two appends the joined texts are the drawn tokens decoded; what was held back comes
    with the next token, or with `finish`. What was appended is not given out.
    """

    def __init__(self, tokenizer: Tokenizer | None, loaded: Sequence[int] | None = None) -> None:
        """Starts before the first drawn token.

        Args:
            tokenizer: decodes; without one there is no text.
            loaded: tokens of a sequence that goes on where a file ends, and so does its text; None
                for a new one.
        """
        self._tokenizer = tokenizer
        self._loaded = loaded is not None
        self._spans: list[list[int]] = []  # [start, stop) of drawn tokens
        self.cut([] if loaded is None else loaded)

    def push(self, token_id: int, position: int) -> str | None:
        """Adds a drawn token. Returns the text that is now final, None without a tokenizer."""
        if self._stream is None:
            return None
        before = ""
        if self._spans and self._spans[-1][1] == position:
            self._spans[-1][1] += 1
        else:
            before = self._stream.interrupt() if self._spans else ""
            self._spans.append([position, position + 1])
        return before + self._stream.push(token_id)

    def finish(self) -> str | None:
        """Ends the text. Returns what was held back, None without a tokenizer."""
        return None if self._stream is None else self._stream.finish()

    def cut(self, token_ids: Sequence[int]) -> None:
        """Goes back to a sequence of these tokens, the first of those that there were."""
        self._stream = None if self._tokenizer is None else Detokenizer(self._tokenizer, eager=True)
        if self._stream is None:
            return
        length = len(token_ids)
        self._spans = [[a, min(b, length)] for a, b in self._spans if a < length]
        if self._loaded and not self._spans:
            self._spans = [[length, length]]
        for number, (start, stop) in enumerate(self._spans):
            if number:
                self._stream.interrupt()
            elif self._loaded:
                start = max(0, start - _CONTEXT)
            for token_id in token_ids[start:stop]:
                self._stream.push(token_id)

    def fork(self) -> StepText:
        """A twin that goes on by itself."""
        twin = copy.copy(self)
        twin._spans = [list(span) for span in self._spans]
        twin._stream = self._stream and self._stream.fork()
        return twin
