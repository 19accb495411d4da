"""The one thread that owns cache and model: runs passes, and jobs between passes."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from .errors import EngineFull, InvalidRequest, OutOfCapacity, RequestCancelled
from .reading import Reader
from .request import Request, closed_error
from .scheduler import Scheduler

logger = logging.getLogger(__name__)


@dataclass
class _Job:
    """run: what to do. wait_for_room: whether to try again when pages or slots come free."""

    run: Callable[[], Any]
    future: Future
    wait_for_room: bool = False


class Worker:
    """Starts with the first piece of work; `close()` ends it. Methods are safe from any thread of
    the process that made it; another process, forked from it, is refused."""

    def __init__(self, scheduler: Scheduler, max_waiting: int | None = None):
        self._scheduler, self._max_waiting = scheduler, max_waiting
        self._changed = threading.Condition()
        self._arrivals: deque[Request] = deque()
        self._jobs: deque[_Job] = deque()
        self._blocked: list[_Job] = []  # jobs that wait for room; the worker's own
        self._thread: threading.Thread | None = None
        self._closed = False
        self._process = os.getpid()

    # -- from any thread ---------------------------------------------------------------------

    def submit(self, requests: Sequence[Request]) -> None:
        """Hands requests over, all or none.

        Raises: EngineFull when more would wait than may; RequestCancelled when closed.
        """
        self.check_caller()
        with self._changed:
            self._check_open()
            self._check_queue(requests)
            for request in requests:
                request.attach(self._notify, self.is_current)
                self._arrivals.append(request)
            self._start()

    def call(self, job: Callable[[], Any], wait_for_room: bool = False) -> Any:
        """Runs `job` between two passes and returns its result; when that is a Reader, the logits
        that the passes after it read.

        wait_for_room: on OutOfCapacity the job is tried again after later passes, as long as
            running requests may still give something back.
        """
        self.check_caller()
        entry = _Job(job, Future(), wait_for_room)
        with self._changed:
            self._check_open()
            self._jobs.append(entry)
            self._start()
        try:
            return entry.future.result()
        finally:
            # An exception holds this frame: without a way back from here to it, what the caller
            # dropped (a sequence, say) is freed at once and not by a later collection of cycles.
            del entry

    def post(self, job: Callable[[], Any]) -> None:
        """Runs `job` between two passes without waiting for it; nothing happens once closed."""
        if os.getpid() != self._process:
            return
        with self._changed:
            if not self._closed:
                self._jobs.append(_Job(job, Future()))
                self._start()

    @property
    def waiting(self) -> int:
        """Requests that have no place in the cache yet."""
        return len(self._arrivals) + len(self._scheduler.waiting)

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._closed

    def is_current(self) -> bool:
        """Whether the caller is the worker thread itself."""
        return threading.current_thread() is self._thread

    def close(self) -> None:
        """Ends all requests with RequestCancelled and the thread with them."""
        if os.getpid() != self._process:
            return  # a forked copy has no thread to end
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None and not self.is_current():
            self._thread.join()

    def check_caller(self) -> None:
        """Refuses a forked process, whose copy has no threads, and the worker thread itself.

        Raises: RequestCancelled, InvalidRequest.
        """
        if os.getpid() != self._process:
            raise RequestCancelled(
                f"engine: it must be used in the process that opened it ({self._process}), got a "
                f"call in process {os.getpid()} forked from it; open an engine there"
            )
        if self.is_current():
            raise InvalidRequest(
                "engine: a plan or logits processor must not call the engine that runs it"
            )

    def _check_open(self) -> None:
        if self._closed:
            raise RequestCancelled("engine: must be open, got one that was closed")

    def _check_queue(self, requests: Sequence[Request]) -> None:
        """A request waits when it is not admitted at once: those blocked already, and arrivals
        beyond the free places."""
        if self._max_waiting is None:
            return
        blocked, places = len(self._scheduler.waiting), 0
        if not blocked:
            places = self._scheduler.max_running - len(self._scheduler.running)
        arriving = [len(r.branches) for r in (*self._arrivals, *requests)]
        while arriving and arriving[0] <= places:
            places -= arriving.pop(0)
        if arriving and blocked + len(arriving) > self._max_waiting:
            raise EngineFull(
                f"engine: at most max_waiting = {self._max_waiting} requests may wait, got "
                f"{len(requests)} more with {self.waiting} waiting; try again later"
            )

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name="elastic-infer-worker", daemon=True
            )
            self._thread.start()
        self._changed.notify_all()

    def _notify(self) -> None:
        if os.getpid() == self._process:
            with self._changed:
                self._changed.notify_all()

    # -- the worker thread -------------------------------------------------------------------

    def _run(self) -> None:
        try:
            progressed = True
            device = self._scheduler.model.device
            with device.running():
                while self._wait(progressed):
                    progressed = self._turn()
                device.wait()  # what may still run there uses memory that is about to go
        finally:
            self._finish()

    def _wait(self, progressed: bool) -> bool:
        """Sleeps until there is something to do; False when closed."""
        scheduler = self._scheduler
        with self._changed:
            while not (
                self._closed or self._arrivals or self._jobs
                or (progressed and (scheduler.has_work or self._blocked))
                or scheduler.has_cancelled
            ):  # fmt: skip
                self._changed.wait()
            return not self._closed

    def _turn(self) -> bool:
        """Takes what arrived, runs jobs, then one pass. Returns whether anything changed."""
        scheduler = self._scheduler
        with self._changed:
            while self._arrivals:
                scheduler.submit(self._arrivals.popleft())
            jobs, self._blocked = self._blocked, []
            while self._jobs:  # one by one: a sequence that is collected here posts one more
                jobs.append(self._jobs.popleft())
        done = self._run_jobs(jobs)
        before = len(scheduler.running), len(scheduler.waiting)
        try:
            ran = scheduler.step()
        except Exception as error:
            logger.exception("a pass failed; what is in the cache ends with the error")
            scheduler.abandon_running(error)
            ran = True
        progressed = ran or done or before != (len(scheduler.running), len(scheduler.waiting))
        if self._blocked and not progressed:
            # Nothing that runs can give anything back: what cannot be met now never will be.
            blocked, self._blocked = self._blocked, []
            for job in blocked:
                self._attempt(job, last=True)
        return progressed

    def _run_jobs(self, jobs: list[_Job]) -> bool:
        """Runs jobs in order; those that must wait for room go to ``_blocked``."""
        return any([self._attempt(job, last=not self._scheduler.has_work) for job in jobs])

    def _attempt(self, job: _Job, last: bool) -> bool:
        """Runs one job; False if it was put off."""
        try:
            result = job.run()
            if isinstance(result, Reader):
                result.future = job.future
                self._scheduler.add_reader(result)
            else:
                job.future.set_result(result)
        except OutOfCapacity as error:
            if job.wait_for_room and not last:
                self._blocked.append(job)
                return False
            job.future.set_exception(error)
        except BaseException as error:
            job.future.set_exception(error)
        finally:
            del job  # see `call`
        return True

    def _finish(self) -> None:
        with self._changed:
            self._closed = True
            arrivals, jobs = list(self._arrivals), self._blocked
            while self._jobs:
                jobs.append(self._jobs.popleft())
        closed = RequestCancelled("engine: closed before the call ended")
        self._scheduler.abandon(closed_error, closed)
        for request in arrivals:
            request.abandon(closed_error(request))
        for job in jobs:
            job.future.set_exception(closed)
