"""A request of any values ends alone: refused by name, or with an error of its own, while the
request beside it gives what it gives alone."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, Tokenizer

from elastic_infer import (
    ElasticError,
    EngineFull,
    InvalidRequest,
    NonFiniteLogits,
    OutOfCapacity,
    Plan,
    RequestFailed,
    SamplingParams,
)
from elastic_infer.sampling.checks import LONGEST_TEXT, MOST_STOPS
from elastic_infer.value_checks import MOST_IDS
from support.engines import (
    END_THINK,
    TEXT_VOCABULARY,
    assert_all_free,
    beside,
    open_engine,
    write_text_model,
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """An engine whose tokenizer has 40 tokens more than the model has embeddings."""
    folder = write_text_model(tmp_path_factory.mktemp("model"))
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([AddedToken(f"<pad{i}>", normalized=False) for i in range(40)])
    backend.add_tokens([AddedToken("</reason>", normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    with open_engine(folder, max_model_len=64, max_num_seqs=6) as engine:
        yield engine
        assert_all_free(engine)


def assert_can_be_shown(error: Exception) -> None:
    assert len(str(error).encode("utf-8")) < 20_000


# -- values of parameters -----------------------------------------------------------------------


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no repr")


HUGE = 10**5000  # Python refuses to print it
ints = st.one_of(
    st.integers(-3, 40),
    st.integers(),
    st.sampled_from([2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**400, HUGE, -HUGE]),
)
floats = st.one_of(
    st.floats(0, 2),
    st.floats(),
    st.sampled_from([1e39, 1e-46, 1e-39, 5e-324, 3.4028235677973366e38, 3.4e38, 1e-38, 1e300]),
)
odd = ["\ud800", "a\udfff", "x" * 10**6, "<pad3>"]
texts = st.one_of(st.text(max_size=4), st.sampled_from(odd))
wrong = st.sampled_from(
    [None, True, "x", b"x", (), [], {}, {1}, 1j, Unprintable(), object, torch.ones(2), float]
)
values = st.one_of(
    ints,
    floats,
    texts,
    wrong,
    st.lists(ints, max_size=4),
    st.lists(texts, max_size=3),
    st.lists(wrong, max_size=2),
    st.dictionaries(ints, floats, max_size=3),
)
FIELDS = {
    "n": ints,
    "max_tokens": ints,
    "min_tokens": ints,
    "temperature": floats,
    "top_p": floats,
    "top_k": ints,
    "min_p": floats,
    "seed": ints,
    "stop": st.lists(texts, max_size=3),
    "stop_token_ids": st.lists(ints, max_size=4),
    "ignore_eos": st.booleans(),
    "logprobs": ints,
    "logit_bias": st.dictionaries(ints, floats, max_size=3),
    "allowed_token_ids": st.lists(ints, max_size=4),
    "bad_words": st.lists(texts, max_size=3),
    "repetition_penalty": floats,
    "presence_penalty": floats,
    "frequency_penalty": floats,
    "skip_special_tokens": st.booleans(),
    "logits_processors": wrong,
}


@st.composite
def parameters(draw):
    names = draw(st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=3, unique=True))
    return {name: draw(st.one_of(FIELDS[name], FIELDS[name], values)) for name in names}


@settings(max_examples=150, deadline=None)
@given(given_=parameters())
def test_any_value_is_refused_by_name_or_ends_alone(engine, given_):
    """Stands for all values of all fields: ints of any size, floats that float32 cannot hold, ids
    beyond the vocabulary, texts that UTF-8 cannot hold, wrong types."""
    given_ = {"max_tokens": 4, **given_}
    try:
        params = SamplingParams(**given_)
    except InvalidRequest as error:
        assert str(error).startswith("SamplingParams: ")
        assert_can_be_shown(error)
        return
    ended = beside(engine, params=params)
    if isinstance(ended, Exception):
        named = isinstance(ended, (InvalidRequest, OutOfCapacity, NonFiniteLogits))
        assert named or params.logits_processors, ended
        assert_can_be_shown(ended)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 1e39}, "temperature must be a finite number >= 0 that float32 can hold"),
        ({"top_p": 1e-46}, r"top_p must be a finite number in \(0, 1\] that float32 can hold"),
        ({"repetition_penalty": 1e300}, "repetition_penalty must .* float32"),
        ({"temperature": 10**400}, "temperature must .* got <an int of 1329 bits>"),
        ({"min_tokens": HUGE, "max_tokens": 4}, r"min_tokens must be <= max_tokens \(4\), got <an"),
        ({"logprobs": 129}, r"logprobs must be None or an int in \[0, 128\], got 129"),
        ({"stop": ["x"] * (MOST_STOPS + 1)}, "stop must hold at most 64 texts, got 65"),
        ({"stop": "x" * (LONGEST_TEXT + 1)}, "stop must hold texts of at most 512 characters"),
        ({"bad_words": ["x"] * 1025}, "bad_words must hold at most 1024 texts, got 1025"),
        ({"stop": "\ud800"}, "stop must hold texts that UTF-8 can encode"),
        ({"stop_token_ids": itertools.count()}, f"stop_token_ids must hold at most {MOST_IDS}"),
        ({"logits_processors": [len] * 65}, "logits_processors must hold at most 64 functions"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:20],
)
def test_what_the_tables_cannot_hold_is_named(values, message):
    """Stands for numbers beyond the tables' types and for sizes beyond what a pass can bear."""
    with pytest.raises(InvalidRequest, match=message):
        SamplingParams(**values)


@pytest.mark.parametrize("top_k", [TEXT_VOCABULARY + 1, 2**31, HUGE], ids=["V", "int32", "huge"])
def test_top_k_beyond_the_vocabulary_keeps_all(engine, top_k):
    values = {"temperature": 1.0, "seed": 5, "max_tokens": 6, "ignore_eos": True}
    expected = engine.generate("a", SamplingParams(**values)).token_ids
    output = beside(engine, params=SamplingParams(**values, top_k=top_k))
    assert output.token_ids == expected


def test_a_choice_of_no_token_is_refused_by_name(engine):
    """Stands for parameters that together bar every token before the first one is sampled."""
    every = list(range(TEXT_VOCABULARY))
    for values, name in (
        ({"stop_token_ids": every, "min_tokens": 1}, "min_tokens must leave a token to sample"),
        ({"allowed_token_ids": [7], "stop_token_ids": [7], "min_tokens": 1}, "allowed_token_ids"),
        ({"allowed_token_ids": [97], "bad_words": ["a"]}, "allowed_token_ids must hold an id"),
    ):
        ended = beside(engine, params=SamplingParams(**values))
        assert isinstance(ended, InvalidRequest) and name in str(ended)


# -- plans --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"closing_text": [END_THINK, TEXT_VOCABULARY]},
        {"closing_text": [END_THINK, 10**400]},
        {"closing_text": "<pad30></think>"},
        {"end_tag": "</reason>"},
        {"end_tag": 10**400},
        {"start_tag": 2**40},
        {"start_tag": "</reason>"},
    ],
    ids=str,
)
def test_tokens_without_an_embedding_are_refused(engine, options):
    """Stands for ids that a plan would force or wait for and the model cannot read: beyond its
    vocabulary, or of the tokenizer alone."""
    ended = beside(engine, "x<think>", None, Plan.think_answer("S", "L", think_tokens=0, **options))
    assert isinstance(ended, InvalidRequest) and str(ended).startswith("plan: ")
    assert f"vocabulary of {TEXT_VOCABULARY}" in str(ended)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Plan.by_uncertainty("S", "L", 10**400),
        lambda: Plan.by_uncertainty("S", "L", math.inf),
        lambda: Plan.fixed("x" * 10**6),
        lambda: Plan.think_answer("S", "L", think_tokens=-HUGE),
        lambda: Plan.schedule([(HUGE, "S")]),
        lambda: Plan.schedule([(0, "S")], policy=f"window({'9' * 5000})"),
    ],
)
def test_plans_of_any_numbers_are_refused_by_name(engine, make):
    """Stands for a plan's numbers and names of any size, and for their messages."""
    with pytest.raises(ElasticError) as caught:
        engine.generate("a", SamplingParams(max_tokens=1), plan=make())
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("who", ["plan", "processor", "step"])
def test_exits_and_interrupts_of_a_callback_end_its_request(engine, kind, who):
    """Stands for exceptions that are no Exceptions, which would end a thread: the request fails
    with their cause, the engine goes on."""

    def leave(*_):
        raise kind("leaving")

    params = SamplingParams(max_tokens=3, logits_processors=[] if who == "plan" else [leave])
    if who == "step":
        with engine.open("a") as sequence, pytest.raises(RequestFailed, match=kind.__name__):
            sequence.step(params=params)
        return
    ended = beside(engine, "a", params, leave if who == "plan" else None)
    assert isinstance(ended, RequestFailed) and isinstance(ended.__cause__, kind)


class Mute(Exception):
    def __str__(self):
        raise ValueError("nothing to say")


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("zero"), Mute(), StopIteration(3), MemoryError()], ids=repr
)
def test_an_exception_of_a_callback_reaches_its_caller_as_it_is(engine, error):
    """Stands for what a user's function raises on purpose, whatever its message is."""

    def fail(*_):
        raise error

    for params, plan in (
        (SamplingParams(max_tokens=3, logits_processors=[fail]), None),
        (SamplingParams(max_tokens=3), Plan.custom(fail)),
    ):
        assert beside(engine, "a", params, plan) is error
        with pytest.raises((type(error), RequestFailed)) as raised:
            list(engine.stream("a", params, plan=plan))
        assert error in (raised.value, raised.value.__cause__)


# -- rows ---------------------------------------------------------------------------------------


def _double(ids, row, phase):
    row.data = row.double()


def _shorter(ids, row, phase):
    row.data = row.data[:3].clone()


def _no_memory(ids, row, phase):
    row.untyped_storage().resize_(0)


BREAKERS = {
    "resize": lambda ids, row, phase: row.resize_(3),
    "grow": lambda ids, row, phase: row.resize_(10**6),
    "unsqueeze": lambda ids, row, phase: row.unsqueeze_(0),
    "double": _double,
    "shorter": _shorter,
    "memory": _no_memory,
    "set": lambda ids, row, phase: row.set_(torch.ones(2)),
    "strides": lambda ids, row, phase: row.as_strided_((TEXT_VOCABULARY,), (0,)),
    "returns a matrix": lambda ids, row, phase: row[None],
    "returns text": lambda ids, row, phase: "row",
    "returns another length": lambda ids, row, phase: row[1:],
    "returns meta": lambda ids, row, phase: row.to("meta"),
    "nan": lambda ids, row, phase: row.mul_(math.nan),
    "bars all": lambda ids, row, phase: row.fill_(-math.inf),
    "clears the tokens": lambda ids, row, phase: ids.append(3),
}


@pytest.mark.parametrize("function", BREAKERS.values(), ids=BREAKERS)
def test_a_row_that_a_processor_breaks_ends_alone(engine, function):
    """Stands for all that a function may do to its tensor: shape, dtype, strides, memory, device,
    what it returns, and the list of tokens."""
    good = SamplingParams(max_tokens=3, logits_processors=[lambda *_: None])
    assert beside(engine, params=good).finish_reason in ("length", "stop")
    params = SamplingParams(max_tokens=3, logits_processors=[function])
    assert isinstance(beside(engine, params=params), Exception)


def test_rows_that_need_gradients_are_taken_as_values(engine):
    """Stands for processors that call a module of torch without no_grad."""
    weight = torch.nn.Parameter(torch.ones(TEXT_VOCABULARY))
    values = {"max_tokens": 5, "seed": 1}
    expected = engine.generate("a", SamplingParams(**values)).token_ids
    for function in (
        lambda ids, row, phase: row * weight,
        lambda ids, row, phase: row.mul_(weight),
        lambda ids, row, phase: (row.requires_grad_(), None)[1],
    ):
        output = beside(engine, params=SamplingParams(**values, logits_processors=[function]))
        assert output.token_ids == expected


def test_what_fails_between_prompt_and_choices_ends_alone(engine, monkeypatch):
    """Stands for errors while the choices of a request get their sequences."""
    fork = MemoryError("no room")

    def fail(sequence):
        raise fork

    monkeypatch.setattr(engine.core.model.cache, "fork", fail)
    ended = beside(engine, params=SamplingParams(n=2, max_tokens=3, temperature=1.0))
    assert isinstance(ended, RequestFailed) and ended.__cause__ is fork


def test_a_tokenizer_that_panics_ends_its_request_alone(tmp_path):
    """Stands for decoders that cannot take a token: their panic is no Exception."""
    folder = write_text_model(tmp_path)
    path = folder / "tokenizer.json"
    backend = json.loads(path.read_text())
    backend["decoder"] = {"type": "Strip", "content": "a", "start": 0, "stop": 2}
    path.write_text(json.dumps(backend))
    with open_engine(folder) as engine:
        good = engine.submit([5, 6], SamplingParams(max_tokens=20, logit_bias={97: -100}))
        params = SamplingParams(max_tokens=4, allowed_token_ids=[97])
        with pytest.raises(ElasticError, match="PanicException"):
            engine.generate([5, 6], params)
        assert good.result(60).finish_reason in ("length", "stop")
        with engine.open([5, 6]) as sequence, pytest.raises(InvalidRequest, match="PanicException"):
            sequence.step(params=params)
        assert_all_free(engine)


# -- sizes --------------------------------------------------------------------------------------


def test_sizes_are_compared_before_anything_is_made(engine, monkeypatch):
    """Stands for numbers and lengths that a client chooses: with what would be made for them out of
    reach, they are refused all the same."""

    def unreachable(*_, **__):
        raise AssertionError("made before it was compared")

    monkeypatch.setattr("elastic_infer.engine.intake.Branch", unreachable)
    monkeypatch.setattr("elastic_infer.engine.intake.RowProcessors", unreachable)
    monkeypatch.setattr(type(engine.tokenizer), "encode", unreachable)
    for n in (7, 10**6, 2**70, HUGE):
        with pytest.raises(OutOfCapacity, match="n must be at most max_num_seqs 6"):
            engine.submit("a", SamplingParams(n=n, temperature=1.0))
    long = "1" * (64 * engine.tokenizer.most_characters(1) + 1)
    chat = [{"role": "user", "content": long}]
    for call in (
        lambda: engine.generate(long),
        lambda: engine.generate(["a" * len(long)] * 2),
        lambda: engine.score(long),
        lambda: engine.open(long),
        lambda: engine.chat(chat),
    ):
        with pytest.raises(InvalidRequest, match="characters to fit within max_model_len 64"):
            call()
    for call in (engine.generate, engine.score, engine.open):
        with pytest.raises(InvalidRequest, match="must fit within max_model_len 64, got 65 tokens"):
            call([5] * 65)


def test_the_longest_prompt_that_fits_is_taken(engine):
    """The bound on characters refuses nothing that fits: tokens of any length, and byte runs."""
    for text in ("<|end|>" * 60, "é" * 30, "x" * 60, "</reason>"[:-1] * 7):
        assert len(engine.generate(text, SamplingParams(max_tokens=1)).token_ids) == 1


def test_more_prompts_than_may_wait_are_refused_before_they_are_read(tmp_path, monkeypatch):
    with open_engine(write_text_model(tmp_path), max_num_seqs=2, max_waiting=1) as engine:
        monkeypatch.setattr(type(engine.tokenizer), "encode", None)
        with pytest.raises(EngineFull, match="got 10000 prompts; give fewer"):
            engine.generate(["a"] * 10_000)


@pytest.mark.parametrize("text", ["\ud800", "fine \udfff", "é\udc80"])
def test_lone_surrogates_are_refused_everywhere(engine, text):
    """Stands for texts that UTF-8 cannot hold: prompts, chats, and texts of plans."""
    for call in (
        lambda: engine.generate(text),
        lambda: engine.generate([text, "a"]),
        lambda: engine.score(text),
        lambda: engine.open(text),
        lambda: engine.chat([{"role": "user", "content": text}]),
        lambda: engine.chat([{"role": text, "content": "a"}]),
        lambda: engine.generate("a", width=text),
        lambda: engine.generate("a", SamplingParams(stop=text)),
        lambda: engine.generate("a", SamplingParams(bad_words=text)),
        lambda: engine.generate("a", plan=Plan.think_answer("S", "L", closing_text=text)),
        lambda: engine.generate("a", plan=Plan.think_answer("S", "L", start_tag=text)),
        lambda: engine.generate("a", plan=lambda view: text),
    ):
        with pytest.raises(ElasticError) as caught:
            call()
        assert_can_be_shown(caught.value)


# -- generation_config.json ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": 1.5}, "top_k must be an int >= -1, got 1.5"),
        ({"temperature": 1e39}, "temperature must .* float32"),
        ({"top_p": 1e-60}, "top_p must .* float32"),
        ({"repetition_penalty": -1}, "repetition_penalty must"),
        ({"max_new_tokens": 0}, "max_new_tokens must be None or an int >= 1, got 0"),
        ({"max_new_tokens": 3, "min_new_tokens": 4}, "min_new_tokens must be <= max_new"),
        ({"min_p": [1]}, "min_p must"),
    ],
)
def test_bad_values_of_a_generation_config_name_the_file(tmp_path, values, message):
    """Stands for the parameters that come with a checkpoint."""
    folder = write_text_model(tmp_path, generation_config=values)
    with open_engine(folder) as engine:
        with pytest.raises(InvalidRequest, match=rf"^generation_config\.json: {message}"):
            engine.generate("a")
        assert engine.generate("a", SamplingParams(max_tokens=1)).finish_reason


def test_arguments_of_any_type_are_refused_by_name(engine):
    """Stands for arguments of a wrong type: what is not served raises an ElasticError, and nothing
    waits for ever."""
    odd = [5, 1.5, HUGE, b"x", {}, [[]], [None], ["a", 5], [HUGE], [-1], object(), torch.ones(3)]
    calls = [engine.generate, engine.score, lambda x: engine.generate([x]), engine.decode]
    one = SamplingParams(max_tokens=1)
    calls += [
        lambda x: engine.generate("a", x),
        lambda x: engine.generate(["a"], [x]),
        lambda x: engine.generate("a", one, width=x),
        lambda x: engine.generate("a", one, plan=x),
        lambda x: engine.generate("a", one, plan=Plan.think_answer("S", "L", closing_text=x)),
        lambda x: engine.generate("a", one, plan=Plan.think_answer("S", "L", newline_ids=x)),
        lambda x: engine.generate("a", one, plan=Plan.think_answer("S", "L", start_tag=x)),
        lambda x: engine.generate("a", one, plan=Plan.schedule(x)),
        lambda x: engine.generate("a", one, plan=Plan.custom(lambda view: "S", widths=x)),
        lambda x: engine.open("a", width=x),
        lambda x: engine.tokenizer.token_id(x),
        lambda x: engine.chat(
            [{"role": "user", "content": "a"}], one, chat_template_kwargs={"self": x}
        ),
        SamplingParams.from_generation_config,
    ]
    for call in calls:
        for value in odd:
            try:
                call(value)
            except ElasticError as error:
                assert_can_be_shown(error)
    with pytest.raises(InvalidRequest, match="prompt: must be text or a list of token ids"):
        engine.score(None)


def test_one_refused_prompt_of_a_list_starts_none(engine):
    before = engine.stats()["requests"]
    with pytest.raises(InvalidRequest):
        engine.generate(["a", "b", "\ud800"], SamplingParams(max_tokens=2))
    assert engine.stats()["requests"] == before
