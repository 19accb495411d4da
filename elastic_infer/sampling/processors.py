"""Changes to a row of logits before a token is drawn from it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from ..codes import dtype_name
from ..errors import InvalidRequest, shown
from ..outputs import Phase, TopLogprobs
from ..user_calls import call_user
from .checks import (
    fail,
)
from .params import SamplingParams, _int_tensor, _shortest, _stop_tokens, row_stats

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer


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

        Args:
            params: the request's parameters.
            prompt_ids: the prompt's tokens.
            vocab_size: V, the length of a row.
            tokenizer: needed for bad_words, and for stop strings that are tokens.
            eos_ids: end-of-sequence tokens.
            tags: ids of the think tags.

        Raises:
            InvalidRequest: ids outside the vocabulary, bad words without a tokenizer, and
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
        self._penalized = (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )
        self._prompt = [i for i in prompt_ids if i < vocab_size] if self._penalized else []
        self._cache: dict[str, torch.Tensor] = {}
        self._counted = 0
        self.active = bool(
            params.allowed_token_ids
            or params.logit_bias
            or self._stops
            or self._bad
            or self._penalized
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

        Args:
            row: float32 [V], the logits.
            token_ids: all generated tokens so far.
            phase: "thinking", "answer" or None, handed to the user's functions.

        Raises:
            InvalidRequest: if a function returns something that is not a row.
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
                row,
                "bias",
                lambda: torch.tensor(
                    list(params.logit_bias.values()), dtype=torch.float32, device="cpu"
                ),
            )
        if self._penalized:
            self._penalize(row, token_ids)
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
            try:
                row.copy_(result.detach())
            except RuntimeError as error:
                raise InvalidRequest(
                    "logits_processors: a function must return a dense tensor with values of its"
                    f" own, got {result.dtype} {result.layout} on {result.device}"
                ) from error

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
                f"{dtype_name(handed.dtype)}{list(handed.shape)}"
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

    def _penalize(self, row: torch.Tensor, token_ids: Sequence[int]) -> None:
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


def top_logprobs(row: torch.Tensor, token_id: int, k: int, run=None) -> TopLogprobs:
    """The log-probability and rank of a token and of the k likeliest.

    Args:
        row: float [V], the logits before any processing.
        token_id: the sampled token; it comes first in the result.
        k: how many of the likeliest follow, the likeliest first; 0 for none.
        run: a Pool, or None for one thread: it changes no bit.

    Returns:
        {token id: (log-probability, rank)}; rank 1 is the likeliest, equal logits share one.
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
