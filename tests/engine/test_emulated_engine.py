"""The whole engine on a device: the emulated one, whose memory is the CPU's but whose kernels,
workspaces, streams and graphs go through the code that a GPU takes."""

from contextlib import contextmanager

import pytest
import torch

from elastic_infer import Engine, Plan, SamplingParams, demo_model
from elastic_infer.device.shared import Shared
from elastic_infer.engine import loading
from elastic_infer.model.batch import Segment
from elastic_infer.model.model import Model
from elastic_infer.scheduling.reads import Read
from elastic_infer.scheduling.sampler import Sampler
from support.emulated import built, installed, load
from support.engines import (
    assert_all_free,
    base_config,
    base_engine,
    base_widths,
    draw,
    open_engine,
    run_read,
    sized_engine,
)
from support.quantized import write_quantized

emu = load(built())
GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
PROMPT, WIDTHS = draw(12), ("S", "M", "L")
PLANS = {
    "carry": Plan.schedule([(0, "S"), (2, "L")], policy="carry"),
    "exact": Plan.schedule([(0, "S"), (2, "L")], policy="exact"),
    "window": Plan.schedule([(0, "M"), (3, "L")], policy="window(2)"),
}


@contextmanager
def emulated_engine(folder, make=base_engine, **limits):
    with installed(emu), make(folder, device="emulated", **limits) as engine:
        yield engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(scope="module")
def expected(folder):
    """What the CPU generates, by width and by policy; the logits of a score."""
    with base_engine(folder, device="cpu") as engine:
        tokens = {w: engine.generate(PROMPT, GREEDY, width=w).token_ids for w in WIDTHS}
        tokens |= {p: engine.generate(PROMPT, GREEDY, plan=PLANS[p]).token_ids for p in PLANS}
        return tokens | {"score": engine.score(draw(150), width="M")}


@pytest.fixture(scope="module")
def engine(folder, expected):
    """One engine for the tests that leave nothing behind."""
    with emulated_engine(folder) as engine:
        yield engine
        assert_all_free(engine)


def assert_near(logits, like):
    assert logits.device.type == "cpu" and (logits - like).abs().max() <= 1e-4 * like.abs().max()


def test_alone_at_every_width(engine, expected):
    for width in WIDTHS:
        assert engine.generate(PROMPT, GREEDY, width=width).token_ids == expected[width]


def test_mixed_widths_share_passes_and_one_graph(engine, expected):
    """Rows of all widths, in every order, and switches in mid-sequence: no size of pass is captured
    twice."""
    plans = [*(Plan.fixed(w) for w in WIDTHS), PLANS["carry"]]
    for order in (plans, plans[::-1]):
        outputs = engine.generate([PROMPT] * 4, GREEDY, plan=order)
        wanted = [*(expected[w] for w in WIDTHS), expected["carry"]]
        assert [o.token_ids for o in outputs] == (wanted if order is plans else wanted[::-1])
    sizes = engine.core.model._recorded
    assert engine.core.model.captures == len(sizes) and 4 in sizes


def test_launches_that_overlap_change_no_token(engine, expected, monkeypatch):
    monkeypatch.setattr(engine.core.model, "dependent_launch", True)
    monkeypatch.setattr(engine.core.model, "_recorded", {})
    outputs = engine.generate([PROMPT] * 3, GREEDY, width=list(WIDTHS))
    assert [o.token_ids for o in outputs] == [expected[w] for w in WIDTHS]
    assert engine.core.model.captures == len(engine.core.model._recorded) > 0


@pytest.mark.parametrize("policy", PLANS)
def test_switches(engine, expected, policy):
    before = engine.core.model.captures
    output = engine.generate(PROMPT, GREEDY, plan=PLANS[policy])
    assert output.token_ids == expected[policy]
    assert (output.rebuilt_tokens > 0) == (policy != "carry")
    assert engine.core.model.captures == max(before, 1)


def test_logits_come_to_the_host_in_chunks_and_whole(engine, expected):
    """Prefill of several passes and more rows than the head takes at once."""
    assert_near(engine.score(draw(150), width="M"), expected["score"])


def test_padding_rows_change_nothing(engine, expected, monkeypatch):
    """A pass of 3 sequences in a graph of 5 rows."""
    monkeypatch.setattr(Model, "recorded_size", lambda model, steps: 5)
    outputs = engine.generate([PROMPT] * 3, GREEDY, width=list(WIDTHS))
    assert [o.token_ids for o in outputs] == [expected[w] for w in WIDTHS]
    assert list(engine.core.model._recorded)[-1] == 5


def test_steady_steps_draw_in_the_pass_and_copy_once(engine, expected, monkeypatch):
    """After the prompt no draw of its own, one upload a step, and the page table not among it."""
    draws, uploads = [], []
    ids, upload = Sampler._ids, Shared.upload
    monkeypatch.setattr(Sampler, "_ids", lambda *a: draws.append(1) or ids(*a))
    monkeypatch.setattr(Shared, "upload", lambda s, last: uploads.append(last) or upload(s, last))
    assert engine.generate(PROMPT, GREEDY, width="M").token_ids == expected["M"]
    assert len(draws) == 1
    # The prompt's pass writes the page table, unless an earlier test left the same pages in it.
    _, own, *steps = uploads
    assert own == "min_p" and steps == ["logit_mode"] * 3


def test_sizes_of_recorded_passes(engine):
    sizes = [engine.core.model.recorded_size(n) for n in range(1, 17)]
    assert sizes == list(range(1, 17))  # the engine's max_num_seqs is 16
    engine.core.model.max_num_seqs, kept = 100, engine.core.model.max_num_seqs
    try:
        found = {n: engine.core.model.recorded_size(n) for n in range(1, 101)}
    finally:
        engine.core.model.max_num_seqs = kept
    assert all(n <= size <= max(n * 5 / 4, 16) for n, size in found.items())
    assert found[17] == 20 and found[65] == 80 and found[100] == 100
    assert len(set(found.values())) == 16 + 12 + 3


def test_captured_equals_eager(folder, engine):
    """Law 7, bit for bit."""
    tokens, rows = draw(6, seed=5), []

    def logits(engine):
        sequence, model = engine.core.model.cache.open(), engine.core.model
        found = [run_read(model, sequence, Read(tokens[:3], "M", "prefill"))]
        for token in tokens[3:]:
            found.append(run_read(model, sequence, Read([token], "S", "step")))
        model.cache.close(sequence)
        return torch.cat(found)

    rows.append(logits(engine))
    assert engine.core.model.captures
    with emulated_engine(folder, enforce_eager=True) as other:
        rows.append(logits(other))
        assert other.core.model.captures == 0
    assert torch.equal(*rows)


def test_what_needs_logits_on_the_host(folder, engine):
    """Log-probabilities, penalties, processors and drawn tokens beside greedy ones."""

    def last_but_three(token_ids, row, phase):
        assert row.device.type == "cpu"
        row[:127] = -torch.inf

    params = [
        GREEDY,
        SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=2),
        SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, repetition_penalty=1.7),
        SamplingParams(temperature=0.0, max_tokens=3, logits_processors=[last_but_three]),
        SamplingParams(temperature=0.9, top_k=20, top_p=0.9, max_tokens=3, seed=11, n=2),
    ]
    found = engine.generate([PROMPT] * len(params), params)
    with base_engine(folder, device="cpu") as cpu:
        wanted = cpu.generate([PROMPT] * len(params), params)
    for a, b in zip(found, wanted, strict=True):
        assert [c.token_ids for c in a.choices] == [c.token_ids for c in b.choices]
    for a, b in zip(found[1].choices[0].logprobs, wanted[1].choices[0].logprobs, strict=True):
        assert list(a) == list(b)
        assert all(abs(a[t][0] - b[t][0]) < 1e-3 and a[t][1] == b[t][1] for t in a)
    assert all(t >= 127 for t in found[3].choices[0].token_ids)


def test_fork_rollback_save_and_load(engine, tmp_path):
    """A sequence driven by hand continues bit-equal through each of them."""
    with engine.open(PROMPT, width="S") as one:
        one.step(), one.snapshot()
        with one.fork() as twin:
            assert torch.equal(twin.logits(), one.logits())
            ahead = [one.step(width="L").id for _ in range(2)]
            assert [twin.step(width="L").id for _ in range(2)] == ahead
        after = one.logits()
        one.save(tmp_path / "one")
        with engine.load(tmp_path / "one") as other:
            assert torch.equal(other.logits(), after) and other.step().id == one.step().id
        one.rollback(len(PROMPT) + 3)
        assert torch.equal(one.logits(), after)


def test_preempted_sequences_come_back_bit_equal(folder, expected):
    """Two sequences that outgrow their pages: one goes to host memory and returns."""
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    prompts = [draw(60, seed=s) for s in (1, 2)]
    with emulated_engine(folder, sized_engine, pages=8, slots=2, max_num_seqs=2) as roomy:
        wanted = [roomy.generate(p, params, width="S").token_ids for p in prompts]
    with emulated_engine(folder, sized_engine, pages=3, slots=2, max_num_seqs=2) as tight:
        outputs = tight.generate(prompts, params, width="S")
        assert [o.token_ids for o in outputs] == wanted
        assert tight.stats()["preemptions"] >= 1
        assert_all_free(tight)


def test_one_bad_row_ends_alone(engine, expected):
    """NaN in a row's state: it ends with an error, the others and later rows do not notice."""
    model = engine.core.model

    def run():
        good, bad = model.cache.open(), model.cache.open()
        for s in (good, bad):
            run_read(model, s, Read(PROMPT, "S", "prefill"))
        model.cache.ssm[0][bad.slot].fill_(torch.nan)
        first = model.forward([Segment(s, [5], "S") for s in (good, bad)])
        rows = first.of(0).clone(), first.of(1).clone()
        model.cache.close(good), model.cache.close(bad)
        return rows

    good, bad = engine.core.call(run)
    assert good.isfinite().all() and bad.isnan().any()
    assert engine.generate(PROMPT, GREEDY, width="L").token_ids == expected["L"]


@pytest.mark.parametrize("kind", ["nvfp4", "fp8"])
def test_quantized_weights_give_the_logits_of_the_cpu(tmp_path, kind):
    """Codes go to the device and into its own order of tiles; every width reads its prefix."""
    write_quantized(tmp_path, base_config(), base_widths(), {"": kind}, seed=1)
    with open_engine(tmp_path, device="cpu") as cpu:
        wanted = {width: cpu.score(PROMPT, width=width).clone() for width in WIDTHS}
    with installed(emu), open_engine(tmp_path, device="emulated") as engine:
        for width, logits in wanted.items():
            assert_near(engine.score(PROMPT, width=width), logits)


def test_the_budget_counts_the_cache_as_it_is_kept(folder, monkeypatch):
    seen, real = [], loading.cache_budget

    def watched(*arguments, **named):
        seen.append(named["dtypes"])
        return real(*arguments, **named)

    monkeypatch.setattr(loading, "cache_budget", watched)
    with emulated_engine(folder, kv_cache_dtype="fp8", mamba_ssm_cache_dtype="float16") as small:
        assert seen == [small.core.model.cache.dtypes]
        assert seen[0].names == ("fp8", "float16")


def test_the_shipped_reasoner_answers_alike():
    """Text, think tags and a switch between them, at its true sizes."""
    question = "17+5"
    with Engine.from_pretrained(demo_model(), device="cpu", dtype="float32", threads=1) as cpu:
        plan = Plan.think_answer(think="S", answer="L", think_tokens=4, grace=0)
        params = SamplingParams(temperature=0.0, max_tokens=12)
        wanted = cpu.generate(question, params, plan=plan)
    with (
        installed(emu),
        Engine.from_pretrained(
            demo_model(),
            device="emulated",
            dtype="float32",
            kv_cache_memory_bytes=8 << 20,
            max_num_batched_tokens=128,
            max_num_seqs=2,
        ) as engine,
    ):
        found = engine.generate(question, params, plan=plan)
    assert found.text == wanted.text and found.width_runs == wanted.width_runs
    assert len({width for width, _ in found.width_runs}) == 2
