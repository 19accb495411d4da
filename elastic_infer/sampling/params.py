"""How the next token is chosen: parameters, and what is done to a row of logits before."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InvalidRequest, shown
from ..ops.softmax_stats import softmax_stats
from ..outputs import Phase, TopLogprobs
from ..user_calls import call_user
from .checks import (
    MOST_BAD_WORDS,
    MOST_LOGPROBS,
    MOST_STOPS,
    biases_of,
    check_int,
    check_number,
    fail,
    functions_of,
    ids_of,
    is_int,
    texts_of,
)

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

__all__ = ["LogitsProcessor", "RowProcessors", "SamplingParams", "top_logprobs"]

# (generated token ids, row [V] float32, phase) -> None after a change in place, or a new row.
LogitsProcessor = Callable[[Sequence[int], torch.Tensor, Phase | None], torch.Tensor | None]

# What is taken from a generation_config.json, and as which parameter.
_GENERATION_CONFIG = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens",
}  # fmt: skip
GREEDY_BELOW = 1e-5  # dividing logits by less than this overflows; such a temperature is greedy


# ---------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled and when generation ends. Names and defaults are vLLM's.

    n: number of continuations of the one prompt.
    max_tokens: most tokens to generate; None: up to the context limit.
    min_tokens: no end-of-sequence or stop token, and no stop string, before this many.
    temperature: logits are divided by it; 0 always takes the largest.
    top_p: keep the likeliest tokens that together reach this probability, in (0, 1].
    top_k: keep this many of the likeliest; 0, -1, or more than there are, keeps all.
    min_p: keep tokens at least this fraction of the likeliest one's probability, in [0, 1].
    seed: for repeatable sampling; None (or -1) draws one.
    stop: strings that end generation, at most 64; they are not part of the text. Not looked for in
        thinking. One that is a special token, or a think tag, ends generation as that token,
        anywhere.
    stop_in_thinking: look for stop strings in thinking too.
    stop_token_ids: tokens that end generation.
    ignore_eos: go on after an end-of-sequence token.
    logprobs: per token, its log-probability and this many of the likeliest, at most 128; None for
        none.
    logit_bias: {token id: added to its logit, within -100 … 100}.
    allowed_token_ids: only these can be sampled; None for all.
    bad_words: texts that are never completed, at most 1024.
    repetition_penalty: > 1 divides positive and multiplies negative logits of every token of
        prompt and output.
    presence_penalty: subtracted once from the logits of tokens in the output, in [-2, 2].
    frequency_penalty: subtracted from them as often as they occurred, in [-2, 2].
    skip_special_tokens: leave special tokens out of the text (think tags stay).
    logits_processors: functions (token_ids, row, phase): the generated ids (to be read only),
        the float32 row [V] to change in place or to replace by returning one, and the phase. What
        one raises, or leaves the row as, ends its request alone.

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
        check_number("temperature", self.temperature, ">= 0", lambda x: x >= 0)
        check_number("top_p", self.top_p, "in (0, 1]", lambda x: 0 < x <= 1, positive=True)
        check_number("min_p", self.min_p, "in [0, 1]", lambda x: 0 <= x <= 1)
        check_number(
            "repetition_penalty", self.repetition_penalty, "> 0", lambda x: x > 0, positive=True
        )
        for name in ("presence_penalty", "frequency_penalty"):
            check_number(name, getattr(self, name), "in [-2, 2]", lambda x: -2 <= x <= 2)

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
        """Whether the largest logit is always taken."""
        return self.temperature < GREEDY_BELOW

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> SamplingParams:
        """The parameters that a generation_config.json means; its other keys are not sampling.

        config: the file's object. temperature, top_p, top_k, min_p and repetition_penalty are
            taken as they are, max_new_tokens and min_new_tokens as max_tokens and min_tokens;
            do_sample false means temperature 0.

        Raises InvalidRequest naming the file, its key, rule and value.
        """
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


class RowProcessors:
    """Everything that changes one sequence's logits before temperature and truncation.

    stop_tokens: {token that ends generation: the reason to give}.

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
        tags: Collection[int] = (),
    ) -> None:
        """Prepare for one sequence.

        params: the request's parameters.
        prompt_ids: the prompt's tokens.
        vocab_size: V, the length of a row.
        tokenizer: needed for bad_words, and for stop strings that are tokens.
        eos_ids: end-of-sequence tokens.
        tags: ids of the think tags.
        Raises InvalidRequest for ids outside the vocabulary, bad words without a tokenizer, and
        parameters that together leave no token to be sampled.
        """
        self.params = params
        self.vocab_size = vocab_size
        for name in ("allowed_token_ids", "logit_bias", "stop_token_ids"):
            for token_id in getattr(params, name) or ():
                if token_id >= vocab_size:
                    raise fail(name, f"hold ids below the vocabulary size {vocab_size}", token_id)
        self.stop_tokens = _stop_tokens(params, tokenizer, tags)
        stops = {*self.stop_tokens, *(i for i in eos_ids if i < vocab_size)}
        stops = {token_id for token_id in stops if token_id < vocab_size}
        self._stops = sorted(stops) if params.min_tokens > 0 else []
        self._bad = _bad_sequences(params.bad_words, tokenizer, vocab_size)
        self._check_choice()
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

    def fork(self) -> RowProcessors:
        """The same for another sequence that continues the same prompt."""
        twin = copy.copy(self)
        twin._cache, twin._counted = {}, 0
        return twin

    def _check_choice(self) -> None:
        """Raises InvalidRequest if no token is left to begin with."""
        params = self.params
        barred = {*self._stops, *(ids[0] for ids in self._bad if len(ids) == 1)}
        if params.allowed_token_ids:
            if barred.issuperset(params.allowed_token_ids):
                raise fail(
                    "allowed_token_ids",
                    "hold an id that does not stop and is no bad word, for "
                    f"min_tokens={shown(params.min_tokens)}",
                    list(params.allowed_token_ids),
                )
        elif len(barred) >= self.vocab_size:
            raise fail(
                "min_tokens" if self._stops else "bad_words",
                f"leave a token to sample: all {self.vocab_size} of the vocabulary stop or are bad "
                "words",
                params.min_tokens if self._stops else list(params.bad_words),
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
            row[self._made(row, "stops", lambda: _int_tensor(self._stops))] = -math.inf
        if params.logit_bias:
            ids = self._made(row, "bias_ids", lambda: _int_tensor(params.logit_bias))
            row[ids] += self._made(
                row, "bias",
                lambda: torch.tensor(
                    list(params.logit_bias.values()), dtype=torch.float32, device="cpu"
                ),
            )  # fmt: skip
        if self._penalised:
            self._penalise(row, token_ids)
        if params.logits_processors:
            self._call_functions(row, token_ids, phase)

    def _call_functions(
        self, row: torch.Tensor, token_ids: Sequence[int], phase: Phase | None
    ) -> None:
        """The user's functions. They get another tensor of the row's memory, so that they can
        change the values and not what the row is."""
        handed, count = row.detach(), len(token_ids)
        for function in self.params.logits_processors:
            result = call_user(function, token_ids, handed, phase)
            self._check_kept(handed, row)
            if len(token_ids) != count:
                raise InvalidRequest(
                    "logits_processors: a function must not change token_ids, got "
                    f"{len(token_ids)} in place of {count}"
                )
            if result is None or result is handed:
                continue
            if not isinstance(result, torch.Tensor) or result.shape != row.shape:
                got = list(result.shape) if isinstance(result, torch.Tensor) else shown(result)
                raise InvalidRequest(
                    "logits_processors: a function must return None or a row"
                    f" [{self.vocab_size}], got {got}"
                )
            row.copy_(result.detach())

    def _check_kept(self, handed: torch.Tensor, row: torch.Tensor) -> None:
        """Raises InvalidRequest if a function made something else of the tensor it was given."""
        same = (
            handed.shape == row.shape
            and handed.dtype == row.dtype
            and handed.device == row.device
            and handed.layout == row.layout
            and handed.stride() == row.stride()
            and row.untyped_storage().nbytes() >= 4 * self.vocab_size
            and handed.data_ptr() == row.data_ptr()
        )
        if not same:
            raise InvalidRequest(
                "logits_processors: a function must leave its row float32"
                f"[{self.vocab_size}] in its own memory, or return another, got "
                f"{str(handed.dtype)[6:]}{list(handed.shape)}"
            )

    def _made(self, row: torch.Tensor, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A constant of this sequence on the row's device, made once."""
        found = self._cache.get(name)
        if found is None or found.device != row.device:
            found = self._cache[name] = make().to(row.device)
        return found

    def _barred(self) -> torch.Tensor:
        mask = torch.ones(self.vocab_size, dtype=torch.bool, device="cpu")
        mask[list(self.params.allowed_token_ids)] = False
        return mask

    def _prompt_mask(self) -> torch.Tensor:
        mask = torch.zeros(self.vocab_size, dtype=torch.bool, device="cpu")
        if self._prompt:
            mask[self._prompt] = True
        return mask

    def _penalise(self, row: torch.Tensor, token_ids: Sequence[int]) -> None:
        counts = self._cache.get("counts")
        if counts is None or counts.device != row.device or len(token_ids) < self._counted:
            counts = torch.zeros(self.vocab_size, dtype=torch.float32, device=row.device)
            self._cache["counts"] = counts
            self._counted = 0
        fresh = list(token_ids[self._counted :])
        if fresh:
            ids = torch.tensor(fresh, device=row.device)
            counts.index_add_(0, ids, counts.new_ones(len(fresh)))
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


def _bad_sequences(
    words: Sequence[str], tokenizer: Tokenizer | None, vocab_size: int
) -> list[list[int]]:
    """The token sequences of bad words, as they are spelled with and without a space before."""
    if not words:
        return []
    if tokenizer is None:
        raise fail("bad_words", "be empty without a tokenizer", list(words))
    found: list[list[int]] = []
    for word in words:
        plain = tokenizer.encode(word.lstrip(), add_special_tokens=False)
        if not plain:
            raise fail("bad_words", "hold texts that have tokens", word)
        spaced = tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
        found += [plain, spaced]
    for ids in found:
        if max(ids) >= vocab_size:
            raise fail("bad_words", f"have ids below the vocabulary size {vocab_size}", max(ids))
    return _shortest(found)


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

    row: float32 [V]. run: a Pool, or None for one thread.
    """
    given = [[temperature], [0.0], [0.0]]
    by, log_sum, entropy = torch.tensor(given, dtype=torch.float32, device="cpu")
    softmax_stats(row[None], by, log_sum, entropy, run=run)
    return log_sum.item(), entropy.item()


def top_logprobs(row: torch.Tensor, token_id: int, k: int, run=None) -> TopLogprobs:
    """The log-probability and rank of a token and of the k likeliest.

    row: float [V], the logits before any processing.
    token_id: the sampled token; it comes first in the result.
    k: how many of the likeliest follow, the likeliest first; 0 for none.
    run: a Pool, or None for one thread: it changes no bit.
    Returns {token id: (log-probability, rank)}; rank 1 is the likeliest, equal logits share one.
    """
    values = row.float()
    total, _ = row_stats(values, 1.0, run)
    ids = [token_id]
    if k > 0:
        ids += torch.topk(values, min(k, values.numel())).indices.tolist()
    result: TopLogprobs = {}
    for index in dict.fromkeys(ids):
        rank = int((values > values[index]).sum()) + 1
        result[index] = (float(values[index] - total), rank)
    return result
