"""The one thread that owns cache and model: runs passes, and jobs between passes."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from .errors import OutOfCapacity, RequestCancelled
from .request import Request, closed_error
from .scheduler import Scheduler

logger = logging.getLogger(__name__)


class Worker:
    """Starts with the first piece of work; `close()` ends it. Methods are safe from any thread."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler
        self._changed = threading.Condition()
        self._arrivals: deque[Request] = deque()
        self._jobs: deque[tuple[Callable[[], Any], Future]] = deque()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, request: Request) -> None:
        """Hands a request over."""
        request._wake = self._notify
        with self._changed:
            self._check_open()
            self._arrivals.append(request)
            self._start()

    def call(self, job: Callable[[], Any], wait_for_room: bool = False) -> Any:
        """Runs `job` between two passes and returns its result.

        wait_for_room: on OutOfCapacity the job is tried again after later passes, as long as
            running requests may still give something back.
        """
        future: Future = Future()
        with self._changed:
            self._check_open()
            self._jobs.append((_Job(job, wait_for_room), future))
            self._start()
        return future.result()

    @property
    def waiting(self) -> int:
        """Requests that have no place in the cache yet."""
        return len(self._arrivals) + len(self._scheduler.waiting)

    def close(self) -> None:
        """Ends all requests with RequestCancelled and the thread with them."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _check_open(self) -> None:
        if self._closed:
            raise RequestCancelled("engine: must be open, got one that was closed")

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name="elastic-infer-worker", daemon=True
            )
            self._thread.start()
        self._changed.notify_all()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        scheduler, progressed = self._scheduler, True
        while True:
            with self._changed:
                while not (
                    self._closed or self._arrivals or self._jobs
                    or (scheduler.has_work and (progressed or _cancelled(scheduler)))
                ):  # fmt: skip
                    self._changed.wait()
                if self._closed:
                    break
                while self._arrivals:
                    scheduler.submit(self._arrivals.popleft())
                jobs = [self._jobs.popleft() for _ in range(len(self._jobs))]
            did_jobs = self._run_jobs(jobs)
            before = len(scheduler.running) + len(scheduler.waiting)
            try:
                progressed = scheduler.step()
            except Exception as error:
                logger.exception("a pass failed; its requests end with the error")
                scheduler.abandon(lambda _, e=error: e)
                progressed = True
            progressed |= did_jobs or before != len(scheduler.running) + len(scheduler.waiting)
        self._finish()

    def _run_jobs(self, jobs: list[tuple[_Job, Future]]) -> bool:
        done = False
        for job, future in jobs:
            try:
                future.set_result(job.run())
                done = True
            except OutOfCapacity as error:
                if job.wait_for_room and self._scheduler.running:
                    with self._changed:
                        self._jobs.append((job, future))
                else:
                    future.set_exception(error)
            except BaseException as error:
                future.set_exception(error)
                done = True
        return done

    def _finish(self) -> None:
        self._scheduler.abandon(closed_error)
        with self._changed:
            while self._arrivals:
                request = self._arrivals.popleft()
                request.finish(closed_error(request))
            while self._jobs:
                self._jobs.popleft()[1].set_exception(
                    RequestCancelled("engine: closed before the call ended")
                )


class _Job:
    def __init__(self, run: Callable[[], Any], wait_for_room: bool):
        self.run, self.wait_for_room = run, wait_for_room


def _cancelled(scheduler: Scheduler) -> bool:
    return any(r.cancelled for r in scheduler.waiting) or any(
        b.request.cancelled for b in scheduler.running
    )
