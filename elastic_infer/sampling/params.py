"""Choice of the next token: parameters, and changes to a row of logits before it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InvalidRequest, shown
from ..ops.softmax_stats import softmax_stats
from ..outputs import Phase
from ..public import public
from ..value_checks import is_int
from .checks import (
    MOST_BAD_WORDS,
    MOST_LOGPROBS,
    MOST_STOPS,
    biases_of,
    check_int,
    fail,
    functions_of,
    ids_of,
    number_of,
    texts_of,
)

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

__all__ = ["LogitsProcessor", "SamplingParams"]

# (generated token ids, row [V] float32, phase) -> None after a change in place, or a new row.
LogitsProcessor = Callable[[Sequence[int], torch.Tensor, Phase | None], torch.Tensor | None]

# What is taken from a generation_config.json, and as which parameter.
_GENERATION_CONFIG = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
}
GREEDY_BELOW = 1e-5  # dividing logits by less than this overflows; such a temperature is greedy


# ---------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------


@public
@dataclass(frozen=True)
class SamplingParams:
    """Settings of sampling and of the end of generation. Names and defaults are vLLM's.

    Attributes:
        n: number of continuations of the one prompt.
        max_tokens: most tokens to generate; None: up to the context limit.
        min_tokens: no end-of-sequence or stop token, and no stop string, before this many.
        temperature: logits are divided by it; 0 always takes the largest.
        top_p: keep the likeliest tokens that together reach this probability, in (0, 1].
        top_k: keep this many of the likeliest; 0, -1, or more than there are, keeps all.
        min_p: keep tokens at least this fraction of the likeliest one's probability, in [0, 1].
        seed: for repeatable sampling; None (or -1) draws one.
        stop: strings that end generation, at most 64; they are not part of the text. Not looked for
            in thinking, nor, if they are white space only, in the white space between thinking and
            answer. One that is a special token, or a think tag, ends generation as that token,
            anywhere.
        stop_in_thinking: look for stop strings everywhere.
        stop_token_ids: tokens that end generation.
        ignore_eos: go on after an end-of-sequence token.
        logprobs: per token, its log-probability and this many of the likeliest, at most 128; None
            for none.
        logit_bias: {token id: added to its logit, within -100 … 100}.
        allowed_token_ids: only these can be sampled; None for all.
        bad_words: texts that are never completed, at most 1024.
        repetition_penalty: > 1 divides positive and multiplies negative logits of every token of
            prompt and output.
        presence_penalty: subtracted once from the logits of tokens in the output, in [-2, 2].
        frequency_penalty: subtracted from them as often as they occurred, in [-2, 2].
        skip_special_tokens: leave special tokens out of the text (think tags stay).
        logits_processors: functions (token_ids, row, phase): the generated ids (to be read only),
            the float32 row [V] to change in place or to replace by returning one, and the phase.
            An error in one, or a row that cannot be used, ends its request alone.

    Numbers must be such that float32 holds them; stop strings and bad words have at most 512
    characters. Raises InvalidRequest naming field, rule and value. Change one with
    dataclasses.replace.
    """

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: str | Sequence[str] | None = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    skip_special_tokens: bool = True
    logits_processors: Sequence[LogitsProcessor] | None = ()
    stop_in_thinking: bool = False

    def __post_init__(self) -> None:
        self._check_counts()
        self._check_numbers()
        self._check_lists()
        for name in ("ignore_eos", "skip_special_tokens", "stop_in_thinking"):
            if not isinstance(getattr(self, name), bool):
                raise fail(name, "be True or False", getattr(self, name))
        if self.n > 1 and self.greedy:
            raise fail("n", "be 1 at temperature 0, where all would be equal", self.n)

    def __repr__(self) -> str:
        values = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]
        given = [f"{n}={shown(v)}" for n, v, default in values if v not in (default, {})]
        return f"SamplingParams({', '.join(given)})"

    def _check_counts(self) -> None:
        check_int("n", self.n, 1)
        check_int("max_tokens", self.max_tokens, 1, optional=True)
        check_int("min_tokens", self.min_tokens, 0)
        check_int("top_k", self.top_k, -1)
        check_int("logprobs", self.logprobs, 0, MOST_LOGPROBS, optional=True)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            most = shown(self.max_tokens)
            raise fail("min_tokens", f"be <= max_tokens ({most})", self.min_tokens)
        if is_int(self.seed) and self.seed == -1:
            self._set("seed", None)
        if self.seed is not None and (not is_int(self.seed) or not 0 <= self.seed < 2**64):
            raise fail("seed", "be None or an int in [0, 2**64)", self.seed)

    def _check_numbers(self) -> None:
        self._number("temperature", ">= 0", lambda x: x >= 0)
        self._number("top_p", "in (0, 1]", lambda x: 0 < x <= 1, positive=True)
        self._number("min_p", "in [0, 1]", lambda x: 0 <= x <= 1)
        self._number("repetition_penalty", "> 0", lambda x: x > 0, positive=True)
        for name in ("presence_penalty", "frequency_penalty"):
            self._number(name, "in [-2, 2]", lambda x: -2 <= x <= 2)

    def _number(
        self, name: str, rule: str, holds: Callable[[float], bool], positive: bool = False
    ) -> None:
        self._set(name, number_of(name, getattr(self, name), rule, holds, positive))

    def _check_lists(self) -> None:
        self._set("stop", texts_of("stop", self.stop, MOST_STOPS))
        self._set("bad_words", texts_of("bad_words", self.bad_words, MOST_BAD_WORDS))
        stops = () if self.stop_token_ids is None else self.stop_token_ids
        self._set("stop_token_ids", ids_of("stop_token_ids", stops))
        if self.allowed_token_ids is not None:
            allowed = ids_of("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise fail("allowed_token_ids", "be None or hold at least one id", [])
            self._set("allowed_token_ids", allowed)
        self._set("logit_bias", biases_of("logit_bias", self.logit_bias))
        self._set("logits_processors", functions_of("logits_processors", self.logits_processors))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """True if the largest logit is always taken."""
        return self.temperature < GREEDY_BELOW

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> SamplingParams:
        """The parameters that a generation_config.json means; its other keys are not sampling.

        Args:
            config: the file's object. temperature, top_p, top_k, min_p and repetition_penalty are
                taken as they are, max_new_tokens and min_new_tokens as max_tokens and min_tokens;
                do_sample false means temperature 0.

        Raises:
            InvalidRequest: names the file, its key, rule and value.
        """
        if not isinstance(config, Mapping):
            raise InvalidRequest(f"generation_config: must be an object, got {shown(config)}")
        values = {
            name: config[key]
            for key, name in _GENERATION_CONFIG.items()
            if config.get(key) is not None
        }
        if config.get("do_sample") is False:
            values["temperature"] = 0.0
        try:
            return cls(**values)
        except InvalidRequest as error:
            text = str(error).removeprefix("SamplingParams: ")
            for key, name in _GENERATION_CONFIG.items():
                text = text.replace(f"{name} ", f"{key} ") if name != key else text
            raise InvalidRequest(
                f"generation_config.json: {text}; give params, or mend the file"
            ) from None


# ---------------------------------------------------------------------------------------------
# Rows of logits
# ---------------------------------------------------------------------------------------------


def _int_tensor(ids: Iterable[int]) -> torch.Tensor:
    return torch.tensor(list(ids), dtype=torch.int64, device="cpu")


def _stop_tokens(
    params: SamplingParams, tokenizer: Tokenizer | None, tags: Collection[int]
) -> dict[int, str | int]:
    """{token that ends generation: stop reason}: the ids that were given, and stop strings that
    are a special token or a think tag, whose text a stream need not show."""
    found: dict[int, str | int] = {}
    for text in params.stop if tokenizer is not None else ():
        token_id = tokenizer.token_id(text)
        if token_id is not None and (token_id in tokenizer.special_ids or token_id in tags):
            found[token_id] = text
            continue
        hidden = [] if not params.skip_special_tokens else tokenizer.special_texts_in(text)
        if hidden:
            raise fail(
                "stop",
                "hold no special token beside other text, which the text of an output leaves out"
                f" ({shown(hidden[0])}); give the token alone, or skip_special_tokens=False",
                text,
            )
    return found | {token_id: token_id for token_id in params.stop_token_ids}


def _shortest(sequences: list[list[int]]) -> list[list[int]]:
    """The sequences without those that end in another one, which bars them already."""
    kept: dict[tuple[int, ...], list[int]] = {}
    lengths: set[int] = set()
    for ids in sorted(sequences, key=len):
        if not any(tuple(ids[-length:]) in kept for length in lengths):
            kept[tuple(ids)] = ids
            lengths.add(len(ids))
    return list(kept.values())


def row_stats(row: torch.Tensor, temperature: float, run=None) -> tuple[float, float]:
    """(log-sum-exp, entropy) of row / temperature, summed in an order that no thread changes.

    Args:
        row: float32 [V].
        run: a Pool, or None for one thread.
    """
    given = [[temperature], [0.0], [0.0]]
    by, log_sum, entropy = torch.tensor(given, dtype=torch.float32, device="cpu")
    softmax_stats(row[None], by, log_sum, entropy, run=run)
    return log_sum.item(), entropy.item()
