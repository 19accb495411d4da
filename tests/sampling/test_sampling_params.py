"""Sampling parameters and what they do to a row of logits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import tokenizers
import torch
from hypothesis import given, settings, strategies as st
from tokenizers import decoders, models, pre_tokenizers

from elastic_infer.errors import InvalidRequest
from elastic_infer.sampling.params import SamplingParams
from elastic_infer.sampling.processors import RowProcessors, top_logprobs
from elastic_infer.text.tokenizer import Tokenizer

V = 16
EOS = 15


def row_of(seed: int = 0) -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(seed)) * 3


def processors(
    params: SamplingParams, prompt: Sequence[int] = (), tokenizer: Tokenizer | None = None
) -> RowProcessors:
    return RowProcessors(params, prompt, V, tokenizer, [EOS])


def applied(
    params: SamplingParams,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    tokenizer: Tokenizer | None = None,
    row: torch.Tensor | None = None,
) -> torch.Tensor:
    row = row_of() if row is None else row.clone()
    processors(params, prompt, tokenizer).apply(row, list(output), None)
    return row


# -- parameters -------------------------------------------------------------------------------


class Failing(list):
    """A list whose iteration fails."""

    def __iter__(self):
        raise RuntimeError("no elements today")


ODD = [torch.tensor(3), torch.ones(2), Failing([1]), iter([1, "a"]), object(), b"ab", 2**70]


@pytest.mark.parametrize("value", ODD, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(SamplingParams)])
def test_values_that_compare_or_iterate_oddly_are_refused_by_name(name, value):
    """Family: tensors, iterators and objects whose ==, len or iteration gives no plain answer, in
    every parameter. A number that is taken works in every step, also as a long int."""
    try:
        params = SamplingParams(**{name: value})
    except InvalidRequest as error:
        assert name in str(error)
    else:
        assert not applied(params, prompt=[1], output=[2]).isnan().any()


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("n", 0, "be an int >= 1, got 0"),
        ("n", True, "be an int >= 1, got True"),
        ("max_tokens", 0, "be None or an int >= 1, got 0"),
        ("min_tokens", -1, "be an int >= 0"),
        ("temperature", -0.1, "be a finite number >= 0"),
        ("temperature", math.nan, "be a finite number >= 0"),
        ("temperature", math.inf, "be a finite number >= 0"),
        ("temperature", "hot", "be a finite number >= 0, got 'hot'"),
        ("temperature", None, "be a finite number >= 0, got None"),
        ("top_p", 0, r"be a finite number in \(0, 1\]"),
        ("top_p", 1.01, r"be a finite number in \(0, 1\]"),
        ("top_k", -2, "be an int >= -1"),
        ("top_k", 2.0, "be an int >= -1"),
        ("min_p", 1.5, r"in \[0, 1\]"),
        ("seed", -2, r"be None or an int in \[0, 2\*\*64\)"),
        ("seed", 2**64, "be None or an int in"),
        ("seed", 1.5, "be None or an int in"),
        ("stop", [""], "hold non-empty str only, got ''"),
        ("stop", 3, "be a str or a list of str, got 3"),
        ("stop", ["a", 3], "hold non-empty str only, got 3"),
        ("stop_token_ids", [-1], "hold token ids"),
        ("stop_token_ids", "abc", "be a list of token ids"),
        ("stop_token_ids", 7, "be a list of token ids"),
        ("ignore_eos", 1, "be True or False"),
        ("skip_special_tokens", None, "be True or False"),
        ("logprobs", -1, r"be None or an int in \[0, 128\]"),
        ("logit_bias", [1], "be {token id: number}"),
        ("logit_bias", {"a": 1}, "have token ids"),
        ("logit_bias", {3: 101}, "be a number in"),
        ("logit_bias", {3: math.nan}, "be a number in"),
        ("allowed_token_ids", [], "be None or hold at least one id"),
        ("allowed_token_ids", [1.0], "hold token ids"),
        ("bad_words", [""], "hold non-empty str only"),
        ("repetition_penalty", 0, "be a finite number > 0"),
        ("presence_penalty", 2.1, r"in \[-2, 2\]"),
        ("frequency_penalty", -2.1, r"in \[-2, 2\]"),
        ("logits_processors", [3], "be a list of functions"),
    ],
)
def test_every_wrong_value_is_named(field: str, value: object, rule: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^SamplingParams: {field}.* must .*{rule}"):
        SamplingParams(**{field: value})


def test_values_that_belong_together() -> None:
    with pytest.raises(InvalidRequest, match=r"min_tokens must be <= max_tokens \(4\), got 5"):
        SamplingParams(max_tokens=4, min_tokens=5)
    with pytest.raises(InvalidRequest, match="n must be 1 at temperature 0"):
        SamplingParams(n=2, temperature=0)
    assert SamplingParams(n=2, temperature=0.5).n == 2


def test_values_are_normalized_and_fixed() -> None:
    params = SamplingParams(stop="END", seed=-1, stop_token_ids=[3, 3, 1], bad_words="x", top_k=-1)
    assert params.stop == ("END",) and params.bad_words == ("x",)
    assert params.seed is None and params.stop_token_ids == (3, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_p = 0.5
    with pytest.raises(InvalidRequest, match="top_p"):
        dataclasses.replace(params, top_p=2)
    assert dataclasses.replace(params, top_p=0.5).stop == ("END",)
    assert SamplingParams(stop=None, stop_token_ids=None, logits_processors=None).stop == ()


def test_greedy_starts_where_division_would_overflow() -> None:
    assert SamplingParams(temperature=0).greedy and SamplingParams(temperature=1e-6).greedy
    assert not SamplingParams(temperature=0.01).greedy and not SamplingParams().greedy


def test_from_generation_config() -> None:
    config = {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 50,
        "max_new_tokens": 99,
        "min_p": None,
        "eos_token_id": [2, 11],
        "transformers_version": "5",
        "do_sample": True,
    }
    assert SamplingParams.from_generation_config(config) == SamplingParams(
        temperature=0.6, top_p=0.95, top_k=50, max_tokens=99
    )
    assert SamplingParams.from_generation_config({}) == SamplingParams()
    assert SamplingParams.from_generation_config({"do_sample": False, "temperature": 1.0}).greedy
    with pytest.raises(InvalidRequest, match="top_p must"):
        SamplingParams.from_generation_config({"top_p": 3})


# -- rows -------------------------------------------------------------------------------------


def test_nothing_to_do_is_not_active() -> None:
    for params in (
        SamplingParams(),
        SamplingParams(temperature=0.3, top_k=4, top_p=0.5, min_p=0.1, stop="x", seed=1),
        SamplingParams(stop_token_ids=[3], logprobs=5, max_tokens=3, logit_bias={}),
    ):
        row = row_of()
        made = processors(params)
        assert not made.active
        made.apply(row, [1, 2], None)
        assert torch.equal(row, row_of())


def test_allowed_ids_and_bias() -> None:
    row = applied(SamplingParams(allowed_token_ids=[2, 5]))
    assert row.isfinite().nonzero().flatten().tolist() == [2, 5]
    assert torch.equal(row[[2, 5]], row_of()[[2, 5]])
    expected = row_of()
    expected[3] += 2.5
    expected[0] -= 1
    assert torch.equal(applied(SamplingParams(logit_bias={3: 2.5, 0: -1})), expected)
    row = applied(SamplingParams(allowed_token_ids=[2], logit_bias={3: 100}))
    assert row[3] == -math.inf, "a bias must not lift a token that is not allowed"


def test_min_tokens_bars_every_way_to_stop() -> None:
    params = SamplingParams(min_tokens=2, stop_token_ids=[4])
    made = processors(params)
    for count, barred in ((0, [4, EOS]), (1, [4, EOS]), (2, []), (3, [])):
        row = row_of()
        made.apply(row, [1] * count, None)
        assert row.isinf().nonzero().flatten().tolist() == barred
    with pytest.raises(InvalidRequest, match="allowed_token_ids must hold an id that does not"):
        processors(SamplingParams(min_tokens=1, allowed_token_ids=[EOS]))


@settings(max_examples=150, deadline=None)
@given(
    prompt=st.lists(st.integers(0, V - 1), max_size=6),
    output=st.lists(st.integers(0, V - 1), max_size=12),
    repetition=st.sampled_from([1.0, 0.7, 1.5]),
    presence=st.sampled_from([0.0, 0.5, -1.0]),
    frequency=st.sampled_from([0.0, 0.25, -0.5]),
    shown=st.integers(0, 12),
)
def test_penalties(
    prompt: list[int],
    output: list[int],
    repetition: float,
    presence: float,
    frequency: float,
    shown: int,
) -> None:
    params = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
    )
    expected = []
    for token_id, logit in enumerate(row_of().tolist()):
        if token_id in prompt + output:
            logit = logit / repetition if logit > 0 else logit * repetition
        logit -= frequency * output.count(token_id)
        logit -= presence * (token_id in output)
        expected.append(logit)
    made = processors(params, prompt)
    made.apply(row_of(), output[:shown], None)  # counting goes on from what was shown before
    row = row_of()
    made.apply(row, output, None)
    torch.testing.assert_close(row, torch.tensor(expected), rtol=1e-6, atol=1e-6)
    row = row_of()
    made.apply(row, output[:1], None)  # and starts again when tokens were taken back
    again = applied(params, prompt, output[:1])
    assert torch.equal(row, again)


def words() -> Tokenizer:
    vocab = {w: i for i, w in enumerate(["[U]", "a", "b", "c", "▁a", "▁b", "▁"])}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, [("▁", "a"), ("▁", "b")], unk_token="[U]", fuse_unk=False)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    return Tokenizer(backend)


def test_bad_words_lose_only_their_last_token() -> None:
    tokenizer = words()
    assert tokenizer.encode("ab") == [1, 2] and tokenizer.encode(" ab") == [4, 2]
    params = SamplingParams(bad_words=["ab", "c"])

    def barred(output: list[int]) -> list[int]:
        return applied(params, output=output, tokenizer=tokenizer).isinf().nonzero()[:, 0].tolist()

    assert barred([]) == [3]
    assert barred([1]) == [2, 3], "spelled without a space before"
    assert barred([2, 4]) == [2, 3], "spelled with one"
    assert barred([1, 1, 3]) == [3]
    with pytest.raises(InvalidRequest, match="bad_words must be empty without a tokenizer"):
        processors(params)


@settings(max_examples=200, deadline=None)
@given(
    merges=st.lists(st.sampled_from(["ab", "bc", "abc", "▁a", "▁ab", "▁abc"]), unique=True),
    word=st.text("abc", min_size=1, max_size=4),
    before=st.lists(st.integers(0, 3), max_size=2),
)
def test_bad_words_are_barred_with_and_without_a_space(
    merges: list[str], word: str, before: list[int]
) -> None:
    """Vocabularies in which a word has any number of tokens, and another behind a space."""
    pairs = {
        "ab": ("a", "b"),
        "bc": ("b", "c"),
        "abc": ("ab", "c"),
        "▁a": ("▁", "a"),
        "▁ab": ("▁", "ab"),
        "▁abc": ("▁", "abc"),
    }
    vocab = {w: i for i, w in enumerate(["[U]", "a", "b", "c", "▁", *pairs])}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, [pairs[m] for m in merges], unk_token="[U]", fuse_unk=False)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer = Tokenizer(backend)
    for spelled in (word, " " + word):
        ids = tokenizer.encode(spelled)
        row = applied(SamplingParams(bad_words=[word]), (), [*before, *ids[:-1]], tokenizer)
        assert row[ids[-1]] == -math.inf, (spelled, ids)


def test_users_functions_come_last_and_see_the_phase() -> None:
    seen = []

    def in_place(token_ids: Sequence[int], row: torch.Tensor, phase: str | None) -> None:
        seen.append((list(token_ids), phase, float(row[3])))
        row[3] = 7.0

    def new(token_ids: Sequence[int], row: torch.Tensor, phase: str | None) -> torch.Tensor:
        return row * 2

    params = SamplingParams(logit_bias={3: 1.0}, logits_processors=[in_place, new])
    made = processors(params)
    assert made.active
    row = row_of()
    made.apply(row, [5], "thinking")
    assert seen == [([5], "thinking", float(row_of()[3] + 1))]
    assert row[3] == 14.0 and torch.equal(row[:3], row_of()[:3] * 2)
    bad = SamplingParams(logits_processors=[lambda ids, row, phase: row[:3]])
    with pytest.raises(InvalidRequest, match=r"must return None or a row \[16\], got \[3\]"):
        applied(bad)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(allowed_token_ids=[V]),
        SamplingParams(logit_bias={V: 1.0}),
        SamplingParams(stop_token_ids=[V]),
    ],
)
def test_ids_outside_the_vocabulary(params: SamplingParams) -> None:
    with pytest.raises(InvalidRequest, match=f"must hold ids below the vocabulary size {V}, got"):
        processors(params)


def test_a_wrong_row_is_refused() -> None:
    made = processors(SamplingParams(logit_bias={1: 1.0}))
    for row in (torch.zeros(V - 1), torch.zeros(V, dtype=torch.float64), torch.zeros(1, V)):
        with pytest.raises(ValueError, match=r"row must be float32\[16\]"):
            made.apply(row, [], None)


@settings(max_examples=60, deadline=None)
@given(
    row=st.lists(st.sampled_from([-2.0, 0.0, 0.5, 3.0]), min_size=3, max_size=8),
    k=st.integers(0, 10),
    data=st.data(),
)
def test_top_logprobs(row: list[float], k: int, data: st.DataObject) -> None:
    logits = torch.tensor(row)
    token_id = data.draw(st.integers(0, len(row) - 1))
    result = top_logprobs(logits, token_id, k)
    exact = torch.log_softmax(logits.double(), 0).tolist()
    assert next(iter(result)) == token_id
    assert len(result) in (min(k, len(row)), min(k, len(row)) + 1) and len(result) >= 1
    for index, (logprob, rank) in result.items():
        assert logprob == pytest.approx(exact[index], abs=1e-6)
        assert rank == 1 + sum(value > row[index] for value in row)
    others = [value for index, value in enumerate(row) if index not in result]
    top = list(result)[1:]
    assert all(row[index] >= value for index in top for value in others)
