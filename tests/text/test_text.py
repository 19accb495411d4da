"""Laws of incremental text: whatever the tokens and cuts, the joined text is the whole text."""

from __future__ import annotations

import re

import pytest
import tokenizers
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from elastic_infer.errors import InvalidRequest
from elastic_infer.text.detokenizer import Detokenizer
from elastic_infer.text.stops import StopStrings, split_reasoning
from elastic_infer.text.tokenizer import Tokenizer


def byte_level() -> Tokenizer:
    """A byte-level vocabulary: 256 bytes, some merges, added tokens inside and outside it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    for merged in ("th", "Ġth", "Ã©", "ðŁ", "ĺĢ"):
        vocab[merged] = len(vocab)
    merges = [("t", "h"), ("Ġ", "th"), ("Ã", "©"), ("ð", "Ł"), ("ĺ", "Ģ")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(["<think>", "</think>", AddedToken("é x", normalized=False), "日"])
    backend.add_special_tokens(["<|im_end|>"])
    return Tokenizer(backend)


def sentencepiece_like() -> Tokenizer:
    """A Llama-like decoder: spaces as ▁, byte fallback, one leading space stripped."""
    words = ["<unk>", "▁", "▁▁", "a", "▁a", "b", "é", "▁the", "</s>", "", "x▁y"]
    vocab = {word: index for index, word in enumerate(words)}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, "<unk>"))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend)


def word_level(decoder: decoders.Decoder | None) -> Tokenizer:
    """A small vocabulary under any decoder."""
    words = ["[UNK]", "a", "##b", "▁", "▁c", "d</w>", "e", "é", ".", " ", "do", "n't", "[S]"]
    vocab = {word: index for index, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, "[UNK]"))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens(["[S]"])
    return Tokenizer(backend)


BUILT = {
    "byte-level": (byte_level(), "bytes"),
    "sentencepiece": (sentencepiece_like(), "pieces"),
    "characters": (word_level(decoders.Fuse()), "pieces"),
    "joined by spaces": (word_level(None), "pieces"),
    "metaspace": (word_level(decoders.Metaspace()), "pieces"),
    "wordpiece": (word_level(decoders.WordPiece()), "pieces"),
    "suffix": (word_level(decoders.BPEDecoder()), "whole"),
}


def pushed(tokenizer: Tokenizer, ids: list[int], **kwargs: object) -> tuple[list[str], str]:
    stream = Detokenizer(tokenizer, **kwargs)
    return [stream.push(token_id) for token_id in ids], stream.finish()


@pytest.mark.parametrize("name", BUILT)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_joined_text_is_the_decoded_text(name: str, data: st.DataObject) -> None:
    tokenizer, kind = BUILT[name]
    assert tokenizer.stream_rule.kind == kind
    token = st.integers(0, tokenizer.vocab_size + 2)  # some lie outside the vocabulary
    if name == "sentencepiece":  # bytes would crowd out everything else
        token = st.integers(0, 10) | st.integers(11, 266) | st.sampled_from([0xC3 + 11, 0xA9 + 11])
    ids = data.draw(st.lists(token, max_size=24))
    skip = data.draw(st.booleans())
    keep = data.draw(st.sampled_from([(), tuple(tokenizer.special_ids)]))
    parts, rest = pushed(tokenizer, ids, skip_special_tokens=skip, keep=keep)
    whole = tokenizer.decode(ids, skip_special_tokens=skip, keep=keep)
    assert "".join(parts) + rest == whole
    if not keep:
        assert whole == tokenizer.backend.decode(ids, skip_special_tokens=skip)
    given_out = "".join(parts)
    assert whole.startswith(given_out), "text that was given out must never change"


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_text_survives_byte_level_streaming(text: str) -> None:
    tokenizer, _ = BUILT["byte-level"]
    ids = tokenizer.encode(text)
    parts, rest = pushed(tokenizer, ids, skip_special_tokens=False)
    assert "".join(parts) + rest == text
    assert rest == "" and not any("\ufffd" in part for part in parts if "\ufffd" not in text)


def test_incomplete_characters_are_held_back() -> None:
    tokenizer, _ = BUILT["byte-level"]
    ids = tokenizer.encode("😀!")
    assert len(ids) == 3
    parts, rest = pushed(tokenizer, ids)
    assert parts == ["", "😀", "!"] and rest == ""
    parts, rest = pushed(tokenizer, ids[:1])
    assert parts == [""] and rest == "\ufffd"


def test_a_bad_byte_changes_its_whole_run_and_nothing_given_out() -> None:
    tokenizer, _ = BUILT["sentencepiece"]
    good = [11 + 0xC3, 11 + 0xA9]
    assert pushed(tokenizer, [3, *good, 3]) == (["a", "", "", "éa"], "")
    assert pushed(tokenizer, [3, *good, 11 + 0xFF]) == (["a", "", "", ""], "\ufffd" * 3)


def test_leading_space_is_stripped_once() -> None:
    tokenizer, _ = BUILT["sentencepiece"]
    assert pushed(tokenizer, [4, 4])[0] == ["a", " a"]
    assert pushed(tokenizer, [1, 4])[0] == ["", " a"]
    assert pushed(tokenizer, [9, 4])[0] == ["", "a"], "an empty token does not start the text"


def test_special_tokens_are_left_out_unless_kept() -> None:
    tokenizer, _ = BUILT["byte-level"]
    end = tokenizer.token_id("<|im_end|>")
    assert pushed(tokenizer, [end]) == ([""], "")
    assert pushed(tokenizer, [end], keep=[end])[0] == ["<|im_end|>"]
    assert pushed(tokenizer, [end], skip_special_tokens=False)[0] == ["<|im_end|>"]


def test_cost_per_token_does_not_grow() -> None:
    tokenizer, _ = BUILT["sentencepiece"]

    class Counting:
        """The backend, counting the tokens it decodes."""

        count = 0

        def __getattr__(self, name: str) -> object:
            return getattr(tokenizer.backend, name)

        def decode(self, ids: list[int], **kwargs: object) -> str:
            Counting.count += len(ids)
            return tokenizer.backend.decode(ids, **kwargs)

    fresh = Tokenizer(sentencepiece_like().backend)
    fresh.backend = Counting()
    pushed(fresh, [3, 4, 5, 6, 11 + 0xC3, 11 + 0xA9, 7] * 200)
    assert Counting.count < 5 * 7 * 200


# -- stop strings ---------------------------------------------------------------------------


def reference_stop(text: str, stop: list[str]) -> tuple[str, str | None]:
    """Reads one character more at a time: the first end wins, then the longest."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


SHORT = st.text("ab\n", min_size=1, max_size=4)


@settings(max_examples=400, deadline=None)
@given(chunks=st.lists(st.text("ab\n", max_size=5), max_size=8), stop=st.lists(SHORT, max_size=3))
def test_stop_strings_do_not_depend_on_the_cuts(chunks: list[str], stop: list[str]) -> None:
    finder = StopStrings(stop)
    given_out, hit = "", None
    for chunk in chunks:
        emit, hit = finder.push(chunk)
        given_out += emit
        if hit is not None:
            break
    if hit is None:
        given_out += finder.finish()
    assert (given_out, hit) == reference_stop("".join(chunks), stop)


@given(text=st.text("ab", max_size=12), stop=SHORT)
def test_nothing_more_than_a_possible_start_is_held(text: str, stop: str) -> None:
    finder = StopStrings([stop])
    emit, hit = finder.push(text)
    held = "" if hit else finder.finish()
    assert stop.startswith(held) and len(held) < len(stop)
    assert hit or emit + held == text


def test_stop_strings_after_a_hit_and_unsearched() -> None:
    finder = StopStrings(["END"])
    assert finder.push("xE") == ("x", None)
    assert finder.push("ND y") == ("", "END")
    assert finder.push("more") == ("", "END") and finder.finish() == ""
    finder = StopStrings(["END"])
    assert finder.push("an END", search=False) == ("an END", None)
    assert finder.push(" EN") == (" ", None)
    assert finder.push("", search=False) == ("EN", None)
    with pytest.raises(InvalidRequest, match="stop: every entry must be a non-empty str, got ''"):
        StopStrings([""])


# -- reasoning --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "in_prompt", "expected"),
    [
        ("plain", False, (None, "plain")),
        ("\nplain </think>", False, (None, "\nplain </think>")),
        ("<think>a\nb</think>\n\n42\n", False, ("a\nb", "42\n")),
        ("\n<think>a", False, ("a", "")),
        ("a</think>b", True, ("a", "b")),
        ("<think>\na\n</think>b", True, ("a", "b")),
        ("still", True, ("still", "")),
        ("</think>b", True, ("", "b")),
        ("a</think>b<think>c</think>d", True, ("a", "bcd")),
        ("", True, ("", "")),
        ("", False, (None, "")),
    ],
)
def test_split_reasoning(text: str, in_prompt: bool, expected: tuple[str | None, str]) -> None:
    assert split_reasoning(text, "<think>", "</think>", in_prompt) == expected


def test_the_rule_warns_when_nothing_can_be_streamed(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = word_level(decoders.BPEDecoder())
    assert pushed(tokenizer, [5, 5]) == (["", ""], "d d")
    assert re.search("cannot be cut safely", caplog.text)
