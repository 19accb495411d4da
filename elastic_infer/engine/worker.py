"""The one thread that owns cache and model: runs passes, and jobs between passes."""

from __future__ import annotations

import _thread
import logging
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

from ..cache.sequence import Sequence as CacheSequence
from ..errors import EngineFault, EngineFull, InvalidRequest, OutOfCapacity, RequestCancelled, shown
from ..scheduling.promise import Promise
from ..scheduling.reader import Reader
from ..scheduling.request import Request, closed_error
from ..scheduling.scheduler import Scheduler
from ..user_calls import text_of

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Job:
    """run: what to do. wait_for_room: whether to try again when pages or slots come free."""

    run: Callable[[], Any]
    wait_for_room: bool = False
    promise: Promise = field(default_factory=Promise)


class _Place(weakref.ref):
    """A caller's hold on a sequence of the cache. When the caller drops it, the reference itself
    lands in the worker's inbox: there is no code of Python's on the way that could be interrupted.
    """

    __slots__ = ("sequence",)
    sequence: CacheSequence


class Worker:
    """Starts with the first piece of work; `close()` ends it. Methods are safe from any thread and
    any signal handler of the process that made it; another process, forked from it, is refused.

    Callers hand over by single calls into C (`SimpleQueue.put`, `deque.extend`) and take no lock
    that this thread takes, so that they can be interrupted anywhere.

    passes_left: how many passes may run before it waits; set it from a job. Jobs, arrivals and
    cancellations go on at 0.
    """

    def __init__(self, scheduler: Scheduler, max_waiting: int | None = None):
        self._scheduler, self._max_waiting = scheduler, max_waiting
        self.passes_left: float = math.inf
        self._arrivals: deque[Request] = deque()
        self._inbox: SimpleQueue[_Job | _Place | None] = SimpleQueue()  # None only wakes
        self._blocked: list[_Job] = []  # jobs that wait for room; the worker's own
        self._places: dict[int, _Place] = {}  # by the sequence's id; the worker's own
        self._admission = threading.RLock()  # between callers that a limit counts
        self._birth = threading.Lock()  # between threads that start the worker
        self._thread: threading.Thread | None = None
        self._identity: int | None = None
        self._closed = self._finished = False
        self._ended = Promise()
        self._process = os.getpid()

    # -- from any thread ---------------------------------------------------------------------

    def submit(self, requests: Sequence[Request]) -> None:
        """Hands requests over, all or none.

        Raises:
            EngineFull: when more would wait than may.
            RequestCancelled: when closed.
        """
        self.check_caller()
        self._start()
        for request in requests:
            request.attach(self._wake, self.is_current)
        if self._max_waiting is None:
            self._arrivals.extend(requests)
        else:
            # Re-entrant: a signal handler that submits meanwhile is not counted against this call.
            with self._admission:
                self._check_queue(requests)
                self._arrivals.extend(requests)
        self._inbox.put(None)
        if self._finished:  # the thread may not have seen them
            _abandon(self._arrivals, closed_error)

    def call(self, job: Callable[[], Any], wait_for_room: bool = False) -> Any:
        """Runs `job` between two passes and returns its result; when that is a Reader, the logits
        that the passes after it read. A caller that is interrupted meanwhile drops the result, so
        what a job makes must give its place back when it is dropped (see `own`).

        Args:
            wait_for_room: on OutOfCapacity the job is tried again after later passes, as long as
                running requests may still give something back.
        """
        self.check_caller()
        self._start()
        entry = _Job(job, wait_for_room)
        promise = entry.promise
        try:
            self._inbox.put(entry)
            if self._finished:  # the thread may not have seen it
                promise.fail(_closed())
            return promise.result()
        finally:
            done = promise.done
            promise.abandon()
            if not done:  # interrupted
                self._inbox.put(None)
            del entry, promise  # see `Promise.result`

    def own(self, owner: object, sequence: CacheSequence) -> None:
        """On the worker: closes `sequence` when `owner` is dropped."""
        place = _Place(owner, self._inbox.put)
        place.sequence = sequence
        self._places[id(sequence)] = place

    def disown(self, sequence: CacheSequence) -> None:
        """On the worker: says that `sequence` is closed."""
        self._places.pop(id(sequence), None)

    @property
    def waiting(self) -> int:
        """Requests that have no place in the cache yet."""
        return len(self._arrivals) + len(self._scheduler.waiting)

    @property
    def closed(self) -> bool:
        """True if `close()` was called."""
        return self._closed

    def is_current(self) -> bool:
        """True if the caller is the worker thread itself."""
        return threading.get_ident() == self._identity

    def close(self) -> None:
        """Ends all requests with RequestCancelled and the thread with them."""
        if os.getpid() != self._process:
            return  # a forked copy has no thread to end
        self._closed = True
        self._inbox.put(None)
        thread = self._thread
        if thread is not None and not self.is_current():
            self._ended.wait()
            thread.join()  # of what is left of it: an interrupt can break a join that waits

    def check_thread(self) -> None:
        """Refuses the worker thread itself.

        Raises:
            InvalidRequest: a call from that thread.
        """
        if self.is_current():
            raise InvalidRequest(
                "engine: a plan or logits processor must not call the engine that runs it"
            )

    def check_caller(self) -> None:
        """Refuses a forked process, whose copy has no threads, and the worker thread itself.

        Raises:
            RequestCancelled: a call in a forked process.
            InvalidRequest: a call from the worker thread.
        """
        if os.getpid() != self._process:
            raise RequestCancelled(
                f"engine: it must be used in the process that opened it ({self._process}), got a "
                f"call in process {os.getpid()} forked from it; open an engine there"
            )
        self.check_thread()

    def _check_queue(self, requests: Sequence[Request]) -> None:
        """A request waits when it is not admitted at once: those blocked already, and arrivals
        beyond the free places."""
        blocked, places = len(self._scheduler.waiting), 0
        if not blocked:
            places = self._scheduler.max_num_seqs - len(self._scheduler.running)
        arriving = [len(r.branches) for r in (*self._arrivals.copy(), *requests)]
        while arriving and arriving[0] <= places:
            places -= arriving.pop(0)
        if arriving and blocked + len(arriving) > self._max_waiting:
            raise EngineFull(
                f"engine: at most max_waiting = {self._max_waiting} requests may wait, got "
                f"{len(requests)} more with {self.waiting} waiting; try again later"
            )

    def _start(self) -> None:
        """Starts the thread if there is none.

        Raises:
            RequestCancelled: when closed.
            EngineFault: when no thread can be started.
        """
        if self._closed:
            raise RequestCancelled("engine: must be open, got one that was closed")
        if self._thread is not None:
            return
        # From a thread of its own: an interrupt in `Thread.start` would leave the new thread
        # waiting for a lock that the interrupted one took.
        started = Promise()
        try:
            _thread.start_new_thread(self._give_birth, (started,))
            started.result()
        except RuntimeError as error:
            raise EngineFault(
                f"engine: its thread must start, got {shown(text_of(error))}; end other threads or "
                "raise the limit of threads (ulimit -u)"
            ) from error

    def _give_birth(self, started: Promise) -> None:
        try:
            with self._birth:
                if self._thread is None:
                    thread = threading.Thread(
                        target=self._run, name="elastic-infer-worker", daemon=True
                    )
                    thread.start()
                    self._thread = thread
            started.set()
        except BaseException as error:
            started.fail(error)

    def _wake(self) -> None:
        if os.getpid() == self._process:
            self._inbox.put(None)

    # -- the worker thread -------------------------------------------------------------------

    def _run(self) -> None:
        self._identity = threading.get_ident()
        try:
            device, progressed = self._scheduler.model.device, True
            with device.running():
                while not self._closed:
                    progressed = self._turn(self._take(progressed))
                device.wait()  # what may still run there uses memory that is about to go
        finally:
            self._finish()
            self._identity = None
            self._ended.set()

    def _take(self, progressed: bool) -> deque[_Job | _Place]:
        """Everything that came in, after sleeping until there is something to do."""
        scheduler, inbox, items = self._scheduler, self._inbox, deque()
        busy = progressed and self.passes_left > 0 and (scheduler.has_work or self._blocked)
        if not (busy or self._arrivals or scheduler.has_cancelled):
            items.append(inbox.get())
        while not inbox.empty():
            items.append(inbox.get())
        return items

    def _turn(self, items: deque[_Job | _Place]) -> bool:
        """Takes what arrived, runs jobs, then one pass. Returns whether anything changed."""
        scheduler = self._scheduler
        while self._arrivals:
            scheduler.submit(self._arrivals.popleft())
        before = len(scheduler.running), len(scheduler.waiting)
        self._guard(scheduler.drop_cancelled)  # asked for before a job is done before it
        done = self._run_jobs(items)
        allowed = self.passes_left > 0  # as jobs have left it
        ran = allowed and not self._closed and self._guard(scheduler.step)
        self.passes_left -= ran
        progressed = ran or done or before != (len(scheduler.running), len(scheduler.waiting))
        if self._blocked and allowed and not progressed:
            # Nothing that runs can give anything back: what cannot be met now never will be.
            blocked, self._blocked = self._blocked, []
            while blocked:
                self._attempt(blocked.pop(0), last=True)
        return progressed

    def _guard(self, action: Callable[[], Any]) -> Any:
        """Runs a part of a pass; its value, or True when it failed."""
        try:
            return action()
        except BaseException as error:
            self._survive(error)
            return True

    def _survive(self, error: BaseException) -> None:
        """After a fault that belongs to no row: ends what is in the cache, or what waits where the
        cache is empty, by name. The engine goes on."""
        fault = EngineFault(
            f"engine: a pass failed ({type(error).__name__}: {text_of(error)}); what was "
            "in the cache ended with it and the engine goes on"
        )
        fault.__cause__ = error
        with suppress(BaseException):  # a program's own handler may raise as well
            logger.error("%s", fault, exc_info=error)
        scheduler = self._scheduler
        if scheduler.running or scheduler.readers:
            scheduler.abandon_running(lambda request: fault, fault)
        else:
            _abandon(scheduler.waiting, lambda request: fault)

    def _run_jobs(self, items: deque[_Job | _Place]) -> bool:
        """Runs jobs in order, those that waited for room first; those that still must go to
        ``_blocked``."""
        if self._blocked:
            items.extendleft(reversed(self._blocked))
            self._blocked = []
        done = False
        while items:  # none is held here any longer than it runs
            item = items.popleft()
            if isinstance(item, _Place):
                self._guard(partial(self._scheduler.release, item.sequence))
                self.disown(item.sequence)
                done = True
            elif item is not None and not (item.wait_for_room and item.promise.abandoned):
                done |= self._attempt(item, last=not self._scheduler.has_work)
            del item
        return done

    def _attempt(self, job: _Job, last: bool) -> bool:
        """Runs one job; False if it was put off."""
        try:
            result = job.run()
            if isinstance(result, Reader):
                result.promise = job.promise
                self._scheduler.add_reader(result)
            else:
                box, result = [result], None
                job.promise.set(box.pop())  # no reference stays here: see `Promise.set`
        except OutOfCapacity as error:
            if job.wait_for_room and not last:
                self._blocked.append(job)
                return False
            job.promise.fail(error)
        except BaseException as error:
            job.promise.fail(error)
        finally:
            del job  # see `Promise.result`
        return True

    def _finish(self) -> None:
        self._closed = self._finished = True  # from here on callers look after themselves
        closed = _closed()
        self._scheduler.abandon_running(closed_error, closed)
        _abandon(self._scheduler.waiting, closed_error)
        _abandon(self._arrivals, closed_error)
        while not self._inbox.empty():
            self._blocked.append(self._inbox.get())
        for job in self._blocked:
            if isinstance(job, _Job):
                job.promise.fail(closed)
        self._blocked.clear()
        self._places.clear()


def _abandon(queue: deque[Request], error_of: Callable[[Request], Exception]) -> None:
    """Ends requests that have no place in the cache yet."""
    with suppress(IndexError):  # callers may do the same at the end
        while True:
            request = queue.popleft()
            request.abandon(error_of(request))


def _closed() -> RequestCancelled:
    return RequestCancelled("engine: closed before the call ended")
