"""Law 5 at the engine: limits, order of arrival, neighbours and threads change no bit."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch

from elastic_infer import NonFiniteLogits, Plan, RequestCancelled, SamplingParams
from elastic_infer.scheduling.batching import GRID
from support.engines import (
    assert_all_free,
    base_engine,
    draw,
    held,
    in_threads,
    sized_engine,
    text_engine,
)
from support.plans import plans


def work():
    """(prompt, params, plan) of sixteen requests of many lengths."""
    jobs = []
    for i, plan in enumerate(plans() * 2):
        prompt = [*draw([3, 64, 65, 130, 17, 200, 1, 90][i * 3 % 8], i), 3]
        params = SamplingParams(
            max_tokens=24,
            seed=i,
            temperature=0.9,
            top_p=0.95,
            logprobs=1,
            ignore_eos=True,
            frequency_penalty=0.3 if i % 3 == 0 else 0.0,
        )
        jobs.append((prompt, params, plan))
    return jobs


def summary(output):
    """What must not depend on scheduling."""
    choice = output.choices[0]
    return (
        choice.token_ids,
        choice.logprobs,
        choice.width_runs,
        choice.finish_reason,
        output.rebuilt_tokens,
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Every request alone, with room for whole prompts."""
    with base_engine(tmp_path_factory.mktemp("alone"), max_num_batched_tokens=512) as engine:
        return [summary(engine.generate(p, params, plan=plan)) for p, params, plan in work()]


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_num_batched_tokens": 80},
        {"max_num_batched_tokens": 131, "mixing": "always"},
        {"mixing": "never"},
        {"max_num_seqs": 3, "max_num_batched_tokens": 70},
        {"threads": 1},
        {"isa": "portable", "threads": 3},
        {"dtype": torch.bfloat16, "max_num_batched_tokens": 80, "max_num_seqs": 5},
    ],
    ids=str,
)
def test_limits_change_no_bit(tmp_path, expected, limits):
    # Other instructions and dtypes have other bits: they are compared with themselves alone.
    own = {key: limits[key] for key in ("isa", "dtype") if key in limits}
    if own:
        with base_engine(tmp_path, max_num_batched_tokens=512, **own) as engine:
            expected = [summary(engine.generate(p, a, plan=plan)) for p, a, plan in work()]
    with base_engine(tmp_path, **limits) as engine:
        requests = [engine.submit(*job) for job in work()]
        got = [summary(r.result()) for r in requests]
        assert_all_free(engine)
    assert got == expected


@pytest.mark.parametrize("seed", range(3))
def test_order_and_time_of_arrival_change_no_bit(tmp_path, expected, seed):
    order = list(range(16))
    rng = random.Random(seed)
    rng.shuffle(order)
    with base_engine(tmp_path, max_num_seqs=5, max_num_batched_tokens=96) as engine:
        got = {}
        waiting = []
        for i in order:
            waiting.append((i, engine.submit(*work()[i])))
            if rng.random() < 0.3:  # let some finish before the next arrive
                j, request = waiting.pop(rng.randrange(len(waiting)))
                got[j] = summary(request.result())
        got |= {i: summary(r.result()) for i, r in waiting}
        assert_all_free(engine)
    assert [got[i] for i in range(16)] == expected


def test_preemption_changes_no_bit(tmp_path, expected):
    with sized_engine(tmp_path, pages=9, slots=16, max_num_seqs=6) as engine:
        with held(engine):
            requests = [engine.submit(*job) for job in work()]
        got = [summary(r.result()) for r in requests]
        assert engine.stats()["preemptions"] > 0
        assert_all_free(engine)
    assert got == expected


def test_threads_change_no_bit(tmp_path, expected):
    """Sixteen threads submit at once, beside sequences that are driven by hand."""
    with base_engine(tmp_path, max_num_seqs=8, max_num_batched_tokens=96) as engine:
        jobs = work()

        def call(prompt, params, plan):
            return summary(engine.generate(prompt, params, plan=plan))

        with held(engine):
            generating = in_threads(*(partial(call, *job) for job in jobs))
        with engine.open(draw(40), width="S") as a, engine.open(draw(40), width="S") as b:
            for _ in range(8):
                assert a.step().id == b.step().id
                a.rollback(40), b.rollback(40)
        got = generating()
        assert_all_free(engine)
    assert got == expected


def test_prompts_are_cut_on_the_grid_only(tmp_path):
    with base_engine(tmp_path, max_num_batched_tokens=100) as engine:
        cuts, forward = [], engine.core.model.forward

        def watch(segments):
            cuts.extend((s.sequence.length, len(s.tokens)) for s in segments if s.kind == "prefill")
            return forward(segments)

        engine.core.model.forward = watch
        params = SamplingParams(max_tokens=3, seed=0, ignore_eos=True)
        engine.generate([draw(n, n) for n in (300, 150, 70)], params)
        lengths = {300, 150, 70}
        assert all((at + n) % GRID == 0 or at + n in lengths for at, n in cuts)
        assert len(cuts) > 6


@pytest.mark.parametrize("tokens", [70, 100, 300])
def test_snapshots_lie_where_the_prompt_says_not_where_passes_end(tmp_path, tokens):
    """What `window` rebuilds, and so every later bit, is the same however the prompt was cut."""
    plan = Plan.schedule([(0, "S"), (45, "L"), (60, "M")], policy="window(60)")
    params = SamplingParams(max_tokens=64, temperature=0, logprobs=0, ignore_eos=True)
    with base_engine(tmp_path, max_num_batched_tokens=512) as engine:
        want = summary(engine.generate(draw(184), params, plan=plan))
    with base_engine(tmp_path, max_num_batched_tokens=tokens + 16) as engine:
        requests = [engine.submit(draw(n, n), params, plan) for n in (70, 130)]
        assert summary(engine.generate(draw(184), params, plan=plan)) == want
        [r.result() for r in requests]
    assert want[-1] > 0


def test_long_prompts_do_not_stall_running_requests(tmp_path):
    """While a long prompt is read in parts, everybody else gets a token in every pass."""
    with base_engine(tmp_path, max_num_batched_tokens=80, mixing="always") as engine:
        kinds, forward = [], engine.core.model.forward

        def watch(segments):
            kinds.append(sorted(s.kind for s in segments))
            return forward(segments)

        params = SamplingParams(max_tokens=30, seed=0, ignore_eos=True)
        with held(engine) as hold:
            first = engine.submit(draw(5), params)
            assert hold.step() == 1
            engine.core.model.forward = watch
            long = engine.submit(draw(400), params)
        long.result(), first.result()
        mixed = [k for k in kinds if "prefill" in k]
        assert len(mixed) >= 6 and all("step" in k for k in mixed)


@pytest.mark.parametrize("mixing", ["auto", "always", "never"])
def test_nobody_starves(tmp_path, mixing):
    """Rows of every width advance together, whatever the mixing: in a run where all have the same
    to do, nobody ends long after the others have."""
    with base_engine(tmp_path, mixing=mixing) as engine:
        params = SamplingParams(max_tokens=40, seed=0, ignore_eos=True)
        with held(engine) as hold:
            requests = [engine.submit(draw(5, i), params, width="SML"[i % 3]) for i in range(9)]
            late = engine.submit(draw(5), SamplingParams(max_tokens=2, seed=0, ignore_eos=True))
            passes = 0
            while not late.done:
                passes += hold.step()
            assert not any(r.done for r in requests), "a late request is not put last"
            while not all(r.done for r in requests):
                passes += hold.step()
        assert passes <= {"always": 40, "auto": 250, "never": 130}[mixing]


def test_one_bad_row_ends_alone(tmp_path):
    """NaN logits end their own request; its neighbours in the same passes keep their bits, and so
    do the requests that get its pages and its slot afterwards."""
    prompts = [draw(70, i, vocabulary=120) for i in range(5)]
    barred = SamplingParams(
        max_tokens=20, seed=1, logprobs=0, ignore_eos=True, logit_bias={125: -100.0}
    )
    with base_engine(tmp_path, max_num_seqs=5) as engine:
        expected = [summary(o) for o in engine.generate(prompts, barred)]
        poisoned = engine.core.model.weights.embedding[125]
        kept = poisoned.clone()
        poisoned.fill_(torch.nan)
        prompts[2] = [*prompts[2][:30], 125, *prompts[2][31:]]
        outs = engine.generate(prompts, barred)
        for i in (0, 1, 3, 4):
            assert summary(outs[i]) == expected[i]
        bad = outs[2]
        assert bad.finish_reason == "error" and bad.token_ids == []
        assert "logits must be finite" in bad.stop_reason and "at width L" in bad.stop_reason
        assert_all_free(engine)
        poisoned.copy_(kept)
        prompts[2] = draw(70, 2, vocabulary=120)
        assert [summary(o) for o in engine.generate(prompts, barred)] == expected


def test_nan_is_an_error_by_name(tmp_path):
    with text_engine(tmp_path) as engine:
        kept = engine.core.model.weights.embedding[65].clone()
        engine.core.model.weights.embedding[65] = torch.nan
        with pytest.raises(NonFiniteLogits, match=r"logits must be finite .* at token 0 at width"):
            engine.generate("ABC")
        with engine.open("BC") as sequence:
            sequence.append([65])
            with pytest.raises(NonFiniteLogits, match="step: logits must be finite"):
                sequence.step()
            sequence.rollback(2)
            assert sequence.step().id >= 0, "back before the bad token it goes on"
        engine.core.model.weights.embedding[65] = kept
        assert_all_free(engine)


# -- sequences that callers drive share the passes --------------------------------------------


class Passes:
    """Records every pass of an engine."""

    def __init__(self, engine):
        self.segments, self._forward = [], engine.core.model.forward
        engine.core.model.forward = self._watch

    def _watch(self, segments):
        self.segments.append(sorted((s.kind, len(s.tokens)) for s in segments))
        return self._forward(segments)


def test_steps_and_scores_of_many_threads_share_passes(tmp_path):
    params = SamplingParams(max_tokens=1, seed=0, ignore_eos=True)
    with base_engine(tmp_path, mixing="always", max_num_batched_tokens=256) as engine:
        sequences = [engine.open(draw(5, i), width="SML"[i % 3]) for i in range(6)]
        for sequence in sequences:
            sequence.step()
        with engine.open(draw(5, 0), width="S") as twin:
            twin.step()
            alone = twin.step().id
        score = engine.score(draw(40), width="M")
        passes = Passes(engine)
        with held(engine) as hold:
            calls = in_threads(
                *(s.step for s in sequences),
                lambda: engine.score(draw(40), width="M"),
                lambda: engine.generate(draw(9), params),
            )
            hold.arrived(requests=1, readers=7)
        first, *_, scored, _ = calls()
        assert passes.segments == [[("prefill", 9), ("prefill", 40)] + [("step", 1)] * 6]
        assert first.id == alone and torch.equal(scored, score)
        for sequence in sequences:
            sequence.close()
        assert_all_free(engine)


def test_a_long_score_does_not_stall_a_stream(tmp_path):
    with base_engine(tmp_path, max_num_batched_tokens=80, mixing="always") as engine:
        want = engine.score(draw(500))
        passes = Passes(engine)
        params = SamplingParams(max_tokens=40, seed=0, ignore_eos=True)
        with held(engine) as hold:
            request = engine.submit(draw(3), params)
            scoring = in_threads(lambda: engine.score(draw(500)))
            hold.arrived(requests=1, readers=1)
        assert torch.equal(scoring()[0], want) and len(request.result().token_ids) == 40
        with_score = [p for p in passes.segments if any(k == "prefill" and n > 3 for k, n in p)]
        assert len(with_score) >= 7 and sum(("step", 1) in p for p in with_score) >= 6
        assert_all_free(engine)


def test_closing_a_sequence_ends_what_another_thread_reads_into_it(tmp_path):
    with base_engine(tmp_path, max_num_batched_tokens=80) as engine:
        sequence = engine.open(draw(400))
        with held(engine) as hold:
            reading = in_threads(sequence.logits)
            hold.arrived(readers=1)
            assert hold.step(2) == 2
            sequence.close()
            with pytest.raises(RequestCancelled, match="must be open, got one that was closed"):
                reading()
            assert_all_free(engine)
