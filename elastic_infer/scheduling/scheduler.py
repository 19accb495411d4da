"""Continuous batching: admission, passes, preemption. Runs on one thread and owns the cache."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence as Seq
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ..cache.pages import pages_for
from ..cache.sequence import Sequence
from ..errors import NonFiniteLogits, OutOfCapacity, RequestCancelled
from ..model.model import Model
from ..outputs import Token
from ..plans.decision import Decision
from ..user_calls import as_failure, text_of
from .ahead import next_parts
from .batching import Candidate, Limits, StepCosts, form_batch
from .passes import Flight, Part, Passes
from .reader import Reader
from .reads import Read, single_steps
from .request import Branch, Request
from .sampler import Drawn, Sampler
from .stats import Stats
from .switching import keep_snapshots, snapshot_slots, split_for_snapshots, switch

logger = logging.getLogger(__name__)

CLOSED = "sequence: must be open, got one that was closed"


class Scheduler:
    """All requests of one model.

    Args:
        model: owns weights and cache.
        eos_ids: tokens that end a sequence.
        limits: of one pass.
        mixing: True if rows of different widths share passes.
        max_num_seqs: branches in the cache.
        async_scheduling: True if passes may be launched before the tokens of the last are known
            (`ahead.py`); never on a CPU, which has computed them by then.
    """

    def __init__(
        self,
        model: Model,
        eos_ids: tuple[int, ...],
        limits: Limits,
        costs: StepCosts,
        mixing: str = "auto",
        max_num_seqs: int = 64,
        async_scheduling: bool = True,
    ):
        self.model, self.cache = model, model.cache
        self.eos_ids, self.limits, self.costs = frozenset(eos_ids), limits, costs
        self.mixing, self.max_num_seqs = mixing, max_num_seqs
        self.sampler = Sampler(model.pool, model.device)
        self.waiting: deque[Request] = deque()
        self.running: list[Branch] = []  # in order of arrival
        self.readers: list[Reader] = []
        self._reader_waits = False
        self._ahead = async_scheduling and not model.device.is_cpu
        self._passes = Passes(model, self.sampler, costs, limits.max_num_seqs)
        self._flight: Flight | None = None  # launched in the last step, its tokens not read out
        self.stats = Stats()
        self._width_index = {name: i for i, name in enumerate(model.widths)}

    # -- admission ---------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queues a request whose arguments were checked."""
        self.stats.requests += 1
        self.waiting.append(request)

    @property
    def has_work(self) -> bool:
        """True if any request or reader has not ended."""
        return bool(self.waiting or self.running or self.readers)

    def add_reader(self, reader: Reader) -> None:
        """Makes its reads in the next passes."""
        self.readers.append(reader)

    def drop_readers(self, sequence: Sequence, error: Exception) -> None:
        """Ends the reader of a sequence that is closed."""
        for reader in [r for r in self.readers if r.sequence is sequence]:
            self.readers.remove(reader)
            reader.fail(error)

    def release(self, sequence: Sequence) -> None:
        """Gives the place of a sequence back that its caller has closed or dropped."""
        self.drop_readers(sequence, RequestCancelled(CLOSED))
        self.cache.close(sequence)

    @property
    def has_cancelled(self) -> bool:
        """True if a request or a reader that has not ended was cancelled."""
        return (
            any(r.cancelled for r in self.waiting)
            or any(b.request.cancelled for b in self.running)
            or any(r.promise.abandoned for r in self.readers)
        )

    def slots_for(self, request: Request) -> int:
        """State slots that a request may hold at once."""
        return len(request.branches) * (1 + snapshot_slots(request.plan.policy))

    @property
    def spare_slots(self) -> int:
        """Slots without a claim: running requests may still fork or take snapshots."""
        claimed = sum(self.slots_for(r) for r in {b.request: None for b in self.running})
        held = sum(
            1 + len(b.sequence.snapshots)
            for b in self.running
            if b.sequence is not None and b.sequence.slot >= 0
        )
        return self.cache.slots.free - (claimed - held)

    def claim_slots(self, count: int = 1) -> None:
        """Checks that slots can be taken without breaking promises to running requests.

        Raises:
            OutOfCapacity: states the numbers.
        """
        if self.spare_slots < count:
            raise OutOfCapacity(
                f"cache: state slots must be free to continue, needed {count}, free "
                f"{max(0, self.spare_slots)} of {self.cache.slots.size}"
            )

    def _admit(self) -> None:
        """Lets preempted branches back in first, then requests in order of arrival."""
        for branch in self.running:
            saved = branch.sequence.saved if branch.sequence else None
            if saved is None:
                continue
            # One page to spare, so that it does not fall out again at once.
            busy = self._flight is not None or bool(self._active())
            if saved.page_count + 1 > self.cache.pages.free and busy:
                return
            try:
                self.cache.resume(branch.sequence)
            except OutOfCapacity:
                return
        while self.waiting and not self._reader_waits:
            request = self.waiting[0]
            if not request.cancelled and not self._fits_now(request):
                return
            self.waiting.popleft()
            if request.cancelled:
                self._end_request(request, "cancelled")
            else:
                self._start(request)

    def _fits_now(self, request: Request) -> bool:
        pages = pages_for(len(request.prompt_ids) + 1) if self.cache.k else 0
        return (
            len(self.running) + len(request.branches) <= self.max_num_seqs
            and self.spare_slots >= self.slots_for(request)
            and self.cache.pages.free >= pages
        )

    def _active(self) -> list[Branch | Reader]:
        """Rows that can be in the next pass; readers first: they are never preempted."""
        return [r for r in (*self.readers, *self.running) if r.ready]

    def _start(self, request: Request) -> None:
        """Opens the sequence of the first branch; the others fork from it after the prompt."""
        request.started = time.perf_counter()
        first = request.branches[0]
        self.running.extend(request.branches)

        def begin() -> None:
            first.sequence = self.cache.open(track=request.track)
            self._decide(first, list(request.prompt_ids))
            if first.finish_reason is not None:  # what the plan forced was all that may come
                self._share_start(first)

        self._guard(first, begin)

    def _share_start(self, first: Branch) -> None:
        """Gives the other branches of a request the tokens that its plan forced before the first
        sampling, and its plan's state."""
        for other in first.request.branches[1:]:
            other.run = first.run.fork()
            for token in first.tokens:
                other.width = token.width
                if self._append(other, token.id, True, None):
                    break
            other.width, other.phase = first.width, first.phase

    # -- one pass ----------------------------------------------------------------------------

    def step(self) -> bool:
        """Admits, runs one pass, samples. True if a pass ran. Cancellations take effect by
        `drop_cancelled`, before.

        On a device the next pass is launched before this one's tokens are read out, if these can
        change nothing about it; the step after this one finds it in flight."""
        self._admit()
        flight = self._flight or self._launch(self._form(), self._active())
        if flight is None:
            return False
        self._flight = self._launch_ahead(flight)
        self._land(flight, self._flight)
        if self._flight and not self._flight.wanted:
            self._flight = None
        return True

    def _launch_ahead(self, flight: Flight) -> Flight | None:
        """Starts the pass after the one in flight, if what it reads is settled, is steps alone and
        has room."""
        if not self._ahead or self.readers or self.model.last is not flight.result:
            return None
        ready = next_parts(flight, self.running, self.model.max_length) or []
        parts = self._choose(ready)
        if any(part.read.kind != "step" for part in parts) or not self._has_room(parts):
            return None
        self.stats.passes_ahead += bool(parts)
        return self._launch(parts, [part.row for part in ready])

    def _launch(self, parts: list[Part], ready: Seq[Branch | Reader]) -> Flight | None:
        """Starts a pass, which on a CPU is to run it, and takes due snapshots.

        Args:
            ready: who could have been in it.
        """
        if not parts:
            return None
        chosen = {id(part.row) for part in parts}
        for row in ready:
            row.waited = 0 if id(row) in chosen else row.waited + 1
        flight = self._passes.launch(parts)
        self.stats.passes += 1
        for part in parts:
            if part.feed < 0:
                self._consume(part)
        return flight

    def _land(self, flight: Flight, ahead: Flight | None) -> None:
        """Reads out what a pass drew, samples what it did not, and decides on the next reads.

        Args:
            ahead: the pass that was launched after it.
        """
        ids, rows, branches = self._passes.read_out(flight), [], []
        for i, part in enumerate(flight.parts):
            row = part.row
            if isinstance(row, Reader):
                if part.logits != "none":
                    row.take(flight.result.of(i))
                if part.samples:
                    self.readers.remove(row)
                    row.finish()
            elif part.samples and row.finish_reason is None:
                branches_of = self._fork(row) or []
                rows += [flight.result.spans[i][0]] * len(branches_of)
                branches += branches_of
        if branches:
            all_drawn = self.sampler.draw(flight.result.logits, rows, branches, ids)
            for branch, drawn in zip(branches, all_drawn):
                self._guard(branch, lambda b=branch, d=drawn: self._take(b, d))
        for part in ahead.parts if ahead else ():
            if part.feed >= 0 and part.row.finish_reason is None:
                self._guard(part.row, lambda p=part: self._confirm(p))

    def _consume(self, part: Part) -> None:
        """Takes a pass's tokens off the row's reads, and a snapshot where one is due then."""
        row, read = part.row, part.read
        self.stats.tokens_read += part.count
        if part.count < len(read.tokens):
            row.pending[0] = read.after(part.count)
            return
        row.pending.pop(0)
        if isinstance(row, Branch):
            keep_snapshots(self.cache, row.sequence, row.request.plan.policy, read.mark)

    def _confirm(self, part: Part) -> None:
        """Takes off a branch's reads what the pass ahead reads of them, now that the token is known
        that this pass was fed."""
        branch, read = part.row, part.row.pending[0]
        foreseen = replace(part.read, tokens=branch.token_ids[-1:])
        if branch.pending != [foreseen]:
            raise RuntimeError(
                f"{branch.request.request_id}: the next read must be the one that was settled, "
                f"{foreseen}, got {branch.pending}"
            )
        self.cache.advance(branch.sequence, read.tokens, read.width, read.kind)
        self._consume(part)

    def _choose(self, ready: list[Part]) -> list[Part]:
        """The parts of the next pass, among those that could be read."""
        candidates = [
            Candidate(
                key=i,
                width=self._width_index[p.read.width],
                tokens=len(p.read.tokens),
                kind=p.read.kind,
                position=p.row.sequence.length,
                waited=p.row.waited,
            )
            for i, p in enumerate(ready)
        ]
        batch = form_batch(candidates, self.limits, self.costs, self.mixing)
        parts = [replace(ready[key], count=n) for key, n in batch]
        for p in parts:
            whole = p.count == len(p.read.tokens)
            p.samples = p.feed >= 0 or (whole and len(p.row.pending) == 1)
        return parts

    def _pages_needed(self, parts: list[Part]) -> list[int]:
        return [self.cache.pages_needed(p.row.sequence, p.count) for p in parts]

    def _has_room(self, parts: list[Part]) -> bool:
        return not self.cache.k or sum(self._pages_needed(parts)) <= self.cache.pages.free

    def _form(self) -> list[Part]:
        """The next pass, after making room for it where needed. A reader waits for room while a
        branch runs, and nothing new is admitted meanwhile; branches move one another out."""
        left_out: list[Reader] = []
        while True:
            ready = [Part(r, r.pending[0]) for r in self._active() if r not in left_out]
            chosen = self._choose(ready)
            if self._has_room(chosen):
                self._reader_waits = bool(left_out)
                return chosen
            branches = [p.row for p in ready if isinstance(p.row, Branch)]
            needs = zip(chosen, self._pages_needed(chosen))
            hungry = [p.row for p, n in needs if n and isinstance(p.row, Reader)]
            if hungry and branches:
                left_out.append(hungry[-1])
            elif hungry:
                self.readers.remove(hungry[-1])
                hungry[-1].fail(self._no_pages("sequence", hungry[-1]))
            else:
                self._preempt_youngest(branches)

    def _no_pages(self, name: str, row: Branch | Reader) -> OutOfCapacity:
        return OutOfCapacity(
            f"{name}: KV pages must be free to continue at {row.sequence.length} tokens, free "
            f"{self.cache.pages.free} of {self.cache.pages.size}; close open sequences or give the "
            "engine more kv_cache_memory_bytes"
        )

    def _preempt_youngest(self, branches: list[Branch]) -> None:
        """Moves the youngest branch out; the only one left has nowhere to go and fails."""
        victim = branches[-1]
        if len(branches) == 1:
            self._fail(victim, self._no_pages(victim.request.request_id, victim))
            return
        logger.info("preempting %s at %d tokens", victim.request.request_id, victim.sequence.length)
        self.cache.preempt(victim.sequence)
        victim.request.preemptions += 1
        self.stats.preemptions += 1

    def _fork(self, branch: Branch) -> list[Branch] | None:
        """After the prompt: gives the other branches of the request their own sequences."""
        request = branch.request
        if request.first_token is not None:
            return [branch]
        request.first_token = time.perf_counter()

        def fork() -> list[Branch]:
            self._share_start(branch)
            for other in request.branches[1:]:
                other.sequence = self.cache.fork(branch.sequence)
            return list(request.branches)

        return self._guard(branch, fork)

    # -- tokens ------------------------------------------------------------------------------

    def _guard(self, branch: Branch, action: Callable[[], Any]) -> Any:
        """Runs a branch's part of a pass: its plan, its text. Its failure, an exit or
        an interrupt that a user's function raises included, ends this request alone."""
        try:
            return action()
        except BaseException as error:
            self._fail(branch, error)

    def _take(self, branch: Branch, drawn: Drawn) -> None:
        """Adds a sampled token and decides on the next reads."""
        if drawn.token < 0:
            raise branch.request.error or NonFiniteLogits(
                f"{branch.request.request_id}: logits must be finite to be sampled, got NaN or "
                f"nothing finite at token {len(branch.token_ids)} at width {branch.width}"
            )
        branch.entropy = drawn.entropy
        if not self._append(branch, drawn.token, False, drawn):
            self._decide(branch, [drawn.token])

    def _decide(self, branch: Branch, unread: list[int]) -> None:
        """Asks the plan for the next width, appends forced tokens, prepares the reads."""
        decision: Decision = branch.run.next(branch.token_ids, branch.entropy)
        decision.check(self._width_index, self.model.config.vocab_size)
        branch.phase = decision.phase
        changed = branch.width not in ("", decision.width)
        branch.width = decision.width
        for token in decision.forced:
            unread.append(token)
            if self._append(branch, token, True, None):
                return
        policy = branch.request.plan.policy
        if changed:
            reads, again = switch(
                self.cache, branch.sequence, unread, decision.width, policy, self.model.widths
            )
            branch.request.rebuilt_tokens += again
            self.stats.rebuilt_tokens += again
        else:
            kind = "step" if branch.sequence.tokens else "prefill"
            reads = [Read(unread, decision.width, kind)]
        reads = split_for_snapshots(reads, branch.sequence.length, policy)
        branch.pending = [part for read in reads for part in single_steps(read)]

    def _append(self, branch: Branch, token: int, forced: bool, drawn: Drawn | None) -> bool:
        """Adds one token to the output; True if the branch ended with it."""
        params, stops = branch.request.params, branch.processors.stop_tokens
        phase = branch.place(token)
        branch.token_ids.append(token)
        count = len(branch.token_ids)
        may_stop = count >= params.min_tokens
        hidden = False
        if not forced and may_stop:
            is_eos = token in self.eos_ids and not params.ignore_eos
            if is_eos or token in stops:
                hidden = True
                branch.finish_reason, branch.stop_reason = "stop", stops.get(token)
        if branch.finish_reason is None and branch.is_full(count, self.model.max_length):
            branch.finish_reason = "length"
        ended = branch.finish_reason is not None
        text = branch.push_text(token, phase, ended, hidden, may_stop)
        top = drawn.logprobs if drawn else None
        logprob = top[token][0] if top else None
        branch.emit(Token(token, text, branch.width, phase, forced, logprob, top))
        if branch.finish_reason is not None:
            self._end(branch)
        return branch.finish_reason is not None

    # -- ends --------------------------------------------------------------------------------

    def _end(self, branch: Branch) -> None:
        """Gives the branch's place back; finishes the request with its last branch."""
        if branch.sequence is not None:
            self.cache.close(branch.sequence)
        branch.pending = []
        if branch in self.running:
            self.running.remove(branch)
        request = branch.request
        if all(b.finish_reason is not None for b in request.branches):
            request.finish(request.error)

    def _fail(self, branch: Branch, raised: BaseException) -> None:
        """Ends a branch with an error, and with it its request."""
        request = branch.request
        error = as_failure(request.request_id, raised)
        text = text_of(error)
        with suppress(Exception):  # a program's own handler may raise, which is not this row's
            logger.warning("%s ended with an error: %s", request.request_id, text)
        request.error = error
        for other in request.branches:
            if other.finish_reason is None:
                other.finish_reason, other.stop_reason = "error", text
                self._end(other)

    def _end_request(self, request: Request, reason: str) -> None:
        for branch in request.branches:
            if branch.finish_reason is None:
                branch.finish_reason = reason
                self._end(branch)

    def drop_cancelled(self) -> None:
        """Ends requests that were cancelled, and readers whose callers have gone."""
        for reader in [r for r in self.readers if r.promise.abandoned]:
            self.readers.remove(reader)
            reader.fail(RequestCancelled("sequence: the call that read it was interrupted"))
        for request in {b.request: None for b in self.running if b.request.cancelled}:
            self._end_request(request, "cancelled")
        for request in [r for r in self.waiting if r.cancelled]:
            self.waiting.remove(request)
            self._end_request(request, "cancelled")

    def abandon_running(self, error_of: Callable[[Request], Exception], other: Exception) -> None:
        """Ends every request that has a place in the cache with the error that `error_of(request)`
        makes, and every reader with `other`."""
        self._flight = None
        for request in {b.request: None for b in self.running}:
            error = error_of(request)
            try:
                self._fail(request.branches[0], error)
            except Exception:  # what is broken may be the cache: its caller waits all the same
                self.running = [b for b in self.running if b.request is not request]
                request.abandon(error)
        while self.readers:
            with suppress(Exception):
                self.readers.pop().fail(other)
