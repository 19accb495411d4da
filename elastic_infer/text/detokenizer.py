"""Text from a stream of token ids: incremental decoding, stop strings, reasoning and answer."""

from __future__ import annotations

import codecs
import copy
import json
import logging
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, InvalidRequest
from ..user_calls import tokenizer_errors

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

__all__ = ["Detokenizer", "StopStrings", "split_reasoning"]

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------
# How a tokenizer's decoder may be cut
# ---------------------------------------------------------------------------------------------


def _byte_level_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for the
    characters from U+0100 upwards.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    table.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return table


_BYTE_OF = _byte_level_alphabet()

MOST_GROWTH = 1024  # real tokenizers have a few replacements of single characters

# Decoders that work on every token by itself, looking at most at whether it is the first.
_PER_TOKEN = {"Replace", "ByteFallback", "Strip", "Metaspace", "WordPiece"}


class StreamRule:
    """Where the text of a token sequence may be cut without changing it, for one tokenizer.

    `kind` is
      "bytes"   byte-level: the text is the UTF-8 decoding of the tokens' joined bytes;
      "pieces"  every token but the first always gives the same text (runs of byte-fallback
                tokens are one unit, since one bad byte changes the whole run);
      "whole"   nothing is known, so the text is given out at the end only.
    """

    def __init__(self, backend: Any) -> None:
        """backend: tokenizers.Tokenizer whose decoder is examined."""
        self.backend = backend
        self._bytes: dict[int, bytes] = {}
        self._pieces: dict[int, str] = {}
        self.byte_runs = False
        self.anchor: int | None = None
        self.kind = self._classify()
        if self.kind == "pieces":
            self.anchor = self._find_anchor()
            if self.anchor is None:
                self.kind = "whole"
        if self.kind == "whole":
            logger.warning(
                "this tokenizer's decoder cannot be cut safely: streams give their text at the end"
            )

    def _classify(self) -> str:
        decoder = self.backend.decoder
        if decoder is None:
            return "pieces"
        steps = list(_flatten(json.loads(decoder.__getstate__())))
        names = [step["type"] for step in steps]
        if names and names[0] == "ByteLevel" and set(names[1:]) <= {"Fuse"}:
            return "bytes"
        fused = False
        for step in steps:
            name = step["type"]
            if name == "Fuse":
                fused = True
                continue
            # After Fuse only the start of the text may still be stripped; its end is not known.
            cuttable = name == "Strip" and step["stop"] == 0 if fused else name in _PER_TOKEN
            if not cuttable:
                return "whole"
            if name == "Replace" and "<0x" in step["content"]:
                return "whole"
        self.byte_runs = "ByteFallback" in names
        return "pieces"

    def _find_anchor(self) -> int | None:
        """A token whose own text stays when others follow: it takes the place of "the first"."""
        decode = self.backend.decode
        for index in range(min(self.backend.get_vocab_size(), 65536)):
            token = self.backend.id_to_token(index)
            if not token or not token.isascii() or not token.isalnum():
                continue
            text = decode([index], skip_special_tokens=False)
            twice = decode([index, index], skip_special_tokens=False)
            if text and twice != text and twice.startswith(text):
                return index
        return None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token of a byte-level vocabulary (empty when there is none)."""
        found = self._bytes.get(token_id)
        if found is None:
            token = self.backend.id_to_token(token_id) or ""
            if all(char in _BYTE_OF for char in token):
                found = bytes(_BYTE_OF[char] for char in token)
            else:
                found = token.encode("utf-8")
            self._bytes[token_id] = found
        return found

    def is_byte(self, token_id: int) -> bool:
        """Whether the token is one byte of a byte-fallback run ("<0x0A>")."""
        if not self.byte_runs:
            return False
        token = self.backend.id_to_token(token_id) or ""
        return len(token) == 6 and token.startswith("<0x") and token.endswith(">")

    def whole_characters(self, token_ids: list[int]) -> bool:
        """Tells if the byte tokens among these are whole UTF-8 characters."""
        run = (self.backend.id_to_token(i)[3:5] for i in token_ids if self.is_byte(i))
        try:
            return bool(bytes.fromhex("".join(run)).decode())
        except ValueError:
            return False

    def piece(self, token_id: int) -> str:
        """The text of one token that is not the first."""
        found = self._pieces.get(token_id)
        if found is None:
            found = self._pieces[token_id] = self.unit([token_id])
        return found

    def unit(self, token_ids: list[int]) -> str:
        """The text of a run of tokens that does not start the sequence."""
        head = self.decode([self.anchor])
        return self.decode([self.anchor, *token_ids])[len(head) :]

    def decode(self, token_ids: list[int]) -> str:
        """The text of tokens by themselves. Raises InvalidRequest if the decoder fails on them."""
        with tokenizer_errors("decode"):
            return self.backend.decode(token_ids, skip_special_tokens=False)


def _flatten(step: dict[str, Any]) -> Iterable[dict[str, Any]]:
    if step["type"] == "Sequence":
        for inner in step.get("decoders") or step.get("normalizers") or ():
            yield from _flatten(inner)
    else:
        yield step


def check_growth(name: str, part: dict[str, Any] | None) -> None:
    """Refuses replacements that, one after the other, could make very much of little text.

    name: "normalizer" or "decoder". part: what tokenizer.json says of it, None if it has none.

    Raises CheckpointError.
    """
    growth = 1.0
    for step in [] if part is None else _flatten(part):
        if step["type"] == "Replace":
            made = len(step["content"])
            # A regular expression may match single characters, or stand between any two.
            found = len(step["pattern"].get("String", ""))
            growth *= max(1.0, made / found if found else 1 + made)
    if growth > MOST_GROWTH:
        raise CheckpointError(
            f"tokenizer.json: {name} must make at most {MOST_GROWTH} characters of one by its "
            f"replacements, got {growth:.3g}"
        )


class Detokenizer:
    """Turns token ids into text one by one.

    The joined results of every `push` and of `finish` equal
    `tokenizer.decode(ids, skip_special_tokens, keep)` exactly. What a later token could still
    change (an incomplete UTF-8 character, a run of byte-fallback tokens) is held back.
    The cost of a token does not grow with the length of the sequence.

    `eager` gives a run of byte-fallback tokens out as soon as it is whole characters, for streams
    whose end is not known. A bad byte after it is then a character of its own, where decoding
    all at once would take the run before it for bad too.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        keep: Collection[int] = (),
        eager: bool = False,
    ) -> None:
        """Start an empty sequence.

        tokenizer: whose vocabulary and decoder are used.
        skip_special_tokens: leave special tokens out of the text.
        keep: special token ids that stay in the text all the same (think tags, for example).
        eager: do not wait for the end of a run of byte-fallback tokens.
        """
        self._eager = eager
        self._rule = tokenizer.stream_rule
        self._backend = tokenizer.backend
        self._vocab = tokenizer
        self._skip = tokenizer.special_ids - set(keep) if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held: list[int] = []  # tokens whose text is not final yet
        self._open = False  # whether the first piece of text has been given out

    def push(self, token_id: int) -> str:
        """Add one token. Returns the text that is now final ("" when there is none)."""
        if token_id in self._skip or self._backend.id_to_token(token_id) is None:
            return ""
        rule = self._rule
        if rule.kind == "bytes":
            return self._utf8.decode(rule.token_bytes(token_id))
        if rule.kind == "whole" or rule.is_byte(token_id):
            self._held.append(token_id)
            return self._give_held() if self._eager and rule.whole_characters(self._held) else ""
        if self._open:
            text = rule.unit(self._held) if self._held else ""
            self._held.clear()
            return text + rule.piece(token_id)
        self._held.append(token_id)
        text = self._decode_held()
        if text:  # the start of the text is settled: leading spaces were stripped or kept
            self._open = True
            self._held.clear()
        return text

    def finish(self) -> str:
        """End the sequence. Returns the text that was held back."""
        if self._rule.kind == "bytes":
            return self._utf8.decode(b"", final=True)
        text = self._give_held() if self._held else ""
        self._held.clear()
        return text

    def interrupt(self) -> str:
        """Lets tokens pass that are not of this stream. Returns the text that was held back; what
        comes next is no start of a text any more."""
        text = self.finish()
        self._open = self._rule.kind == "pieces"
        return text

    def fork(self) -> Detokenizer:
        """A twin that goes on by itself."""
        twin = copy.copy(self)
        twin._held = list(self._held)
        twin._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        twin._utf8.setstate(self._utf8.getstate())
        return twin

    def _give_held(self) -> str:
        if self._open:
            text = self._rule.unit(self._held)
        else:
            text = self._decode_held()
            if not text:  # it may be the space that a decoder strips: the start is still to come
                return ""
            self._open = self._rule.kind == "pieces"
        self._held.clear()
        return text

    def _decode_held(self) -> str:
        try:
            return self._rule.decode(self._held)
        except InvalidRequest:
            self._held.clear()  # what cannot be decoded is said once
            raise


# ---------------------------------------------------------------------------------------------
# Stop strings
# ---------------------------------------------------------------------------------------------


class StopStrings:
    """Finds the first stop string in a stream of text, wherever the stream is cut.

    The first one is the one that is complete first; of several complete at the same character,
    the longest. What is given out never holds any part of it.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """stop: the stop strings, none of them empty."""
        for text in stop:
            if not isinstance(text, str) or not text:
                raise InvalidRequest(f"stop: every entry must be a non-empty str, got {text!r}")
        self.stop = tuple(stop)
        self.hit: str | None = None
        self._held = ""
        self._longest = max(map(len, self.stop), default=0)

    def push(self, text: str, search: bool = True) -> tuple[str, str | None]:
        """Add text.

        text: what comes next in the stream.
        search: False gives everything out without looking for stop strings (while fewer than
            `min_tokens` tokens exist); a stop string is then only looked for in later text.
        Returns (text that is final, stop string found or None). After a hit there is no more text.
        """
        if self.hit is not None:
            return "", self.hit
        buffer, self._held = self._held + text, ""
        if not search or not self.stop:
            return buffer, None
        found = self._first(buffer)
        if found is not None:
            start, self.hit = found
            return buffer[:start], self.hit
        keep = self._open_suffix(buffer)
        if keep:
            self._held = buffer[-keep:]
            buffer = buffer[:-keep]
        return buffer, None

    def finish(self) -> str:
        """End the stream. Returns the text that was held back as a possible start of a stop."""
        held, self._held = self._held, ""
        return held

    def _first(self, buffer: str) -> tuple[int, str] | None:
        best: tuple[int, int, str] | None = None
        for stop in self.stop:
            start = buffer.find(stop)
            if start >= 0:
                candidate = (start + len(stop), start, stop)
                best = candidate if best is None else min(best, candidate)
        return None if best is None else (best[1], best[2])

    def _open_suffix(self, buffer: str) -> int:
        for length in range(min(len(buffer), self._longest - 1), 0, -1):
            suffix = buffer[-length:]
            if any(stop.startswith(suffix) for stop in self.stop):
                return length
        return 0


# ---------------------------------------------------------------------------------------------
# Reasoning and answer
# ---------------------------------------------------------------------------------------------


def split_reasoning(
    text: str, start_tag: str, end_tag: str, prompt_is_thinking: bool
) -> tuple[str | None, str]:
    """Splits a generated text into its thinking block and its answer.

    Thinking starts in the prompt or with a start tag that nothing but white space comes before;
    it ends at the first end tag. White space around the reasoning and before the answer is
    dropped, and so are further tags; a text without thinking is returned as it is.

    text: the generated text, tags included.
    start_tag, end_tag: the tags, for example "<think>" and "</think>".
    prompt_is_thinking: whether the prompt ends inside a thinking block.
    Returns (reasoning or None, answer); the answer is "" while the block is open.
    """
    body = text.lstrip()
    if body.startswith(start_tag):
        body = body[len(start_tag) :]
    elif not prompt_is_thinking:
        return None, text
    reasoning, _, answer = body.partition(end_tag)
    answer = answer.replace(start_tag, "").replace(end_tag, "")
    return reasoning.replace(start_tag, "").strip(), answer.lstrip()
