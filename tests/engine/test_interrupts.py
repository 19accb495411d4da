"""Interrupts, signal handlers, callbacks that call back, and faults of a pass: the engine neither
hangs nor loses a place, and what is refused is refused by name."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from elastic_infer import EngineFault, InvalidRequest, RequestCancelled, SamplingParams
from elastic_infer.scheduling.promise import Promise
from support.engines import HANG, assert_all_free, base_engine, draw, held

LONG = SamplingParams(max_tokens=400, ignore_eos=True, seed=1)
SHORT = SamplingParams(max_tokens=3, ignore_eos=True, seed=1)


@pytest.fixture
def engine(tmp_path):
    with base_engine(tmp_path, max_num_seqs=4) as engine:
        yield engine
        assert_all_free(engine)


# -- storms -------------------------------------------------------------------------------------

STORM = """
import pathlib, random, signal, sys, tempfile, threading
sys.path.insert(0, "tests")
from support import engines
from elastic_infer import SamplingParams

seed, wanted = int(sys.argv[1]), int(sys.argv[2])
rng, counted, armed = random.Random(seed), 0, False
params = SamplingParams(max_tokens=4, ignore_eos=True, seed=1)

def stop(*_):
    global armed
    if armed:
        armed = False
        raise KeyboardInterrupt

with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    engine = engines.base_engine(folder / "model", max_num_seqs=12)
    path = folder / "sequence.safetensors"
    with engine.open([5, 6, 7]) as sequence:
        sequence.step()
        sequence.save(path)
    alone = engine.generate([5, 6, 7], params).token_ids

    def by_hand():
        with engine.open([5, 6, 7]) as sequence:
            for _ in range(6):
                sequence.step()
            sequence.snapshot()
            with sequence.fork() as twin:
                twin.step(width="S")
            sequence.rollback(4)
            sequence.save(path)
            sequence.logits()

    def again():
        with engine.load(path) as sequence:
            for _ in range(5):
                try:
                    sequence.step()
                except KeyboardInterrupt:
                    sequence.token_ids  # and on
                    raise

    def requests():
        engine.generate([5, 6, 7], params)
        engine.submit([5, 6], params).cancel()
        list(engine.stream([5, 6], params))
        engine.generate([[5, 6]] * 3, params)
        engine.score([5, 6, 7])

    signal.signal(signal.SIGALRM, stop)
    while counted < wanted:
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.0003, 0.02))
            rng.choice([by_hand, again, requests])()
            armed = False
        except (KeyboardInterrupt, Exception):  # torch makes an error of its own of some
            if armed:
                raise
            counted += 1
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 0)
    engine.core.call(lambda: None)
    for _ in range(len(alone) * 40):  # requests whose handle an interrupt took end by themselves
        if not engine.core.call(lambda: engine.core.scheduler.has_work):
            break
    engines.assert_all_free(engine)
    assert engine.generate([5, 6, 7], params).token_ids == alone
    engine.close()
print("served", counted)
"""


def storm(seed, interrupts):
    done = subprocess.run(
        [sys.executable, "-c", STORM, str(seed), str(interrupts)],
        capture_output=True,
        text=True,
        timeout=HANG + interrupts,
        cwd=Path(__file__).resolve().parents[2],
        check=False,
    )
    assert done.returncode == 0 and "served" in done.stdout, done.stderr[-3000:]


def test_a_short_storm_of_interrupts():
    """Stands for Control-C at any moment of any call: afterwards every slot and page is back, and
    the engine gives the tokens that it gave before."""
    storm(1, 120)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(3))
def test_a_long_storm_of_interrupts(seed):
    storm(seed + 10, 1500)


HANDLER = """
import pathlib, signal, sys, tempfile
sys.path.insert(0, "tests")
from support import engines
from elastic_infer import RequestCancelled, SamplingParams

what, params = sys.argv[1], SamplingParams(max_tokens=2, ignore_eos=True, seed=1)
with tempfile.TemporaryDirectory() as folder:
    for limit in (None, 10**6):
        engine = engines.base_engine(pathlib.Path(folder), max_num_seqs=4, max_waiting=limit)
        alone, seen = engine.generate([5, 6], params).token_ids, []

        def handle(*_):
            if what == "close":
                engine.close()
            seen.append(None if what == "close" else engine.generate([5, 6], params).token_ids)
            signal.setitimer(signal.ITIMER_REAL, 0.003)  # not before: handlers must not pile up

        signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.003)
        try:
            while len(seen) < (1 if what == "close" else 15):
                engine.submit([5, 6], params).cancel()
        except RequestCancelled:
            assert what == "close"
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert all(each in (None, alone) for each in seen) and seen
        engine.close()
print("served")
"""


@pytest.mark.parametrize("what", ["close", "generate"])
def test_a_signal_handler_may_use_the_engine_that_is_being_called(what):
    """Stands for handlers that run in the middle of a call on the same thread: no lock of that call
    is one that they, or the worker, have to wait for."""
    done = subprocess.run(
        [sys.executable, "-c", HANDLER, what],
        capture_output=True,
        text=True,
        timeout=HANG,
        cwd=Path(__file__).resolve().parents[2],
        check=False,
    )
    assert done.returncode == 0 and "served" in done.stdout, done.stderr[-3000:]


def interrupted_when(hold, condition, call):
    """Makes a call on this thread, interrupted when a condition holds between two passes."""

    def stop(*_):
        raise KeyboardInterrupt

    before, caller = signal.signal(signal.SIGUSR1, stop), threading.get_ident()

    def interrupt():
        hold.until(condition)
        signal.pthread_kill(caller, signal.SIGUSR1)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            call()
    finally:
        thread.join(HANG)
        signal.signal(signal.SIGUSR1, before)


def test_what_is_interrupted_while_it_waits_for_room_keeps_nothing(engine, tmp_path):
    """Stands for all calls that wait for a place: it comes free for others, not for them."""
    path = tmp_path / "sequence.safetensors"
    with engine.open(draw(5)) as sequence, held(engine) as hold:
        sequence.save(path)
        request = engine.submit(draw(5), LONG)
        assert hold.step() == 1
        spare = engine.core.call(lambda: engine.core.scheduler.spare_slots)
        others = [engine.open(draw(3)) for _ in range(spare)]
        for call in (
            lambda: engine.open(draw(3)),
            lambda: engine.load(path),
            sequence.fork,
            sequence.snapshot,
            lambda: engine.score(draw(3)),
        ):
            interrupted_when(hold, lambda: engine.core.worker._blocked, call)
        request.cancel()
        engine.core.call(lambda: None)
        assert engine.stats()["slots_used"] == 1 + spare
        for other in others:
            other.close()


def test_a_read_that_is_interrupted_goes_on_in_the_next_call(engine):
    """Stands for interrupts in the passes of a call: the tokens are those of an undisturbed one."""
    scheduler = engine.core.scheduler
    with engine.open(draw(300)) as alone, engine.open(draw(300)) as sequence:
        wanted = [alone.step().id for _ in range(3)]
        with held(engine) as hold:
            for call in (sequence.logits, sequence.step, lambda: sequence.switch("L")):
                interrupted_when(hold, lambda: scheduler.readers, call)
                hold.step()
            engine.core.call(lambda: None)
            assert not scheduler.readers, "it is not read for nobody"
        assert [sequence.step().id for _ in range(3)] == wanted
        with held(engine) as hold:
            interrupted_when(hold, lambda: scheduler.readers, lambda: engine.score(draw(200)))


# -- callbacks ----------------------------------------------------------------------------------


def test_a_callback_that_would_wait_for_its_own_engine_is_refused(engine):
    """Stands for every way to wait on the worker's own thread, and for what a refusal leaves."""
    other = engine.submit(draw(5), LONG)
    sequence = engine.open(draw(5))
    sequence.step()
    for call in (
        lambda: list(other),
        other.result,
        other.wait,
        sequence.step,
        sequence.close,
        sequence.fork,
        lambda: engine.open(draw(3)),
        lambda: engine.score(draw(3)),
        lambda: list(engine.stream(draw(3))),
        lambda: engine.generate(draw(3)),
    ):

        def inside(token_ids, row, phase, call=call):
            call()

        with pytest.raises(InvalidRequest, match="must not"):
            engine.generate(draw(5), SamplingParams(max_tokens=2, logits_processors=[inside]))
        assert not sequence.closed
    assert sequence.step().id >= 0, "a refused call has changed nothing"
    other.cancel()
    sequence.close()


# -- faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError])
@pytest.mark.parametrize("where", ["step", "drop_cancelled", "_admit", "_form", "_land"])
def test_a_fault_that_belongs_to_no_row_does_not_close_the_engine(engine, kind, where, monkeypatch):
    """Stands for everything that can leave a pass: what is in the cache, or waits for an empty
    one, ends by name, and the next request is served."""
    with held(engine):
        requests = [engine.submit(draw(5, i), SHORT) for i in range(3)]

        def broken(*_):
            monkeypatch.undo()
            raise kind("broken")

        engine.core.call(lambda: monkeypatch.setattr(engine.core.scheduler, where, broken))
        if where == "drop_cancelled":
            engine.core.call(lambda: None)
    for request in requests:
        output = request.wait(HANG)
        assert output.finish_reason == "error" and isinstance(request.error, EngineFault)
        assert f"a pass failed ({kind.__name__}: broken)" in str(request.error)
        assert isinstance(request.error.__cause__, kind)
    assert not engine.closed and len(engine.generate(draw(5), SHORT).token_ids) == 3


def test_an_engine_whose_thread_cannot_start_says_so_and_nothing_is_half_open(engine, monkeypatch):
    """Stands for limits of threads (ulimit -u, containers): by either of the two that start."""

    def refused(*_):
        raise RuntimeError("can't start new thread")

    for target in (
        "elastic_infer.engine.worker._thread.start_new_thread",
        "elastic_infer.engine.worker.threading.Thread.start",
    ):
        monkeypatch.setattr(target, refused)
        for call in (lambda: engine.open(draw(3)), lambda: engine.submit(draw(3), SHORT)):
            with pytest.raises(EngineFault, match=r"its thread must start, got .can't start new"):
                call()
        monkeypatch.undo()
        assert engine.stats()["waiting"] == engine.stats()["slots_used"] == 0
    assert len(engine.generate(draw(5), SHORT).token_ids) == 3


def test_calls_that_race_with_the_end_are_told(engine):
    """Stands for callers that hand over after the worker has taken its last look."""
    engine.generate(draw(3), SHORT)
    worker, start = engine.core.worker, engine.core.worker._start
    worker._start = lambda: (start(), engine.close())
    with pytest.raises(RequestCancelled, match="closed before the call ended"):
        worker.call(lambda: None)
    worker._start = lambda: None
    with pytest.raises(RequestCancelled, match="the engine was closed before"):
        engine.submit(draw(3), SHORT).result(HANG)
    del worker._start
    engine.core.call = lambda job: job()  # for the look at what is free


# -- promises -----------------------------------------------------------------------------------


def test_a_promise_is_kept_for_every_waiter_once():
    """Its value goes to the first that takes it and is not kept; one that is abandoned is not
    kept either, whenever the value comes."""
    promise = Promise()
    assert not promise.wait(0) and not promise.wait(-1) and promise._alarms == []
    waiting = [threading.Thread(target=promise.wait) for _ in range(3)]
    [t.start() for t in waiting]
    promise.set("value")
    [t.join(HANG) for t in waiting]
    assert not any(t.is_alive() for t in waiting) and promise.wait(1e300)
    assert promise.result() == "value" and promise.result() is None
    for order in (("abandon", "set"), ("set", "abandon")):
        left = Promise()
        for step in order:
            getattr(left, step)()
        assert left._value is None and left.done and left.abandoned
