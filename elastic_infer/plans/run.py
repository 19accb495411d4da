"""A plan at work: its state on one sequence."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..outputs import Phase
from .decision import Decision
from .phase import PhaseTracker, Tag, make_tracker

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Start:
    """A sequence at whose beginning a plan starts.

    Attributes:
        tags: start and end of thinking, as text or token ids.
        prompt_phase: where the prompt ends, None to find it in `prompt_ids`.
        tokenizer: for think tags and newlines.
        widths: names that the engine knows.
    """

    tags: tuple[Tag, Tag]
    prompt_phase: str | None
    prompt_ids: Sequence[int]
    tokenizer: Tokenizer | None
    widths: tuple[str, ...]

    def tracker(self) -> PhaseTracker | None:
        """A tracker for the tags, None if they are not tokens of the vocabulary."""
        return make_tracker(self.tags, self.tokenizer)


class PlanRun(ABC):
    """A plan at work on one sequence. Everything it knows comes from the tokens it is shown.

    prompt_is_thinking: True if the prompt ends inside a thinking block.
    """

    def __init__(self, start: Start, tracker: PhaseTracker | None) -> None:
        self._tracker = tracker
        self._seen = 0
        if tracker is not None:
            if start.prompt_phase is None:
                tracker.read_prompt(start.prompt_ids)
            elif start.prompt_phase != "undecided":
                tracker.phase = start.prompt_phase
        self.prompt_is_thinking = self.phase == "thinking"

    @property
    def phase(self) -> Phase | None:
        """Phase at the end of the tokens so far: "thinking", "answer", or None if unknown."""
        return None if self._tracker is None else self._tracker.phase

    def phases(self) -> PhaseTracker | None:
        """A tracker of its own that goes on from here, None where think tags are unknown."""
        return copy.copy(self._tracker)

    def next(self, token_ids: Sequence[int], entropy: float | None = None) -> Decision:
        """Decides about the next token. Asking again without new tokens changes nothing.

        Args:
            token_ids: all generated tokens so far, forced ones included.
            entropy: of the last sampled distribution in nats, None if unknown.

        Returns:
            The decision.

        Raises:
            WidthError: a custom plan's unknown width.
            InvalidRequest: a custom plan's wrong answer.
            ValueError: if tokens were taken back (keep a `fork` of the run to return to).
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
