"""Text from a stream of token ids: incremental decoding, stop strings, reasoning and answer."""

from __future__ import annotations

import codecs
import copy
import logging
from collections.abc import Collection
from typing import TYPE_CHECKING

from ..errors import InvalidRequest

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

__all__ = ["Detokenizer"]

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------
# How a tokenizer's decoder may be cut
# ---------------------------------------------------------------------------------------------


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

        Args:
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


# ---------------------------------------------------------------------------------------------
# Reasoning and answer
# ---------------------------------------------------------------------------------------------
