"""Small engines for tests, with and without text."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from elastic_infer import ElasticError, SamplingParams
from elastic_infer.engine.engine import Engine
from elastic_infer.model.batch import Segment
from elastic_infer.scheduling.batching import chunk_length
from elastic_infer.scheduling.reads import Read
from elastic_infer.sizing.capacity import Capacity
from support import tiny

# Token ids of the byte-level vocabulary of `text_engine`; the byte b is token b.
THINK, END_THINK, EOS = 256, 257, 258
HANG = 120  # seconds after which a test says that something hangs; no verdict depends on it
TEXT_VOCABULARY = 272  # a few ids beyond the tokenizer's, as padded models have


def tiny_engine(
    folder: Path, seed: int = 0, dtype=torch.float32, config=None, widths=None, **limits
) -> Engine:
    """An engine on a random tiny checkpoint; limits as of `Engine.from_pretrained`."""
    config = config or tiny.tiny_config(seed)
    widths = tiny.tiny_widths(config, seed) if widths is None else widths
    tiny.write_tiny(folder, config, widths, dtype, seed)
    return open_engine(folder, **limits)


def open_engine(folder: Path, **limits) -> Engine:
    """An engine on a folder, with limits that suit tests."""
    given = {
        "max_model_len": 512,
        "max_num_seqs": 16,
        "threads": 2,
        "kv_cache_memory_bytes": 64 << 20,
        **limits,
    }
    return Engine.from_pretrained(folder, **given)


def base_config(**overrides):
    """One fixed model with every kind of layer and unaligned sizes."""
    sizes = {
        "hybrid_override_pattern": "ME*M-E",
        "hidden_size": 112,
        "vocab_size": 130,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 32,
        "n_groups": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 80,
        "intermediate_size": 144,
        "moe_shared_expert_intermediate_size": 96,
        "max_position_embeddings": 512,
    }
    return tiny.tiny_config(7, **{**sizes, **overrides})


def base_widths():
    """Three widths of `base_config` that differ on every axis."""
    return {
        "version": 1,
        "default_width": "L",
        "widths": {
            "L": {},
            "M": {
                "hidden_size": 80,
                "mamba_num_heads": 6,
                "num_attention_heads": 6,
                "n_routed_experts": 5,
                "moe_intermediate_size": 48,
                "intermediate_size": 96,
                "moe_shared_expert_intermediate_size": 64,
            },
            "S": {
                "hidden_size": 48,
                "mamba_num_heads": 4,
                "num_attention_heads": 4,
                "n_routed_experts": 4,
                "moe_intermediate_size": 32,
                "intermediate_size": 48,
                "moe_shared_expert_intermediate_size": 32,
            },
        },
    }


def base_engine(folder: Path, **limits):
    """An engine on the fixed model."""
    return tiny_engine(folder, 7, config=base_config(), widths=base_widths(), **limits)


def sized_engine(folder: Path, pages: int, slots: int, max_num_seqs: int, **limits) -> Engine:
    """An engine on the fixed model whose cache has exactly so many pages and slots."""

    def fixed(config, served, dtype, *, max_model_len, **_):
        return Capacity(max_model_len, max_num_seqs, 128, pages, slots)

    with mock.patch("elastic_infer.engine.loading.plan_capacity", fixed):
        return base_engine(folder, **limits)


def write_text_model(folder: Path, **files) -> Path:
    """The fixed model with a byte-level vocabulary, think tags that are not special, and an end
    token. files: further JSON files of the folder, by name without ".json"."""
    config = base_config(vocab_size=TEXT_VOCABULARY, eos_token_id=EOS)
    tiny.write_tiny(folder, config, base_widths(), seed=7)
    byte_of = {c: b for b, c in enumerate(_byte_alphabet())}
    backend = tokenizers.Tokenizer(models.BPE(vocab=byte_of, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    plain = [AddedToken(text, normalized=False, special=False) for text in ("<think>", "</think>")]
    backend.add_tokens(plain)
    backend.add_special_tokens([AddedToken("<|end|>", normalized=False, special=True)])
    backend.save(str(folder / "tokenizer.json"))
    named = {
        "eos_token": "<|end|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }
    for name, value in {"tokenizer_config": named, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if tools %}tools:{{ tools | tojson }}\n{% endif %}"
    "{% if add_generation_prompt %}[assistant]"
    "{{ '<think>' if enable_thinking | default(true) else '<think></think>' }}{% endif %}"
)


def _byte_alphabet() -> list[str]:
    """The character of a byte-level vocabulary that stands for each byte."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = iter(range(0x100, 0x200))
    return [chr(b) if b in shown else chr(next(hidden)) for b in range(256)]


def text_engine(folder: Path, files: dict | None = None, **limits):
    """An engine on the fixed model with text."""
    return open_engine(write_text_model(folder, **(files or {})), **limits)


def script(tokens):
    """A logits processor that makes the model say these tokens (ids, or text as bytes), then its
    end token."""
    ids = list(tokens.encode()) if isinstance(tokens, str) else list(tokens)

    def say(token_ids, row, phase):
        at = len(token_ids)
        row[:] = -torch.inf
        row[ids[at] if at < len(ids) else EOS] = 0.0

    return say


def run_read(model, sequence, read: Read, logits: str = "last") -> torch.Tensor:
    """Makes one read pass by pass, with nobody beside it; its logits [rows, V] after the last
    token, or after all of them."""
    rows, left = [], read.tokens
    while left:
        n = 1
        if read.kind == "prefill":
            n = chunk_length(sequence.length, len(left), model.max_num_batched_tokens)
        wanted = logits if logits == "all" or n == len(left) else "none"
        result = model.forward([Segment(sequence, left[:n], read.width, read.kind, wanted)])
        if wanted != "none":
            rows.append(result.of(0).clone())
        left = left[n:]
    return torch.cat(rows)


def draw(count: int, seed: int = 0, vocabulary: int = 130) -> list[int]:
    """Random token ids that are no special ones of `base_config`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (count,), generator=generator).tolist()


class Held:
    """An engine that runs no pass but those that `step` asks for. Arrivals, jobs and cancellations
    go on, so that a test says what lies in the queue before the scheduler decides."""

    def __init__(self, engine: Engine):
        self._engine, self._worker = engine, engine.core.worker
        self._allow(0)

    def _allow(self, passes: float) -> None:
        self._engine.core.call(lambda: setattr(self._worker, "passes_left", passes))

    def step(self, passes: int = 1) -> int:
        """Runs so many passes, or fewer where there is nothing left to run; returns how many."""
        self._allow(passes)
        before = passes
        # Every job is followed by an attempt at a pass: no fewer are left, so none could run.
        while (left := self._engine.core.call(lambda: self._worker.passes_left)) not in (0, before):
            before = left
        self._allow(0)
        return passes - left

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits until a condition holds between two passes, as when calls of other threads have
        reached the engine."""
        end = time.monotonic() + HANG
        while not self._engine.core.call(condition):
            assert time.monotonic() < end, "hang"

    def arrived(self, requests: int = 0, readers: int = 0) -> None:
        """Waits until so many requests wait for their first pass, and so many readers."""
        scheduler = self._engine.core.scheduler
        self.until(lambda: (len(scheduler.waiting), len(scheduler.readers)) == (requests, readers))

    def release(self) -> None:
        """Lets passes run again."""
        self._allow(math.inf)


@contextmanager
def held(engine: Engine) -> Iterator[Held]:
    """Keeps an engine between two passes; releases it at the end."""
    hold = Held(engine)
    try:
        yield hold
    finally:
        if not engine.closed:
            hold.release()


def in_threads(*calls: Callable[[], object]) -> Callable[[], list]:
    """Starts every call on a thread of its own. What is returned waits for all of them and gives
    their results, raising the first error."""
    pool = ThreadPoolExecutor(len(calls))
    started = [pool.submit(call) for call in calls]
    pool.shutdown(wait=False)
    return lambda: [each.result(HANG) for each in started]


NEIGHBOUR = SamplingParams(
    temperature=0.9, seed=3, ignore_eos=True, repetition_penalty=1.1, max_tokens=9
)


def beside(engine, prompt="a", params=None, plan=None):
    """Runs a request in the same passes as a neighbour, whose tokens must not change.

    Returns: what the request's caller got: its error or its output.
    """
    alone = engine.generate("neighbour", NEIGHBOUR).token_ids
    with held(engine):
        good = engine.submit("neighbour", NEIGHBOUR)
        try:
            bad = engine.submit(prompt, params, plan)
        except ElasticError as error:
            bad = error
    output = good.result(60)
    assert output.token_ids == alone and output.finish_reason == "length"
    assert not engine.closed
    if isinstance(bad, Exception):
        return bad
    output = bad.wait(60)
    return bad.error or output


def assert_all_free(engine: Engine) -> None:
    """Nothing is left in the cache: every page and slot is free, with no reference to it."""
    cache = engine.core.model.cache
    engine.core.call(lambda: None)  # whatever was asked for before has been done then
    for pool in (cache.pages, cache.slots):
        assert pool.used == 0 and sorted(pool._free) == list(range(pool.size)), pool.name
        assert not any(pool._references), pool.name
    stats = engine.stats()
    assert stats["running"] == stats["waiting"] == 0
