"""Plans at work: the state of a plan for one sequence."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..errors import InvalidRequest, WidthError, shown
from ..outputs import Phase
from ..user_calls import call_user
from .decision import Decision, PlanView, ReadOnly
from .phase import PhaseTracker

if TYPE_CHECKING:
    from .kinds import ByUncertainty, Custom, Fixed, Schedule, ThinkAnswer
    from .plan import Plan

__all__ = ["CustomRun", "FixedRun", "PlanRun", "ScheduleRun", "ThinkRun", "UncertainRun"]


class PlanRun(ABC):
    """A plan at work on one sequence. Everything it knows comes from the tokens it is shown.

    plan: the plan.
    prompt_is_thinking: whether the prompt ends inside a thinking block.
    """

    def __init__(self, plan: Plan, prompt_ids: Sequence[int], tracker: PhaseTracker | None) -> None:
        self.plan = plan
        self._tracker = tracker
        self._seen = 0
        if tracker is not None:
            if plan.prompt_phase is None:
                tracker.read_prompt(prompt_ids)
            elif plan.prompt_phase != "undecided":
                tracker.phase = plan.prompt_phase
        self.prompt_is_thinking = self.phase == "thinking"

    @property
    def phase(self) -> Phase | None:
        """Where the tokens shown so far end: "thinking", "answer", or None if unknown."""
        return None if self._tracker is None else self._tracker.phase

    def phases(self) -> PhaseTracker | None:
        """A tracker of its own that goes on from here, None where think tags are unknown."""
        return copy.copy(self._tracker)

    def next(self, token_ids: Sequence[int], entropy: float | None = None) -> Decision:
        """Decides about the next token. Asking again without new tokens changes nothing.

        token_ids: all generated tokens so far, forced ones included.
        entropy: of the last sampled distribution in nats, None if unknown.
        Returns the decision. Raises WidthError, InvalidRequest (a custom plan's answer), and
        ValueError if tokens were taken back (keep a `fork` of the run to return to).
        """
        count = len(token_ids)
        if count < self._seen:
            raise ValueError(
                f"plan: token_ids must continue the {self._seen} tokens already shown, got {count};"
                " return to an earlier state with a fork() taken there"
            )
        fresh = [token_ids[i] for i in range(self._seen, count)]
        for token_id in fresh:
            self._observe(token_id)
        self._seen = count
        return self._decide(token_ids, entropy, len(fresh))

    @property
    def may_force(self) -> tuple[int, ...]:
        """The tokens that it may force."""
        return ()

    def settled(self, count: int) -> str | None:
        """The width that reads on once there are `count` tokens, whatever the ones are that were
        not shown yet; None where it depends on them, or where tokens may be forced."""
        return None

    def fork(self) -> PlanRun:
        """An independent copy of the state."""
        twin = copy.copy(self)
        twin._tracker = copy.copy(self._tracker)
        return twin

    def _observe(self, token_id: int) -> None:
        if self._tracker is not None:
            self._tracker.push(token_id)

    @abstractmethod
    def _decide(self, token_ids: Sequence[int], entropy: float | None, fresh: int) -> Decision:
        """The decision, given that `fresh` tokens are new since the last call."""


class FixedRun(PlanRun):
    plan: Fixed

    def _decide(self, token_ids: Sequence[int], entropy: float | None, fresh: int) -> Decision:
        return Decision(self.plan.width, self.phase)

    def settled(self, count: int) -> str | None:
        return self.plan.width


class ScheduleRun(PlanRun):
    plan: Schedule
    _at = 0

    def _decide(self, token_ids: Sequence[int], entropy: float | None, fresh: int) -> Decision:
        steps = self.plan.steps
        while self._at + 1 < len(steps) and steps[self._at + 1][0] <= len(token_ids):
            self._at += 1
        return Decision(steps[self._at][1], self.phase)

    def settled(self, count: int) -> str | None:
        return [width for start, width in self.plan.steps if start <= count][-1]


class ThinkRun(PlanRun):
    plan: ThinkAnswer

    def __init__(
        self,
        plan: ThinkAnswer,
        prompt_ids: Sequence[int],
        tracker: PhaseTracker,
        closing: tuple[int, ...],
        newline: Callable[[int], bool] | None,
    ) -> None:
        super().__init__(plan, prompt_ids, tracker)
        self._closing = closing
        self._newline = newline
        # Without a way to see a newline there is nothing to wait for.
        self._grace = 0 if newline is None else plan.grace
        self._thought = 0
        self._due = plan.think_tokens == 0

    @property
    def may_force(self) -> tuple[int, ...]:
        return self._closing

    def _observe(self, token_id: int) -> None:
        was = self.phase
        super()._observe(token_id)
        budget = self.plan.think_tokens
        if was != "thinking" or self.phase != "thinking" or budget is None:
            return
        self._thought += 1
        if self._thought >= budget:
            at_newline = self._newline is not None and self._newline(token_id)
            self._due = self._due or at_newline or self._thought >= budget + self._grace

    def _decide(self, token_ids: Sequence[int], entropy: float | None, fresh: int) -> Decision:
        plan = self.plan
        if self.phase == "answer":
            return Decision(plan.answer, "answer")
        if self.phase == "thinking" and self._due:
            return Decision(plan.answer, "answer", self._closing)
        return Decision(plan.think, self.phase)

    def settled(self, count: int) -> str | None:
        plan = self.plan
        if self.phase == "answer" or (plan.think == plan.answer and plan.think_tokens is None):
            return plan.answer
        return None


class UncertainRun(PlanRun):
    plan: ByUncertainty
    _left = 0

    def _decide(self, token_ids: Sequence[int], entropy: float | None, fresh: int) -> Decision:
        self._left = max(0, self._left - fresh)
        if fresh and entropy is not None and entropy > self.plan.threshold:
            self._left = self.plan.hold
        return Decision(self.plan.wide if self._left else self.plan.narrow, self.phase)


class CustomRun(PlanRun):
    plan: Custom

    def __init__(
        self,
        plan: Custom,
        prompt_ids: Sequence[int],
        tracker: PhaseTracker | None,
        allowed: tuple[str, ...],
    ) -> None:
        super().__init__(plan, prompt_ids, tracker)
        self._prompt = ReadOnly(prompt_ids)
        self._allowed = allowed

    def _decide(self, token_ids: Sequence[int], entropy: float | None, fresh: int) -> Decision:
        view = PlanView(self._prompt, ReadOnly(token_ids), self.phase, entropy)
        width = call_user(self.plan.function, view)
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
