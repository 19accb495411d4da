"""The text of sequences that are driven by hand: whatever is drawn, appended, taken back, forked,
switched, saved and loaded, the joined texts of steps are the drawn tokens decoded."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st
from test_text import byte_level, sentencepiece_like

from elastic_infer import SamplingParams
from elastic_infer.text.stream import StepText
from support.engines import base_config, base_widths, open_engine, text_engine, tiny

BYTES, WORDS = byte_level(), sentencepiece_like()
EURO = [BYTES.encode(c)[0] for c in "a"] + BYTES.encode("€ é😀")
CASES = {
    "byte-level": (BYTES, st.sampled_from(EURO) | st.integers(0, BYTES.vocab_size - 1)),
    # Only spaces and words: a bad byte changes what was given out of its run.
    "sentencepiece": (WORDS, st.integers(1, 10)),
}
ACTIONS = st.sampled_from(["draw"] * 6 + ["append", "rollback", "fork"])


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_joined_texts_are_the_drawn_tokens(name: str, data: st.DataObject) -> None:
    """Any order of drawing, appending, going back and forking. The oracle decodes every stretch
    between two appends at once."""
    tokenizer, token = CASES[name]
    prompt = data.draw(st.lists(token, max_size=3))
    text, tokens = StepText(tokenizer), list(prompt)
    drawn: list[int] = []  # positions
    given_out: list[str] = []  # of each of them
    for action in data.draw(st.lists(ACTIONS, max_size=30)):
        if action == "draw":
            drawn.append(len(tokens))
            tokens.append(data.draw(token))
            given_out.append(text.push(tokens[-1], drawn[-1]))
        elif action == "append":
            tokens += data.draw(st.lists(token, min_size=1, max_size=3))
        elif action == "rollback" and tokens:
            tokens = tokens[: data.draw(st.integers(len(prompt), len(tokens)))]
            drawn = [at for at in drawn if at < len(tokens)]
            given_out = given_out[: len(drawn)]
            text.cut(tokens)
        elif action == "fork":
            twin = text.fork()
            text.push(data.draw(token), len(tokens))  # the other one goes its own way
            text = twin
    stretches: list[list[int]] = []
    for i, at in enumerate(drawn):
        if i == 0 or drawn[i - 1] != at - 1:
            stretches.append([])
        stretches[-1].append(tokens[at])
    visible = [[t for t in part if t not in tokenizer.special_ids] for part in stretches]
    rule = tokenizer.stream_rule
    expected = "".join(
        tokenizer.decode(part) if i == 0 or rule.kind == "bytes" else rule.unit(part)
        for i, part in enumerate(visible)
    )
    assert "".join(given_out) + text.finish() == expected


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=12), at=st.integers(0, 40), back=st.integers(0, 3))
def test_a_loaded_sequence_goes_on_with_half_a_character(text: str, at: int, back: int) -> None:
    """Saving and loading between any two tokens, and going back behind that point."""
    ids = BYTES.encode(text)
    at = min(at, len(ids))
    first = StepText(BYTES)
    given_out = [first.push(token_id, i) for i, token_id in enumerate(ids[:at])]
    second = StepText(BYTES, loaded=ids[:at])
    start = max(0, at - back)
    second.cut(ids[:start])
    rest = [second.push(token_id, i) for i, token_id in enumerate(ids[start:], start)]
    assert "".join(given_out[:start] + rest) + second.finish() == BYTES.decode(ids)


@settings(max_examples=100, deadline=None)
@given(text=st.text("a\u20ac\u00e9 😀", min_size=1, max_size=8))
def test_characters_of_byte_fallback_come_at_once(text: str) -> None:
    """A stream without an end may not wait for the end of a run of bytes."""
    ids = [b + 11 for b in text.encode()]
    stream = StepText(WORDS)
    parts = [stream.push(token_id, i) for i, token_id in enumerate(ids)]
    assert "".join(parts) == WORDS.decode(ids) and stream.finish() == ""


def test_half_a_character_is_given_out_at_the_end(tmp_path) -> None:
    """Steps of an engine, with everything in between that a caller can do."""

    def say(sequence, ids):
        return [
            sequence.step(params=SamplingParams(temperature=0, allowed_token_ids=[i])).text
            for i in ids
        ]

    euro = list("€".encode())
    with text_engine(tmp_path / "model") as engine:
        sequence = engine.open("ask", width="S")
        assert say(sequence, [*b"x", *euro[:2]]) == ["x", "", ""]
        sequence.switch("L", "exact")
        twin = sequence.fork()
        sequence.save(tmp_path / "file")
        assert say(sequence, euro[2:]) == ["€"] and sequence.close() == ""
        with engine.load(tmp_path / "file") as loaded:
            assert say(loaded, [*euro[2:], *b"y"]) == ["€", "y"]
        twin.rollback(len(twin.token_ids) - 1)
        assert say(twin, euro[1:]) == ["", "€"]
        say(twin, euro[:1])
        twin.append(list(b"what the caller says"))
        assert say(twin, b"z") == ["\ufffdz"]
        say(twin, euro[:1])
        assert twin.close() == "\ufffd" and twin.close() == ""


def test_without_a_tokenizer_there_is_no_text(tmp_path) -> None:
    """A model that has ids only."""
    tiny.write_tiny(tmp_path, base_config(), base_widths(), seed=7)
    with open_engine(tmp_path) as engine:
        sequence = engine.open([5, 6])
        assert sequence.step().text is None
        sequence.rollback(1)
        sequence.append([9])
        assert sequence.fork().close() is None and sequence.close() is None


def test_copies_do_not_share_what_is_held_back() -> None:
    """A fork in the middle of a character."""
    stream = StepText(BYTES)
    first, *rest = BYTES.encode("€")
    stream.push(first, 0)
    twin = stream.fork()
    assert stream.finish() == "\ufffd"
    assert "".join(twin.push(t, i) for i, t in enumerate(rest, 1)) == "€"
