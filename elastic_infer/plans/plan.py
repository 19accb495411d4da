"""Plans: which width computes the next token.

A `Plan` is a constant description. `Plan.begin` gives a `PlanRun`, the state of one sequence,
which is asked before every sampling and answers with a `Decision`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..errors import InvalidRequest, WidthError, shown
from ..public import public
from ..showing import one_line
from ..value_checks import check_int, elements, is_one_of
from .decision import DEFAULT_GRACE, PROMPT_PHASES, PlanView
from .kinds import ByUncertainty, Custom, Fixed, Kind, Schedule, ThinkAnswer
from .phase import Tag
from .policy import CARRY, Policy
from .run import PlanRun, Start

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

__all__ = ["Plan", "as_plan"]

_LONGEST_CLOSING = 1 << 16  # characters; they are tokenized with every request


def _integer(name: str, value: Any, least: int) -> int:
    check_int(f"plan: {name}", value, least)
    return value


def _integers(name: str, values: Any) -> tuple[int, ...]:
    ids = elements(f"plan: {name}", values, "token ids")
    return tuple(_integer(f"{name}: an id", i, 0) for i in ids)


def _width_name(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"plan: {name} must be the name of a width, got {shown(value)}")
    return value


@public
@dataclass(frozen=True)
class Plan:
    """A rule that gives every token its width. Make one with the static methods; it never changes.

    Attributes:
        kind: the rule that chooses.
        policy: treatment of the cache at a switch.
        start_tag: opens thinking, as text or token ids.
        end_tag: closes thinking, as text or token ids.
        prompt_phase: where the prompt ends: None finds it in the prompt, see `think_answer`.
    """

    kind: Kind
    policy: Policy = CARRY
    start_tag: Tag = "<think>"
    end_tag: Tag = "</think>"
    prompt_phase: str | None = None

    # -- making one ---------------------------------------------------------------------------

    @staticmethod
    def fixed(width: str) -> Plan:
        """The same width for every token."""
        return Plan(Fixed(_width_name("width", width)))

    @staticmethod
    def schedule(steps: Sequence[tuple[int, str]], policy: str | Policy = "carry") -> Plan:
        """Widths by the number of the generated token.

        Args:
            steps: [(0, "S"), (12, "L")]: "S" from token 0 on, "L" from token 12 on. The first must
                start at 0, the starts must ascend.
            policy: "carry", "exact" or "window(n)".
        """
        try:
            given = elements("plan: steps", steps, "steps like (0, 'S')")
            pairs = tuple((start, width) for start, width in given)
        except (InvalidRequest, TypeError, ValueError):
            pairs = ()
        if not pairs:
            raise InvalidRequest(
                f"plan: steps must be a list like [(0, 'S'), (12, 'L')], got {shown(steps)}"
            )
        for start, width in pairs:
            _integer("steps: a start", start, 0)
            _width_name("steps: a width", width)
        starts = [start for start, _ in pairs]
        if starts[0] != 0:
            raise InvalidRequest(f"plan: steps must start at token 0, got {shown(starts[0])}")
        if any(a >= b for a, b in pairwise(starts)):
            raise InvalidRequest(f"plan: the starts of steps must ascend, got {shown(starts)}")
        return Plan(Schedule(pairs), Policy.parse(policy))

    @staticmethod
    def think_answer(
        think: str,
        answer: str,
        think_tokens: int | None = None,
        grace: int = DEFAULT_GRACE,
        closing_text: str | Sequence[int] | None = None,
        start_tag: Tag = "<think>",
        end_tag: Tag = "</think>",
        policy: str | Policy = "carry",
        newline_ids: Collection[int] | None = None,
        prompt_phase: str | None = None,
    ) -> Plan:
        """One width thinks, another answers; thinking can be limited.

        Thinking runs from the start tag (in the prompt, or generated with nothing but white
        space before it) to the end tag. There is one block per answer. The end tag is read by
        the answer width. The think width runs until thinking is known or ruled out.
        A start tag anywhere in a prompt counts unless an end tag follows it; in a chat, only one
        that the template puts after the last message.

        Args:
            think: width of the thinking block.
            answer: width of everything after it.
            think_tokens: generated tokens allowed inside the block; None for no limit, 0 closes the
                block as soon as it opens.
            grace: when they are used up, how many more tokens to wait for one with a newline before
                closing.
            closing_text: text or token ids to close the block with then, holding the end tag once;
                None for the end tag alone.
            start_tag: opens the block; text that is a single token of the vocabulary, or token ids.
            end_tag: closes the block, likewise.
            policy: "carry", "exact" or "window(n)".
            newline_ids: the tokens that count as newlines; None asks the tokenizer. Without both
                the grace ends at once.
            prompt_phase: overrides the tags in the prompt: "thinking" (it ends inside a
                block), "answer" (the model will not think) or "undecided" (it may open a block).
        """
        if not is_one_of(prompt_phase, PROMPT_PHASES):
            raise InvalidRequest(
                'plan: prompt_phase must be None, "thinking", "answer" or "undecided", got '
                + shown(prompt_phase)
            )
        tags = (start_tag, end_tag)
        for name, tag in zip(("start_tag", "end_tag"), tags, strict=True):
            if isinstance(tag, bool) or not isinstance(tag, (str, int)) or tag in ("",):
                raise InvalidRequest(f"plan: {name} must be text or a token id, got {shown(tag)}")
        if start_tag == end_tag:
            raise InvalidRequest(
                f"plan: end_tag must differ from start_tag, got {shown(end_tag)} twice"
            )
        if think_tokens is not None:
            _integer("think_tokens (None for no limit)", think_tokens, 0)
        _integer("grace", grace, 0)
        closing = _closing(closing_text, end_tag)
        newlines = None
        if newline_ids is not None:
            newlines = frozenset(_integers("newline_ids", newline_ids))
        kind = ThinkAnswer(
            think=_width_name("think", think),
            answer=_width_name("answer", answer),
            think_tokens=think_tokens,
            grace=grace,
            closing=closing,
            newline_ids=newlines,
        )
        return Plan(kind, Policy.parse(policy), start_tag, end_tag, prompt_phase)

    @staticmethod
    def by_uncertainty(
        narrow: str,
        wide: str,
        threshold: float,
        hold: int = 8,
        policy: str | Policy = "carry",
    ) -> Plan:
        """The narrow width until a distribution is uncertain, then the wide one for a while.

        Args:
            narrow: width of the prompt, of the first token and wherever the model is certain.
            wide: width for uncertain places.
            threshold: entropy in nats of the last sampled distribution above which `wide` takes
                over.
            hold: how many tokens it then computes; counted anew whenever the entropy is above
                again.
            policy: "carry", "exact" or "window(n)".
        """
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise InvalidRequest(
                f"plan: threshold must be a number of nats, got {shown(threshold)}"
            )
        if not 0 <= threshold < sys.float_info.max:
            raise InvalidRequest(f"plan: threshold must be finite and >= 0, got {shown(threshold)}")
        kind = ByUncertainty(
            narrow=_width_name("narrow", narrow),
            wide=_width_name("wide", wide),
            threshold=float(threshold),
            hold=_integer("hold", hold, 1),
        )
        return Plan(kind, Policy.parse(policy))

    @staticmethod
    def custom(
        function: Callable[[PlanView], str],
        widths: Sequence[str] | None = None,
        policy: str | Policy = "carry",
    ) -> Plan:
        """Asks a function before every token.

        Args:
            function: gets a PlanView, returns a width's name; called on the engine's own thread, so
                it should be quick. An error in it ends its request alone.
            widths: the names it may return; None allows every width of the engine.
            policy: "carry", "exact" or "window(n)".
        """
        if not callable(function):
            raise InvalidRequest(f"plan: a custom plan must be callable, got {shown(function)}")
        names = None
        if widths is not None:
            if not isinstance(widths, (list, tuple)) or not widths:
                raise InvalidRequest(f"plan: widths must be a list of names, got {shown(widths)}")
            names = tuple(_width_name("widths: an entry", width) for width in widths)
        return Plan(Custom(function, names), Policy.parse(policy))

    # -- using one ----------------------------------------------------------------------------

    @property
    def needs_entropy(self) -> bool:
        """True if `PlanRun.next` needs the entropy of the last sampled distribution."""
        return self.kind.needs_entropy

    @property
    def widths_used(self) -> tuple[str, ...] | None:
        """The widths it may choose, in order of first use; None for any."""
        return self.kind.widths_used

    @property
    def tags(self) -> tuple[Tag, Tag]:
        """The think tags, as text or token ids."""
        return self.start_tag, self.end_tag

    def can_widen(self, order: Sequence[str] | Mapping[str, Any]) -> bool:
        """True if a switch may go to a width with more Mamba heads than an earlier one had.

        Args:
            order: widths from few to many Mamba heads, or {width: head count, or one per layer}
                (there, equal counts do not widen).
        """
        if isinstance(order, Mapping):
            size = order
        else:
            size = {width: index for index, width in enumerate(order)}
        names = self.widths_used if self.widths_used is not None else tuple(size)
        self._check_known(names, size)
        return any(_wider(size[later], size[first]) for first, later in self.kind.switches(names))

    def needed_ids(self, tokenizer: Tokenizer | None) -> list[tuple[str, int]]:
        """(argument, token id) of the tags without which the plan cannot do its work."""
        return self.kind.needed_ids(self.tags, tokenizer)

    def begin(
        self,
        prompt_ids: Sequence[int],
        tokenizer: Tokenizer | None,
        widths: Collection[str],
    ) -> PlanRun:
        """Starts the plan on one sequence.

        Args:
            prompt_ids: the prompt's tokens; a phase can begin there. In a `ChatPrompt`, only
                its tail decides about it.
            tokenizer: for think tags and newlines, None without one.
            widths: the names that the engine knows.

        Raises:
            WidthError: for an unknown width.
            InvalidRequest: if think tags that the plan needs are not single tokens of the
                vocabulary.
        """
        if self.widths_used is not None:
            self._check_known(self.widths_used, widths)
        start = Start(self.tags, self.prompt_phase, prompt_ids, tokenizer, tuple(widths))
        return self.kind.start(start)

    @one_line
    def __repr__(self) -> str:
        return self.kind.describe(str(self.policy))

    def _check_known(self, names: Sequence[str], known: Collection[str]) -> None:
        for name in names:
            if name not in known:
                raise WidthError(
                    f"plan: width must be one of {', '.join(known)}, got {shown(name)}"
                )


def _wider(a: Any, b: Any) -> bool:
    """True if head counts a exceed b in any layer."""
    if isinstance(a, Sequence) and isinstance(b, Sequence):
        return any(x > y for x, y in zip(a, b, strict=True))
    if isinstance(a, Sequence):
        return any(x > b for x in a)
    if isinstance(b, Sequence):
        return any(a > y for y in b)
    return a > b


def _closing(value: str | Sequence[int] | None, end_tag: Tag) -> str | tuple[int, ...]:
    """closing_text, checked: text when the tokenizer is to encode it, else ids."""
    if value is None:
        return end_tag if isinstance(end_tag, str) else (end_tag,)
    if isinstance(value, str):
        if len(value) > _LONGEST_CLOSING:
            raise InvalidRequest(
                f"plan: closing_text must have at most {_LONGEST_CLOSING} characters, got "
                f"{len(value)}"
            )
        if isinstance(end_tag, str) and value.count(end_tag) != 1:
            raise InvalidRequest(
                f"plan: closing_text must hold the end tag {shown(end_tag)} once, got "
                f"{shown(value)}"
            )
        return value
    ids = _integers("closing_text", value)
    if isinstance(end_tag, int) and ids.count(end_tag) != 1:
        raise InvalidRequest(
            f"plan: closing_text must hold the end tag {end_tag} once, got {shown(ids)}"
        )
    return ids


def as_plan(
    plan: Plan | Callable[[PlanView], str] | None,
    width: str | None = None,
    default_width: str | None = None,
) -> Plan:
    """The plan that the arguments of a request mean.

    Args:
        plan: a Plan, or a function as for `Plan.custom`.
        width: one width for every token; not together with a plan.
        default_width: the width where neither is given.

    Raises:
        InvalidRequest: if both are given, or something else is.
    """
    if plan is not None and width is not None:
        raise InvalidRequest(
            f"width: must not be given together with plan, got width={shown(width)} and "
            f"plan={shown(plan)};"
            " leave one out"
        )
    if plan is None:
        return Plan.fixed(default_width if width is None else width)  # type: ignore[arg-type]
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, type) or not callable(plan):
        hint = f"; use width={shown(plan)} or parse_plan" if isinstance(plan, str) else ""
        raise InvalidRequest(f"plan: must be a Plan or a function, got {shown(plan)}{hint}")
    return Plan.custom(plan)
