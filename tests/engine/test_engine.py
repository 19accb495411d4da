"""The public object: generate, stream, chat, score, submit, and what comes back."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from functools import partial

import pytest
import torch

from elastic_infer import Plan, RequestCancelled, SamplingParams
from support.engines import (
    END_THINK,
    EOS,
    HANG,
    THINK,
    assert_all_free,
    base_engine,
    draw,
    held,
    in_threads,
    open_engine,
    script,
    text_engine,
    write_text_model,
)

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with text_engine(tmp_path_factory.mktemp("model")) as engine:
        yield engine
        assert_all_free(engine)


def say(engine, tokens, prompt="ask", **values):
    """What the engine makes of a model that says `tokens`."""
    processors = [script(tokens), *values.pop("logits_processors", ())]
    return engine.generate(prompt, SamplingParams(logits_processors=processors, **values))


# -- what a call gives back -------------------------------------------------------------------


def test_greedy_tokens_are_those_of_score(engine):
    """Every token is the largest logit of what `score` gives for the tokens before it."""
    prompt = list(b"How are you?")
    for width in engine.widths:
        out = engine.generate(prompt, GREEDY, width=width)
        logits = engine.score(prompt + out.token_ids, width=width)
        assert logits.dtype == torch.float32
        assert logits.shape == (len(prompt) + 12, engine.config.vocab_size)
        assert out.token_ids == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert out.width_runs == [(width, 12)] and out.finish_reason == "length"


def test_one_prompt_gives_one_output_and_a_list_a_list(engine):
    one = engine.generate("ab", GREEDY)
    assert one.prompt == "ab" and one.prompt_token_ids == list(b"ab")
    ids = engine.generate(list(b"ab"), GREEDY)
    assert ids.prompt is None and ids.token_ids == one.token_ids and ids.text == one.text
    several = engine.generate(["ab", list(b"cd")], GREEDY, width=["S", "L"])
    assert [o.width_runs for o in several] == [[("S", 12)], [("L", 12)]]
    assert engine.generate(["ab"], GREEDY)[0].token_ids == one.token_ids
    lists = engine.generate(
        ["ab", "ab"],
        [GREEDY, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)],
        plan=[Plan.fixed("L"), Plan.fixed("S")],
    )
    assert [len(o.token_ids) for o in lists] == [12, 3]
    assert lists[0].token_ids == one.token_ids, "the default width is L"


def test_default_width_and_order(engine):
    assert list(engine.widths) == ["S", "M", "L"] and engine.default_width == "L"
    assert engine.generate("x", GREEDY).width_runs == [("L", 12)]


def test_output_fields(engine):
    out = say(engine, [*b"because", END_THINK, *b" 42", EOS], prompt="why <think>")
    assert out.text == "because</think> 42" and out.reasoning == "because" and out.answer == "42"
    assert out.token_ids == [*b"because", END_THINK, *b" 42", EOS]
    assert out.finish_reason == "stop" and out.stop_reason is None
    usage = out.usage
    assert usage.prompt_tokens == len("why ") + 1 and usage.completion_tokens == 12
    assert usage.reasoning_tokens == 8 and usage.forced_tokens == 0  # the end tag still thinks
    times = out.times
    assert 0 <= times.queued_s <= times.first_token_s <= times.total_s
    assert times.total_s == pytest.approx(times.queued_s + times.prefill_s + times.decode_s)
    assert len(out.choices) == 1 and out.preemptions == 0 and out.rebuilt_tokens == 0
    assert "request-" in repr(out)


def test_an_answer_without_thinking(engine):
    out = say(engine, "plain")
    assert (out.text, out.reasoning, out.answer) == ("plain", None, "plain")
    begun = say(engine, [THINK, *b"so", END_THINK, *b"x"])
    assert (begun.text, begun.reasoning, begun.answer) == ("<think>so</think>x", "so", "x")


def test_without_a_tokenizer_text_is_none(tmp_path):
    with base_engine(tmp_path) as bare:
        assert bare.tokenizer is None and bare.decode([5]) is None
        out = bare.generate(draw(5), GREEDY)
        assert out.text is None and out.answer is None and len(out.token_ids) == 12
        assert all(token.text is None for token in bare.stream(draw(5), GREEDY))


# -- streaming --------------------------------------------------------------------------------


def test_stream_equals_generate(engine):
    params = SamplingParams(temperature=1.0, max_tokens=40, seed=3, ignore_eos=True)
    tokens = list(engine.stream("tell", params, width="M"))
    out = engine.generate("tell", params, width="M")
    assert [t.id for t in tokens] == out.token_ids
    assert "".join(t.text for t in tokens) == out.text
    assert {t.width for t in tokens} == {"M"} and not any(t.forced for t in tokens)


def test_stream_holds_back_incomplete_characters(engine):
    text = "é日😀"
    tokens = list(engine.stream("x", SamplingParams(logits_processors=[script(text)])))
    assert [t.text for t in tokens] == ["", "é", "", "", "日", "", "", "", "😀", ""]
    cut = say(engine, "a😀", max_tokens=3)
    assert cut.text == "a�" and cut.finish_reason == "length", "a cut character is shown as such"


def test_leaving_a_stream_cancels(engine):
    params = SamplingParams(max_tokens=400, ignore_eos=True, seed=0)
    stream = engine.stream("go", params)
    next(stream)
    stream.close()
    assert_all_free(engine)


def test_submit_returns_at_once_and_can_be_iterated_twice(engine):
    request = engine.submit("go", GREEDY, width="S")
    tokens = list(request)
    assert list(request) == [] and request.done
    assert request.result().token_ids == [t.id for t in tokens]
    with held(engine), pytest.raises(TimeoutError, match="no result after 0"):
        engine.submit("go", SamplingParams(max_tokens=400, ignore_eos=True)).result(timeout=0)


def test_calls_from_many_threads_share_batches(engine):
    alone = [engine.generate(f"q{i}", GREEDY, width="SML"[i % 3]).token_ids for i in range(12)]
    passes = engine.stats()["passes"]
    with held(engine) as hold:
        calls = in_threads(
            *(partial(engine.generate, f"q{i}", GREEDY, width="SML"[i % 3]) for i in range(12))
        )
        hold.arrived(requests=12)
    assert [out.token_ids for out in calls()] == alone
    assert engine.stats()["passes"] - passes < 12 * 12


# -- chat -------------------------------------------------------------------------------------


def test_chat(engine):
    params = SamplingParams(logits_processors=[script([*b"hm", END_THINK, *b"hi"])])
    messages = [{"role": "user", "content": "hello"}]
    out = engine.chat(messages, params, width="S")
    assert bytes(out.prompt_token_ids[:-1]).decode() == "[user]hello\n[assistant]"
    assert out.prompt_token_ids[-1] == THINK and out.reasoning == "hm" and out.answer == "hi"
    off = engine.chat(messages, params, chat_template_kwargs={"enable_thinking": False})
    assert off.prompt_token_ids[-2:] == [THINK, END_THINK] and off.reasoning is None
    prompt = engine.chat_prompt(messages, tools=[{"name": "f"}])
    assert 'tools:[{"name": "f"}]' in engine.decode(prompt)


# -- ends -------------------------------------------------------------------------------------


def test_end_token(engine):
    out = say(engine, "ab")
    assert out.token_ids == [*b"ab", EOS] and out.text == "ab"
    assert (out.finish_reason, out.stop_reason) == ("stop", None)
    on = say(engine, "ab", ignore_eos=True, max_tokens=5)
    assert on.token_ids == [*b"ab", EOS, EOS, EOS] and on.finish_reason == "length"
    shown = say(engine, "ab", ignore_eos=True, max_tokens=3, skip_special_tokens=False)
    assert shown.text == "ab<|end|>"


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ("lo wo", "hel", "lo wo"),  # over five tokens
        (["xyz", "world"], "hello ", "world"),
        (["world", "hello world"], "", "hello world"),  # the longest of those complete at once
        (["o", "w"], "hell", "o"),
        ("never", "hello world", None),
        ("worldly", "hello world", None),  # held back until the end, then given out
    ],
)
def test_stop_strings_across_tokens(engine, stop, text, reason):
    params = SamplingParams(logits_processors=[script("hello world")], stop=stop)
    out = engine.generate("x", params)
    assert (out.text, out.stop_reason, out.finish_reason) == (text, reason, "stop")
    pieces = [t.text for t in engine.stream("x", params)]
    assert "".join(pieces) == text


def test_stop_token_ids(engine):
    out = say(engine, "abcd", stop_token_ids=[ord("c")])
    assert (out.text, out.finish_reason, out.stop_reason) == ("ab", "stop", ord("c"))
    assert out.token_ids == list(b"abc")


def test_min_tokens(engine):
    """No end token, stop token or stop string before: barred from sampling, or not looked for."""
    none = SamplingParams(min_tokens=5, max_tokens=8, temperature=0, logit_bias={EOS: 100.0})
    out = engine.generate("x", none)
    assert EOS not in out.token_ids[:5] and out.token_ids[5] == EOS and len(out.token_ids) == 6
    early = say(engine, "ababab", stop="ab", min_tokens=4, ignore_eos=True, max_tokens=6)
    assert early.text == "abab" and early.stop_reason == "ab"


def test_max_tokens_and_the_context_limit(engine, tmp_path):
    assert len(engine.generate("x", GREEDY).token_ids) == 12
    with base_engine(tmp_path, max_model_len=40) as short:
        out = short.generate(draw(30), SamplingParams(temperature=0, ignore_eos=True))
        assert len(out.token_ids) == 10 and out.finish_reason == "length"
        last = short.generate(draw(39), SamplingParams(temperature=0, ignore_eos=True))
        assert len(last.token_ids) == 1


def test_params_none_take_the_generation_config(tmp_path):
    files = {
        "generation_config": {
            "eos_token_id": [ord("z"), EOS],
            "max_new_tokens": 7,
            "do_sample": False,
        }
    }
    with text_engine(tmp_path, files) as engine:
        first, again = engine.generate("x"), engine.generate("x")
        assert first.token_ids == again.token_ids and len(first.token_ids) <= 7
        ended = engine.generate("x", SamplingParams(logits_processors=[script("azb")]))
        assert ended.token_ids == list(b"az") and ended.finish_reason == "stop"


# -- several choices --------------------------------------------------------------------------


def test_n_choices_differ_repeat_and_prefill_once(engine):
    params = SamplingParams(n=3, max_tokens=10, seed=5, ignore_eos=True)
    before = engine.stats()["tokens_read"]
    out = engine.generate("abc" * 30, params, width="M")
    read = engine.stats()["tokens_read"] - before
    assert read == 90 + 3 * 9, "one prefill; the last token of each choice is not read"
    assert len({tuple(c.token_ids) for c in out.choices}) == 3
    again = engine.generate("abc" * 30, params, width="M")
    assert [c.token_ids for c in again.choices] == [c.token_ids for c in out.choices]
    one = engine.generate(
        "abc" * 30, SamplingParams(max_tokens=10, seed=5, ignore_eos=True), width="M"
    )
    assert one.token_ids == out.choices[0].token_ids
    assert out.usage.completion_tokens == 30


def test_choices_end_on_their_own(engine):
    def some_end(token_ids, row, phase):
        row[EOS] = row.max() + 1.0  # about even

    params = SamplingParams(n=6, max_tokens=30, seed=1, logits_processors=[some_end])
    out = engine.generate("x", params)
    lengths = {len(c.token_ids) for c in out.choices}
    assert len(lengths) > 1 and all(c.finish_reason == "stop" for c in out.choices)


@pytest.mark.parametrize("max_tokens", [1, 4])
def test_forced_tokens_before_the_first_sampling_reach_every_choice(engine, max_tokens):
    """The budget is used up in the prompt: the closing text comes first, in all choices."""
    plan = Plan.think_answer("S", "L", think_tokens=0, closing_text="no</think>")
    params = SamplingParams(n=3, max_tokens=max_tokens, seed=2, ignore_eos=True)
    out = engine.generate("x<think>", params, plan=plan)
    closing = [*b"no", END_THINK][:max_tokens]
    for choice in out.choices:
        assert choice.token_ids[: len(closing)] == closing
        assert len(choice.token_ids) == max_tokens and choice.finish_reason == "length"
    assert_all_free(engine)


# -- callbacks --------------------------------------------------------------------------------


def test_a_failing_callback_ends_its_request_alone(engine):
    def broken(token_ids, row, phase):
        if len(token_ids) == 3:
            raise KeyError("mine")

    bad = SamplingParams(max_tokens=8, logits_processors=[broken], ignore_eos=True)
    outs = engine.generate(["a", "b", "c"], [GREEDY, bad, GREEDY])
    assert [o.finish_reason for o in outs] == ["length", "error", "length"]
    assert len(outs[1].token_ids) == 3 and "mine" in outs[1].stop_reason
    with pytest.raises(KeyError, match="mine"):
        engine.generate("b", bad)
    assert_all_free(engine)


def test_a_callback_cannot_wait_for_its_own_engine(engine):
    def inside(token_ids, row, phase):
        engine.generate("x", GREEDY)

    with pytest.raises(ValueError, match="must not call the engine that runs it"):
        engine.generate("b", SamplingParams(max_tokens=2, logits_processors=[inside]))


# -- life -------------------------------------------------------------------------------------


def test_import_is_light():
    code = (
        "import sys, threading, elastic_infer\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
        "assert 'elastic_infer._C' not in sys.modules, 'native'\n"
        "assert threading.active_count() == 1\n"
        "elastic_infer.Engine\n"
        "assert threading.active_count() == 1\n"
        "assert set(elastic_infer.__all__) <= set(dir(elastic_infer)) | set(elastic_infer._LAZY)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_runs_before_the_first_request(tmp_path):
    before = set(threading.enumerate())
    with open_engine(write_text_model(tmp_path)) as engine:
        assert set(threading.enumerate()) == before
        engine.generate("x", GREEDY)
        (started,) = set(threading.enumerate()) - before
        assert started.name == "elastic-infer-worker"
    assert not started.is_alive()


def test_a_dropped_engine_is_closed_but_not_under_a_request(tmp_path):
    engine = open_engine(write_text_model(tmp_path))
    request = engine.submit("x", SamplingParams(max_tokens=100, ignore_eos=True))
    alive = weakref.ref(engine)
    worker = engine.core.worker
    del engine
    assert len(request.result().token_ids) == 100, "the request keeps its engine"
    gc.collect()
    worker._thread.join(HANG)
    gc.collect()
    assert alive() is None and not worker._thread.is_alive()


def test_an_open_engine_does_not_keep_python_from_ending(tmp_path):
    write_text_model(tmp_path)
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from support.engines import open_engine\n"
        "from elastic_infer import SamplingParams\n"
        f"engine = open_engine({str(tmp_path)!r})\n"
        "request = engine.submit('x', SamplingParams(max_tokens=500, ignore_eos=True))\n"
        "next(iter(request))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=HANG, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_use_after_close_is_refused(tmp_path):
    engine = open_engine(write_text_model(tmp_path))
    sequence = engine.open("abc")
    with held(engine) as hold:
        running = engine.submit("x", SamplingParams(max_tokens=400, ignore_eos=True))
        assert hold.step() == 1
        engine.close()
    with pytest.raises(RequestCancelled, match="the engine was closed"):
        running.result()
    for call in (
        lambda: engine.generate("x"),
        lambda: engine.score("x"),
        lambda: engine.open("x"),
        lambda: engine.submit("x"),
        sequence.logits,
        sequence.fork,
    ):
        with pytest.raises(RequestCancelled, match="closed"):
            call()
    sequence.close()
    engine.close()
    assert engine.closed
