"""A result that one thread owes to others, kept so that no interrupt can break it."""

from __future__ import annotations

import time
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

_Item = TypeVar("_Item")

# Seconds. Python does not see a signal that comes when a wait has begun in Python's eyes and not
# yet in the system's; so every wait is looked after again.
_LOOK = 0.5


def take(queue: SimpleQueue[_Item]) -> _Item:
    """Waits for the next item of a queue; a signal that comes meanwhile is handled."""
    while True:
        try:
            return queue.get(timeout=_LOOK)
        except Empty:
            pass


class Promise:
    """A value or an error that is set once; any number of threads wait for it.

    `threading.Event`, `Condition` and `Future` take their locks in Python code: a KeyboardInterrupt
    or a signal handler in between leaves them half held. Here every waiter brings a queue of its
    own, and each operation that matters is one call into C.

    Attributes:
        done: True if it is set.
        abandoned: True if the thread that asked for it went away.
    """

    __slots__ = ("__weakref__", "_alarms", "_error", "_value", "abandoned", "done")

    def __init__(self) -> None:
        self.done = self.abandoned = False
        self._value: Any = None
        self._error: BaseException | None = None
        self._alarms: list[SimpleQueue] = []

    def set(self, value: Any = None) -> None:
        """Gives the value; one that is not waited for any more is dropped at once."""
        self._value = value
        del value  # from here on it is the waiter's alone
        self._wake()

    def fail(self, error: BaseException) -> None:
        """Gives an error instead."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        self.done = True
        if self.abandoned:
            self._value = None
        for alarm in self._alarms.copy():
            alarm.put(None)

    def abandon(self) -> None:
        """Says that the value is not wanted: it is dropped, now or when it comes."""
        self.abandoned = True
        self._value = None

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until it is set, for at most `timeout` seconds. True if it is."""
        until = None if timeout is None else time.monotonic() + timeout
        while not self.done:
            alarm: SimpleQueue = SimpleQueue()
            self._alarms.append(alarm)  # before the second look, so that no setting is missed
            try:
                if not self.done:
                    left = _LOOK if until is None else max(0.0, until - time.monotonic())
                    alarm.get(timeout=min(left, _LOOK))
            except Empty:
                if until is not None and time.monotonic() >= until:
                    return self.done
            finally:
                self._alarms.remove(alarm)
        return True

    def result(self) -> Any:
        """Waits, then hands the value over: the promise does not keep it. Raises its error."""
        try:
            self.wait()
            if self._error is not None:
                raise self._error
            value, self._value = self._value, None
            return value
        finally:
            # An error holds this frame: without a way back from here to it, what the caller
            # dropped (a sequence, say) is freed at once and not by a later collection of cycles.
            self = None
