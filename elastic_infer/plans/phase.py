"""Phases of a sequence, thinking and answering, found from token ids."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Union

from ..outputs import Phase
from .decision import ChatPrompt

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

Tag = Union[str, int]  # noqa: UP007 (evaluated at run time)


class PhaseTracker:
    """Finds the phase from token ids alone. One thinking block per answer.

    Attributes:
        start: id of the start tag.
        end: id of the end tag.
        phase: of the next token; None while it is open whether the model will think: nothing but
            white space has come since the prompt, or since an end tag of an earlier turn.
        opened: True if a token opened a block, rather than the prompt.
    """

    def __init__(self, start: int, end: int, blank: Callable[[int], bool]) -> None:
        self.start, self.end, self._blank = start, end, blank
        self.phase: Phase | None = None
        self.opened = False

    def read_prompt(self, prompt_ids: Sequence[int]) -> None:
        """Finds the phase at the end of a prompt; a chat's messages may quote tags."""
        tail = prompt_ids.tail if isinstance(prompt_ids, ChatPrompt) else prompt_ids
        only_blank = True
        for token_id in reversed(tail):
            if token_id == self.start:
                self.phase = "thinking"
                return
            if token_id == self.end:
                # Right at the end it closes this turn's block; earlier it closed another turn's.
                self.phase = "answer" if only_blank else None
                return
            only_blank = only_blank and self._blank(token_id)

    def push(self, token_id: int) -> Phase | None:
        """Reads a token. Returns the phase that it belongs to itself: the end tag of a block to
        its thinking; the start tag, white space before it, and tags in the answer to none."""
        is_tag = token_id in (self.start, self.end)
        if self.phase is None:
            if token_id == self.start:
                self.phase, self.opened = "thinking", True
                return None
            if not self._blank(token_id):
                self.phase = "answer"
        elif self.phase == "thinking":
            if token_id == self.end:
                self.phase = "answer"
            return "thinking"
        return None if is_tag else self.phase


def tag_id(tag: Tag, tokenizer: Tokenizer | None) -> int | None:
    """The id of a think tag given as text or id; None if it is no single token."""
    if isinstance(tag, int):
        return tag
    return None if tokenizer is None else tokenizer.token_id(tag)


def make_tracker(
    tags: tuple[Tag, Tag], tokenizer: Tokenizer | None, newline_ids: Collection[int] = ()
) -> PhaseTracker | None:
    """The tracker for these tags, None if they are not tokens of the vocabulary."""
    start, end = (tag_id(tag, tokenizer) for tag in tags)
    if start is None or end is None:
        return None

    def blank(token_id: int) -> bool:
        if token_id in newline_ids:
            return True
        if tokenizer is None or token_id in (start, end):
            return False
        return not tokenizer.decode([token_id], skip_special_tokens=False).strip()

    return PhaseTracker(start, end, blank)
