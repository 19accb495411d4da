"""Plans at work in the engine: which width computed which token, and what a switch rebuilds."""

from __future__ import annotations

import random

import pytest
import torch

from elastic_infer import InvalidRequest, Plan, Policy, SamplingParams, WidthError
from elastic_infer.sampling.processors import top_logprobs
from elastic_infer.scheduling import switching
from support.engines import (
    END_THINK,
    EOS,
    THINK,
    assert_all_free,
    base_engine,
    draw,
    open_engine,
    run_read,
    script,
    text_engine,
    write_text_model,
)

NEWLINE = ord("\n")
POLICIES = ["carry", "exact", "window(8)"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with text_engine(tmp_path_factory.mktemp("model"), max_num_batched_tokens=128) as engine:
        yield engine
        assert_all_free(engine)


def told(engine, tokens, plan, prompt="x", **values):
    params = SamplingParams(logits_processors=[script(tokens)], **values)
    return engine.generate(prompt, params, plan=plan)


def greedy(count, **values):
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **values)


def replay(engine, out, reads):
    """Greedy tokens of a sequence that is driven by hand through `reads`, [(width, count)]."""
    with engine.open(out.prompt_token_ids, width=reads[0][0]) as sequence:
        ids = []
        for width, count in reads:
            ids += [sequence.step(width=width).id for _ in range(count)]
        return ids


# -- which width computes which token ---------------------------------------------------------


def test_fixed(engine):
    out = engine.generate("abc", greedy(5), plan=Plan.fixed("S"))
    assert out.width_runs == [("S", 5)]
    assert out.token_ids == engine.generate("abc", greedy(5), width="S").token_ids


def test_schedule_by_carry(engine):
    """Token t is sampled from the logits of the width that the schedule names for t, over the
    cache that the earlier widths have left."""
    plan = Plan.schedule([(0, "S"), (4, "L"), (9, "M")])
    out = engine.generate("hello", greedy(12), plan=plan)
    assert out.width_runs == [("S", 4), ("L", 5), ("M", 3)] and out.rebuilt_tokens == 0
    assert out.token_ids == replay(engine, out, [("S", 4), ("L", 5), ("M", 3)])
    narrow = engine.generate("hello", greedy(12), width="S")
    assert out.token_ids[:4] == narrow.token_ids[:4] and out.token_ids != narrow.token_ids


def test_schedule_by_exact_equals_a_fresh_prompt(engine):
    plan = Plan.schedule([(0, "S"), (6, "L")], policy="exact")
    out = engine.generate("hello", greedy(14, logprobs=0), plan=plan)
    prompt = out.prompt_token_ids + out.token_ids[:6]
    assert out.rebuilt_tokens == len(prompt) - 1, "the last token was not read before"
    fresh = engine.generate(prompt, greedy(8, logprobs=0), width="L")
    assert out.token_ids[6:] == fresh.token_ids
    assert out.logprobs[6:] == fresh.logprobs, "to the bit"


@pytest.mark.parametrize("length", [5, 60, 64, 65, 200])
@pytest.mark.parametrize("at", [1, 7, 8, 9, 30])
def test_window_rebuilds_n_to_2n_tokens(engine, length, at):
    n = 8
    plan = Plan.schedule([(0, "S"), (at, "L")], policy=f"window({n})")
    out = engine.generate(draw(length), greedy(at + 2), plan=plan)
    read = length + at - 1  # tokens in the cache at the switch
    if read < n:
        assert out.rebuilt_tokens == read, "all of them"
    else:
        slack = 63 if at - 1 < n else 0  # right after a prompt its cut on the grid is further away
        assert n <= out.rebuilt_tokens <= 2 * n + slack or out.rebuilt_tokens == read < 2 * n


def many_switches(seed):
    """(n, length of the prompt, tokens at which the width changes)."""
    rng = random.Random(seed)
    starts = sorted({rng.randrange(1, 200) for _ in range(12)})
    return rng.choice([4, 20, 40]), rng.randrange(1, 250), starts


# In the first, the second switch comes late after the first, whose rebuilt part held a grid point.
@pytest.mark.parametrize("case", [(100, 300, [90, 180]), *map(many_switches, range(6))], ids=str)
def test_every_one_of_many_window_switches_is_bounded(engine, monkeypatch, case):
    n, length, starts = case
    counts = []

    def watch(cache, sequence, *rest):
        length = len(sequence.tokens)
        reads, again = switching.switch(cache, sequence, *rest)
        counts.append((length, again))
        return reads, again

    monkeypatch.setattr("elastic_infer.scheduling.scheduler.switch", watch)
    steps = [(start, "SLM"[i % 3]) for i, start in enumerate([0, *starts])]
    plan = Plan.schedule(steps, policy=f"window({n})")
    out = engine.generate(draw(length), greedy(starts[-1] + 3), plan=plan)
    assert len(counts) == len(steps) - 1 and out.rebuilt_tokens == sum(a for _, a in counts)
    for length, again in counts:
        assert again <= 2 * n + 63, (n, counts)
        assert again >= min(n, length), (n, counts)


def test_window_equals_carry_at_its_snapshot(engine):
    """The tokens after a `window` switch are those after: the narrow width up to the snapshot, a
    carry switch there, and the rest read as a prompt by the wide width."""
    prompt, n, at = draw(100), 8, 21
    plan = Plan.schedule([(0, "S"), (at, "L")], policy=f"window({n})")
    out = engine.generate(prompt, greedy(at + 10, logprobs=0), plan=plan)
    kept = len(prompt) + at - 1 - out.rebuilt_tokens
    assert kept == len(prompt) + n, "one snapshot after the prompt, one every n tokens"
    model, cache = engine.core.model, engine.core.model.cache
    tokens = prompt + out.token_ids

    def by_hand():
        from elastic_infer.scheduling.reads import Read

        sequence = cache.open(track=True)
        run_read(model, sequence, Read(prompt, "S", "prefill"))
        run_read(model, sequence, Read(tokens[len(prompt) : kept], "S", "step"))
        rows = [run_read(model, sequence, Read(tokens[kept : len(prompt) + at], "L", "prefill"))]
        for token in out.token_ids[at:-1]:
            rows.append(run_read(model, sequence, Read([token], "L", "step")))
        cache.close(sequence)
        return torch.cat(rows)

    rows = engine.core.call(by_hand)
    assert rows.argmax(-1).tolist() == out.token_ids[at:]
    wanted = [top_logprobs(row, token, 0) for row, token in zip(rows, out.token_ids[at:])]
    assert out.logprobs[at:] == wanted


@pytest.mark.parametrize("policy", POLICIES)
def test_switching_often_and_back(engine, policy):
    steps = [(i, "SLM"[i % 3]) for i in range(0, 30, 1)]
    plan = Plan.schedule(steps, policy=policy)
    out = engine.generate(draw(70), greedy(30), plan=plan)
    assert [w for w, _ in out.width_runs] == [w for _, w in steps]
    again = engine.generate(draw(70), greedy(30), plan=plan)
    assert again.token_ids == out.token_ids


# -- think, answer ----------------------------------------------------------------------------


def test_think_answer_without_a_budget(engine):
    plan = Plan.think_answer("S", "L")
    out = told(engine, [THINK, *b"hm", END_THINK, *b"ok"], plan)
    # The end tag is sampled by S; the answer width reads it and samples what follows.
    assert out.width_runs == [("S", 4), ("L", 3)]
    assert (out.reasoning, out.answer) == ("hm", "ok")
    assert out.usage.reasoning_tokens == 3 and out.usage.forced_tokens == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_budget_closes_thinking(engine, policy):
    plan = Plan.think_answer("S", "L", think_tokens=5, grace=0, policy=policy)
    tokens = list(
        engine.stream(
            "q<think>", SamplingParams(logits_processors=[script("abcdefghij")]), plan=plan
        )
    )
    assert [t.id for t in tokens] == [*b"abcde", END_THINK, *b"ghij", EOS]
    assert [t.width for t in tokens] == ["S"] * 5 + ["L"] * 6
    assert [t.forced for t in tokens] == [False] * 5 + [True] + [False] * 5
    assert [t.phase for t in tokens] == ["thinking"] * 6 + ["answer"] * 5
    assert "".join(t.text for t in tokens) == "abcde</think>ghij"
    assert tokens[5].logprob is None


def test_grace_waits_for_a_newline(engine):
    plan = Plan.think_answer("S", "L", think_tokens=3, grace=4)
    at_newline = told(engine, b"abcd\nfgh", plan, prompt="<think>")
    assert at_newline.token_ids[:6] == [*b"abcd", NEWLINE, END_THINK]
    in_vain = told(engine, b"abcdefghijk", plan, prompt="<think>")
    assert in_vain.token_ids[:8] == [*b"abcdefg", END_THINK]
    own = told(engine, [*b"abcd", END_THINK, *b"f"], plan, prompt="<think>")
    assert own.usage.forced_tokens == 0 and own.token_ids.count(END_THINK) == 1


def test_closing_text(engine):
    plan = Plan.think_answer("S", "L", think_tokens=2, grace=0, closing_text=" enough.</think>\n")
    out = told(engine, b"ab" + b"?" * 11 + b"ok", plan, prompt="<think>")
    assert out.text == "ab enough.</think>\n?ok"
    assert out.usage.forced_tokens == len(" enough.") + 1 + len("\n")
    assert out.width_runs == [("S", 2), ("L", len(out.token_ids) - 2)]
    assert out.answer == "?ok"


def test_closing_text_counts_and_may_end_the_request(engine):
    plan = Plan.think_answer("S", "L", think_tokens=2, grace=0, closing_text="enough</think>")
    short = told(engine, b"abcd", plan, prompt="<think>", max_tokens=5)
    assert short.token_ids == list(b"abeno") and short.finish_reason == "length"
    stopped = told(engine, b"abcd", plan, prompt="<think>", stop="oug", stop_in_thinking=True)
    assert stopped.text == "aben" and stopped.stop_reason == "oug"
    assert stopped.finish_reason == "stop"


def test_a_budget_of_zero_closes_at_once(engine):
    plan = Plan.think_answer("S", "L", think_tokens=0)
    out = told(engine, b"?ok", plan, prompt="<think>")
    assert out.token_ids == [END_THINK, *b"ok", EOS] and out.width_runs == [("L", 4)]


def test_think_answer_greedy_tokens(engine):
    """With real logits: S up to the budget, then the closing token, then L over the same cache."""
    out = engine.generate(
        "why<think>", greedy(16), plan=Plan.think_answer("S", "L", think_tokens=6, grace=0)
    )
    with engine.open(out.prompt_token_ids, width="S") as sequence:
        ids = [sequence.step().id for _ in range(6)]
        sequence.width = "L"
        sequence.append([END_THINK])
        ids.append(END_THINK)
        ids += [sequence.step().id for _ in range(9)]
    assert out.token_ids == ids


def test_tags_must_be_in_the_vocabulary(engine, tmp_path):
    with pytest.raises(InvalidRequest, match=r"start_tag must be a single token .* '<thought>'"):
        engine.generate("x", plan=Plan.think_answer("S", "L", start_tag="<thought>"))
    with base_engine(tmp_path) as bare:
        with pytest.raises(InvalidRequest, match=r"start_tag .* there is no tokenizer"):
            bare.generate([5], plan=Plan.think_answer("S", "L"))
        plan = Plan.think_answer("S", "L", start_tag=3, end_tag=4, think_tokens=2, grace=0)
        out = bare.generate([9, 3], greedy(6), plan=plan)
        assert out.token_ids[2] == 4 and out.width_runs == [("S", 2), ("L", 4)]


# -- uncertainty and functions ----------------------------------------------------------------


def test_by_uncertainty(engine):
    """The wide width takes over after an uncertain token, for `hold` tokens."""

    def spread(token_ids, row, phase):
        row[:] = -torch.inf
        if len(token_ids) == 3:
            row[:8] = 0.0  # entropy log 8 = 2.08 nats
        else:
            row[65] = 0.0

    params = SamplingParams(max_tokens=12, logits_processors=[spread], seed=0)
    plan = Plan.by_uncertainty("S", "L", threshold=2.0, hold=3)
    out = engine.generate("x", params, plan=plan)
    assert out.width_runs == [("S", 4), ("L", 3), ("S", 5)]
    high = Plan.by_uncertainty("S", "L", threshold=2.1, hold=3)
    assert engine.generate("x", params, plan=high).width_runs == [("S", 12)]


def test_a_function_sees_tokens_phase_and_entropy(engine):
    seen = []

    def choose(view):
        seen.append((list(view.token_ids), view.phase, view.entropy))
        assert list(view.prompt_ids) == [*b"ab", THINK]
        return "L" if len(view.token_ids) == 2 else "M"

    out = told(engine, [65, END_THINK, 66], choose, prompt="ab<think>")
    assert out.width_runs == [("M", 2), ("L", 1), ("M", 1)]
    assert [s[0] for s in seen] == [[], [65], [65, END_THINK], [65, END_THINK, 66]]
    assert [s[1] for s in seen] == ["thinking", "thinking", "answer", "answer"]
    assert seen[0][2] is None and seen[1][2] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda view: "XL", WidthError, "must return one of S, M, L, got 'XL'"),
        (lambda view: None, InvalidRequest, "must return a width's name, got None"),
        (lambda view: 1 / 0, ZeroDivisionError, "division"),
    ],
)
def test_a_function_that_fails_ends_its_request_alone(engine, function, error, message):
    with pytest.raises(error, match=message):
        engine.generate("x", greedy(4), plan=function)
    late = [lambda view: function(view) if len(view.token_ids) == 2 else "S", Plan.fixed("S")]
    bad, good = engine.generate(["x", "x"], greedy(6), plan=late)
    assert bad.finish_reason == "error" and len(bad.token_ids) == 2
    assert good.token_ids == engine.generate("x", greedy(6), width="S").token_ids


# -- misuse -----------------------------------------------------------------------------------


def test_width_and_plan_together_are_refused(engine):
    with pytest.raises(InvalidRequest, match="width: must not be given together with plan"):
        engine.generate("x", width="S", plan=Plan.fixed("S"))


def test_unknown_widths_are_named(engine):
    for call in (
        lambda: engine.generate("x", width="XL"),
        lambda: engine.generate("x", plan=Plan.fixed("XL")),
        lambda: engine.generate("x", plan=Plan.schedule([(0, "S"), (2, "XL")])),
        lambda: engine.generate("x", plan=Plan.think_answer("S", "XL")),
        lambda: engine.score("x", width="XL"),
        lambda: engine.open("x", width="XL"),
    ):
        with pytest.raises(WidthError, match="must be one of S, M, L, got 'XL'"):
            call()
    with pytest.raises(InvalidRequest, match="must be a Plan or a function, got 'S'"):
        engine.generate("x", plan="S")
    with pytest.raises(InvalidRequest, match=r"think_tokens .* must be an int >= 0, got -1"):
        Plan.think_answer("S", "L", think_tokens=-1)


def test_widening_needs_what_the_plan_promised(tmp_path):
    """A plan that can widen tracks; one that is fixed does not pay for it."""
    with open_engine(write_text_model(tmp_path)) as engine:
        seen = []
        opened = engine.core.model.cache.open
        engine.core.model.cache.open = lambda track=False: (seen.append(track), opened(track))[1]
        engine.generate("x", greedy(2), plan=Plan.schedule([(0, "S"), (1, "L")]))
        engine.generate("x", greedy(2), plan=Plan.schedule([(0, "L"), (1, "S")]))
        engine.generate("x", greedy(2), plan=Plan.schedule([(0, "S"), (1, "L")], policy="exact"))
        engine.generate(
            "x", greedy(2), plan=Plan.schedule([(0, "S"), (1, "L")], policy=Policy("window", 4))
        )
        engine.generate("x", greedy(2), width="S")
        assert seen == [True, False, False, True, False]
