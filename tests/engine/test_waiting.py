"""Waits of callers: their time limits, signals that nothing wakes a wait for, and interrupts
between the two halves of a call."""

from __future__ import annotations

import math
import signal
import threading

import pytest

from elastic_infer import InvalidRequest, OutOfCapacity, SamplingParams
from elastic_infer.engine import engine as engine_module
from support.engines import HANG, assert_all_free, base_engine, draw, held, text_engine

SHORT = SamplingParams(max_tokens=3, ignore_eos=True, seed=1)


@pytest.fixture
def engine(tmp_path):
    with base_engine(tmp_path, max_num_seqs=4) as engine:
        yield engine
        assert_all_free(engine)


@pytest.mark.parametrize("call", ["result", "wait"])
def test_any_timeout_is_kept_or_refused_by_name(engine, call):
    """Stands for every value that a caller may give as a time limit."""
    with held(engine):
        request = engine.submit(draw(5), SHORT)
        wait = getattr(request, call)
        for timeout in ("x", math.nan, [1], 1j, 10**400, True, b"1", -math.inf):
            with pytest.raises(InvalidRequest, match="timeout must be None or a number of seconds"):
                wait(timeout)
        for timeout in (0, -1, -1e300, 0.0, 1e-9):
            with pytest.raises(TimeoutError, match="no result after"):
                wait(timeout)
    for timeout in (None, math.inf, 1e308, HANG):
        assert len(wait(timeout).token_ids) == 3
    assert len(wait(-1).token_ids) == 3, "what is there needs no wait"


WAITS = {
    "iterate": lambda engine, request: list(request),
    "stream": lambda engine, request: next(engine.stream(draw(4), SHORT)),
    "result": lambda engine, request: request.result(),
    "generate": lambda engine, request: engine.generate(draw(4), SHORT),
    "score": lambda engine, request: engine.score(draw(4)),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_signal_that_wakes_no_wait_is_seen(engine, name):
    """Stands for signals that come just before a wait blocks, or on another thread: Python notes
    them and nothing wakes the thread that is to handle them."""
    seen = threading.Event()

    def handle(*_):
        seen.set()
        raise KeyboardInterrupt

    with held(engine) as hold:
        request = engine.submit(draw(5), SHORT)

        def interrupt():
            hold.until(lambda: True)
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
            if not seen.wait(HANG):
                hold.release()

        before = signal.signal(signal.SIGUSR1, handle)
        thread = threading.Thread(target=interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                thread.start()
                WAITS[name](engine, request)
        finally:
            thread.join(HANG)
            signal.signal(signal.SIGUSR1, before)
    assert len(request.wait(HANG).token_ids) == 3


def test_an_interrupted_rollback_leaves_tokens_and_text_of_one_length(tmp_path, monkeypatch):
    """Stands for Control-C right before and right after the worker went back: the text of later
    steps is that of the tokens there are."""

    def saying(text):
        return SamplingParams(logits_processors=[lambda ids, row, phase: one(row, text[len(ids)])])

    def one(row, token):
        row[:] = -math.inf
        row[token] = 0.0

    with text_engine(tmp_path) as engine:
        call = engine.core.call
        for before in (True, False):
            with engine.open("x") as sequence:
                said = b"xa\xe2\x82\xacb"  # "b" is not said
                for _ in range(3):
                    sequence.step(params=saying(said))  # two of three bytes of a character

                def interrupted(job, *given, before=before):
                    monkeypatch.undo()
                    if not before:
                        call(job, *given)
                    raise KeyboardInterrupt

                monkeypatch.setattr(sequence, "_settle", lambda: None)
                monkeypatch.setattr(engine.core, "call", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    sequence.rollback(2)
                kept = len(sequence.token_ids)
                assert kept == (4 if before else 2)
                text = sequence.step(params=saying(said[:kept] + b"c")).text
                assert text == ("\N{REPLACEMENT CHARACTER}c" if before else "c")


def test_logits_beyond_memory_are_refused_before_any_pass(engine, monkeypatch):
    """Stands for prompts whose logits [T, V] do not fit: no pass is run for them."""
    passes = engine.stats()["passes"]
    needed = 4 * 200 * 130
    monkeypatch.setattr(engine_module, "free_memory", lambda: needed - 1)
    with pytest.raises(OutOfCapacity, match=f"score: logits of 200 tokens need {needed} bytes"):
        engine.score(draw(200))
    monkeypatch.setattr(engine_module, "free_memory", lambda: 1 << 80)

    def refused(*_, **__):
        raise RuntimeError("can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine_module.torch, "empty", refused)
        with pytest.raises(OutOfCapacity, match="score fewer tokens at a time"):
            engine.score(draw(200))
    assert engine.stats()["passes"] == passes
    assert engine.score(draw(200)).shape == (200, 130)
