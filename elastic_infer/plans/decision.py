"""The values that plans are made of, and the phase of a sequence."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union, overload

from ..errors import InvalidRequest, WidthError, shown
from ..outputs import Phase

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

__all__ = [
    "CARRY",
    "DEFAULT_GRACE",
    "PROMPT_PHASES",
    "ChatPrompt",
    "Decision",
    "PhaseTracker",
    "PlanView",
    "Policy",
    "ReadOnly",
    "Tag",
    "make_tracker",
    "tag_id",
]

Tag = Union[str, int]  # noqa: UP007 (evaluated at run time)
PROMPT_PHASES = (None, "thinking", "answer", "undecided")
DEFAULT_GRACE = 16
DEFAULT_WINDOW = 256


@dataclass(frozen=True)
class Policy:
    """What happens to the cache when the width changes.

    kind: "carry" keeps it, "exact" rebuilds it from the tokens, "window" rebuilds its last part.
    n: tokens between two snapshots for "window" (n to 2n tokens are rebuilt, soon after a prompt up
        to 63 more because prompts are cut on a grid of 64), None otherwise.
    """

    kind: str
    n: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("carry", "exact", "window"):
            raise InvalidRequest(
                f"policy: must be 'carry', 'exact' or 'window(n)', got {shown(self.kind)}"
            )
        if self.kind == "window":
            n = DEFAULT_WINDOW if self.n is None else self.n
            if isinstance(n, bool) or not isinstance(n, int) or n < 1:
                raise InvalidRequest(
                    f"policy: n of 'window(n)' must be an int >= 1, got {shown(n)}"
                )
            object.__setattr__(self, "n", n)
        elif self.n is not None:
            raise InvalidRequest(f"policy: {self.kind!r} must have no n, got {shown(self.n)}")

    @classmethod
    def parse(cls, value: str | Policy) -> Policy:
        """Reads "carry", "exact", "window", "window(128)" or "window:128"; a Policy stays."""
        if isinstance(value, Policy):
            return value
        if not isinstance(value, str):
            raise InvalidRequest(
                f"policy: must be 'carry', 'exact', 'window(n)' or a Policy, got {shown(value)}"
            )
        match = re.fullmatch(r"(\w+)(?:\((-?\d{1,18})\)|:(-?\d{1,18}))?", value.strip())
        if match is None:
            raise InvalidRequest(
                f"policy: must be 'carry', 'exact' or 'window(n)', got {shown(value)}"
            )
        n = match.group(2) or match.group(3)
        return cls(match.group(1), None if n is None else int(n))

    def __str__(self) -> str:
        return self.kind if self.n is None else f"{self.kind}({self.n})"


CARRY = Policy("carry")


@dataclass(frozen=True)
class Decision:
    """What computes the next token.

    width: the width that reads every token not read yet, so the next token's logits are its.
    phase: the phase the next token is sampled in; None where that is unknown.
    forced: token ids appended to the output first and read by `width` too.
    """

    width: str
    phase: Phase | None
    forced: tuple[int, ...] = ()

    def check(self, widths: Collection[str], vocabulary: int) -> None:
        """Raises WidthError for a width that is none of `widths`, InvalidRequest for forced tokens
        beyond the vocabulary."""
        if self.width not in widths:
            known = ", ".join(widths)
            raise WidthError(f"plan: width must be one of {known}, got {shown(self.width)}")
        for token in self.forced:
            if not 0 <= token < vocabulary:
                raise InvalidRequest(
                    f"plan: forced tokens must be ids in [0, {vocabulary}), got {shown(token)}"
                )


class ReadOnly(Sequence[int]):
    """A list that can be looked at but not changed, without a copy."""

    __slots__ = ("_items",)

    def __init__(self, items: Sequence[int]) -> None:
        self._items = items

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        return self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return repr(list(self._items))


@dataclass(frozen=True)
class PlanView:
    """What a custom plan sees before the next token.

    prompt_ids: the prompt's tokens.
    token_ids: all generated tokens so far.
    phase: "thinking", "answer" or None.
    entropy: of the last sampled distribution in nats, None before the first token.
    """

    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    phase: Phase | None
    entropy: float | None


class ChatPrompt(list[int]):
    """Token ids of a chat's prompt; a list that knows what comes after the messages.

    tail: tokens of what follows the last message, where the phase may begin.
    """

    def __init__(self, token_ids: Sequence[int], tail: Sequence[int]) -> None:
        super().__init__(token_ids)
        self.tail = tuple(tail)


class PhaseTracker:
    """Finds the phase from token ids alone. One thinking block per answer.

    start, end: ids of the think tags.
    phase: of the next token; None while it is open whether the model will think: nothing but
        white space has come since the prompt, or since an end tag of an earlier turn.
    opened: whether a token opened a block, rather than the prompt.
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
