"""Random sequences of everything a caller can do: nothing leaks, nothing is lost, every cache is
bit-equal to the replay of what it recorded, nothing deadlocks."""

from __future__ import annotations

import gc
import random
import tempfile
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from elastic_infer import OutOfCapacity, Plan, RequestCancelled, SamplingParams, WidthError
from elastic_infer.scheduling.reads import replay_reads
from support.engines import HANG, assert_all_free, draw, in_threads, run_read, sized_engine

WIDTHS = st.sampled_from(["S", "M", "L"])
POLICIES = st.sampled_from(["carry", "exact", "window(3)", "window(20)"])


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with sized_engine(tmp_path_factory.mktemp("model"), pages=14, slots=8, max_num_seqs=3) as made:
        yield made
        assert_all_free(made)


class Sequences(RuleBasedStateMachine):
    """Sequences driven by hand, beside requests that come, go and are cancelled."""

    engine = None  # set by the test

    @initialize()
    def begin(self):
        self.open_ones, self.requests, self.cancelled = [], [], []
        self.numbers = random.Random(0)
        self.folder = tempfile.TemporaryDirectory()

    def pick(self, at):
        assume(self.open_ones)
        return self.open_ones[at % len(self.open_ones)]

    def guarded(self, sequence, action):
        """Runs an action that may find no room; then the tokens must still be there."""
        before = list(sequence.token_ids)
        try:
            return action()
        except OutOfCapacity:
            assert sequence.token_ids[: len(before)] == before, "tokens were lost"
            return None

    @precondition(lambda self: len(self.open_ones) < 6)
    @rule(length=st.integers(1, 150), width=WIDTHS, track=st.booleans())
    def open(self, length, width, track):
        try:
            sequence = self.engine.open(draw(length, length), width=width, track=track)
        except OutOfCapacity:
            return
        self.open_ones.append(sequence)

    @rule(at=st.integers(0, 9), count=st.integers(1, 4), width=WIDTHS)
    def step(self, at, count, width):
        sequence = self.pick(at)

        def action():
            for _ in range(count):
                token = sequence.step()
                assert token.width == sequence.width
                assert sequence.token_ids[-1] == token.id

        self.guarded(sequence, action)

    @rule(at=st.integers(0, 9), count=st.integers(1, 70))
    def append(self, at, count):
        sequence = self.pick(at)
        if len(sequence.token_ids) + count <= self.engine.max_model_len:
            tokens = draw(count, count)
            sequence.append(tokens)
            assert sequence.token_ids[-count:] == tokens

    @rule(at=st.integers(0, 9), width=WIDTHS, policy=POLICIES)
    def switch(self, at, width, policy):
        sequence = self.pick(at)
        before = list(sequence.token_ids), sequence.width

        def action():
            again = sequence.switch(width, policy)
            assert 0 <= again <= len(before[0]) and sequence.width == width

        try:
            self.guarded(sequence, action)
        except WidthError:
            assert policy == "carry" and sequence.width == before[1]
        assert sequence.token_ids == before[0]

    @rule(at=st.integers(0, 9), part=st.floats(0.01, 1.0))
    def rollback(self, at, part):
        sequence = self.pick(at)
        tokens = list(sequence.token_ids)
        length = max(1, int(part * len(tokens)))
        try:
            sequence.rollback(length)
        except OutOfCapacity:
            assert sequence.token_ids in (tokens, tokens[:length])
        else:
            assert sequence.token_ids == tokens[:length]

    @precondition(lambda self: len(self.open_ones) < 6)
    @rule(at=st.integers(0, 9))
    def fork(self, at):
        sequence = self.pick(at)
        twin = self.guarded(sequence, sequence.fork)
        if twin is not None:
            assert twin.token_ids == sequence.token_ids and twin.runs == sequence.runs
            self.open_ones.append(twin)

    @rule(at=st.integers(0, 9))
    def snapshot(self, at):
        sequence = self.pick(at)
        self.guarded(sequence, sequence.snapshot)

    @rule(at=st.integers(0, 9))
    def save_and_load(self, at):
        sequence = self.pick(at)
        path = Path(self.folder.name) / "sequence.safetensors"

        def action():
            sequence.save(path)
            loaded = self.engine.load(path)
            assert loaded.token_ids == sequence.token_ids and loaded.width == sequence.width
            self.open_ones.append(loaded)

        self.guarded(sequence, action)

    @rule(at=st.integers(0, 9))
    def close(self, at):
        sequence = self.pick(at)
        self.open_ones.remove(sequence)
        sequence.close()
        with pytest.raises(RequestCancelled, match="one that was closed"):
            sequence.step()

    @rule(at=st.integers(0, 9))
    def drop(self, at):
        self.open_ones.remove(self.pick(at))
        gc.collect()  # a failed call's traceback may still have held it

    @precondition(lambda self: len(self.requests) < 4)
    @rule(
        length=st.integers(1, 130), count=st.integers(1, 40), n=st.integers(1, 2), policy=POLICIES
    )
    def submit(self, length, count, n, policy):
        params = SamplingParams(max_tokens=count, n=n, seed=length, ignore_eos=True)
        plan = Plan.schedule([(0, "S"), (3, "L"), (9, "M")], policy=policy)
        self.requests.append(self.engine.submit(draw(length, length), params, plan))

    @precondition(lambda self: self.requests)
    @rule()
    def cancel(self):
        request = self.requests.pop()
        request.cancel()
        self.cancelled.append(request)

    @invariant()
    def references_are_those_of_the_holders(self):
        """Counted between two passes, on the engine's own thread."""
        if not hasattr(self, "open_ones"):
            return
        cache, scheduler = self.engine.core.model.cache, self.engine.core.scheduler

        def check():
            sequences = [s._sequence for s in self.open_ones]
            sequences += [b.sequence for b in scheduler.running if b.sequence is not None]
            for pool, held in (
                (cache.pages, lambda s: s.pages + [p for x in s.snapshots for p in x.pages]),
                (
                    cache.slots,
                    lambda s: [i for i in [s.slot] if i >= 0] + [x.slot for x in s.snapshots],
                ),
            ):
                expected = [0] * pool.size
                for sequence in sequences:
                    for i in held(sequence):
                        expected[i] += 1
                assert pool._references == expected, pool.name
                assert pool.free == expected.count(0)

        self.engine.core.call(check)

    def replayed(self, sequence):
        """Logits of a new sequence that makes the recorded reads, or None without room."""
        model, cache = self.engine.core.model, self.engine.core.model.cache

        def job():
            fresh = cache.open(track=sequence._sequence.track)
            try:
                row = None
                for read in replay_reads(sequence._sequence, 0, sequence._sequence.length):
                    row = run_read(model, fresh, read)[-1]
                return row
            finally:
                cache.close(fresh)

        return self.engine.core.call(job, wait_for_room=True)

    def teardown(self):
        """Every other request runs to its end beside the last look at the sequences."""
        if not hasattr(self, "open_ones"):
            return
        for request in self.requests[1::2]:
            request.cancel()
        while self.open_ones:
            sequence = self.open_ones.pop()
            try:
                row = sequence.logits()
                expected = self.replayed(sequence)
            except OutOfCapacity:
                pass
            else:
                assert torch.equal(row, expected), sequence.runs
            sequence.close()
        for request in self.requests + self.cancelled:
            request.wait(HANG)
        for request in self.requests[::2]:
            reasons = {choice.finish_reason for choice in request.output().choices}
            assert reasons == {"length"} or isinstance(request.error, OutOfCapacity)
        self.folder.cleanup()
        assert_all_free(self.engine)


def run_sequences(engine, examples, steps):
    from hypothesis.stateful import run_state_machine_as_test

    machine = type("Bound", (Sequences,), {"engine": engine})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_random_sequences(engine):
    run_sequences(engine, 12, 20)


@pytest.mark.slow
def test_many_random_sequences(engine):
    run_sequences(engine, 80, 30)


def test_sixteen_threads_submit_and_cancel_at_random(engine):
    """No leak, no deadlock, no wrong answer."""
    params = SamplingParams(max_tokens=25, seed=4, ignore_eos=True)
    plan = Plan.schedule([(0, "S"), (6, "L")], policy="window(4)")
    expected = {
        i: engine.generate(draw(10 * i + 5, i), params, plan=plan).token_ids for i in range(8)
    }

    def work(number):
        rng = random.Random(number)
        for _ in range(16):
            i = rng.randrange(8)
            kind = rng.randrange(5)
            if kind == 0:
                request = engine.submit(draw(10 * i + 5, i), params, plan)
                list(islice(request, rng.randrange(3)))
                request.cancel()
                got = request.result(HANG).token_ids
                assert got == expected[i][: len(got)]
            elif kind == 1:
                stream = engine.stream(draw(10 * i + 5, i), params, plan=plan)
                for token, want in zip(stream, expected[i][: rng.randrange(1, 25)]):
                    assert token.id == want
                stream.close()
            elif kind == 2:
                try:
                    with engine.open(draw(20, i), width="S") as sequence:
                        sequence.step(), sequence.step(width="L")
                        with sequence.fork() as twin:
                            assert twin.step().id == sequence.step().id
                except OutOfCapacity:
                    pass
            else:
                got = engine.generate(draw(10 * i + 5, i), params, plan=plan)
                assert got.token_ids == expected[i]

    in_threads(*(partial(work, number) for number in range(16)))()
    assert_all_free(engine)
