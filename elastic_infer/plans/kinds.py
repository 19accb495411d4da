"""The kinds of plan behind `Plan`'s constructors, each with its state on one sequence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import InvalidRequest, WidthError, shown
from ..user_calls import call_user
from .decision import Decision, PlanView, ReadOnly
from .phase import PhaseTracker, Tag, make_tracker, tag_id
from .run import PlanRun, Start

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

__all__ = ["ByUncertainty", "Custom", "Fixed", "Kind", "Schedule", "ThinkAnswer"]

TAG_NAMES = ("start_tag", "end_tag")


class Kind(ABC):
    """A rule that chooses the width of every token.

    Attributes:
        needs_entropy: True if it asks for the entropy of the last sampled distribution.
    """

    needs_entropy: ClassVar[bool] = False

    @property
    @abstractmethod
    def widths_used(self) -> tuple[str, ...] | None:
        """The widths it may choose, in order of first use; None for any."""

    def switches(self, names: Sequence[str]) -> list[tuple[str, str]]:
        """Pairs (earlier width, later width) that can come in one sequence."""
        return [(a, b) for a in names for b in names if a != b]

    def needed_ids(
        self, tags: tuple[Tag, Tag], tokenizer: Tokenizer | None
    ) -> list[tuple[str, int]]:
        """(argument, token id) of the tags without which it cannot do its work."""
        return []

    @abstractmethod
    def start(self, start: Start) -> PlanRun:
        """Its state at the beginning of a sequence."""

    @abstractmethod
    def describe(self, policy: str) -> str:
        """The call of `Plan` that makes it."""


@dataclass(frozen=True)
class Fixed(Kind):
    """The same width for every token."""

    width: str

    @property
    def widths_used(self) -> tuple[str, ...]:
        return (self.width,)

    def start(self, start: Start) -> PlanRun:
        return FixedRun(self, start)

    def describe(self, policy: str) -> str:
        return f"Plan.fixed({self.width!r})"


class FixedRun(PlanRun):
    """Every token at one width."""

    def __init__(self, kind: Fixed, start: Start) -> None:
        super().__init__(start, start.tracker())
        self._width = kind.width

    def _decide(self, token_ids: Sequence[int], entropy: float | None, fresh: int) -> Decision:
        return Decision(self._width, self.phase)

    def settled(self, count: int) -> str | None:
        return self._width


@dataclass(frozen=True)
class Schedule(Kind):
    """Widths by the number of the generated token."""

    steps: tuple[tuple[int, str], ...]

    @property
    def widths_used(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(width for _, width in self.steps))

    def switches(self, names: Sequence[str]) -> list[tuple[str, str]]:
        order = [width for _, width in self.steps]
        return [(a, b) for i, a in enumerate(order) for b in order[i + 1 :]]

    def start(self, start: Start) -> PlanRun:
        return ScheduleRun(self, start)

    def describe(self, policy: str) -> str:
        return f"Plan.schedule({list(self.steps)}, policy={policy!r})"


class ScheduleRun(PlanRun):
    """The width of the last step that has begun."""

    def __init__(self, kind: Schedule, start: Start) -> None:
        super().__init__(start, start.tracker())
        self._steps, self._at = kind.steps, 0

    def _decide(self, token_ids: Sequence[int], entropy: float | None, fresh: int) -> Decision:
        steps = self._steps
        while self._at + 1 < len(steps) and steps[self._at + 1][0] <= len(token_ids):
            self._at += 1
        return Decision(steps[self._at][1], self.phase)

    def settled(self, count: int) -> str | None:
        return [width for start, width in self._steps if start <= count][-1]


@dataclass(frozen=True)
class ThinkAnswer(Kind):
    """One width thinks, another answers."""

    think: str
    answer: str
    think_tokens: int | None
    grace: int
    closing: str | tuple[int, ...]
    newline_ids: frozenset[int] | None

    @property
    def widths_used(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.think, self.answer)))

    def switches(self, names: Sequence[str]) -> list[tuple[str, str]]:
        return [(self.think, self.answer)]  # never back: there is one block per answer

    def needed_ids(
        self, tags: tuple[Tag, Tag], tokenizer: Tokenizer | None
    ) -> list[tuple[str, int]]:
        ids = [(name, tag_id(tag, tokenizer)) for name, tag in zip(TAG_NAMES, tags)]
        return [(name, found) for name, found in ids if found is not None]

    def start(self, start: Start) -> PlanRun:
        tokenizer = start.tokenizer
        for name, tag in zip(TAG_NAMES, start.tags):
            if tag_id(tag, tokenizer) is None:
                why = "there is no tokenizer" if tokenizer is None else "the vocabulary has none"
                raise InvalidRequest(
                    f"plan: {name} must be a single token of the vocabulary, got {shown(tag)} and"
                    f" {why}; give the model's own tag, or its token id"
                )
        newlines = self.newline_ids
        tracker = make_tracker(start.tags, tokenizer, newlines or ())
        assert tracker is not None  # both tags were found above
        newline: Callable[[int], bool] | None = None
        if newlines is not None:
            newline = newlines.__contains__
        elif tokenizer is not None:

            def newline(token_id: int) -> bool:
                return "\n" in tokenizer.decode([token_id], skip_special_tokens=False)

        closing = self._closing_ids(tracker.end, start.tags[1], tokenizer)
        return ThinkRun(self, start, tracker, closing, newline)

    def _closing_ids(self, end: int, tag: Tag, tokenizer: Tokenizer | None) -> tuple[int, ...]:
        """The tokens that close a block. end: id of the end tag, given as `tag`."""
        if isinstance(self.closing, str):
            if self.closing == tag:
                return (end,)
            if tokenizer is None:
                raise InvalidRequest(
                    "plan: closing_text must be token ids without a tokenizer, got"
                    f" {shown(self.closing)}"
                )
            if isinstance(tag, int):
                tag = tokenizer.decode([tag], skip_special_tokens=False)
            before, found, after = self.closing.partition(tag)
            if not found or tag in after:
                raise InvalidRequest(
                    f"plan: closing_text must hold the end tag {shown(tag)} once, got "
                    f"{shown(self.closing)}"
                )
            parts = [tokenizer.encode(part, add_special_tokens=False) for part in (before, after)]
            ids = (*parts[0], end, *parts[1])
        else:
            ids = self.closing
        if ids.count(end) != 1:
            raise InvalidRequest(
                f"plan: closing_text must hold the end tag's id {end} once, got {shown(ids)}"
            )
        return ids

    def describe(self, policy: str) -> str:
        limit = "" if self.think_tokens is None else f", think_tokens={self.think_tokens}"
        return (
            f"Plan.think_answer(think={self.think!r}, answer={self.answer!r}{limit},"
            f" policy={policy!r})"
        )


class ThinkRun(PlanRun):
    """Thinks at one width until the end tag or the end of the budget, then answers at another."""

    def __init__(
        self,
        kind: ThinkAnswer,
        start: Start,
        tracker: PhaseTracker,
        closing: tuple[int, ...],
        newline: Callable[[int], bool] | None,
    ) -> None:
        super().__init__(start, tracker)
        self._kind = kind
        self._closing = closing
        self._newline = newline
        # Without a way to see a newline there is nothing to wait for.
        self._grace = 0 if newline is None else kind.grace
        self._thought = 0
        self._due = kind.think_tokens == 0

    @property
    def may_force(self) -> tuple[int, ...]:
        return self._closing

    def _observe(self, token_id: int) -> None:
        was = self.phase
        super()._observe(token_id)
        budget = self._kind.think_tokens
        if was != "thinking" or self.phase != "thinking" or budget is None:
            return
        self._thought += 1
        if self._thought >= budget:
            at_newline = self._newline is not None and self._newline(token_id)
            self._due = self._due or at_newline or self._thought >= budget + self._grace

    def _decide(self, token_ids: Sequence[int], entropy: float | None, fresh: int) -> Decision:
        kind = self._kind
        if self.phase == "answer":
            return Decision(kind.answer, "answer")
        if self.phase == "thinking" and self._due:
            return Decision(kind.answer, "answer", self._closing)
        return Decision(kind.think, self.phase)

    def settled(self, count: int) -> str | None:
        kind = self._kind
        if self.phase == "answer" or (kind.think == kind.answer and kind.think_tokens is None):
            return kind.answer
        return None


@dataclass(frozen=True)
class ByUncertainty(Kind):
    """The narrow width until a distribution is uncertain."""

    narrow: str
    wide: str
    threshold: float
    hold: int

    needs_entropy: ClassVar[bool] = True

    @property
    def widths_used(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.narrow, self.wide)))

    def start(self, start: Start) -> PlanRun:
        return UncertainRun(self, start)

    def describe(self, policy: str) -> str:
        return (
            f"Plan.by_uncertainty(narrow={self.narrow!r}, wide={self.wide!r},"
            f" threshold={self.threshold}, hold={self.hold}, policy={policy!r})"
        )


class UncertainRun(PlanRun):
    """Wide for some tokens after each that was uncertain."""

    def __init__(self, kind: ByUncertainty, start: Start) -> None:
        super().__init__(start, start.tracker())
        self._kind, self._left = kind, 0

    def _decide(self, token_ids: Sequence[int], entropy: float | None, fresh: int) -> Decision:
        self._left = max(0, self._left - fresh)
        if fresh and entropy is not None and entropy > self._kind.threshold:
            self._left = self._kind.hold
        return Decision(self._kind.wide if self._left else self._kind.narrow, self.phase)


@dataclass(frozen=True)
class Custom(Kind):
    """Asks a function before every token."""

    function: Callable[[PlanView], str]
    widths: tuple[str, ...] | None

    needs_entropy: ClassVar[bool] = True

    @property
    def widths_used(self) -> tuple[str, ...] | None:
        return self.widths

    def start(self, start: Start) -> PlanRun:
        return CustomRun(self, start)

    def describe(self, policy: str) -> str:
        name = getattr(self.function, "__name__", type(self.function).__name__)
        return f"Plan.custom({name}, policy={policy!r})"


class CustomRun(PlanRun):
    """The width that the function names."""

    def __init__(self, kind: Custom, start: Start) -> None:
        super().__init__(start, start.tracker())
        self._function, self._allowed = kind.function, kind.widths or start.widths
        self._prompt = ReadOnly(start.prompt_ids)

    def _decide(self, token_ids: Sequence[int], entropy: float | None, fresh: int) -> Decision:
        view = PlanView(self._prompt, ReadOnly(token_ids), self.phase, entropy)
        width = call_user(self._function, view)
        if not isinstance(width, str):
            raise InvalidRequest(
                f"plan: a custom plan must return a width's name, got {shown(width)}"
            )
        if width not in self._allowed:
            raise WidthError(
                f"plan: a custom plan must return one of {', '.join(self._allowed)}, got "
                f"{shown(width)}"
            )
        return Decision(width, self.phase)
