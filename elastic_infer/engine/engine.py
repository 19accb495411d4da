"""The public object: an elastic checkpoint that generates at any of its widths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence as Seq
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.widths import Width
from ..errors import EngineFull, InvalidRequest, OutOfCapacity, shown
from ..outputs import Output
from ..plans.decision import ChatPrompt
from ..plans.plan import Plan
from ..public import public
from ..sampling.params import SamplingParams
from ..scheduling.reader import Reader
from ..scheduling.reads import Read
from ..scheduling.request import Request, Stream
from ..showing import count_text, name_text, names_text, one_line, size_text
from ..sizing.capacity import Capacity, free_memory
from ..text.stream import StepText
from ..text.tokenizer import Tokenizer
from ..torch_modes import plain_torch
from .core import Core, check_queue
from .intake import Prompt, is_one_prompt, one_per_prompt
from .loading import Loaded, Options, load
from .sequence_file import read_sequence
from .session import EngineSequence


@public
class Engine:
    """One checkpoint, loaded once, that serves all of its widths. See `from_pretrained`.

    Every method can be called from any thread; calls from several threads share batches. Nothing
    runs before the first request. Use it in a `with`, or `close()` it.
    """

    def __init__(
        self,
        loaded: Loaded,
        max_waiting: int | None = None,
        mixing: str = "auto",
        async_scheduling: bool = True,
    ):
        """Use `from_pretrained`."""
        self.core = Core(loaded, max_waiting, mixing, async_scheduling)
        self.config, self.default_width = self.core.config, self.core.default_width

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
        kv_cache_dtype: str = "auto",
        mamba_ssm_cache_dtype: str = "auto",
        widths: str | Path | Mapping[str, Any] | None = None,
        mixing: str = "auto",
        isa: str = "auto",
        batch_invariant: bool = False,
        enforce_eager: bool = False,
        activation_quantization: str = "none",
        async_scheduling: bool = True,
        progress: Callable[[str, int], None] | None = None,
    ) -> Engine:
        """Loads a `nemotron_h` checkpoint.

        Args:
            path_or_hub_id: folder, or ``owner/name`` on the Hub.
            revision: branch, tag or commit of a Hub id.
            device: "auto" (the first GPU if this build has CUDA kernels and it can be used, else
                the CPU), "cpu", "cuda" or "cuda:N".
            dtype: "auto" (as stored), "float32" or "bfloat16".
            max_width: widest width to serve; nothing beyond it is read or kept.
            max_model_len: tokens of a sequence, prompt and output; None = the model's context.
            max_num_seqs: sequences in the cache at once; more requests wait.
            max_num_batched_tokens: tokens of one pass; long prompts are cut into several.
            kv_cache_memory_bytes: memory of KV pages and states together; None = at most half of
                the free memory, on a GPU the rest that gpu_memory_utilization leaves.
            gpu_memory_utilization: share of a GPU's memory to use, memory in use already included.
            threads: CPU threads; None = all that this process may use.
            max_waiting: requests that may wait; None = any number. A signal handler's requests
                are not counted against a `submit` that it interrupts.
            kv_cache_dtype: of keys and values: "auto" (the model's dtype) or "fp8" (E4M3).
            mamba_ssm_cache_dtype: of the Mamba state: "float32", "float16" (rounded
                stochastically), or "auto" (as config.json says, else float32).
            widths: width table as a dict, or a JSON file's path.
            mixing: "auto", "always" or "never": sharing of a pass by rows of different widths.
            isa: instruction set of the CPU kernels: "auto", "portable", "avx2" or "avx512".
            batch_invariant: demand that results of a row do not depend, to the bit, on what shares
                its batch, nor on how prompts are cut into passes. On a CPU they never do; on a
                GPU they do without it, and it costs speed with few rows (docs/design/cuda.md).
            enforce_eager: on a GPU, launch the kernels of every pass one by one, without graphs.
            activation_quantization: form of activations in products with NVFP4 weights:
                "none"; "int8" on a CPU: 16 values at a time become 8-bit integers, faster and a
                little less exact; "nvfp4" on GPUs of compute capability 12.x, never run on one.
            async_scheduling: on a GPU, launch a pass of decode steps before the tokens of the one
                before it are read out, where these cannot change what it reads. A row that has
                ended may then share one more pass, as in any batch. No effect on a CPU.
            progress: called with (tensor name, bytes) for every tensor read.

        Raises:
            CheckpointError: the folder cannot be used.
            WidthError: `max_width` is unknown.
            InvalidRequest: an option is out of range, or cannot be used here.
            OutOfCapacity: weights and cache do not fit.
        """
        # Every option of loading is an argument of this call, by the same name.
        given = locals()
        options = Options(**{field.name: given[field.name] for field in fields(Options)})
        check_queue(max_waiting, mixing, async_scheduling)
        loaded = load(path_or_hub_id, revision, widths, options)
        return cls(loaded, max_waiting, mixing, async_scheduling)

    # -- what it is --------------------------------------------------------------------------

    @one_line
    def __repr__(self) -> str:
        core = self.core
        name = name_text(core.checkpoint.name)
        if self.closed:
            return f"Engine({name}, closed)"
        return (
            f"Engine({name}, widths {names_text(list(self.widths), ' < ')}, "
            f"{size_text(core.model.weights.nbytes)}, "
            f"{count_text(core.capacity.max_num_seqs, 'sequence')})"
        )

    @property
    def widths(self) -> dict[str, Width]:
        """The widths that can be used, by active parameters, ascending."""
        return self.core.widths

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.core.tokenizer

    @property
    def default_params(self) -> SamplingParams:
        """Sampling parameters that `params=None` stands for: the checkpoint's own."""
        return self.core.intake.default_params

    @property
    def max_model_len(self) -> int:
        return self.core.max_model_len

    @property
    def capacity(self) -> Capacity:
        """The limits in force."""
        return self.core.capacity

    @property
    def fingerprint(self) -> str:
        """64 hex digits that tell these weights from others."""
        return self.core.fingerprint

    @property
    def closed(self) -> bool:
        return self.core.worker.closed

    def stats(self) -> dict[str, int]:
        """Counters: requests, passes, how many of these were launched ahead of the tokens before
        them, tokens read, preemptions, tokens rebuilt by switches; and what is in use now."""
        cache, scheduler = self.core.model.cache, self.core.scheduler
        return {
            **vars(scheduler.stats),
            "running": len(scheduler.running),
            "waiting": self.core.worker.waiting,
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

        Returns:
            An Output, or a list. In a list, a failed prompt has finish_reason "error".

        Raises:
            InvalidRequest: a wrong argument.
            WidthError: a width that is not served.
            OutOfCapacity: a request that can never fit.
            ElasticError: for a single prompt, its own failure.
        """
        if is_one_prompt(prompt):
            return self._generate(self.core.intake.request(prompt, params, plan, width))
        prompts = list(prompt)
        waiting = self.core.max_waiting
        if waiting is not None and len(prompts) > waiting + self.core.capacity.max_num_seqs:
            raise EngineFull(
                f"engine: at most max_waiting = {waiting} requests may wait, got {len(prompts)} "
                "prompts; give fewer at a time"
            )
        columns = [
            one_per_prompt(n, v, len(prompts))
            for n, v in (("params", params), ("plan", plan), ("width", width))
        ]
        requests = [
            self.core.intake.request(p, *options) for p, options in zip(prompts, zip(*columns))
        ]
        try:
            self._submit(requests)
            return [r.wait() for r in requests]
        finally:
            _cancel(requests)

    def _generate(self, request: Request) -> Output:
        try:
            self._submit([request])
            return request.result()
        finally:
            _cancel([request])

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        width: str | None = None,
        plan: Plan | Callable | None = None,
    ) -> Stream:
        """Generates and yields tokens as they come; the joined texts equal `generate`'s. Leaving
        the loop early, closing or dropping the stream, also before its first token, cancels the
        request."""
        return Stream(self.submit(prompt, params, plan, width=width))

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
        """Applies the checkpoint's chat template and generates the assistant's turn.

        Args:
            messages: dicts with "role" and "content", oldest first.
            params: sampling parameters; None = the checkpoint's generation_config.json.
            width: one width for every token; None = the checkpoint's default.
            plan: a width for each token; not with `width`.
            tools: JSON schemas of tools, for the template.
            chat_template_kwargs: arguments and variables of `Tokenizer.apply_chat_template`, such
                as {"enable_thinking": True}, or {"continue_final_message": True} to go on with the
                last message.
        """
        prompt = self.chat_prompt(messages, tools, chat_template_kwargs)
        return self._generate(self.core.intake.request(prompt, params, plan, width))

    def chat_prompt(
        self,
        messages: list[Mapping[str, Any]],
        tools: list | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of the prompt that `chat` uses. `generate` knows of these where the messages
        end: think tags that a message quotes say nothing about the phase."""
        if self.core.tokenizer is None:
            raise InvalidRequest("chat: the checkpoint must have a tokenizer.json, got none")
        text, start = self.core.tokenizer.chat_text(messages, tools, chat_template_kwargs)
        ids = self.core.intake.encode("chat", text, add_special_tokens=False)
        return ChatPrompt(ids, self.core.tokenizer.encode(text[start:], add_special_tokens=False))

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        plan: Plan | Callable | None = None,
        *,
        width: str | None = None,
    ) -> Request:
        """Hands a prompt over and returns at once: iterate over the request, wait for `result()`,
        or `cancel()` it.

        Raises:
            InvalidRequest, WidthError: for wrong arguments.
            OutOfCapacity: for a request that can never fit.
            EngineFull: when max_waiting requests wait already.
        """
        request = self.core.intake.request(prompt, params, plan, width)
        self._submit([request])
        return request

    def _submit(self, requests: list[Request]) -> None:
        for request in requests:
            request.keep_alive(self.core)
        self.core.worker.submit(requests)

    def score(self, token_ids: Prompt, *, width: str | None = None) -> torch.Tensor:
        """Float32 logits [T, V] after every token of a prompt read at one width.

        Raises: InvalidRequest, WidthError; OutOfCapacity for logits beyond free memory.
        """
        ids, width = self._checked("score", self.core.intake.prompt_ids(token_ids), width)
        logits = _room_for_logits(len(ids), self.config.vocab_size)

        def job() -> Reader:
            sequence = self.core.open_slot(False)

            def give_back(_) -> None:
                self.core.model.cache.close(sequence)

            return Reader(sequence, [Read(ids, width, "prefill")], logits, give_back, give_back)

        return self.core.call(job, wait_for_room=True)

    def open(
        self, prompt: Prompt | None = None, *, width: str | None = None, track: bool = True
    ) -> EngineSequence:
        """Opens a sequence to drive by hand: `step`, `width = …`, `fork`, `rollback`, `save`.

        Args:
            prompt: text or token ids to begin with; None = empty.
            width: width of the first tokens; None = the checkpoint's default.
            track: narrow steps also update what wider widths need, so that "carry" can widen.
        """
        if not isinstance(track, bool):
            raise InvalidRequest(f"open: track must be True or False, got {shown(track)}")
        ids = [] if prompt is None else self.core.intake.prompt_ids(prompt)
        ids, width = self._checked("open", ids, width)

        def job() -> EngineSequence:
            return EngineSequence(self.core, self.core.open_slot(track), width, ids)

        return self.core.call(job, wait_for_room=True)

    def _checked(self, what: str, ids: list[int], width: str | None) -> tuple[list[int], str]:
        width = self.default_width if width is None else width
        self.core.intake.check_width(width)
        self.core.intake.check_fits(what, len(ids), 0, 1)
        return ids, width

    def load(self, path: str | Path) -> EngineSequence:
        """Opens a sequence that `EngineSequence.save` wrote; it continues bit-equal.

        Raises:
            CheckpointError: a file of other weights, or a damaged one.
            OutOfCapacity: a sequence that does not fit.
        """
        self.core.worker.check_caller()
        with plain_torch():
            sequence, saved, width, unread, logits = read_sequence(path, self.core)
        self.core.intake.check_fits("load", sequence.length + len(unread), 0, 1)

        text = StepText(self.core.tokenizer, sequence.tokens + unread)

        def job() -> EngineSequence:
            self.core.scheduler.claim_slots()
            self.core.model.cache.place(sequence, saved)
            session = EngineSequence(self.core, sequence, width, unread, text)
            session._logits = logits
            return session

        return self.core.call(job, wait_for_room=True)

    def decode(self, token_ids: Seq[int]) -> str | None:
        """Text of token ids; None without a tokenizer."""
        if isinstance(token_ids, (str, bytes)) or not isinstance(token_ids, Iterable):
            raise InvalidRequest(f"decode: token_ids must be a list, got {shown(token_ids)}")
        return self.core.tokenizer.decode(list(token_ids)) if self.core.tokenizer else None

    def close(self) -> None:
        """Ends what runs with RequestCancelled, and the worker thread; using it after is refused.

        An engine that is garbage-collected, or open when Python ends, is closed too; a request
        that has not ended keeps its engine.
        """
        self.core.worker.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _cancel(requests: list[Request]) -> None:
    """Cancels what has not ended: the caller was interrupted, and they have no other."""
    for request in requests:
        if not request.done:
            request.cancel()


def _room_for_logits(tokens: int, vocabulary: int) -> torch.Tensor:
    """Host memory for the logits [tokens, vocabulary] of a score.

    Raises: OutOfCapacity when there is not so much.
    """
    needed, free = 4 * tokens * vocabulary, free_memory()
    with suppress(RuntimeError, MemoryError), plain_torch():
        if needed <= free:
            return torch.empty(tokens, vocabulary, device="cpu", dtype=torch.float32)
    raise OutOfCapacity(
        f"score: logits of {tokens} tokens need {needed} bytes of memory, free {free}; score "
        "fewer tokens at a time"
    )
