"""Places where a stream of tokens may be cut into text."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from typing import Any

from ..user_calls import tokenizer_errors

logger = logging.getLogger(__name__)


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
# Decoders that work on every token by itself, looking at most at whether it is the first.
_PER_TOKEN = {"Replace", "ByteFallback", "Strip", "Metaspace", "WordPiece"}


class StreamRule:
    """Places where a token sequence's text may be cut without changing it, for one tokenizer.

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
        """True if the token is one byte of a byte-fallback run ("<0x0A>")."""
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
