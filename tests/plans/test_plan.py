"""Plans: what each decides before every token, their checks, and their written form."""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings, strategies as st

from elastic_infer.errors import InvalidRequest, WidthError
from elastic_infer.plans.decision import Decision, PlanView
from elastic_infer.plans.parsing import parse_plan
from elastic_infer.plans.plan import Plan, as_plan
from elastic_infer.plans.policy import Policy
from elastic_infer.plans.run import PlanRun

WIDTHS = ["S", "M", "L"]
SPACE, NEWLINE, WORD, START, END, TAGGY = 0, 1, 2, 3, 4, 5


class Vocabulary:
    """A six-token tokenizer: enough for plans, and easy to read in a failure."""

    texts: ClassVar = {
        SPACE: " ",
        NEWLINE: " \n",
        WORD: "word",
        START: "<think>",
        END: "</think>",
        TAGGY: "x",
    }

    def token_id(self, text: str) -> int | None:
        return next((i for i, t in self.texts.items() if t == text), None)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        assert not skip_special_tokens
        return "".join(self.texts[i] for i in ids)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [{"x": TAGGY, " ": SPACE}[char] for char in text]


def widths(run: PlanRun, sampled: list[int]) -> tuple[list[int], list[str], list[Decision]]:
    """Plays a sequence as an engine does: (output tokens, width that reads each, decisions)."""
    output: list[int] = []
    decisions = []
    for token_id in sampled:
        decision = run.next(output)
        assert run.next(output) == decision, "asking twice must not change anything"
        decisions.append(decision)
        output += [*decision.forced, token_id]
    return output, [decision.width for decision in decisions], decisions


def begin(plan: Plan, prompt: list[int] | None = None, tokenizer: object = None) -> PlanRun:
    return plan.begin([WORD] if prompt is None else prompt, tokenizer or Vocabulary(), WIDTHS)


# -- fixed, schedule --------------------------------------------------------------------------


def test_fixed_and_schedule() -> None:
    assert widths(begin(Plan.fixed("M")), [WORD] * 3)[1] == ["M"] * 3
    plan = Plan.schedule([(0, "S"), (2, "L"), (3, "M")], policy="exact")
    assert widths(begin(plan), [WORD] * 5)[1] == ["S", "S", "L", "M", "M"]
    assert plan.policy == Policy("exact") and plan.widths_used == ("S", "L", "M")
    assert not plan.needs_entropy
    late = begin(plan)
    assert late.next([WORD] * 4).width == "M", "tokens may be shown all at once"


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "steps must be a list like"),
        ("S", "steps must be a list like"),
        (3, "steps must be a list like"),
        ([(1, "S")], "must start at token 0, got 1"),
        ([(0, "S"), (0, "L")], r"must ascend, got \[0, 0\]"),
        ([(0, "S"), (5, "L"), (3, "S")], r"must ascend"),
        ([(0, 7)], "must be the name of a width, got 7"),
        ([(0.0, "S")], "must be an int >= 0, got 0.0"),
    ],
)
def test_schedule_refuses(steps: object, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Plan.schedule(steps)


# -- think, then answer -----------------------------------------------------------------------


def think(**kwargs: object) -> Plan:
    return Plan.think_answer("S", "L", **kwargs)


def test_end_tag_is_read_by_the_answer_width() -> None:
    run = begin(think(), [WORD, START])
    assert run.prompt_is_thinking
    _, read, decisions = widths(run, [WORD, END, WORD, WORD])
    assert read == ["S", "S", "L", "L"]
    assert [d.phase for d in decisions] == ["thinking", "thinking", "answer", "answer"]


def test_a_model_that_opens_thinking_itself() -> None:
    _, read, decisions = widths(begin(think()), [SPACE, START, WORD, END, WORD])
    assert read == ["S", "S", "S", "S", "L"]
    assert [d.phase for d in decisions] == [None, None, "thinking", "thinking", "answer"]


def test_a_model_that_answers_at_once_and_never_thinks_later() -> None:
    _, read, decisions = widths(begin(think(think_tokens=0)), [WORD, START, WORD])
    assert read == ["S", "L", "L"]
    assert not any(d.forced for d in decisions)


@pytest.mark.parametrize(
    ("prompt", "phase"),
    [
        ([START], "thinking"),
        ([START, NEWLINE], "thinking"),
        ([START, WORD, END], "answer"),
        ([START, END, NEWLINE], "answer"),
        ([START, WORD, END, WORD], None),  # an earlier turn's block
        ([START, END, WORD, START], "thinking"),
        ([], None),
    ],
)
def test_the_phase_starts_in_the_prompt(prompt: list[int], phase: str | None) -> None:
    for plan in (think(), Plan.fixed("S"), Plan.custom(lambda view: "S")):
        assert begin(plan, prompt).phase == phase


def test_budget_waits_for_a_newline_within_the_grace() -> None:
    plan = think(think_tokens=2, grace=3)
    out, read, decisions = widths(begin(plan, [START]), [WORD, WORD, WORD, NEWLINE, WORD, WORD])
    assert [d.forced for d in decisions] == [(), (), (), (), (END,), ()]
    assert read == ["S", "S", "S", "S", "L", "L"] and decisions[4].phase == "answer"
    assert out == [WORD, WORD, WORD, NEWLINE, END, WORD, WORD]
    out, _, _ = widths(begin(plan, [START]), [WORD] * 7)
    assert out.index(END) == 2 + 3, "the grace ends without a newline"
    out, _, _ = widths(begin(plan, [START]), [NEWLINE, NEWLINE, WORD])
    assert out.index(END) == 2, "the last token of the budget may be the newline"
    out, _, _ = widths(begin(think(think_tokens=2, grace=0), [START]), [WORD] * 4)
    assert out.index(END) == 2


def test_no_budget_closes_at_once() -> None:
    plan = think(think_tokens=0, grace=8)
    assert widths(begin(plan, [START]), [WORD])[2][0] == Decision("L", "answer", (END,))
    out, read, _ = widths(begin(plan), [START, WORD, WORD])
    assert out == [START, END, WORD, WORD] and read == ["S", "L", "L"]


def test_closing_text_holds_the_end_tag_as_its_id() -> None:
    plan = think(think_tokens=0, closing_text=" x</think>x")
    assert begin(plan, [START]).next([]).forced == (SPACE, TAGGY, END, TAGGY)
    plan = think(think_tokens=0, closing_text=[WORD, END])
    assert begin(plan, [START]).next([]).forced == (WORD, END)
    with pytest.raises(InvalidRequest, match=r"closing_text must hold the end tag"):
        think(closing_text="enough")
    with pytest.raises(InvalidRequest, match=r"closing_text must hold the end tag's id 4"):
        begin(think(closing_text=[WORD]))
    numbered = think(closing_text="x</think>", end_tag=END, think_tokens=0)
    assert begin(numbered, [START]).next([]).forced == (TAGGY, END)


def test_token_ids_as_tags_need_no_tokenizer() -> None:
    plan = think(think_tokens=1, grace=4, start_tag=START, end_tag=END)
    run = plan.begin([START], None, WIDTHS)
    out, _, _ = widths(run, [WORD] * 3)
    assert out == [WORD, END, WORD, WORD], "no newline can be seen, so the grace ends at once"
    kind = dataclasses.replace(plan.kind, newline_ids=frozenset([NEWLINE]))
    plan = dataclasses.replace(plan, kind=kind)
    out, _, _ = widths(plan.begin([START], None, WIDTHS), [WORD, WORD, NEWLINE, WORD])
    assert out == [WORD, WORD, NEWLINE, END, WORD]
    with pytest.raises(InvalidRequest, match=r"start_tag must be a single token .* no tokenizer"):
        think().begin([], None, WIDTHS)
    with pytest.raises(InvalidRequest, match=r"end_tag must be a single token .* vocabulary has"):
        begin(think(end_tag="</done>"))


@settings(max_examples=300, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 5), max_size=4),
    sampled=st.lists(st.sampled_from([SPACE, NEWLINE, WORD, START, END]), max_size=24),
    budget=st.none() | st.integers(0, 6),
    grace=st.integers(0, 4),
    cut=st.integers(0, 24),
)
def test_think_answer_laws(
    prompt: list[int], sampled: list[int], budget: int | None, grace: int, cut: int
) -> None:
    plan = think(think_tokens=budget, grace=grace)
    run = begin(plan, prompt)
    output: list[int] = []
    phases, decisions = [], []
    for number, token_id in enumerate(sampled):
        if number == cut:  # a fork, and a run shown everything at once, go on the same way
            fresh = begin(plan, prompt)
            assert fresh.next(output) == run.fork().next(output)
            run = run.fork()
        decision = run.next(output)
        phases.append(decision.phase)
        decisions.append(decision)
        output += [*decision.forced, token_id]
    order = {None: 0, "thinking": 1, "answer": 2}
    assert [order[p] for p in phases] == sorted(order[p] for p in phases), "phases only advance"
    assert all((d.width == "L") == (d.phase == "answer") for d in decisions)
    assert sum(bool(d.forced) for d in decisions) <= 1
    inside = sum(p == "thinking" for p in phases)
    if budget is not None:
        assert inside <= budget + grace
    if any(d.forced for d in decisions):
        assert budget is not None and inside >= budget


# -- uncertainty, custom ----------------------------------------------------------------------


def test_by_uncertainty_holds_the_wide_width() -> None:
    plan = Plan.by_uncertainty("S", "L", threshold=1.0, hold=2)
    assert plan.needs_entropy
    run = begin(plan)
    entropies = [None, 0.5, 1.5, 0.1, 0.1, 2.0, 2.0, 1.0, 0.0]
    read = [run.next([WORD] * n, entropy).width for n, entropy in enumerate(entropies)]
    assert read == ["S", "S", "L", "L", "S", "L", "L", "L", "S"]
    run = begin(plan)
    run.next([], None)
    assert [run.next([WORD], 3.0).width for _ in range(3)] == ["L"] * 3
    twin = run.fork()
    assert [run.next([WORD] * n, 0.0).width for n in (2, 3)] == ["L", "S"]
    assert twin.next([WORD] * 2, 0.0).width == "L", "a fork keeps its own count"
    for bad in (float("nan"), -1, "1", True):
        with pytest.raises(InvalidRequest, match=r"threshold must be"):
            Plan.by_uncertainty("S", "L", bad)
    with pytest.raises(InvalidRequest, match=r"hold must be an int >= 1, got 0"):
        Plan.by_uncertainty("S", "L", 1.0, hold=0)


def test_custom_sees_everything_and_changes_nothing() -> None:
    views: list[PlanView] = []

    def choose(view: PlanView) -> str:
        views.append(view)
        return "L" if view.phase == "answer" or len(view.token_ids) > 3 else "S"

    run = begin(Plan.custom(choose, widths=["S", "L"]), [WORD, START])
    assert run.next([], None).width == "S"
    assert run.next([WORD, END], 0.25) == Decision("L", "answer")
    last = views[-1]
    assert list(last.prompt_ids) == [WORD, START] and list(last.token_ids) == [WORD, END]
    assert last.entropy == 0.25 and last.phase == "answer"
    with pytest.raises(TypeError):
        last.token_ids[0] = 9
    with pytest.raises(WidthError, match=r"must return one of S, L, got 'M'"):
        begin(Plan.custom(lambda view: "M", widths=["S", "L"])).next([])
    with pytest.raises(WidthError, match=r"must return one of S, M, L, got 'XL'"):
        begin(Plan.custom(lambda view: "XL")).next([])
    with pytest.raises(InvalidRequest, match=r"must return a width's name, got 3"):
        begin(Plan.custom(lambda view: 3)).next([])


# -- all plans --------------------------------------------------------------------------------


def test_unknown_widths_are_named() -> None:
    for plan in (Plan.fixed("XL"), think(), Plan.by_uncertainty("S", "L", 1)):
        with pytest.raises(WidthError, match=r"width must be one of A, B, got"):
            plan.begin([], Vocabulary(), ["A", "B"])


def test_tokens_cannot_be_taken_back() -> None:
    run = begin(Plan.fixed("S"))
    run.next([WORD] * 3)
    with pytest.raises(ValueError, match=r"must continue the 3 tokens already shown, got 2"):
        run.next([WORD] * 2)


def test_plans_never_change() -> None:
    plan = think(think_tokens=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.think_tokens = 4
    assert plan == think(think_tokens=3) and hash(plan) == hash(think(think_tokens=3))
    first, second = begin(plan, [START]), begin(plan, [START])
    first.next([WORD, END])
    assert second.phase == "thinking"


def test_can_widen() -> None:
    def can(plan: Plan) -> bool:
        return plan.can_widen(WIDTHS)

    assert not can(Plan.fixed("S"))
    assert can(Plan.schedule([(0, "S"), (3, "L")]))
    assert not can(Plan.schedule([(0, "L"), (3, "S")]))
    assert can(Plan.schedule([(0, "L"), (3, "S"), (9, "M")]))
    assert can(think()) and not can(Plan.think_answer("L", "S"))
    assert can(Plan.by_uncertainty("S", "L", 1.0))
    assert can(Plan.custom(lambda view: "S")) and not can(Plan.custom(lambda view: "S", ["S"]))
    heads = {"S": 8, "M": 8, "L": [8, 16]}
    assert not Plan.think_answer("S", "M").can_widen(heads), "equal head counts do not widen"
    assert Plan.think_answer("S", "L").can_widen(heads), "wider in one layer is wider"
    assert not Plan.think_answer("L", "S").can_widen(heads)
    with pytest.raises(WidthError, match=r"one of S, M, L, got 'XL'"):
        Plan.fixed("XL").can_widen(WIDTHS)


def test_as_plan() -> None:
    assert as_plan(None, None, "L") == Plan.fixed("L")
    assert as_plan(None, "S", "L") == Plan.fixed("S")
    plan = think()
    assert as_plan(plan, None, "L") is plan
    assert begin(as_plan(lambda view: "M", None, "L")).next([]).width == "M"
    with pytest.raises(InvalidRequest, match=r"width: must not be given together with plan"):
        as_plan(plan, "S", "L")
    for bad in ("S", 3, Plan):
        with pytest.raises(InvalidRequest, match=r"plan: must be a Plan or a function, got"):
            as_plan(bad, None, "L")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("carry", Policy("carry")),
        ("exact", Policy("exact")),
        ("window", Policy("window", 256)),
        ("window(128)", Policy("window", 128)),
        ("window:64", Policy("window", 64)),
        (Policy("window", 3), Policy("window", 3)),
    ],
)
def test_policies(value: str | Policy, expected: Policy) -> None:
    assert Policy.parse(value) == expected
    assert Policy.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "value", ["", "keep", "window(0)", "window(-3)", "window:0", "window(", "carry(3)", None, 3]
)
def test_policies_refused(value: object) -> None:
    with pytest.raises(InvalidRequest, match=r"^policy: "):
        Plan.schedule([(0, "S")], policy=value)


# -- written plans ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("width=S", Plan.fixed("S")),
        ("schedule=0:S+12:L", Plan.schedule([(0, "S"), (12, "L")])),
        ("schedule=0:S,policy=window(9)", Plan.schedule([(0, "S")], policy="window(9)")),
        ("think=M,answer=L", Plan.think_answer("M", "L")),
        (
            "think=M, answer=L, budget=64, grace=2, policy=exact",
            Plan.think_answer("M", "L", think_tokens=64, grace=2, policy="exact"),
        ),
        (
            "think=M,answer=L,prompt_phase=undecided",
            Plan.think_answer("M", "L", prompt_phase="undecided"),
        ),
        ("narrow=S,wide=L,threshold=1.5", Plan.by_uncertainty("S", "L", 1.5)),
        ("narrow=S,wide=L,threshold=1,hold=3", Plan.by_uncertainty("S", "L", 1, hold=3)),
    ],
)
def test_parse_plan(text: str, plan: Plan) -> None:
    assert parse_plan(text) == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("S", "'S' must be key=value; a plan is width=S"),
        ("", "must be key=value"),
        ("think=M", "must come with answer="),
        ("think=M,answer=L,budgets=4", "answer, budget, grace, policy.* got 'budgets=4'"),
        ("think=M,answer=L,budget=many", "budget must be an integer, got 'many'"),
        ("think=M,answer=L,budget=-1", "think_tokens .* must be an int >= 0, got -1"),
        ("width=S,policy=exact", r"\(nothing\), got 'policy=exact'"),
        ("width=S,think=M", "exactly one of width, schedule, think, narrow"),
        ("policy=exact", "exactly one of"),
        ("width=S,width=L", "width must be given once"),
        ("schedule=S", "start:width joined by"),
        ("schedule=3:S", "must start at token 0"),
        ("narrow=S,wide=L,threshold=x", "threshold must be a number, got 'x'"),
        ("narrow=S,wide=L", "must come with threshold="),
        ("think=M,answer=L,policy=keep", "policy: must be 'carry', 'exact' or"),
    ],
)
def test_parse_plan_refuses(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse_plan(text)


class Failing(list):
    """A list whose iteration fails."""

    def __iter__(self):
        raise RuntimeError("no elements today")


@pytest.mark.parametrize(
    "value",
    [
        lambda: torch.tensor(3),
        lambda: torch.ones(2),
        lambda: Failing([1]),
        lambda: iter([1, "a"]),
        lambda: itertools.repeat((0, "S")),
    ],
    ids=("tensor", "array", "failing", "mixed", "endless"),
)
@pytest.mark.parametrize(
    "make",
    [
        lambda value: Plan.fixed(value),
        lambda value: Plan.schedule(value),
        lambda value: Plan.schedule([(0, "S"), (value, "L")]),
        lambda value: Plan.schedule([(0, "S")], policy=value),
        lambda value: Plan.by_uncertainty("S", "L", value),
        lambda value: Plan.by_uncertainty("S", "L", 1.0, hold=value),
        lambda value: Plan.custom(value),
        lambda value: Policy(value),
        lambda value: Policy("window", value),
        *(
            lambda value, name=name: Plan.think_answer(**{"think": "S", "answer": "L", name: value})
            for name in (
                "think",
                "answer",
                "think_tokens",
                "grace",
                "closing_text",
                "start_tag",
                "end_tag",
                "policy",
                "newline_ids",
                "prompt_phase",
            )
        ),
    ],
)
def test_values_that_compare_or_iterate_oddly_are_refused(make, value):
    """Family: tensors, and iterators that fail, are mixed or never end, in every argument."""
    with pytest.raises(InvalidRequest):
        make(value())


def test_long_tags_are_cut_in_messages():
    """Family: tags and closing texts of any length that are refused."""
    for tag in ("x" * 5000, "y" * 60_000):
        given = [{"start_tag": tag}, {"end_tag": tag}, {"closing_text": tag + "</think>"}]
        for plan in [Plan.think_answer("S", "L", **values) for values in given]:
            with pytest.raises(InvalidRequest) as refused:
                plan.begin([WORD], None, {"S": None, "L": None})
            assert len(str(refused.value)) < 400
