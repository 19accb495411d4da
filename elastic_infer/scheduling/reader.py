"""Tokens to be read into a sequence that its caller owns, in the passes that all requests share."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..cache.sequence import Sequence
from ..errors import OutOfCapacity, RequestCancelled
from .promise import Promise
from .reads import Read


class Reader:
    """Reads that the scheduler makes for a sequence it does not own: it is never preempted.

    Args:
        sequence: with a place in the cache.
        pending: what is to be read, in order; emptied as it is.
        room: None for the logits after the last token; else those after every token are written
            there, a float32 tensor [tokens, V] on the host.
        done: called on the worker thread with the logits [rows, V] at the end.
        failed: called there with the error instead; when pages ran out, `pending` holds what is
            left and the sequence can be read on.
    """

    def __init__(
        self,
        sequence: Sequence,
        pending: list[Read],
        room: torch.Tensor | None = None,
        done: Callable[[torch.Tensor], None] | None = None,
        failed: Callable[[BaseException], None] | None = None,
    ):
        self.sequence, self.pending = sequence, pending
        self.logits = "last" if room is None else "all"
        self.promise = Promise()
        self.waited = 0
        self._done, self._failed = done, failed
        self._room, self._rows = room, 0

    @property
    def ready(self) -> bool:
        """True if it has tokens to read and a place in the cache."""
        return bool(self.pending) and self.sequence.slot >= 0

    def take(self, rows: torch.Tensor) -> None:
        """Keeps logits of a pass; they are copied to host memory."""
        if self.logits == "last":
            self._room = rows.to("cpu", copy=True)
            return
        self._room[self._rows : self._rows + len(rows)] = rows
        self._rows += len(rows)

    def finish(self) -> None:
        """Ends it with its logits, once nothing is pending."""
        try:
            rows = self._room
            if self._done:
                self._done(rows)
        except BaseException as error:  # the caller waits, whatever comes in between
            self.fail(error)
            raise
        self.promise.set(rows)

    def fail(self, error: BaseException) -> None:
        """Ends it with an error."""
        try:
            if self._failed:
                self._failed(error)
        finally:
            self.promise.fail(error)


def state_is_lost(error: BaseException) -> bool:
    """True if a sequence may be half updated after this: anything but a lack of pages and a
    cancellation, which come between two passes."""
    return not isinstance(error, (OutOfCapacity, RequestCancelled))
