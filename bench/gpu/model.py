"""A whole model of given sizes on the device, with random weights that are made there."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bench.common.models import draw_values, tensor_specs
from bench.gpu.setting import Setting
from bench.gpu.shapes import model_of
from bench.gpu.timing import free_bytes
from elastic_infer.cache.cache import Cache
from elastic_infer.cache.pages import PAGE, pages_for
from elastic_infer.cache.sequence import Sequence
from elastic_infer.checkpoint.config import ModelConfig
from elastic_infer.checkpoint.counts import kv_bytes_per_token
from elastic_infer.checkpoint.widths import Width, widest
from elastic_infer.codes import dtype_name
from elastic_infer.device.device import Device
from elastic_infer.model.batch import Segment
from elastic_infer.model.loader import WeightLoader
from elastic_infer.model.model import Model
from elastic_infer.sizing.capacity import slot_bytes
from elastic_infer.sizing.footprint import weight_bytes

DTYPE = torch.bfloat16
SPARE = 3 << 30  # bytes for activations, the loader's pieces and the roof's buffers


class RandomCheckpoint:
    """A checkpoint for the loader, with values drawn on the device when they are asked for:
    nothing is on a disk, and no more than one tensor at a time exists beside its tiles."""

    formats: dict[str, str] = {}  # noqa: RUF012  (what a checkpoint offers: nothing is quantized)
    quantized: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, config: ModelConfig, data: dict[str, Any], device: torch.device):
        self.config = config
        self._specs = {spec.name: spec for spec in tensor_specs(data, DTYPE)}
        self._generator = torch.Generator(device).manual_seed(0)

    def tensor(self, name: str, rows=None, cols=None) -> torch.Tensor:
        """Rows and columns of tensor `name`, each a slice, a list of indices or None."""
        spec = self._specs[name]
        sizes = [_kept(n, axis) for n, axis in zip(spec.shape, (rows, cols, *spec.shape[2:]))]
        return draw_values(spec.kind, tuple(sizes), spec.dtype, self._generator)

    def kv_factor(self, layer: int, kind: str) -> float | None:
        """No factors of a cache are stored."""
        return None

    def format_of(self, name: str) -> str:
        """The dtype's name: nothing here is quantized."""
        return dtype_name(self._specs[name].dtype)


def _kept(size: int, axis) -> int:
    if isinstance(axis, slice):
        return len(range(*axis.indices(size)))
    return len(axis) if isinstance(axis, list) else size


def cache_bytes(config: ModelConfig, served: Width, batch: int, length: int) -> int:
    """Bytes of the cache of `batch` sequences of `length` tokens."""
    pages = pages_for(length) * PAGE * kv_bytes_per_token(config, DTYPE.itemsize)
    return batch * (slot_bytes(config, served, DTYPE) + pages)


def fits(setting: Setting, data: dict[str, Any], batch: int, length: int) -> int:
    """Bytes that a model and its cache lack on this device; 0 if they fit."""
    config, widths = model_of(data)
    served = widest(widths)
    need = weight_bytes(config, served, DTYPE) + cache_bytes(config, served, batch, length)
    return max(0, need + SPARE - free_bytes(setting))


class Loaded:
    """A model with a cache for `batch` sequences of up to `length` tokens, its content random: a
    step costs what it costs after that many tokens, without reading them first.

    rows: of the largest pass. graphs: whether passes of steps are captured.
    """

    def __init__(
        self, setting: Setting, module, data: dict[str, Any], batch: int, length: int, rows: int = 0
    ):
        self.setting, self.module = setting, module
        self.batch, self.length, self.rows = batch, length, max(rows, batch)
        self.config, self.widths = model_of(data)
        self.served = widest(self.widths)
        self.device = Device("emulated" if setting.emulate else "cuda:0")
        self.pool = module.Pool()
        with self.device.running():
            checkpoint = RandomCheckpoint(self.config, data, self.device.place)
            loader = WeightLoader(checkpoint, self.served, DTYPE, self.pool, None, self.device)
            self.weights = loader.load()
            pages = batch * pages_for(length) + 1
            self.cache = Cache(self.config, self.served, DTYPE, pages, batch + 1, self.device)
            for pool in (self.cache.k, self.cache.v, self.cache.conv):
                for tensor in pool:
                    tensor.normal_()
            self.model = self.variant()
            self.device.wait()
        self._random = random.Random(0)

    def variant(self, graphs: bool = True, dependent_launch: bool = False) -> Model:
        """A model over the same weights and cache."""
        return Model(
            self.config,
            self.weights,
            list(self.widths.values()),
            self.cache,
            self.pool,
            max_num_batched_tokens=self.rows,
            max_num_seqs=self.batch,
            max_length=self.length,
            device=self.device,
            graphs=graphs,
            dependent_launch=dependent_launch,
        )

    @contextmanager
    def sequences(
        self, count: int, context: int, width: str, track: bool = False
    ) -> Iterator[list]:
        """Open sequences with `context` tokens, as if `width` had read them."""
        opened: list[Sequence] = []
        with self.device.running():
            try:
                for _ in range(count):
                    sequence = self.cache.open(track=track)
                    opened.append(sequence)
                    self.cache.reserve(sequence, context)
                    self.cache.advance(sequence, [0] * context, width, "prefill")
                yield opened
            finally:
                self.device.wait()
                for sequence in opened:
                    self.cache.close(sequence)

    def tokens(self, count: int) -> list[int]:
        """Random token ids."""
        vocabulary = self.config.vocab_size
        return [self._random.randrange(vocabulary) for _ in range(count)]

    def step(self, opened: list[Sequence], widths: list[str], model: Model | None = None) -> None:
        """One token of each sequence, at each one's width; logits stay on the device."""
        ids = self.tokens(len(opened))
        (model or self.model).forward(
            [Segment(s, [token], w) for s, token, w in zip(opened, ids, widths)]
        )

    def prefill(self, sequence: Sequence, count: int, width: str) -> None:
        """Reads `count` random tokens, in passes of at most `rows`; logits of the last."""
        ids = self.tokens(count)
        for start in range(0, count, self.rows):
            part = ids[start : start + self.rows]
            wanted = "last" if start + self.rows >= count else "none"
            self.model.forward([Segment(sequence, part, width, "prefill", wanted)])

    def replay(self, batch: int):
        """The recorded pass of `batch` steps alone, without what the host does before it."""
        return self.model._recorded[self.model.recorded_size(batch)].run

    def distinct_experts(self, rows: int) -> float:
        """Experts that the rows of the last pass named, in its last mixture."""
        return float(len(self.model.buffers.expert_ids[:rows].unique()))
