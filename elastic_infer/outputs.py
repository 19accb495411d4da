"""Results of a request: tokens of a stream, and whole outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .public import public
from .showing import one_line

__all__ = ["Choice", "FinishReason", "Output", "Phase", "Times", "Token", "Usage"]

Phase = Literal["thinking", "answer"]
FinishReason = Literal["stop", "length", "cancelled", "error"]
TopLogprobs = dict[int, tuple[float, int]]


def _short(text: str | None, limit: int = 60) -> str:
    if text is None or len(text) <= limit:
        return repr(text)
    return f"{text[:limit]!r}… ({len(text)} characters)"


@public
@dataclass(frozen=True, slots=True)
class Token:
    """One token of a stream.

    Attributes:
        id: the token.
        text: the text that became final with it, None without a tokenizer. It is "" while text is
            held back: half a character, or the beginning of a stop string, comes later.
        width: the width whose logits it was sampled from; for a forced token, the width that reads
            it.
        phase: its part of the output: "thinking" (with the end tag of the block) or "answer"; None
            for the start tag, white space before that is decided, think tags in the answer, and
            everything where the vocabulary has no tokens for the tags.
        forced: True if the plan put it there instead of sampling it.
        logprob: its log-probability before any processing, None unless asked for; None for a forced
            token, which was drawn from no distribution.
        top_logprobs: {token id: (log-probability, rank)}, None where logprob is.
    """

    id: int
    text: str | None
    width: str
    phase: Phase | None = None
    forced: bool = False
    logprob: float | None = None
    top_logprobs: TopLogprobs | None = None

    @one_line
    def __repr__(self) -> str:
        extra = " forced" if self.forced else ""
        return f"Token({self.id} {_short(self.text, 20)} {self.width} {self.phase}{extra})"


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request, over all its choices.

    Attributes:
        prompt_tokens: tokens of the prompt.
        completion_tokens: generated tokens, forced ones included.
        cached_tokens: prompt tokens that were not computed again because a prefix was reused.
        reasoning_tokens: generated tokens whose phase is "thinking".
        forced_tokens: tokens that a plan put there.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    forced_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Times:
    """Time that a request took, part by part, in seconds.

    Attributes:
        queued_s: from submission to the first pass.
        prefill_s: from the first pass to the first token.
        decode_s: from the first token to the last.
        first_token_s: from submission to the first token.
        total_s: from submission to the end.
    """

    queued_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0


@public
@dataclass(frozen=True, slots=True)
class Choice:
    """One generated continuation.

    Attributes:
        text: the whole text, think tags included; None without a tokenizer.
        reasoning: the text of the tokens whose phase is "thinking", without think tags and the
            white space around it; None where there is no thinking block.
        answer: the text of the tokens whose phase is "answer", without white space ahead of it
            after a thinking block; no think tag is ever in it. None without a tokenizer. Where the
            vocabulary has no tokens for the tags, both are found by the text of the tags.
        token_ids: the generated tokens, forced ones included.
        logprobs: {token id: (log-probability, rank)} per token, None for a forced one; None as a
            whole unless asked for.
        width_runs: [(width, number of tokens)] in order; the counts add up to the tokens.
        finish_reason: "stop", "length", "cancelled", "error"; None while it runs.
        stop_reason: the stop string or token id that ended it, or the error's message.
    """

    text: str | None
    reasoning: str | None
    answer: str | None
    token_ids: list[int]
    logprobs: list[TopLogprobs | None] | None = None
    width_runs: list[tuple[str, int]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @one_line
    def __repr__(self) -> str:
        runs = "+".join(f"{width}:{count}" for width, count in self.width_runs)
        return f"Choice({_short(self.text)}, {runs or 'no tokens'}, {self.finish_reason})"


@public
@dataclass(frozen=True, slots=True)
class Output:
    """The result of one request. The fields of its first choice can be read on it directly.

    Attributes:
        request_id: the request's name.
        prompt: the prompt's text, None when token ids were given.
        prompt_token_ids: the prompt as the model saw it.
        choices: one per `n`.
        usage: token counts.
        times: seconds.
        preemptions: how often the request was moved out of the cache to make room.
        rebuilt_tokens: tokens read again by switches with policy "exact" or "window".
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    choices: list[Choice]
    usage: Usage
    times: Times = Times()
    preemptions: int = 0
    rebuilt_tokens: int = 0

    @property
    def text(self) -> str | None:
        """`choices[0].text`."""
        return self.choices[0].text

    @property
    def reasoning(self) -> str | None:
        """`choices[0].reasoning`."""
        return self.choices[0].reasoning

    @property
    def answer(self) -> str | None:
        """`choices[0].answer`."""
        return self.choices[0].answer

    @property
    def token_ids(self) -> list[int]:
        """`choices[0].token_ids`."""
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> list[TopLogprobs | None] | None:
        """`choices[0].logprobs`."""
        return self.choices[0].logprobs

    @property
    def width_runs(self) -> list[tuple[str, int]]:
        """`choices[0].width_runs`."""
        return self.choices[0].width_runs

    @property
    def finish_reason(self) -> FinishReason | None:
        """`choices[0].finish_reason`."""
        return self.choices[0].finish_reason

    @property
    def stop_reason(self) -> str | int | None:
        """`choices[0].stop_reason`."""
        return self.choices[0].stop_reason

    @one_line
    def __repr__(self) -> str:
        first = repr(self.choices[0]) if self.choices else "no choice"
        more = f" +{len(self.choices) - 1} choices" if len(self.choices) > 1 else ""
        return (
            f"Output({self.request_id}: {first}{more}, "
            f"{self.usage.prompt_tokens}+{self.usage.completion_tokens} tokens, "
            f"{self.times.total_s:.3f} s)"
        )
