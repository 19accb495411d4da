"""Stop strings in a stream of text, and text split into reasoning and answer."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InvalidRequest


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
        self._ahead = False  # nothing but white space was given out since `begin_answer`

    def begin_answer(self) -> None:
        """Says that thinking has ended: up to the next character that is no white space, stop
        strings of white space only are not looked for."""
        self._ahead = True

    def push(self, text: str, search: bool = True) -> tuple[str, str | None]:
        """Add text.

        Args:
            text: what comes next in the stream.
            search: False gives everything out without looking for stop strings (while fewer than
                `min_tokens` tokens exist); a stop string is then only looked for in later text.

        Returns:
            (text that is final, stop string found or None). After a hit there is no more text.
        """
        if self.hit is not None:
            return "", self.hit
        buffer, self._held = self._held + text, ""
        if not search or not self.stop:
            self._ahead = self._ahead and not buffer.strip()
            return buffer, None
        found = self._first(buffer, len(buffer) - len(buffer.lstrip()) if self._ahead else 0)
        if found is not None:
            start, self.hit = found
            return buffer[:start], self.hit
        keep = self._open_suffix(buffer)
        if keep:
            self._held = buffer[-keep:]
            buffer = buffer[:-keep]
        self._ahead = self._ahead and not buffer.strip()
        return buffer, None

    def finish(self) -> str:
        """End the stream. Returns the text that was held back as a possible start of a stop."""
        held, self._held = self._held, ""
        return held

    def _first(self, buffer: str, lead: int) -> tuple[int, str] | None:
        """(where it begins, the stop string), None if there is none. lead: characters of white
        space ahead of the answer."""
        best: tuple[int, int, str] | None = None
        for stop in self.stop:
            start = buffer.find(stop, lead if lead and stop.isspace() else 0)
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


def split_reasoning(
    text: str, start_tag: str, end_tag: str, prompt_is_thinking: bool
) -> tuple[str | None, str]:
    """Splits a generated text into its thinking block and its answer.

    Thinking starts in the prompt or with a start tag that nothing but white space comes before;
    it ends at the first end tag. White space around the reasoning and before the answer is
    dropped, and so are further tags; a text without thinking is returned as it is.

    Args:
        text: the generated text, tags included.
        start_tag: for example "<think>".
        end_tag: for example "</think>".
        prompt_is_thinking: True if the prompt ends inside a thinking block.

    Returns:
        (reasoning or None, answer); the answer is "" while the block is open.
    """
    body = text.lstrip()
    if body.startswith(start_tag):
        body = body[len(start_tag) :]
    elif not prompt_is_thinking:
        return None, text
    reasoning, _, answer = body.partition(end_tag)
    answer = answer.replace(start_tag, "").replace(end_tag, "")
    return reasoning.replace(start_tag, "").strip(), answer.lstrip()
