"""Tokens to be read into a sequence that its caller owns, in the passes that everybody shares."""

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
        logits: "last" (after the last token) or "all".
        done: called on the worker thread with the logits [rows, V] at the end.
        failed: called there with the error instead; when pages ran out, `pending` holds what is
            left and the sequence can be read on.
    """

    def __init__(
        self,
        sequence: Sequence,
        pending: list[Read],
        logits: str = "last",
        done: Callable[[torch.Tensor], None] | None = None,
        failed: Callable[[BaseException], None] | None = None,
    ):
        self.sequence, self.pending, self.logits = sequence, pending, logits
        self.promise = Promise()
        self.waited = 0
        self._done, self._failed = done, failed
        self._rows: list[torch.Tensor] = []

    @property
    def ready(self) -> bool:
        """True if it has tokens to read and a place in the cache."""
        return bool(self.pending) and self.sequence.slot >= 0

    def take(self, rows: torch.Tensor) -> None:
        """Keeps logits of a pass; they are copied to host memory."""
        self._rows.append(rows.to("cpu", copy=True))

    def finish(self) -> None:
        """Ends it with its logits, once nothing is pending."""
        try:
            rows = self._rows[0] if len(self._rows) == 1 else torch.cat(self._rows)
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
