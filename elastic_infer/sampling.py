"""How the next token is chosen: parameters, and what is done to a row of logits before."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from elastic_infer.errors import InvalidRequest
from elastic_infer.outputs import Phase, TopLogprobs

if TYPE_CHECKING:
    from elastic_infer.tokenizer import Tokenizer

__all__ = ["LogitsProcessor", "RowProcessors", "SamplingParams", "top_logprobs"]

# (generated token ids, row [V] float32, phase) -> None after a change in place, or a new row.
LogitsProcessor = Callable[[Sequence[int], torch.Tensor, Phase | None], torch.Tensor | None]

GREEDY_BELOW = 1e-5  # dividing logits by less than this overflows; such a temperature is greedy


# ---------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------


def _fail(name: str, rule: str, value: Any) -> InvalidRequest:
    return InvalidRequest(f"SamplingParams: {name} must {rule}, got {value!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_int(name: str, value: Any, least: int, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not _is_int(value) or value < least:
        none = "None or " if optional else ""
        raise _fail(name, f"be {none}an int >= {least}", value)


def _ids(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise _fail(name, "be a list of token ids", value)
    ids = tuple(value)
    for token_id in ids:
        if not _is_int(token_id) or token_id < 0:
            raise _fail(name, "hold token ids (ints >= 0) only", token_id)
    return tuple(dict.fromkeys(ids))


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)):
        raise _fail(name, "be a str or a list of str", value)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise _fail(name, "hold non-empty str only", text)
    return tuple(texts)


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled and when generation ends. Names and defaults are vLLM's.

    n: number of continuations of the one prompt.
    max_tokens: most tokens to generate; None: up to the context limit.
    min_tokens: no end-of-sequence or stop token, and no stop string, before this many.
    temperature: logits are divided by it; 0 always takes the largest.
    top_p: keep the likeliest tokens that together reach this probability, in (0, 1].
    top_k: keep this many of the likeliest; 0 or -1 keeps all.
    min_p: keep tokens at least this fraction of the likeliest one's probability, in [0, 1].
    seed: for repeatable sampling; None (or -1) draws one.
    stop: strings that end generation; they are not part of the text.
    stop_token_ids: tokens that end generation.
    ignore_eos: go on after an end-of-sequence token.
    logprobs: per token, its log-probability and this many of the likeliest; None for none.
    logit_bias: {token id: added to its logit, within -100 … 100}.
    allowed_token_ids: only these can be sampled; None for all.
    bad_words: texts that are never completed.
    repetition_penalty: > 1 divides positive and multiplies negative logits of every token of
        prompt and output.
    presence_penalty: subtracted once from the logits of tokens in the output, in [-2, 2].
    frequency_penalty: subtracted from them as often as they occurred, in [-2, 2].
    skip_special_tokens: leave special tokens out of the text (think tags stay).
    logits_processors: functions (token_ids, row, phase): the generated ids (to be read only),
        the float32 row [V] to change in place or to replace by returning one, and the phase.

    Raises InvalidRequest naming field, rule and value. Change one with dataclasses.replace.
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

    def __post_init__(self) -> None:
        self._check_counts()
        self._check_numbers()
        self._check_lists()
        for name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise _fail(name, "be True or False", getattr(self, name))
        if self.n > 1 and self.greedy:
            raise _fail("n", "be 1 at temperature 0, where all would be equal", self.n)

    def _check_counts(self) -> None:
        _check_int("n", self.n, 1)
        _check_int("max_tokens", self.max_tokens, 1, optional=True)
        _check_int("min_tokens", self.min_tokens, 0)
        _check_int("top_k", self.top_k, -1)
        _check_int("logprobs", self.logprobs, 0, optional=True)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _fail("min_tokens", f"be <= max_tokens ({self.max_tokens})", self.min_tokens)
        if _is_int(self.seed) and self.seed == -1:
            self._set("seed", None)
        if self.seed is not None and (not _is_int(self.seed) or not 0 <= self.seed < 2**64):
            raise _fail("seed", "be None or an int in [0, 2**64)", self.seed)

    def _check_numbers(self) -> None:
        rules: dict[str, tuple[str, Callable[[float], bool]]] = {
            "temperature": (">= 0", lambda x: x >= 0),
            "top_p": ("in (0, 1]", lambda x: 0 < x <= 1),
            "min_p": ("in [0, 1]", lambda x: 0 <= x <= 1),
            "repetition_penalty": ("> 0", lambda x: x > 0),
            "presence_penalty": ("in [-2, 2]", lambda x: -2 <= x <= 2),
            "frequency_penalty": ("in [-2, 2]", lambda x: -2 <= x <= 2),
        }
        for name, (rule, holds) in rules.items():
            value = getattr(self, name)
            if not _is_number(value) or not holds(value):
                raise _fail(name, f"be a finite number {rule}", value)

    def _check_lists(self) -> None:
        self._set("stop", _texts("stop", self.stop))
        self._set("bad_words", _texts("bad_words", self.bad_words))
        self._set("stop_token_ids", _ids("stop_token_ids", self.stop_token_ids or ()))
        if self.allowed_token_ids is not None:
            allowed = _ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise _fail("allowed_token_ids", "be None or hold at least one id", [])
            self._set("allowed_token_ids", allowed)
        bias = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(bias, Mapping):
            raise _fail("logit_bias", "be {token id: number}", bias)
        for token_id, value in bias.items():
            if not _is_int(token_id) or token_id < 0:
                raise _fail("logit_bias", "have token ids (ints >= 0) as keys", token_id)
            if not _is_number(value) or not -100 <= value <= 100:
                raise _fail(f"logit_bias[{token_id}]", "be a number in [-100, 100]", value)
        self._set("logit_bias", dict(bias))
        processors = self.logits_processors or ()
        if not isinstance(processors, (list, tuple)) or not all(map(callable, processors)):
            raise _fail("logits_processors", "be a list of functions", processors)
        self._set("logits_processors", tuple(processors))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """Whether the largest logit is always taken."""
        return self.temperature < GREEDY_BELOW

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> SamplingParams:
        """The parameters that a generation_config.json means; its other keys are not sampling.

        config: the file's object. temperature, top_p, top_k, min_p and repetition_penalty are
            taken as they are, max_new_tokens and min_new_tokens as max_tokens and min_tokens;
            do_sample false means temperature 0.
        """
        names = {key: key for key in ("temperature", "top_p", "top_k", "min_p")}
        names |= {"repetition_penalty": "repetition_penalty"}
        names |= {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
        values = {name: config[key] for key, name in names.items() if config.get(key) is not None}
        if config.get("do_sample") is False:
            values["temperature"] = 0.0
        return cls(**values)


# ---------------------------------------------------------------------------------------------
# Rows of logits
# ---------------------------------------------------------------------------------------------


class RowProcessors:
    """Everything that changes one sequence's logits before temperature and truncation.

    In order: allowed ids, bad words, min_tokens, logit bias, repetition, frequency and presence
    penalty (vLLM's order), then the user's functions. `active` is False when there is nothing
    to do; the row can then stay where it is.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        vocab_size: int,
        tokenizer: Tokenizer | None,
        eos_ids: Iterable[int],
    ) -> None:
        """Prepare for one sequence.

        params: the request's parameters.
        prompt_ids: the prompt's tokens.
        vocab_size: V, the length of a row.
        tokenizer: needed for bad_words only.
        eos_ids: end-of-sequence tokens.
        Raises InvalidRequest for ids outside the vocabulary, bad words without a tokenizer, and
        allowed ids of which none may be sampled before min_tokens.
        """
        self.params = params
        self.vocab_size = vocab_size
        for name in ("allowed_token_ids", "logit_bias", "stop_token_ids"):
            for token_id in getattr(params, name) or ():
                if token_id >= vocab_size:
                    raise _fail(name, f"hold ids below the vocabulary size {vocab_size}", token_id)
        stops = {*params.stop_token_ids, *(i for i in eos_ids if i < vocab_size)}
        self._stops = sorted(stops) if params.min_tokens > 0 else []
        if self._stops and params.allowed_token_ids and stops >= set(params.allowed_token_ids):
            raise _fail(
                "allowed_token_ids",
                f"hold an id that does not stop, for min_tokens={params.min_tokens}",
                list(params.allowed_token_ids),
            )
        self._bad = _bad_sequences(params.bad_words, tokenizer, vocab_size)
        self._penalised = (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )
        self._prompt = [i for i in prompt_ids if i < vocab_size] if self._penalised else []
        self._cache: dict[str, torch.Tensor] = {}
        self._counted = 0
        self.active = bool(
            params.allowed_token_ids
            or params.logit_bias
            or self._stops
            or self._bad
            or self._penalised
            or params.logits_processors
        )

    def apply(self, row: torch.Tensor, token_ids: Sequence[int], phase: Phase | None) -> None:
        """Changes a row in place.

        row: float32 [V], the logits.
        token_ids: all generated tokens so far.
        phase: "thinking", "answer" or None, handed to the user's functions.
        Raises InvalidRequest if a function returns something that is not a row.
        """
        if row.shape != (self.vocab_size,) or row.dtype != torch.float32:
            raise ValueError(
                f"RowProcessors: row must be float32[{self.vocab_size}], got"
                f" {row.dtype}{list(row.shape)}"
            )
        params = self.params
        if params.allowed_token_ids:
            row.masked_fill_(self._made(row, "barred", self._barred), -math.inf)
        for *before, last in self._bad:
            count = len(before)
            tail = list(token_ids[len(token_ids) - count :]) if count else []
            if len(token_ids) >= count and tail == before:
                row[last] = -math.inf
        if self._stops and len(token_ids) < params.min_tokens:
            row[self._made(row, "stops", lambda: torch.tensor(self._stops))] = -math.inf
        if params.logit_bias:
            ids = self._made(row, "bias_ids", lambda: torch.tensor(list(params.logit_bias)))
            row[ids] += self._made(
                row, "bias", lambda: torch.tensor(list(params.logit_bias.values())).float()
            )
        if self._penalised:
            self._penalise(row, token_ids)
        for function in params.logits_processors:
            result = function(token_ids, row, phase)
            if result is None or result is row:
                continue
            if not isinstance(result, torch.Tensor) or result.shape != row.shape:
                got = list(result.shape) if isinstance(result, torch.Tensor) else repr(result)
                raise InvalidRequest(
                    "logits_processors: a function must return None or a row"
                    f" [{self.vocab_size}], got {got}"
                )
            row.copy_(result)

    def _made(self, row: torch.Tensor, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A constant of this sequence on the row's device, made once."""
        found = self._cache.get(name)
        if found is None or found.device != row.device:
            found = self._cache[name] = make().to(row.device)
        return found

    def _barred(self) -> torch.Tensor:
        mask = torch.ones(self.vocab_size, dtype=torch.bool)
        mask[list(self.params.allowed_token_ids)] = False
        return mask

    def _prompt_mask(self) -> torch.Tensor:
        mask = torch.zeros(self.vocab_size, dtype=torch.bool)
        if self._prompt:
            mask[self._prompt] = True
        return mask

    def _penalise(self, row: torch.Tensor, token_ids: Sequence[int]) -> None:
        counts = self._cache.get("counts")
        if counts is None or counts.device != row.device or len(token_ids) < self._counted:
            counts = torch.zeros(self.vocab_size, device=row.device)
            self._cache["counts"] = counts
            self._counted = 0
        fresh = list(token_ids[self._counted :])
        if fresh:
            ids = torch.tensor(fresh, device=row.device)
            counts.index_add_(0, ids, torch.ones(len(fresh), device=row.device))
            self._counted = len(token_ids)
        params = self.params
        if params.repetition_penalty != 1.0:
            seen = self._made(row, "prompt", self._prompt_mask) | (counts > 0)
            by = params.repetition_penalty
            row.copy_(torch.where(seen, torch.where(row > 0, row / by, row * by), row))
        if params.frequency_penalty != 0.0:
            row.sub_(counts, alpha=params.frequency_penalty)
        if params.presence_penalty != 0.0:
            row.sub_((counts > 0).float(), alpha=params.presence_penalty)


def _bad_sequences(
    words: Sequence[str], tokenizer: Tokenizer | None, vocab_size: int
) -> list[list[int]]:
    """The token sequences of bad words, as they are spelled with and without a space before."""
    if not words:
        return []
    if tokenizer is None:
        raise _fail("bad_words", "be empty without a tokenizer", list(words))
    found: list[list[int]] = []
    for word in words:
        plain = tokenizer.encode(word.lstrip(), add_special_tokens=False)
        spaced = tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
        if not plain:
            raise _fail("bad_words", "hold texts that have tokens", word)
        found.append(plain)
        # A space that is a token of its own changes nothing about the word's own tokens.
        if len(spaced) == len(plain) and spaced[0] != plain[0]:
            found.append(spaced)
    for ids in found:
        if max(ids) >= vocab_size:
            raise _fail("bad_words", f"have ids below the vocabulary size {vocab_size}", max(ids))
    return found


def top_logprobs(row: torch.Tensor, token_id: int, k: int) -> TopLogprobs:
    """The log-probability and rank of a token and of the k likeliest.

    row: float [V], the logits before any processing.
    token_id: the sampled token; it comes first in the result.
    k: how many of the likeliest follow, the likeliest first; 0 for none.
    Returns {token id: (log-probability, rank)}; rank 1 is the likeliest, equal logits share one.
    """
    values = row.float()
    total = torch.logsumexp(values, dim=0)
    ids = [token_id]
    if k > 0:
        ids += torch.topk(values, min(k, values.numel())).indices.tolist()
    result: TopLogprobs = {}
    for index in dict.fromkeys(ids):
        rank = int((values > values[index]).sum()) + 1
        result[index] = (float(values[index] - total), rank)
    return result
