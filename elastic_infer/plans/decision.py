"""The values that plans are made of, and the phase of a sequence."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import overload

from ..errors import InvalidRequest, WidthError, shown
from ..outputs import Phase

__all__ = ["DEFAULT_GRACE", "PROMPT_PHASES", "ChatPrompt", "Decision", "PlanView", "ReadOnly"]

PROMPT_PHASES = (None, "thinking", "answer", "undecided")
DEFAULT_GRACE = 16


@dataclass(frozen=True)
class Decision:
    """A plan's answer: width, phase, and tokens forced before the next step.

    Attributes:
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
    """View of a sequence that a custom plan gets before the next token.

    Attributes:
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
    """Token ids of a chat's prompt; a list that knows its tail after the messages.

    Args:
        tail: tokens after the last message, where the phase may begin.
    """

    def __init__(self, token_ids: Sequence[int], tail: Sequence[int]) -> None:
        super().__init__(token_ids)
        self.tail = tuple(tail)
