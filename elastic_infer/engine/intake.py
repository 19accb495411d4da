"""From the arguments of a call to a checked request: what is refused, is refused here."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..cache.pages import pages_for
from ..checkpoint.config import ModelConfig
from ..checkpoint.widths import Width
from ..errors import InvalidRequest, OutOfCapacity, WidthError, shown
from ..plans.decision import ChatPrompt
from ..plans.phase import tag_id
from ..plans.plan import Plan, as_plan
from ..plans.run import PlanRun
from ..sampling.params import SamplingParams
from ..sampling.processors import RowProcessors
from ..scheduling.request import Branch, Request
from ..scheduling.switching import snapshot_slots
from ..sizing.capacity import Capacity
from ..text.tokenizer import Tokenizer

Prompt = str | list[int]


class Intake:
    """Checks arguments against one model and its limits; keeps no state.

    Args:
        generation_config: the checkpoint's, for requests without parameters.
    """

    def __init__(
        self,
        config: ModelConfig,
        widths: Mapping[str, Width],
        default_width: str,
        tokenizer: Tokenizer | None,
        capacity: Capacity,
        generation_config: Mapping[str, Any],
        eos_ids: tuple[int, ...],
    ):
        self._config, self._widths, self._default_width = config, widths, default_width
        self._tokenizer, self._capacity = tokenizer, capacity
        self._generation_config, self._eos_ids = generation_config, eos_ids
        self._heads = {name: w.mamba_num_heads for name, w in widths.items()}
        self._paged = "*" in config.layers

    # -- requests ----------------------------------------------------------------------------

    @property
    def default_params(self) -> SamplingParams:
        """The sampling parameters of the checkpoint's generation_config.json."""
        return SamplingParams.from_generation_config(self._generation_config)

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        plan: Plan | Callable | None,
        width: str | None,
    ) -> Request:
        """A request with its branches.

        Raises:
            InvalidRequest: a wrong argument.
            WidthError: a width that is not served.
            OutOfCapacity: a request that can never fit.
        """
        params = self._checked(params, width)
        chosen = as_plan(plan, width, self._default_width)
        slots = params.n * (1 + snapshot_slots(chosen.policy))
        self.check_fits("generate", 1, None, slots)
        ids = self.prompt_ids(prompt)
        self.check_fits("generate", len(ids), params.max_tokens, slots)
        self._check_tags(chosen)
        begun = chosen.begin(ids, self._tokenizer, self._widths)
        for token in begun.may_force:
            self._check_token("plan: closing_text", token)
        track = chosen.policy.kind != "exact" and chosen.can_widen(self._heads)
        text = prompt if isinstance(prompt, str) else None
        request = Request(text, ids, params, chosen, _seed(params), track)
        processors = self._processors(request)
        request.branches = [
            self._branch(request, i, begun.fork(), processors.fork()) for i in range(params.n)
        ]
        return request

    def _checked(self, params: SamplingParams | None, width: str | None) -> SamplingParams:
        """The parameters, after the checks of all that costs nothing."""
        params = _as_params(self.default_params if params is None else params)
        if params.n > self._capacity.max_num_seqs:
            raise OutOfCapacity(
                f"generate: n must be at most max_num_seqs {self._capacity.max_num_seqs}, "
                f"got {shown(params.n)}"
            )
        if params.stop and self._tokenizer is None:
            raise InvalidRequest(
                f"stop: must be empty because the checkpoint has no tokenizer.json, got "
                f"{shown(list(params.stop))}; use stop_token_ids"
            )
        if width is not None:
            self.check_width(width)
        return params

    def _processors(self, request: Request) -> RowProcessors:
        return RowProcessors(
            request.params,
            request.prompt_ids,
            self._config.vocab_size,
            self._tokenizer,
            self._eos_ids,
            self._tags(request.plan),
        )

    def _tags(self, plan: Plan) -> tuple[int, ...]:
        """The ids of a plan's think tags, where the vocabulary has them and there is text."""
        if self._tokenizer is None:
            return ()
        ids = (tag_id(tag, self._tokenizer) for tag in (plan.start_tag, plan.end_tag))
        return tuple(i for i in ids if i is not None)

    def _branch(
        self, request: Request, index: int, run: PlanRun, processors: RowProcessors
    ) -> Branch:
        tags = self._tags(request.plan)
        return Branch(request, index, run, processors, self._tokenizer, tags)

    def _check_tags(self, plan: Plan) -> None:
        """Refuses think tags that a plan needs and the model cannot read: a tokenizer may have
        tokens for which there are no embeddings."""
        for name, token in plan.needed_ids(self._tokenizer):
            self._check_token(f"plan: {name}", token)

    def _check_token(self, name: str, token: int) -> None:
        size = self._config.vocab_size
        if not 0 <= token < size:
            raise InvalidRequest(
                f"{name} must be a token of the model's vocabulary of {size}, got id {shown(token)}"
            )

    def detached_branch(self, token_ids: list[int], params: SamplingParams, width: str) -> Branch:
        """A branch outside the scheduler, to sample one token with."""
        params, plan = _as_params(params), Plan.fixed(width)
        request = Request(None, [], params, plan, _seed(params), False)
        begun = plan.begin(token_ids, self._tokenizer, self._widths)
        return self._branch(request, 0, begun, self._processors(request))

    # -- checks ------------------------------------------------------------------------------

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of text or of a list of them.

        Raises:
            InvalidRequest: anything else, no tokens, or ids outside the vocabulary.
        """
        if isinstance(prompt, str):
            return self.encode("prompt", prompt)
        self.check_tokens("prompt", prompt)
        if isinstance(prompt, ChatPrompt):
            return ChatPrompt(prompt, prompt.tail)
        return list(prompt)

    def encode(self, name: str, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, which is refused before it is tokenized where it cannot fit.

        Raises:
            InvalidRequest: too long a text, or no tokenizer.
        """
        if self._tokenizer is None:
            raise InvalidRequest(
                f"{name}: must be token ids because the checkpoint has no tokenizer.json, got text"
            )
        most = self._capacity.max_model_len
        if len(text) > most:  # below, no need to know
            longest = self._tokenizer.most_characters(most)
            if len(text) > longest:
                raise InvalidRequest(
                    f"{name}: must have at most {longest} characters to fit within max_model_len "
                    f"{most}, got {len(text)}"
                )
        ids = self._tokenizer.encode(text, add_special_tokens)
        self.check_tokens(name, ids)
        return ids

    def check_tokens(self, name: str, ids: Sequence[int]) -> None:
        """Raises InvalidRequest unless `ids` are token ids of the model, at least one."""
        if not isinstance(ids, (list, tuple)):
            raise InvalidRequest(
                f"{name}: must be text or a list of token ids, got {type(ids).__name__}"
            )
        if not ids:
            raise InvalidRequest(f"{name}: must hold at least one token, got none")
        most = self._capacity.max_model_len
        if len(ids) > most:
            raise InvalidRequest(
                f"{name}: must fit within max_model_len {most}, got {len(ids)} tokens"
            )
        size = self._config.vocab_size
        for i, t in enumerate(ids):
            if isinstance(t, bool) or not isinstance(t, int) or not 0 <= t < size:
                raise InvalidRequest(
                    f"{name}: token ids must be ints in [0, {size}), got {shown(t)} at position {i}"
                )

    def check_width(self, name: str) -> None:
        """Raises WidthError for a width that is not served."""
        if not isinstance(name, str) or name not in self._widths:
            raise WidthError(f"width: must be one of {', '.join(self._widths)}, got {shown(name)}")

    def check_fits(self, what: str, prompt: int, max_tokens: int | None, slots: int) -> None:
        """Refuses what can never run, with the numbers.

        Args:
            what: the call.
            prompt: its tokens.
            max_tokens: to be generated after them (None: as far as it goes, at least one; 0: none).
            slots: state slots that it may hold at once.

        Raises:
            InvalidRequest: beyond max_model_len.
            OutOfCapacity: beyond the cache.
        """
        c = self._capacity
        if prompt + (max_tokens != 0) > c.max_model_len:
            raise InvalidRequest(
                f"{what}: prompt must leave room within max_model_len {c.max_model_len}, got "
                f"{prompt} tokens"
            )
        total = min(prompt + (max_tokens or 0), c.max_model_len)
        pages = pages_for(total) if self._paged else 0
        if pages > c.num_pages or slots > c.num_slots:
            raise OutOfCapacity(
                f"{what}: {total} tokens need {pages} KV pages and {slots} state slots, the engine "
                f"has {c.num_pages} and {c.num_slots}; lower max_tokens or n, or give it more "
                "kv_cache_memory_bytes"
            )


def _as_params(params: object) -> SamplingParams:
    if not isinstance(params, SamplingParams):
        raise InvalidRequest(f"params: must be SamplingParams, got {type(params).__name__}")
    return params


def _seed(params: SamplingParams) -> int:
    return random.getrandbits(62) if params.seed is None else params.seed


def is_one_prompt(prompt: object) -> bool:
    """True if this is one prompt (text, or a list of ints) and not a list of prompts.

    Raises:
        InvalidRequest: a value that is neither.
    """
    if isinstance(prompt, str):
        return True
    if not isinstance(prompt, (list, tuple)) or not prompt:
        got = "[]" if isinstance(prompt, (list, tuple)) else type(prompt).__name__
        raise InvalidRequest(
            "generate: prompt must be text, a list of token ids, or a non-empty list of these, "
            f"got {got}"
        )
    return all(isinstance(t, int) for t in prompt)


def one_per_prompt(name: str, value: object, count: int) -> list:
    """A list as it is when it has `count` entries; anything else, `count` times.

    Raises:
        InvalidRequest: a list of another length.
    """
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise InvalidRequest(f"{name}: must have one entry per prompt ({count}), got {len(value)}")
    return value
