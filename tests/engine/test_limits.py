"""Limits: what waits, what is refused with numbers, what is moved out, and how all of it ends."""

from __future__ import annotations

import os
import threading

import pytest

from elastic_infer import (
    EngineFault,
    EngineFull,
    InvalidRequest,
    OutOfCapacity,
    Plan,
    RequestCancelled,
    SamplingParams,
)
from elastic_infer.cache.dtypes import CacheDtypes
from elastic_infer.cache.pages import PAGE
from elastic_infer.checkpoint.config import ModelConfig
from elastic_infer.checkpoint.counts import kv_bytes_per_token
from elastic_infer.checkpoint.widths import full_width
from elastic_infer.sizing.capacity import plan_capacity, slot_bytes
from support.engines import (
    HANG,
    assert_all_free,
    base_engine,
    draw,
    held,
    in_threads,
    open_engine,
    script,
    sized_engine,
    text_engine,
    write_text_model,
)


def free(count, **values):
    """Parameters that sample `count` tokens."""
    return SamplingParams(max_tokens=count, ignore_eos=True, **{"seed": 3, **values})


class Gate:
    """A logits processor that stops the engine's thread until it is opened."""

    def __init__(self, at=1):
        self.reached, self.opened, self.at = threading.Event(), threading.Event(), at

    def __call__(self, token_ids, row, phase):
        if len(token_ids) == self.at:
            self.reached.set()
            assert self.opened.wait(HANG)


@pytest.fixture
def engine(tmp_path):
    with base_engine(tmp_path, max_num_seqs=2, max_num_batched_tokens=128) as engine:
        yield engine
        assert_all_free(engine)


def memory(slots, pages):
    """Bytes of a cache of the fixed model in float32."""
    from support.engines import base_config

    config = ModelConfig.from_dict(base_config())
    import torch

    full = full_width(config)
    return slots * slot_bytes(
        config, full, CacheDtypes.of(torch.float32)
    ) + pages * PAGE * kv_bytes_per_token(config, 4)


# -- waiting ----------------------------------------------------------------------------------


def test_requests_wait_when_full(engine):
    alone = [engine.generate(draw(9, i), free(10)).token_ids for i in range(7)]
    requests = [engine.submit(draw(9, i), free(10)) for i in range(7)]
    assert [r.result().token_ids for r in requests] == alone
    assert max(r.output().times.queued_s for r in requests) > 0


def test_at_most_max_waiting_wait(tmp_path):
    with base_engine(tmp_path, max_num_seqs=2, max_waiting=2) as engine:
        gate = Gate()
        first = engine.submit(draw(5), free(3, logits_processors=[gate]))
        assert gate.reached.wait(HANG)
        others = [engine.submit(draw(5), free(3)) for _ in range(3)]  # one runs, two wait
        with pytest.raises(EngineFull, match="at most max_waiting = 2 requests may wait"):
            engine.submit(draw(5), free(3))
        with pytest.raises(EngineFull):
            engine.generate([draw(5)] * 2, free(3))
        gate.opened.set()
        assert all(len(r.result().token_ids) == 3 for r in [first, *others])
        assert len(engine.generate([draw(5)] * 4, free(3))) == 4
        with pytest.raises(EngineFull):
            engine.generate([draw(5)] * 5, free(3))
        assert_all_free(engine)


def test_sequences_take_places_and_requests_wait_for_them(engine):
    slots = engine.capacity.num_slots
    held = [engine.open(draw(3, i)) for i in range(slots)]
    with pytest.raises(OutOfCapacity, match=rf"needed 1, free 0 of {slots}"):
        engine.open(draw(3))
    with pytest.raises(OutOfCapacity, match="state slots must be free"):
        held[0].fork()
    with pytest.raises(OutOfCapacity):
        held[0].snapshot()
    request = engine.submit(draw(5), free(4))
    with pytest.raises(TimeoutError):
        request.result(timeout=0)
    with pytest.raises(OutOfCapacity, match="needed 1, free 0"):
        engine.open(draw(3))  # a request that waits gives nothing back either
    assert engine.stats()["waiting"] == 1 and not request.done
    assert held[0].step().id >= 0, "sequences go on meanwhile"
    held.pop().close()
    assert len(request.result(timeout=HANG).token_ids) == 4
    for sequence in held:
        sequence.close()


def test_sequences_never_take_what_requests_were_promised(tmp_path):
    """With a request that may still fork and take snapshots, `open` gets only the rest."""
    with base_engine(tmp_path, max_num_seqs=3) as engine:
        plan = Plan.schedule([(0, "S"), (4, "L")], policy="window(2)")
        with held(engine) as hold:
            request = engine.submit(draw(5), free(8, n=3), plan)
            assert hold.step() == 1
            spare = engine.core.call(lambda: engine.core.scheduler.spare_slots)
            assert spare == engine.capacity.num_slots - 3 * 3 < engine.core.model.cache.slots.free
            opened = [engine.open(draw(2)) for _ in range(spare)]
            opening = in_threads(lambda: engine.open(draw(2)))
            hold.until(lambda: engine.core.worker._blocked)
        assert [c.finish_reason for c in request.result().choices] == ["length"] * 3
        for sequence in opened + opening():  # the last one had to wait for the request's end
            sequence.close()
        assert_all_free(engine)


# -- refused with numbers ---------------------------------------------------------------------


def test_what_can_never_fit_is_refused(engine):
    with pytest.raises(InvalidRequest, match="max_model_len 512, got 512 tokens"):
        engine.generate(draw(512), free(1))
    assert engine.score(draw(512)).shape[0] == 512
    with pytest.raises(InvalidRequest, match="max_model_len 512, got 513 tokens"):
        engine.score(draw(513))
    with pytest.raises(OutOfCapacity, match="n must be at most max_num_seqs 2, got 3"):
        engine.generate(draw(5), SamplingParams(n=3))
    with engine.open(draw(511)) as sequence:
        sequence.step()
        with pytest.raises(InvalidRequest, match="within max_model_len 512, got 512 \\+ 1"):
            sequence.step()
        with pytest.raises(InvalidRequest, match="got 512 \\+ 2"):
            sequence.append([5, 6])


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_model_len": 0}, r"max_model_len must be an int in \[2, 512\], got 0"),
        ({"max_model_len": 513}, r"max_model_len must be an int in \[2, 512\], got 513"),
        ({"max_num_seqs": 0}, r"max_num_seqs must be an int in \[1, 1024\], got 0"),
        ({"max_num_seqs": 2.5}, r"max_num_seqs must be an int .* got 2.5"),
        ({"max_num_batched_tokens": 70}, r"max_num_batched_tokens must be .* \[80, .* got 70"),
        ({"kv_cache_memory_bytes": -1}, r"kv_cache_memory_bytes must be .* got -1"),
        ({"threads": 0}, r"threads must be an int in \[1, 1024\], got 0"),
        ({"max_waiting": -1}, r"max_waiting must be None or an int >= 0, got -1"),
        ({"mixing": "perhaps"}, "mixing must be auto, always or never, got 'perhaps'"),
        ({"dtype": "int8"}, "dtype must be auto, float32 or bfloat16, got 'int8'"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ({"device": 0}, "device must be auto, cpu, cuda or cuda:N, got 0"),
        ({"isa": "sse9"}, "engine: .*isa.*sse9"),
        ({"gpu_memory_utilization": 0}, r"must be a number in \(0, 1\], got 0"),
    ],
    ids=str,
)
def test_limits_out_of_range_are_named(tmp_path, limits, message):
    write_text_model(tmp_path)
    with pytest.raises(InvalidRequest, match=message):
        open_engine(tmp_path, **limits)


def test_too_little_memory_is_refused_with_the_numbers(tmp_path):
    with pytest.raises(OutOfCapacity, match=r"must hold one sequence of 512 tokens: .* got 1000"):
        base_engine(tmp_path, kv_cache_memory_bytes=1000)
    with pytest.raises(OutOfCapacity, match=r"max_num_seqs 16 sequences .* which holds \d+"):
        base_engine(tmp_path, kv_cache_memory_bytes=memory(10, 8))


def test_without_max_model_len_the_context_is_what_fits(tmp_path):
    with base_engine(
        tmp_path, max_model_len=None, max_num_seqs=1, kv_cache_memory_bytes=memory(1, 3)
    ) as engine:
        assert engine.max_model_len == 3 * PAGE
        out = engine.generate(draw(150), SamplingParams(temperature=0, ignore_eos=True))
        assert len(out.token_ids) == 3 * PAGE - 150 and out.finish_reason == "length"


def test_capacity_of_every_budget_holds_a_whole_sequence():
    from support.engines import base_config

    config = ModelConfig.from_dict(base_config())
    import torch

    for budget in range(memory(1, 8), memory(80, 100), 40_000):
        c = plan_capacity(
            config,
            full_width(config),
            CacheDtypes.of(torch.float32),
            max_model_len=512,
            max_num_seqs=None,
            max_num_batched_tokens=256,
            kv_cache_memory_bytes=budget,
        )
        assert c.num_pages >= 8 and c.num_slots >= c.max_num_seqs >= 1
        assert memory(c.num_slots, c.num_pages) <= budget


# -- preemption -------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "n"), [("carry", 1), ("carry", 2), ("window(16)", 2)])
def test_preempted_requests_go_on_bit_equal(tmp_path, policy, n):
    """Choices share the pages of their prompt until they write; each can be moved out alone."""
    plan = Plan.schedule([(0, "S"), (90, "L")], policy=policy)
    params = free(150, logprobs=0, n=n)
    with base_engine(tmp_path / "roomy", max_num_seqs=4) as engine:
        expected = engine.generate([draw(60, i) for i in range(4)], params, plan=plan)
        assert engine.stats()["preemptions"] == 0
    with sized_engine(tmp_path / "tight", pages=9, slots=12, max_num_seqs=4) as engine:
        got = engine.generate([draw(60, i) for i in range(4)], params, plan=plan)
        assert engine.stats()["preemptions"] > 0
        assert sum(o.preemptions for o in got) == engine.stats()["preemptions"]
        for a, b in zip(got, expected):
            assert a.choices == b.choices
        assert_all_free(engine)


def test_a_lone_request_that_sequences_starve_fails_with_the_numbers(tmp_path):
    with sized_engine(tmp_path, pages=9, slots=6, max_num_seqs=2) as engine:
        with engine.open(draw(64 * 6)) as sequence:
            sequence.logits()
            with pytest.raises(OutOfCapacity, match="free 0 of 9; close open sequences"):
                engine.generate(draw(60), free(200))
            assert len(engine.generate(draw(60), free(100)).token_ids) == 100
        assert len(engine.generate(draw(60), free(200)).token_ids) == 200
        assert_all_free(engine)


def test_a_sequence_waits_for_pages_of_running_requests(tmp_path):
    with sized_engine(tmp_path, pages=9, slots=6, max_num_seqs=2) as engine:
        with engine.open(draw(200)) as sequence, held(engine) as hold:
            request = engine.submit(draw(300), free(120))
            while len(request.output().token_ids) < 100:
                assert hold.step() == 1
            reading = in_threads(sequence.logits)
            hold.arrived(readers=1)  # 7 of 9 pages are the request's until it ends
            while not request.done:
                assert hold.step() == 1 and sequence._queue
            hold.release()
            (row,) = reading()
            with engine.open(draw(200)) as fresh:
                assert (row == fresh.logits()).all()
        assert_all_free(engine)


def test_a_sequence_that_nobody_can_make_room_for_is_told(tmp_path):
    with sized_engine(tmp_path, pages=9, slots=6, max_num_seqs=2) as engine:
        with engine.open(draw(64 * 7)) as first, engine.open(draw(200)) as second:
            first.logits()
            with pytest.raises(OutOfCapacity, match="continue at 128 tokens, free 0 of 9"):
                second.logits()
            assert second.token_ids == draw(200), "nothing is lost"
            first.close()
            with engine.open(draw(200)) as fresh:
                assert (second.logits() == fresh.logits()).all()
        assert_all_free(engine)


# -- cancelling and closing -------------------------------------------------------------------


def test_cancel_during_prefill(tmp_path):
    """A long prompt is read in passes; cancel takes effect before the next one."""
    with base_engine(tmp_path, max_num_seqs=2, max_num_batched_tokens=66) as engine:
        passes, forward = [], engine.core.model.forward

        def slow(segments):
            passes.append(len(segments))
            request.cancel()
            return forward(segments)

        engine.core.model.forward = slow
        with held(engine):
            request = engine.submit(draw(400), free(5))
        out = request.result()
        assert out.finish_reason == "cancelled" and out.token_ids == [] and len(passes) == 1
        assert list(request) == []
        engine.core.model.forward = forward
        assert_all_free(engine)


def test_cancel_while_waiting_and_while_generating(engine):
    gate = Gate(at=2)
    running = engine.submit(draw(5), free(50, logits_processors=[gate]))
    assert gate.reached.wait(HANG)
    more = [engine.submit(draw(5), free(5)) for _ in range(3)]
    more[2].cancel()
    running.cancel()
    gate.opened.set()
    out = running.result()
    assert out.finish_reason == "cancelled" and len(out.token_ids) == 3
    assert more[2].result().finish_reason == "cancelled" and more[2].output().token_ids == []
    assert [len(r.result().token_ids) for r in more[:2]] == [5, 5]
    running.cancel()  # too late, and harmless
    assert running.result().finish_reason == "cancelled"


@pytest.mark.parametrize("many", [False, True])
def test_an_interrupted_caller_cancels(engine, monkeypatch, many):
    """Control-C while waiting: the requests do not go on for nobody."""
    gate, submitted = Gate(at=1), []
    submit = engine.core.worker.submit

    def interrupted(self, timeout=None):
        assert gate.reached.wait(HANG)
        raise KeyboardInterrupt

    def remember(requests):
        submitted.extend(requests)
        submit(requests)

    monkeypatch.setattr("elastic_infer.scheduling.request.Request.wait", interrupted)
    monkeypatch.setattr(engine.core.worker, "submit", remember)
    prompt = [draw(5), draw(6)] if many else draw(5)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompt, free(400, logits_processors=[gate]))
    monkeypatch.undo()
    gate.opened.set()
    assert {r.wait(HANG).finish_reason for r in submitted} == {"cancelled"}


def test_close_while_running(tmp_path):
    engine = base_engine(tmp_path, max_num_seqs=2)
    with held(engine) as hold:
        running = engine.submit(draw(5), free(50))
        assert hold.step(3) == 3
        waiting = [engine.submit(draw(5), free(5)) for _ in range(4)]
        generating = in_threads(lambda: engine.generate([draw(4), draw(4)], free(400)))
        hold.arrived(requests=6)
        engine.close()
    for request in [running, *waiting]:
        with pytest.raises(RequestCancelled, match="the engine was closed before"):
            request.result(HANG)
    assert len(running.output().token_ids) == 3, "what was generated can still be read"
    (outputs,) = generating()
    assert {o.finish_reason for o in outputs} == {"error"}
    cache = engine.core.model.cache
    assert cache.pages.used == cache.slots.used == 0


def test_use_in_a_forked_process_is_refused(tmp_path):
    with text_engine(tmp_path) as engine:
        out = engine.generate("x", free(4))
        sequence = engine.open("abc")
        read, write = os.pipe()
        child = os.fork()
        if child == 0:  # in the copy: no thread of the engine lives here
            try:
                said = []
                for call in (
                    lambda: engine.generate("x", free(4)),
                    lambda: engine.open("x"),
                    lambda: engine.score("x"),
                    sequence.logits,
                ):
                    try:
                        call()
                        said.append("no error")
                    except RequestCancelled as error:
                        said.append(str(error))
                sequence.close()
                engine.close()
                os.write(write, "\n".join(said).encode())
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            lines = pipe.read().splitlines()
        assert os.waitpid(child, 0)[1] == 0
        assert len(lines) == 4
        assert all("must be used in the process that opened it" in line for line in lines)
        assert engine.generate("x", free(4)).token_ids == out.token_ids, "the parent goes on"
        sequence.close()


# -- dropped and failed -----------------------------------------------------------------------


def test_a_dropped_sequence_gives_its_place_back(engine):
    sequence = engine.open(draw(100))
    sequence.logits()
    assert engine.stats()["pages_used"] == 2
    del sequence
    assert_all_free(engine)


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_pass_that_fails_leaks_nothing(engine, after):
    """The native code failing in any pass ends what runs, not what waits."""
    forward, count = engine.core.model.forward, [0]

    def failing(segments):
        count[0] += 1
        if count[0] == after + 1:
            raise RuntimeError("broken pass")
        return forward(segments)

    with held(engine):
        requests = [engine.submit(draw(70, i), free(8)) for i in range(4)]
        engine.core.model.forward = failing
    outs = [r.wait() for r in requests]
    engine.core.model.forward = forward
    assert [o.finish_reason for o in outs].count("error") in (1, 2)
    assert [o.finish_reason for o in outs[2:]] == ["length", "length"]
    with pytest.raises(EngineFault, match=r"a pass failed .RuntimeError: broken pass."):
        requests[0].result()
    assert_all_free(engine)
    assert len(engine.generate(draw(5), free(4)).token_ids) == 4


def test_a_failed_pass_ends_a_sequence_for_good(engine):
    """Its state may be half updated, so it is never silently read on."""
    forward = engine.core.model.forward
    with engine.open(draw(5)) as sequence:
        sequence.logits()

        def failing(segments):
            forward(segments)
            raise RuntimeError("broken pass")

        engine.core.model.forward = failing
        sequence.append([7])
        with pytest.raises(EngineFault, match="broken pass"):
            sequence.logits()
        engine.core.model.forward = forward
        with pytest.raises(RequestCancelled, match=r"while it was read .*broken pass"):
            sequence.logits()
    assert_all_free(engine)


def test_script_helper_says_its_tokens(tmp_path):
    with text_engine(tmp_path) as engine:
        said = engine.generate("x", SamplingParams(logits_processors=[script("hey")]))
        assert said.text == "hey"
