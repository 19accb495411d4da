"""Passes that are launched before the tokens of the last are read out: the same results, whatever
the device's pace is.

Most tests run the CPU's kernels on a device that is as late as it may be (`late.py`), so that
results can be compared bit by bit with an engine on the CPU.
"""

import random
from contextlib import contextmanager
from functools import partial
from itertools import islice

import pytest
import torch
from hypothesis import given, settings, strategies as st
from test_sequences import run_sequences

from elastic_infer import NonFiniteLogits, Plan, RequestCancelled, SamplingParams
from elastic_infer.scheduling.reads import Read
from support.emulated import built, load
from support.engines import (
    HANG,
    assert_all_free,
    base_engine,
    draw,
    held,
    in_threads,
    run_read,
    script,
    sized_engine,
    text_engine,
)
from support.plans import plans
from tests.support.late_device import Late, late_device

emu = load(built())
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, max_tokens=20, seed=3, ignore_eos=True)
PROMPT = draw(12)


@contextmanager
def late_engine(folder, make=base_engine, seed=None, module=None, **limits):
    with late_device(Late(seed), module), make(folder, device="cuda", **limits) as engine:
        yield engine
        assert_all_free(engine)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ahead")


@pytest.fixture(scope="module")
def cpu(folder):
    with base_engine(folder, device="cpu") as engine:
        yield engine
        assert engine.stats()["passes_ahead"] == 0
        assert_all_free(engine)


@pytest.fixture
def engine(folder):
    with late_engine(folder) as engine:
        yield engine


def log_of(engine, action):
    """What the host did while `action` ran: "pass" where it gave one, "wait" where it waited."""
    log = engine.core.model.device.log
    log.clear()
    action()
    return list(log)


def test_a_steady_run_waits_for_nothing_but_the_tokens(engine):
    """Pass n + 1 is given before anybody waits for pass n; then its tokens are the only wait."""
    log = log_of(engine, lambda: engine.generate(PROMPT, GREEDY))
    assert log == ["pass", *["pass", "wait"] * 18, "wait"]
    stats = engine.stats()
    assert stats["passes"] == 20 and stats["passes_ahead"] == 18
    assert stats["tokens_read"] == len(PROMPT) + 19


def test_it_can_be_turned_off(folder, cpu):
    with late_engine(folder, async_scheduling=False) as engine:
        log = log_of(engine, lambda: engine.generate(PROMPT, GREEDY))
        assert log == ["pass", "wait"] * 19 and engine.stats()["passes_ahead"] == 0


def stops(cpu):
    """Requests that end in mid-run by a token, as (prompt, params, plan)."""
    jobs = []
    for i, width in enumerate(("S", "M", "L")):
        found = cpu.generate(draw(20, i), GREEDY, width=width).token_ids
        stop = SamplingParams(temperature=0.0, max_tokens=20, stop_token_ids=[found[5 + 3 * i]])
        jobs.append((draw(20, i), stop, Plan.fixed(width)))
    return jobs


def work(cpu):
    """Requests of all kinds: (prompt, params, plan)."""
    jobs = stops(cpu)
    for i, plan in enumerate(plans()):
        prompt = [*draw([3, 64, 65, 130, 17, 90][i % 6], i), 3]
        for params in (GREEDY, SAMPLED)[i % 2 :]:
            jobs.append((prompt, params, plan))
    many = SamplingParams(temperature=1.1, max_tokens=9, seed=8, n=3, ignore_eos=True)
    jobs.append((draw(70, 9), many, Plan.fixed("M")))
    jobs.append((draw(5, 9), SamplingParams(max_tokens=1, seed=0), Plan.fixed("S")))
    jobs.append((draw(500, 9), SamplingParams(temperature=0.0, ignore_eos=True), Plan.fixed("L")))
    jobs.append((draw(30, 9), SamplingParams(max_tokens=6, seed=1, logprobs=2), Plan.fixed("L")))
    long = SamplingParams(temperature=0.7, max_tokens=60, seed=5, ignore_eos=True)
    for i in range(3):  # outlive those that run no pass ahead
        jobs.append((draw(40, i), long, Plan.schedule([(0, "SML"[i]), (30 + i, "L")])))
    return jobs


def summaries(output):
    return [
        (c.token_ids, c.logprobs, c.width_runs, c.finish_reason, c.stop_reason)
        for c in output.choices
    ], output.rebuilt_tokens


@pytest.fixture(scope="module")
def jobs(cpu):
    return work(cpu)


@pytest.fixture(scope="module")
def expected(cpu, jobs):
    return [summaries(cpu.generate(p, params, plan=plan)) for p, params, plan in jobs]


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"mixing": "always"},
        {"mixing": "never"},
        {"max_num_seqs": 4},
        {"max_num_batched_tokens": 80},
        {"async_scheduling": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [None, 1])
def test_results_are_those_of_the_cpu(folder, jobs, expected, limits, seed):
    """Greedy and sampled, of all widths, plans and policies, that stop in mid-batch, fork, fill the
    context, and are admitted as others end."""
    with late_engine(folder, seed=seed, **limits) as engine:
        with held(engine):
            requests = [engine.submit(*job) for job in jobs]
        assert [summaries(r.result()) for r in requests] == expected
        # Nor has anything come to those that ended while their next row was in the air.
        assert [summaries(r.output()) for r in requests] == expected
        assert not any(r.error for r in requests)
        assert bool(engine.stats()["passes_ahead"]) == limits.get("async_scheduling", True)


def test_cuda_kernels_give_the_same_tokens(folder, jobs, expected):
    """Their bits depend on the number of rows, which differs where a branch stopped."""
    with late_engine(folder, module=emu) as engine:
        some = [0, 1, 2, 4]
        with held(engine):
            requests = [engine.submit(*jobs[i]) for i in some]
        found = [r.result().choices[0] for r in requests]
        assert [c.token_ids for c in found] == [expected[i][0][0][0] for i in some]
        assert [c.finish_reason for c in found] == [expected[i][0][0][3] for i in some]
        assert engine.stats()["passes_ahead"] > 10


def test_what_was_read_ahead_for_a_branch_that_stopped_is_not_in_the_output(engine, cpu):
    """Nor is it counted; the row beside it goes on."""
    (prompt, params, plan), *_ = stops(cpu)
    alone = cpu.generate(prompt, params, plan=plan)
    passes = engine.stats()["passes_ahead"]
    output = engine.generate(prompt, params, plan=plan)
    assert summaries(output) == summaries(alone) and output.finish_reason == "stop"
    count = len(output.token_ids)
    assert engine.stats()["passes_ahead"] - passes == count - 1, "the last one was for nothing"
    assert engine.stats()["tokens_read"] == len(prompt) + count - 1


def test_stop_strings(tmp_path):
    """They are found once the text is there; ids are drawn plainly."""
    params = SamplingParams(temperature=1.5, max_tokens=40, seed=5, ignore_eos=True)
    with text_engine(tmp_path, device="cpu") as engine:
        text = engine.generate("ABC", params).text
        stop = SamplingParams(**{**vars(params), "stop": [text[12:14]]})
        wanted = [summaries(engine.generate("ABC", p)) for p in (stop, params)]
    with late_device(Late()), text_engine(tmp_path, device="cuda") as engine:
        with held(engine) as hold:
            found = in_threads(lambda: engine.generate(["ABC"] * 2, [stop, params]))
            hold.arrived(requests=2)
        (found,) = found()
        assert [summaries(o) for o in found] == wanted
        assert found[0].finish_reason == "stop" and text.startswith(found[0].text)
        assert engine.stats()["passes_ahead"] >= 35
        assert_all_free(engine)


@pytest.mark.parametrize(
    "beside",
    [
        {"logprobs": 0},
        {"repetition_penalty": 1.5},
        {"logits_processors": [script([5] * 20)]},
    ],
    ids=str,
)
def test_logits_that_the_host_looks_at_are_waited_for(engine, cpu, beside):
    """One such row, and no pass runs ahead until it has ended."""
    watched = SamplingParams(**{**vars(GREEDY), "max_tokens": 8, **beside})
    given = [PROMPT, draw(30)], [watched, SAMPLED]
    with held(engine) as hold:
        found = in_threads(lambda: engine.generate(*given))
        hold.arrived(requests=2)
    (found,) = found()
    assert [summaries(o) for o in found] == [summaries(o) for o in cpu.generate(*given)]
    assert engine.stats()["passes_ahead"] == 20 - 8 - 1


@pytest.mark.parametrize(
    "plan, ahead",
    [
        (Plan.fixed("M"), 18),
        (Plan.schedule([(0, "S"), (5, "L"), (9, "M")]), 18),
        (
            Plan.schedule([(0, "S"), (5, "L")], policy="exact"),
            16,
        ),  # nothing before or after a rebuild
        (Plan.schedule([(0, "S"), (9, "L")], policy="window(3)"), 16),
        (Plan.by_uncertainty("S", "L", threshold=4.0), 0),
        (Plan.custom(lambda view: "S"), 0),
        (Plan.think_answer("S", "L", start_tag=3, end_tag=4), None),
        (Plan.think_answer("S", "S", start_tag=3, end_tag=4), 18),
    ],
    ids=str,
)
def test_how_far_plans_run_ahead(engine, cpu, plan, ahead):
    found = engine.generate(PROMPT, GREEDY, plan=plan)
    assert summaries(found) == summaries(cpu.generate(PROMPT, GREEDY, plan=plan))
    stats = engine.stats()
    assert stats["passes_ahead"] == ahead or (ahead is None and 0 < stats["passes_ahead"] < 19)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_what_plans_settle_is_what_they_decide(data):
    """For every kind of plan, after any tokens: the settled width comes whatever the next one is,
    and nothing is forced."""
    made = [
        *plans(),
        Plan.think_answer("S", "S", start_tag=3, end_tag=4),
        Plan.think_answer("S", "L", start_tag=3, end_tag=4),
        Plan.custom(lambda view: "SML"[len(view.token_ids) % 3]),
    ]
    plan = data.draw(st.sampled_from(made))
    run = plan.begin(data.draw(st.sampled_from([[7], [7, 3], [3, 4], [4]])), None, ("S", "M", "L"))
    tokens = []
    run.next(tokens)
    for token in data.draw(st.lists(st.integers(3, 6), max_size=25)):
        width = run.settled(len(tokens) + 1)
        for other in (3, 4, 5):
            decision = run.fork().next([*tokens, other], 9.0)
            assert width in (None, decision.width) and not (width and decision.forced)
        tokens.append(token)
        tokens += run.next(tokens, 1.0).forced


def test_a_plan_that_decides_against_what_it_settled_fails_alone(engine, cpu, monkeypatch):
    bad = Plan.schedule([(0, "M")])
    monkeypatch.setattr(type(bad.begin([3], None, ("M",))), "settled", lambda run, count: "S")
    found = engine.generate([PROMPT] * 2, GREEDY, plan=[bad, Plan.fixed("L")])
    assert found[0].finish_reason == "error" and len(found[0].token_ids) == 2
    assert "the next read must be the one that was settled" in found[0].stop_reason
    assert summaries(found[1]) == summaries(cpu.generate(PROMPT, GREEDY, width="L"))


def test_records_hold_known_tokens_alone(engine, monkeypatch):
    """Between any two passes every cache's record is a part of the prompt and the output."""
    scheduler, seen = engine.core.scheduler, []
    step = scheduler.step

    def checked():
        ran = step()
        for branch in scheduler.running:
            record, known = branch.sequence, branch.request.prompt_ids + branch.token_ids
            assert record.tokens == known[: record.length]
            assert record.length == sum(run.count for run in record.runs)
            seen.append(len(known) - record.length)
        return ran

    monkeypatch.setattr(scheduler, "step", checked)
    with held(engine):
        requests = [engine.submit(draw(9, i), SAMPLED, width=w) for i, w in enumerate("SML")]
    assert {r.result().finish_reason for r in requests} == {"length"}
    assert 0 in seen, "at times all that is known is recorded, since the pass that reads it flies"


def test_nothing_finite_ends_the_branch_though_the_next_pass_flies(folder, cpu):
    """A weight is NaN for one token: the pass that was fed with what came of it harms nobody."""
    good = summaries(cpu.generate(PROMPT, GREEDY, width="S"))
    whole = cpu.generate(draw(20, 1), GREEDY, width="M").token_ids
    token = next(t for t in whole[4:] if t not in (*good[0][0][0], *PROMPT, *draw(20, 1)))
    known = whole[: whole.index(token) + 1]
    with late_engine(folder) as engine:
        engine.core.model.weights.embedding[token] = torch.nan
        with held(engine):
            bad = engine.submit(draw(20, 1), GREEDY, width="M")
            other = engine.submit(PROMPT, GREEDY, width="S")
        with pytest.raises(NonFiniteLogits, match="logits must be finite"):
            bad.result()
        assert bad.output().token_ids == known and bad.output().finish_reason == "error"
        assert summaries(other.result()) == good


def test_preemption(tmp_path, cpu):
    """Sequences that outgrow their pages move out and come back, with passes in the air."""
    params = SamplingParams(**{**vars(SAMPLED), "max_tokens": 80})
    jobs = [(draw(50 + 9 * i, i), params, Plan.fixed("SML"[i % 3])) for i in range(5)]
    wanted = [summaries(cpu.generate(p, a, plan=plan)) for p, a, plan in jobs]
    for pages in (5, 7):
        with late_engine(tmp_path, sized_engine, pages=pages, slots=8, max_num_seqs=4) as engine:
            with held(engine):
                requests = [engine.submit(*job) for job in jobs]
            assert [summaries(r.result()) for r in requests] == wanted
            stats = engine.stats()
            assert stats["preemptions"] > 0 and stats["passes_ahead"] > 50


def test_readers_and_jobs_between_passes(folder, cpu):
    """A score, a sequence driven by hand and a job that runs passes of its own, while others fly:
    what a pass drew is not taken from one that came between."""
    long = SamplingParams(**{**vars(SAMPLED), "max_tokens": 100})
    jobs = [(draw(9, i), long, Plan.fixed(w)) for i, w in enumerate("SML")]
    wanted = [summaries(cpu.generate(p, a, plan=plan)) for p, a, plan in jobs]
    score = cpu.score(PROMPT)
    with cpu.open(PROMPT, width="M") as theirs:
        by_hand = [theirs.step().id for _ in range(4)]
    with late_engine(folder) as engine:
        model = engine.core.model

        def steps():
            sequence = model.cache.open()
            for kind in ("prefill", "step", "step"):
                run_read(model, sequence, Read([5], "S", kind))
            model.cache.close(sequence)

        with engine.open(PROMPT, width="M") as mine, held(engine) as hold:
            requests = [engine.submit(*job) for job in jobs]
            assert hold.step(3) == 3
            for token in by_hand:
                engine.core.call(steps)
                found = in_threads(lambda: mine.step().id)
                hold.arrived(readers=1)
                hold.step(3)
                assert found() == [token]
            found = in_threads(lambda: engine.score(PROMPT))
            hold.arrived(readers=1)
            hold.step(3)
            assert torch.equal(found()[0], score)
            hold.release()
            assert [summaries(r.result()) for r in requests] == wanted
            assert engine.stats()["passes_ahead"] > 20


def test_cancelling_and_closing_in_flight(folder):
    with late_engine(folder) as engine:
        requests = [engine.submit(draw(9, i), GREEDY) for i in range(3)]
        next(iter(requests[0]))
        for request in requests:
            request.cancel()
        assert {r.result().finish_reason for r in requests} <= {"cancelled", "length"}
    with late_device(Late()) as device:
        engine = base_engine(folder, device="cuda")
        with held(engine) as hold:
            request = engine.submit(PROMPT, SamplingParams(temperature=0.0, ignore_eos=True))
            assert hold.step(5) == 5
            engine.close()
        with pytest.raises(RequestCancelled, match="the engine was closed"):
            request.result()
        assert device._done == device._given, "what flew has landed"


def test_threads_submit_and_cancel_at_random(folder, cpu):
    """No leak, no deadlock, no wrong answer."""
    jobs = [(draw(10 * i + 5, i), SAMPLED, Plan.fixed("SML"[i % 3])) for i in range(6)]
    wanted = [cpu.generate(p, a, plan=plan).token_ids for p, a, plan in jobs]
    with late_engine(folder, seed=5, max_num_seqs=4) as engine:

        def run(number):
            rng = random.Random(number)
            for _ in range(20):
                i = rng.randrange(6)
                request = engine.submit(*jobs[i])
                if rng.random() < 0.5:
                    list(islice(request, rng.randrange(4)))
                    request.cancel()
                    got = request.result(HANG).token_ids
                    assert got == wanted[i][: len(got)]
                else:
                    assert request.result(HANG).token_ids == wanted[i]

        in_threads(*(partial(run, number) for number in range(6)))()
        ahead = engine.stats()["passes_ahead"]
        assert engine.submit(*jobs[0]).result(HANG).token_ids == wanted[0]
        assert engine.stats()["passes_ahead"] > ahead, "alone, and so ahead"


def test_random_sequences(tmp_path):
    """The state machine of `test_sequences.py`, whose jobs come between passes that fly."""
    with late_engine(tmp_path, sized_engine, seed=2, pages=14, slots=8, max_num_seqs=3) as engine:
        run_sequences(engine, 8, 20)
        ahead = engine.stats()["passes_ahead"]
        engine.generate(PROMPT, GREEDY)
        assert engine.stats()["passes_ahead"] == ahead + 18
