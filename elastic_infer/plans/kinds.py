"""The kinds of plan behind `Plan`'s constructors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InvalidRequest, shown
from .decision import DEFAULT_GRACE, PlanView
from .phase import make_tracker, tag_id
from .plan import Plan
from .runs import CustomRun, FixedRun, PlanRun, ScheduleRun, ThinkRun, UncertainRun

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

__all__ = ["ByUncertainty", "Custom", "Fixed", "Schedule", "ThinkAnswer"]


@dataclass(frozen=True)
class Fixed(Plan):
    width: str = ""

    @property
    def widths_used(self) -> tuple[str, ...]:
        return (self.width,)

    def _start(
        self, prompt_ids: Sequence[int], tokenizer: Tokenizer | None, known: tuple[str, ...]
    ) -> PlanRun:
        return FixedRun(self, prompt_ids, self._tracker(tokenizer))

    def __repr__(self) -> str:
        return f"Plan.fixed({self.width!r})"


@dataclass(frozen=True)
class Schedule(Plan):
    steps: tuple[tuple[int, str], ...] = ()

    @property
    def widths_used(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(width for _, width in self.steps))

    def _switches(self, names: Sequence[str]) -> list[tuple[str, str]]:
        order = [width for _, width in self.steps]
        return [(a, b) for i, a in enumerate(order) for b in order[i + 1 :]]

    def _start(
        self, prompt_ids: Sequence[int], tokenizer: Tokenizer | None, known: tuple[str, ...]
    ) -> PlanRun:
        return ScheduleRun(self, prompt_ids, self._tracker(tokenizer))

    def __repr__(self) -> str:
        return f"Plan.schedule({list(self.steps)}, policy={str(self.policy)!r})"


@dataclass(frozen=True)
class ThinkAnswer(Plan):
    think: str = ""
    answer: str = ""
    think_tokens: int | None = None
    grace: int = DEFAULT_GRACE
    closing: str | tuple[int, ...] = ()
    newline_ids: frozenset[int] | None = None

    @property
    def widths_used(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.think, self.answer)))

    def _switches(self, names: Sequence[str]) -> list[tuple[str, str]]:
        return [(self.think, self.answer)]  # never back: there is one block per answer

    def needed_ids(self, tokenizer: Tokenizer | None) -> list[tuple[str, int]]:
        tags = (("start_tag", self.start_tag), ("end_tag", self.end_tag))
        ids = [(name, tag_id(tag, tokenizer)) for name, tag in tags]
        return [(name, found) for name, found in ids if found is not None]

    def _start(
        self, prompt_ids: Sequence[int], tokenizer: Tokenizer | None, known: tuple[str, ...]
    ) -> PlanRun:
        for name, tag in (("start_tag", self.start_tag), ("end_tag", self.end_tag)):
            if tag_id(tag, tokenizer) is None:
                why = "there is no tokenizer" if tokenizer is None else "the vocabulary has none"
                raise InvalidRequest(
                    f"plan: {name} must be a single token of the vocabulary, got {tag!r} and"
                    f" {why}; give the model's own tag, or its token id"
                )
        newlines = self.newline_ids
        tracker = make_tracker((self.start_tag, self.end_tag), tokenizer, newlines or ())
        assert tracker is not None  # both tags were found above
        newline: Callable[[int], bool] | None = None
        if newlines is not None:
            newline = newlines.__contains__
        elif tokenizer is not None:

            def newline(token_id: int) -> bool:
                return "\n" in tokenizer.decode([token_id], skip_special_tokens=False)

        closing = self._closing_ids(tracker.end, tokenizer)
        return ThinkRun(self, prompt_ids, tracker, closing, newline)

    def _closing_ids(self, end: int, tokenizer: Tokenizer | None) -> tuple[int, ...]:
        if isinstance(self.closing, str):
            if self.closing == self.end_tag:
                return (end,)
            if tokenizer is None:
                raise InvalidRequest(
                    "plan: closing_text must be token ids without a tokenizer, got"
                    f" {self.closing!r}"
                )
            tag = self.end_tag
            if isinstance(tag, int):
                tag = tokenizer.decode([tag], skip_special_tokens=False)
            before, found, after = self.closing.partition(tag)
            if not found or tag in after:
                raise InvalidRequest(
                    f"plan: closing_text must hold the end tag {tag!r} once, got {self.closing!r}"
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

    def __repr__(self) -> str:
        limit = "" if self.think_tokens is None else f", think_tokens={self.think_tokens}"
        return (
            f"Plan.think_answer(think={self.think!r}, answer={self.answer!r}{limit},"
            f" policy={str(self.policy)!r})"
        )


@dataclass(frozen=True)
class ByUncertainty(Plan):
    narrow: str = ""
    wide: str = ""
    threshold: float = 0.0
    hold: int = 1

    @property
    def needs_entropy(self) -> bool:
        return True

    @property
    def widths_used(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.narrow, self.wide)))

    def _start(
        self, prompt_ids: Sequence[int], tokenizer: Tokenizer | None, known: tuple[str, ...]
    ) -> PlanRun:
        return UncertainRun(self, prompt_ids, self._tracker(tokenizer))

    def __repr__(self) -> str:
        return (
            f"Plan.by_uncertainty(narrow={self.narrow!r}, wide={self.wide!r},"
            f" threshold={self.threshold}, hold={self.hold}, policy={str(self.policy)!r})"
        )


@dataclass(frozen=True)
class Custom(Plan):
    function: Callable[[PlanView], str] = None  # type: ignore[assignment]
    widths: tuple[str, ...] | None = None

    @property
    def needs_entropy(self) -> bool:
        return True

    @property
    def widths_used(self) -> tuple[str, ...] | None:
        return self.widths

    def _start(
        self, prompt_ids: Sequence[int], tokenizer: Tokenizer | None, known: tuple[str, ...]
    ) -> PlanRun:
        tracker = self._tracker(tokenizer)
        return CustomRun(self, prompt_ids, tracker, self.widths or known)

    def __repr__(self) -> str:
        name = getattr(self.function, "__name__", type(self.function).__name__)
        return f"Plan.custom({name}, policy={str(self.policy)!r})"
