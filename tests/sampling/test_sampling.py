"""Every sampling parameter does what it says, seen from outside the engine.

A logits processor that comes last replaces the row by a known distribution, or records it; the
parameters act before it (penalties, biases, bars) or after it (temperature, truncation).
"""

from __future__ import annotations

import math

import pytest
import torch

from elastic_infer import SamplingParams
from support.engines import EOS, TEXT_VOCABULARY, script, text_engine

DRAWS = 400
# Four tokens with probabilities 0.5, 0.25, 0.15, 0.1; all others have none.
TOKENS = list(b"abcd")
PROBABILITIES = [0.5, 0.25, 0.15, 0.1]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with text_engine(tmp_path_factory.mktemp("model")) as engine:
        yield engine


def fixed(token_ids, row, phase):
    row[:] = -torch.inf
    row[TOKENS] = torch.tensor(PROBABILITIES).log()


def frequencies(engine, **values) -> list[float]:
    """How often each of the four tokens comes in many draws."""
    params = SamplingParams(
        max_tokens=DRAWS, ignore_eos=True, logits_processors=[fixed], **{"seed": 1, **values}
    )
    ids = engine.generate("x", params, width="S").token_ids
    assert set(ids) <= set(TOKENS)
    return [ids.count(t) / len(ids) for t in TOKENS]


def close(got: list[float], probabilities: list[float]) -> bool:
    """Within four standard deviations of the expected frequencies."""
    total = sum(probabilities)
    for f, p in zip(got, probabilities, strict=True):
        p /= total
        if abs(f - p) > 4 * math.sqrt(p * (1 - p) / DRAWS) + 1e-9:
            return False
    return True


def last_row(engine, prompt="x", script_first=(), **values):
    """The row of logits as the last processor sees it, after `script_first` was said."""
    rows = []

    def see(token_ids, row, phase):
        rows.append(row.clone())
        if len(token_ids) < len(script_first):
            row[:] = -torch.inf
            row[script_first[len(token_ids)]] = 0.0

    params = SamplingParams(
        temperature=0,
        max_tokens=len(script_first) + 1,
        ignore_eos=True,
        logits_processors=[see],
        **values,
    )
    engine.generate(prompt, params, width="M")
    return rows[-1]


def test_plain_draws_follow_the_distribution(engine):
    assert close(frequencies(engine), PROBABILITIES)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature(engine, temperature):
    expected = [p ** (1 / temperature) for p in PROBABILITIES]
    assert close(frequencies(engine, temperature=temperature), expected)


def test_temperature_zero_is_greedy(engine):
    assert frequencies(engine, temperature=0.0) == [1, 0, 0, 0]
    assert frequencies(engine, temperature=1e-6) == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({"top_k": 2}, 2),
        ({"top_k": 1}, 1),
        ({"top_k": -1}, 4),
        ({"top_p": 0.7}, 2),
        ({"top_p": 0.76}, 3),
        ({"top_p": 0.4}, 1),
        ({"min_p": 0.25}, 3),
        ({"min_p": 0.6}, 1),
        ({"min_p": 0.0}, 4),
        ({"top_k": 3, "top_p": 0.5}, 1),
    ],
    ids=str,
)
def test_truncation(engine, values, kept):
    expected = [p if i < kept else 0.0 for i, p in enumerate(PROBABILITIES)]
    assert close(frequencies(engine, **values), expected)


def test_seeds(engine):
    def ids(**values):
        params = SamplingParams(max_tokens=20, ignore_eos=True, **values)
        return engine.generate("x", params).token_ids

    assert ids(seed=4) == ids(seed=4) != ids(seed=5)
    assert ids() != ids(), "without a seed every call draws its own"
    assert ids(seed=2**64 - 1) == ids(seed=2**64 - 1)


def test_allowed_token_ids(engine):
    params = SamplingParams(max_tokens=40, allowed_token_ids=[7, 9, 11], seed=0)
    assert set(engine.generate("x", params).token_ids) == {7, 9, 11}


def test_logit_bias(engine):
    plain = last_row(engine)
    biased = last_row(engine, logit_bias={5: 3.5, 9: -100.0})
    change = biased - plain
    assert change[5] == pytest.approx(3.5, abs=1e-5)
    assert change[9] == pytest.approx(-100, abs=1e-4)
    assert change.abs().gt(0).sum() == 2
    out = engine.generate("x", SamplingParams(temperature=0, max_tokens=3, logit_bias={8: 100.0}))
    assert out.token_ids == [8, 8, 8]


def test_penalties(engine):
    """Presence and frequency look at the output, repetition at the prompt too."""
    said = [65, 65, 66]
    plain = last_row(engine, "xy", said)
    presence = last_row(engine, "xy", said, presence_penalty=0.5) - plain
    assert presence[[65, 66]].tolist() == pytest.approx([-0.5, -0.5], abs=1e-5)
    assert presence.abs().gt(0).sum() == 2
    frequency = last_row(engine, "xy", said, frequency_penalty=0.5) - plain
    assert frequency[[65, 66]].tolist() == pytest.approx([-1.0, -0.5], abs=1e-5)
    repeated = last_row(engine, "xy", said, repetition_penalty=2.0)
    for token in range(TEXT_VOCABULARY):
        seen = token in (65, 66, ord("x"), ord("y"))
        expected = plain[token] * (0.5 if plain[token] > 0 else 2.0) if seen else plain[token]
        assert repeated[token] == pytest.approx(float(expected), abs=1e-6)


def test_repetition_penalty_changes_what_is_said(engine):
    def ids(**values):
        params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, **values)
        return engine.generate("x", params).token_ids

    assert len(set(ids(frequency_penalty=2.0))) > len(set(ids()))


def test_bad_words(engine):
    """The last token of a bad word is barred only after the others."""
    wanted = script("the cat sat")

    def prefer(token_ids, row, phase):
        row += 50 * torch.isfinite(row)  # whatever is barred stays so
        probe = row.clone()
        wanted(token_ids, probe, phase)
        best = int(probe.argmax())
        if torch.isfinite(row[best]):
            row[best] += 1000

    def text(**values):
        params = SamplingParams(
            temperature=0, max_tokens=11, logits_processors=[prefer], ignore_eos=True, **values
        )
        return engine.generate("x", params).text

    assert text() == "the cat sat"
    barred = text(bad_words=["cat"])
    assert barred.startswith("the ca") and "cat" not in barred


def test_skip_special_tokens(engine):
    say = [*b"a", EOS, *b"b"]
    values = {"logits_processors": [script(say)], "ignore_eos": True, "max_tokens": 3}
    assert engine.generate("x", SamplingParams(**values)).text == "ab"
    shown = engine.generate("x", SamplingParams(**values, skip_special_tokens=False))
    assert shown.text == "a<|end|>b"


def test_think_tags_are_text_even_when_special(engine):
    out = engine.generate("x", SamplingParams(logits_processors=[script([256, *b"a", 257])]))
    assert out.text == "<think>a</think>"


@pytest.mark.parametrize("k", [0, 3])
def test_logprobs(engine, k):
    """Log-probabilities of the unprocessed row: of the token first, then of the likeliest."""
    params = SamplingParams(
        max_tokens=6, seed=2, logprobs=k, logit_bias={4: 20.0}, top_k=2, ignore_eos=True
    )
    prompt = list(b"xyz")
    out = engine.generate(prompt, params, width="S")
    rows = engine.score(prompt + out.token_ids, width="S")[2:-1].log_softmax(-1)
    assert len(out.logprobs) == 6
    for row, token, entry in zip(rows, out.token_ids, out.logprobs):
        assert next(iter(entry)) == token
        assert entry[token][0] == pytest.approx(float(row[token]), abs=1e-5)
        assert entry[token][1] == int((row > row[token]).sum()) + 1
        best = row.topk(k).indices.tolist()
        assert set(entry) == {token, *best}
    tokens = list(engine.stream(prompt, params, width="S"))
    assert [t.logprob for t in tokens] == [e[t.id][0] for t, e in zip(tokens, out.logprobs)]
    assert engine.generate(prompt, SamplingParams(max_tokens=2)).logprobs is None


def test_processors_see_ids_row_and_phase(engine):
    seen = []

    def look(token_ids, row, phase):
        assert row.dtype == torch.float32 and row.shape == (TEXT_VOCABULARY,)
        seen.append((list(token_ids), phase))
        replaced = torch.full_like(row, -torch.inf)
        replaced[[257, 65, 66][len(token_ids)]] = 0
        return replaced

    params = SamplingParams(max_tokens=3, logits_processors=[look])
    out = engine.generate("x<think>", params)
    assert out.token_ids == [257, 65, 66]
    assert seen == [([], "thinking"), ([257], "answer"), ([257, 65], "answer")]


def test_step_takes_sampling_parameters(engine):
    with engine.open("ab") as sequence:
        assert sequence.step(params=SamplingParams(allowed_token_ids=[9], logprobs=1)).id == 9
        greedy = sequence.logits().argmax()
        token = sequence.step()
        assert token.id == int(greedy) and token.logprob is None
