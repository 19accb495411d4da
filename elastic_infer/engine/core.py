"""The parts that an engine and its sequences stand on."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from ..cache.sequence import Sequence
from ..checkpoint.counts import count_parameters
from ..checkpoint.widths import Width
from ..scheduling.batching import Limits, StepCosts, check_mixing
from ..scheduling.scheduler import Scheduler
from ..torch_modes import plain_torch
from ..value_checks import check_int
from .intake import Intake
from .loading import Loaded, check_switch
from .worker import Worker


class Core:
    """One loaded model with its cache, the scheduler over it, and the one thread that runs both.

    Attributes:
        model: weights, cache and buffers.
        tokenizer: of the checkpoint, None without one.
        checkpoint: the open folder.
        capacity: limits that the cache was made for.
        config: sizes of the checkpoint.
        default_width: runs where a call names no width.
        intake: checks calls.
        scheduler: owned by the worker's thread; reach it through `call`.
        max_waiting: requests that may wait.
    """

    def __init__(
        self, loaded: Loaded, max_waiting: int | None, mixing: str, async_scheduling: bool
    ):
        check_queue(max_waiting, mixing, async_scheduling)
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.checkpoint, self.capacity = loaded.checkpoint, loaded.capacity
        self.config, self.default_width = loaded.model.config, loaded.default_width
        self.max_waiting = max_waiting
        self.intake = Intake(
            self.config,
            self.widths,
            self.default_width,
            self.tokenizer,
            self.capacity,
            loaded.generation_config,
            loaded.eos_ids,
        )
        active = [float(count_parameters(self.config, w).active) for w in self.widths.values()]
        most = self.capacity.max_num_seqs
        limits = Limits(self.capacity.max_num_batched_tokens, most)
        with plain_torch():
            self.scheduler = Scheduler(
                self.model,
                loaded.eos_ids,
                limits,
                StepCosts(active),
                mixing,
                most,
                async_scheduling,
            )
        self.worker = Worker(self.scheduler, max_waiting)
        # An engine that is dropped, or still open when Python ends, stops its thread. Requests that
        # have not ended and open sequences keep the core alive.
        weakref.finalize(self, self.worker.close)

    @property
    def widths(self) -> dict[str, Width]:
        """The widths that can be used, by active parameters, ascending."""
        return self.model.widths

    @property
    def fingerprint(self) -> str:
        """64 hex digits that tell these weights from others."""
        return self.checkpoint.fingerprint

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence, prompt and output."""
        return self.capacity.max_model_len

    def call(self, job: Callable[[], Any], wait_for_room: bool = False) -> Any:
        """Runs a job between two passes on the worker's thread; see `Worker.call`."""
        return self.worker.call(job, wait_for_room)

    def open_slot(self, track: bool) -> Sequence:
        """On the worker's thread: a new sequence with a place in the cache."""
        self.scheduler.claim_slots()
        return self.model.cache.open(track)


def check_queue(max_waiting: object, mixing: str, async_scheduling: object) -> None:
    """Raises InvalidRequest for options of the scheduler that there are none of."""
    check_int("engine: max_waiting", max_waiting, 0, optional=True)
    check_mixing(mixing)
    check_switch("async_scheduling", async_scheduling)
