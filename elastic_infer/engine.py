"""The public object: an elastic checkpoint that generates at any of its widths."""

from __future__ import annotations

import json
import logging
import random
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ._C import Pool
from .batching import Limits, StepCosts
from .cache import Cache
from .capacity import Capacity, plan_capacity
from .checkpoint import Checkpoint
from .config import Width, count_parameters, widest
from .errors import EngineFull, InvalidRequest, OutOfCapacity, WidthError
from .model import Model
from .outputs import Output, Token
from .plan import Plan, as_plan
from .request import Branch, Request
from .sampling import RowProcessors, SamplingParams
from .scheduler import Scheduler
from .sequence_file import read_sequence
from .session import EngineSequence, run_read
from .switching import Read
from .tokenizer import Tokenizer, eos_ids_from_folder
from .weights import WeightLoader, activation_dtype
from .worker import Worker

logger = logging.getLogger(__name__)

Prompt = str | list[int]


class Engine:
    """One checkpoint, loaded once, that serves all of its widths. See `from_pretrained`.

    Every method can be called from any thread; calls from several threads share batches. Nothing
    runs before the first request. Use it in a `with`, or `close()` it.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None,
        default_width: str,
        capacity: Capacity,
        generation_config: Mapping[str, Any],
        eos_ids: tuple[int, ...],
        fingerprint: Callable[[], str],
        max_waiting: int | None = None,
        mixing: str = "auto",
    ):
        """Use `from_pretrained`."""
        self._model, self._tokenizer, self._capacity = model, tokenizer, capacity
        self.config, self.default_width = model.config, default_width
        self._generation_config, self._fingerprint = generation_config, fingerprint
        self._max_waiting, self._eos_ids = max_waiting, eos_ids
        active = [float(count_parameters(self.config, w).active) for w in self.widths.values()]
        limits = Limits(capacity.max_num_batched_tokens, capacity.max_num_seqs)
        self._scheduler = Scheduler(
            model, eos_ids, limits, StepCosts(active), mixing, capacity.max_num_seqs
        )
        self._worker = Worker(self._scheduler)
        self._sessions: weakref.WeakSet[EngineSequence] = weakref.WeakSet()
        self._closed = False

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        max_width: str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int = 2048,
        kv_cache_memory_bytes: int | None = None,
        gpu_memory_utilization: float = 0.9,
        threads: int | None = None,
        max_waiting: int | None = None,
        widths: str | Path | Mapping[str, Any] | None = None,
        mixing: str = "auto",
        isa: str = "auto",
        progress: Callable[[str, int], None] | None = None,
    ) -> Engine:
        """Loads a `nemotron_h` checkpoint.

        Args:
            path_or_hub_id: folder, or ``owner/name`` on the Hub.
            revision: branch, tag or commit of a Hub id.
            device: "auto" or "cpu" (this version has no CUDA kernels).
            dtype: "auto" (as stored), "float32" or "bfloat16".
            max_width: widest width to serve; nothing beyond it is read or kept.
            max_model_len: tokens of a sequence, prompt and output; None = the model's context.
            max_num_seqs: sequences in the cache at once; more requests wait.
            max_num_batched_tokens: tokens of one pass; long prompts are cut into several.
            kv_cache_memory_bytes: memory of KV pages and states together; None = at most half of
                what is free.
            gpu_memory_utilization: share of a GPU's memory to use; no effect on a CPU.
            threads: CPU threads; None = all that this process may use.
            max_waiting: requests that may wait; None = any number.
            widths: width table as a dict, or a JSON file's path.
            mixing: "auto", "always" or "never": whether rows of different widths share a pass.
            isa: instruction set of the CPU kernels: "auto", "portable", "avx2" or "avx512".
            progress: called with (tensor name, bytes) for every tensor read.

        Raises: CheckpointError, WidthError, InvalidRequest, OutOfCapacity.
        """
        _check_device(device)
        checkpoint = Checkpoint.open(path_or_hub_id, revision, widths)
        kept, served = served_widths(checkpoint.widths, max_width)
        try:
            kind = activation_dtype(checkpoint, dtype)
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
        config = checkpoint.config
        capacity = plan_capacity(
            config, served, kind, max_model_len, max_num_seqs, max_num_batched_tokens,
            kv_cache_memory_bytes,
        )  # fmt: skip
        try:
            pool = Pool(_threads(threads), isa)
        except ValueError as error:
            raise InvalidRequest(f"engine: {error}") from None
        start = time.perf_counter()
        weights = WeightLoader(checkpoint, served, kind, pool, progress).load()
        cache = Cache(config, served, kind, capacity.num_pages, capacity.num_slots)
        model = Model(
            config, weights, list(kept.values()), cache, pool, capacity.max_num_batched_tokens,
            capacity.max_num_seqs, capacity.max_model_len,
        )  # fmt: skip
        logger.info(
            "loaded %s in %.1f s: widths %s, %s, %.0f MB of weights, %s kernels on %d threads, "
            "max_model_len %d, max_num_seqs %d, %d KV pages, %d state slots",
            path_or_hub_id, time.perf_counter() - start, ", ".join(kept), str(kind)[6:],
            weights.nbytes / 1e6, pool.isa, pool.threads, capacity.max_model_len,
            capacity.max_num_seqs, capacity.num_pages, capacity.num_slots,
        )  # fmt: skip
        default = checkpoint.default_width
        return cls(
            model, Tokenizer.from_folder(checkpoint.folder),
            default if default in kept else list(kept)[-1], capacity,
            _generation_config(checkpoint.folder), _eos_ids(checkpoint),
            lambda: checkpoint.fingerprint, max_waiting, mixing,
        )  # fmt: skip

    # -- what it is --------------------------------------------------------------------------

    @property
    def widths(self) -> dict[str, Width]:
        """The widths that can be used, by active parameters, ascending."""
        return self._model.widths

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._tokenizer

    @property
    def max_model_len(self) -> int:
        return self._capacity.max_model_len

    @property
    def capacity(self) -> Capacity:
        """The limits in force."""
        return self._capacity

    @property
    def fingerprint(self) -> str:
        """64 hex digits that tell these weights from others."""
        return self._fingerprint()

    @property
    def closed(self) -> bool:
        return self._closed

    def stats(self) -> dict[str, int]:
        """Counters: requests, passes, tokens read, preemptions, tokens rebuilt by switches; and what
        is in use now."""
        cache, scheduler = self._model.cache, self._scheduler
        return {
            **vars(scheduler.stats),
            "running": len(scheduler.running),
            "waiting": self._worker.waiting,
            "pages_used": cache.pages.used,
            "slots_used": cache.slots.used,
        }

    # -- generating --------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt | list[Prompt],
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        width: str | list[str] | None = None,
        plan: Plan | Callable | list | None = None,
    ) -> Output | list[Output]:
        """Generates and waits.

        Args:
            prompt: text or token ids; a list of prompts gives a list of outputs.
            params: sampling parameters, one for all or one per prompt; None takes the checkpoint's
                generation_config.json.
            width: one width for every token (or a list, one per prompt).
            plan: which width for which token (or a list, one per prompt); not with `width`.

        Returns: an Output, or a list. In a list, a failed prompt has finish_reason "error".

        Raises: InvalidRequest, WidthError, OutOfCapacity; for a single prompt also its own failure.
        """
        if _is_one(prompt):
            return self.submit(prompt, params, plan, width=width).result()
        prompts = list(prompt)
        if not prompts:
            raise InvalidRequest("generate: prompt must be a prompt or a list of them, got []")
        columns = [_per_prompt(n, v, len(prompts)) for n, v in
                   (("params", params), ("plan", plan), ("width", width))]  # fmt: skip
        requests = [
            self._make_request(p, par, pl, w) for p, (par, pl, w) in zip(prompts, zip(*columns))
        ]
        for request in requests:
            self._worker.submit(request)
        for request in requests:
            request._done.wait()
        return [r.output() for r in requests]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        width: str | None = None,
        plan: Plan | Callable | None = None,
    ) -> Iterator[Token]:
        """Generates and yields tokens as they come; the joined texts equal `generate`'s. Leaving the
        loop early cancels the request."""
        request = self.submit(prompt, params, plan, width=width)

        def tokens() -> Iterator[Token]:
            try:
                yield from request
            finally:
                if not request.done:
                    request.cancel()

        return tokens()

    def chat(
        self,
        messages: list[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        width: str | None = None,
        plan: Plan | Callable | None = None,
        tools: list | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Output:
        """Applies the checkpoint's chat template to `messages` ({"role", "content"}) and generates
        the assistant's turn.

        chat_template_kwargs: variables for the template, such as {"enable_thinking": True}.
        """
        return self.submit(
            self.chat_prompt(messages, tools, chat_template_kwargs), params, plan, width=width
        ).result()

    def chat_prompt(
        self,
        messages: list[Mapping[str, Any]],
        tools: list | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of the prompt that `chat` uses."""
        if self._tokenizer is None:
            raise InvalidRequest("chat: the checkpoint must have a tokenizer.json, got none")
        text = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tools=tools, **dict(chat_template_kwargs or {})
        )
        return self._tokenizer.encode(text, add_special_tokens=False)

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        plan: Plan | Callable | None = None,
        *,
        width: str | None = None,
    ) -> Request:
        """Hands a prompt over and returns at once: iterate over the request, wait for `result()`, or
        `cancel()` it.

        Raises: InvalidRequest, WidthError; OutOfCapacity for what can never fit; EngineFull when
            max_waiting requests wait already.
        """
        request = self._make_request(prompt, params, plan, width)
        self._worker.submit(request)
        return request

    def score(self, token_ids: Prompt, *, width: str | None = None) -> torch.Tensor:
        """Float32 logits [T, V] after every token of a prompt read at one width."""
        ids = self._prompt_ids(token_ids)
        width = self.default_width if width is None else width
        self._check_width(width)
        self._check_fits("score", len(ids), 0, 1)

        def job() -> torch.Tensor:
            sequence = self._model.cache.open()
            try:
                return run_read(self._model, sequence, Read(ids, width, "prefill"), "all")
            finally:
                self._model.cache.close(sequence)

        return self._call(job, wait_for_room=True)

    def open(
        self, prompt: Prompt | None = None, *, width: str | None = None, track: bool = True
    ) -> EngineSequence:
        """Opens a sequence to drive by hand: `step`, `width = …`, `fork`, `rollback`, `save`.

        track: narrow steps also update what wider widths need, so that "carry" can widen.
        """
        ids = [] if prompt is None else self._prompt_ids(prompt)
        width = self.default_width if width is None else width
        self._check_width(width)
        self._check_fits("open", len(ids), 0, 1)
        place = self._call(lambda: self._model.cache.open(track=track), wait_for_room=True)
        session = EngineSequence(self, place, width, ids)
        self._sessions.add(session)
        return session

    def load(self, path: str | Path) -> EngineSequence:
        """Opens a sequence that `EngineSequence.save` wrote; it continues bit-equal.

        Raises: CheckpointError for a file of other weights or a damaged one; OutOfCapacity.
        """
        sequence, saved, width, unread, logits = read_sequence(path, self)
        self._check_fits("load", sequence.length + len(unread), 0, 1)
        self._call(lambda: self._model.cache.place(sequence, saved), wait_for_room=True)
        session = EngineSequence(self, sequence, width, unread)
        session._logits = logits
        self._sessions.add(session)
        return session

    def decode(self, token_ids: Sequence[int]) -> str | None:
        """Text of token ids; None without a tokenizer."""
        return self._tokenizer.decode(list(token_ids)) if self._tokenizer else None

    def close(self) -> None:
        """Ends what runs with RequestCancelled, and the worker thread. Using it after is refused."""
        self._closed = True
        self._worker.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # -- checks ------------------------------------------------------------------------------

    def _call(self, job: Callable[[], Any], wait_for_room: bool = False) -> Any:
        return self._worker.call(job, wait_for_room)

    def _make_request(self, prompt, params, plan, width) -> Request:
        ids = self._prompt_ids(prompt)
        if params is None:
            params = SamplingParams.from_generation_config(self._generation_config)
        if not isinstance(params, SamplingParams):
            raise InvalidRequest(f"params: must be SamplingParams, got {type(params).__name__}")
        if width is not None:
            self._check_width(width)
        chosen = as_plan(plan, width, self.default_width)
        heads = {name: w.mamba_num_heads for name, w in self.widths.items()}
        runs = chosen.begin(ids, self._tokenizer, self.widths)
        track = chosen.policy.kind != "exact" and chosen.can_widen(heads)
        seed = random.getrandbits(62) if params.seed is None else params.seed
        request = Request(
            prompt if isinstance(prompt, str) else None, ids, params, chosen, seed, track
        )
        request.branches = [self._branch(request, i, runs.fork()) for i in range(params.n)]
        self._check_fits("generate", len(ids), params.max_tokens, self._scheduler.slots_for(request))
        if len(request.branches) > self._capacity.max_num_seqs:
            raise OutOfCapacity(
                f"generate: n must be at most max_num_seqs {self._capacity.max_num_seqs}, "
                f"got {params.n}"
            )
        if self._max_waiting is not None and self._worker.waiting >= self._max_waiting:
            raise EngineFull(f"engine: at most {self._max_waiting} requests may wait (max_waiting)")
        return request

    def _branch(self, request: Request, index: int, plan_run) -> Branch:
        vocabulary, tags = self.config.vocab_size, ()
        if self._tokenizer is not None:
            pair = (plan_run.plan.start_tag, plan_run.plan.end_tag)
            ids = [self._tokenizer.token_id(t) if isinstance(t, str) else t for t in pair]
            tags = tuple(i for i in ids if i is not None)
        processors = RowProcessors(
            request.params, request.prompt_ids, vocabulary, self._tokenizer, self._eos_ids
        )
        return Branch(request, index, plan_run, processors, self._tokenizer, tags)

    def _lone_branch(self, token_ids: list[int], params: SamplingParams, width: str) -> Branch:
        """A branch outside the scheduler, to sample one token with."""
        plan = Plan.fixed(width)
        seed = random.getrandbits(62) if params.seed is None else params.seed
        request = Request(None, [], params, plan, seed, False)
        return self._branch(request, 0, plan.begin(token_ids, self._tokenizer, self.widths))

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise InvalidRequest(
                    "prompt: must be token ids because the checkpoint has no tokenizer.json, got text"
                )
            prompt = self._tokenizer.encode(prompt)
        self._check_tokens("prompt", prompt)
        return [int(t) for t in prompt]

    def _check_tokens(self, name: str, ids: Sequence[int]) -> None:
        if isinstance(ids, torch.Tensor) or not isinstance(ids, (list, tuple)):
            raise InvalidRequest(f"{name}: must be text or a list of token ids, got {type(ids)}")
        if not ids:
            raise InvalidRequest(f"{name}: must hold at least one token, got none")
        for i, t in enumerate(ids):
            if isinstance(t, bool) or not isinstance(t, int) or not 0 <= t < self.config.vocab_size:
                raise InvalidRequest(
                    f"{name}: token ids must be ints in [0, {self.config.vocab_size}), got {t!r} "
                    f"at position {i}"
                )

    def _check_width(self, name: str) -> None:
        if name not in self.widths:
            raise WidthError(f"width: must be one of {', '.join(self.widths)}, got {name!r}")

    def _check_fits(self, what: str, prompt: int, max_tokens: int | None, slots: int) -> None:
        """Refuses what can never run, with the numbers."""
        c = self._capacity
        if prompt + (0 if what in ("score", "open", "load") else 1) > c.max_model_len:
            raise InvalidRequest(
                f"{what}: prompt must leave room within max_model_len {c.max_model_len}, got "
                f"{prompt} tokens"
            )
        total = min(prompt + (max_tokens or 0), c.max_model_len)
        pages = -(-total // 64) if self._model.cache.k else 0
        if pages > c.num_pages or slots > c.num_slots:
            raise OutOfCapacity(
                f"{what}: {total} tokens need {pages} KV pages and {slots} state slots, the engine "
                f"has {c.num_pages} and {c.num_slots}; lower max_tokens or n, or give it more "
                "kv_cache_memory_bytes"
            )


def served_widths(widths: Mapping[str, Width], max_width: str | None):
    """(widths that can be used, axis-wise maximum of them) when `max_width` is the widest to serve.

    Raises: WidthError for an unknown name.
    """
    if max_width is None:
        return dict(widths), widest(widths)
    if max_width not in widths:
        raise WidthError(f"max_width: must be one of {', '.join(widths)}, got {max_width!r}")
    top = widths[max_width]
    kept = {name: w for name, w in widths.items() if w.fits_in(top)}
    return kept, top


def _check_device(device: str) -> None:
    if device == "cuda" or str(device).startswith("cuda:"):
        raise InvalidRequest(
            f"engine: device must be auto or cpu, this build has no CUDA kernels, got {device!r}"
        )
    if device not in ("auto", "cpu"):
        raise InvalidRequest(f"engine: device must be auto or cpu, got {device!r}")


def _threads(threads: int | None) -> int:
    import os

    if threads is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024:
        raise InvalidRequest(f"engine: threads must be an int in [1, 1024], got {threads!r}")
    return threads


def _generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _eos_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    ids = eos_ids_from_folder(checkpoint.folder)
    return tuple(ids) or checkpoint.config.eos_token_ids


def _is_one(prompt) -> bool:
    """Whether this is one prompt: text, or a list of ints."""
    if isinstance(prompt, str):
        return True
    return isinstance(prompt, (list, tuple)) and bool(prompt) and all(
        isinstance(t, int) for t in prompt
    )


def _per_prompt(name: str, value, count: int) -> list:
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise InvalidRequest(f"{name}: must have one entry per prompt ({count}), got {len(value)}")
    return value
