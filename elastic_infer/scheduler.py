"""Continuous batching: admission, passes, preemption. Runs on one thread and owns the cache."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from .batching import Candidate, Limits, StepCosts, form_batch
from .cache import PAGE, Sequence
from .errors import NonFiniteLogits, OutOfCapacity, WidthError
from .model import Model, Result, Segment
from .outputs import Token
from .plan import Decision
from .reading import Reader
from .request import Branch, Request
from .sampler import Drawn, Sampler
from .switching import Read, keep_snapshots, snapshot_slots, split_for_snapshots, switch

logger = logging.getLogger(__name__)


@dataclass
class Stats:
    """Counters since the engine was opened."""

    passes: int = 0
    tokens_read: int = 0
    preemptions: int = 0
    rebuilt_tokens: int = 0
    requests: int = 0


class Scheduler:
    """All requests of one model.

    model: owns weights and cache. eos_ids: tokens that end a sequence. limits: of one pass.
    mixing: whether rows of different widths share passes. max_running: branches in the cache.
    """

    def __init__(
        self,
        model: Model,
        eos_ids: tuple[int, ...],
        limits: Limits,
        costs: StepCosts,
        mixing: str = "auto",
        max_running: int = 64,
    ):
        self.model, self.cache = model, model.cache
        self.eos_ids, self.limits, self.costs = frozenset(eos_ids), limits, costs
        self.mixing, self.max_running = mixing, max_running
        self.sampler = Sampler(model.pool, model.device)
        self.waiting: deque[Request] = deque()
        self.running: list[Branch] = []  # in order of arrival
        self.readers: list[Reader] = []
        self._reader_waits = False
        self.stats = Stats()
        self._width_index = {name: i for i, name in enumerate(model.widths)}

    # -- admission ---------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queues a request whose arguments were checked."""
        self.stats.requests += 1
        self.waiting.append(request)

    @property
    def has_work(self) -> bool:
        """Whether any request or reader has not ended."""
        return bool(self.waiting or self.running or self.readers)

    def add_reader(self, reader: Reader) -> None:
        """Makes its reads in the next passes."""
        self.readers.append(reader)

    def drop_readers(self, sequence: Sequence, error: Exception) -> None:
        """Ends what is being read into a sequence that is closed."""
        for reader in [r for r in self.readers if r.sequence is sequence]:
            self.readers.remove(reader)
            reader.fail(error)

    @property
    def has_cancelled(self) -> bool:
        """Whether a request that has not ended was cancelled."""
        return any(r.cancelled for r in self.waiting) or any(
            b.request.cancelled for b in self.running
        )

    def slots_for(self, request: Request) -> int:
        """State slots that a request may hold at once."""
        return len(request.branches) * (1 + snapshot_slots(request.plan.policy))

    @property
    def spare_slots(self) -> int:
        """Slots that nobody has a claim on: running requests may still fork or take snapshots."""
        claimed = sum(self.slots_for(r) for r in {b.request: None for b in self.running})
        held = sum(
            1 + len(b.sequence.snapshots)
            for b in self.running
            if b.sequence is not None and b.sequence.slot >= 0
        )
        return self.cache.slots.free - (claimed - held)

    def claim_slots(self, count: int = 1) -> None:
        """Checks that slots can be taken without breaking what running requests were promised.

        Raises: OutOfCapacity, with the numbers.
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
            if saved.page_count + 1 > self.cache.pages.free and self._active():
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
        pages = -(-(len(request.prompt_ids) + 1) // PAGE) if self.cache.k else 0
        return (
            len(self.running) + len(request.branches) <= self.max_running
            and self.spare_slots >= self.slots_for(request)
            and self.cache.pages.free >= pages
        )

    def _active(self) -> list[Branch | Reader]:
        """Whoever can be in the next pass, readers first: they cannot be preempted."""
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
            other.plan = first.plan.fork()
            for token in first.tokens:
                other.width = token.width
                if self._append(other, token.id, token.phase, True, None):
                    break
            other.width, other.phase = first.width, first.phase

    # -- one pass ----------------------------------------------------------------------------

    def step(self) -> bool:
        """Admits, runs one pass, samples. Returns whether a pass ran."""
        self._drop_cancelled()
        self._admit()
        batch = self._form()
        if not batch:
            return False
        self._run(batch)
        return True

    def _run(self, batch: list[tuple[Branch | Reader, int]]) -> None:
        """Reads the batch's tokens, takes due snapshots, samples where the reads are complete."""
        chosen = {id(r) for r, _ in batch}
        for row in self._active():
            row.waited = 0 if id(row) in chosen else row.waited + 1
        segments = [
            Segment(r.sequence, r.pending[0].tokens[:n], r.pending[0].width, r.pending[0].kind,
                    self._wanted(r, n))
            for r, n in batch
        ]  # fmt: skip
        if not self.model.device.is_cpu:  # there the pass draws the tokens itself
            for segment, (row, _) in zip(segments, batch):
                if isinstance(row, Branch):
                    segment.draw = self.sampler.parameters(row)
        result = self._forward(segments)
        rows, branches = [], []
        for i, (row, n) in enumerate(batch):
            sampling, read = self._completes(row, n), row.pending[0]
            ended = self._consume(row, n)
            if isinstance(row, Reader):
                if segments[i].logits != "none":
                    row.take(result.of(i))
                if sampling:
                    self.readers.remove(row)
                    row.finish()
                continue
            if ended:
                keep_snapshots(self.cache, row.sequence, row.request.plan.policy, read.mark)
            if sampling:
                branches_of = self._fork(row)
                rows += [result.spans[i][0]] * len(branches_of)
                branches += branches_of
        if branches:
            ids = None if result.drawn is None else result.drawn.tolist()
            all_drawn = self.sampler.draw(result.logits, rows, branches, ids)
            for branch, drawn in zip(branches, all_drawn):
                self._guard(branch, lambda b=branch, d=drawn: self._take(b, d))

    def _wanted(self, row: Branch | Reader, n: int) -> str:
        """Which logits the next n tokens of a row are to give."""
        if isinstance(row, Reader) and row.logits == "all":
            return "all"
        return "last" if self._completes(row, n) else "none"

    def _forward(self, segments: list[Segment]) -> Result:
        steps = all(s.kind == "step" for s in segments)
        known = bool(steps and self.model.step_names(len(segments)))
        start = time.perf_counter()
        result = self.model.forward(segments)
        if known:  # the first pass of a size also records it, which says nothing of its cost
            if result.drawn is not None:
                # A device has only been told what to do: the pass ends when its tokens are read.
                result.drawn = result.drawn.cpu()
            widest = max(self._width_index[s.width] for s in segments)
            self.costs.record(widest, len(segments), time.perf_counter() - start)
        self.stats.passes += 1
        self.stats.tokens_read += sum(len(s.tokens) for s in segments)
        return result

    @staticmethod
    def _completes(row: Branch | Reader, n: int) -> bool:
        return len(row.pending) == 1 and n == len(row.pending[0].tokens)

    @staticmethod
    def _consume(row: Branch | Reader, n: int) -> bool:
        """Takes n tokens off the first read; True when that was its end."""
        read = row.pending[0]
        if n == len(read.tokens):
            row.pending.pop(0)
            return True
        row.pending[0] = read.after(n)
        return False

    def _form(self) -> list[tuple[Branch | Reader, int]]:
        """The next pass, after making room for it where needed. A reader waits for room while a
        branch runs, and nothing new is admitted meanwhile; branches move one another out."""
        left_out: list[Reader] = []
        while True:
            ready = [r for r in self._active() if r not in left_out]
            candidates = [
                Candidate(
                    key=i, width=self._width_index[r.pending[0].width],
                    tokens=len(r.pending[0].tokens), kind=r.pending[0].kind,
                    position=r.sequence.length, waited=r.waited,
                )
                for i, r in enumerate(ready)
            ]  # fmt: skip
            batch = form_batch(candidates, self.limits, self.costs, self.mixing)
            chosen = [(ready[key], n) for key, n in batch]
            needs = [self.cache.pages_needed(r.sequence, n) for r, n in chosen]
            if not self.cache.k or sum(needs) <= self.cache.pages.free:
                self._reader_waits = bool(left_out)
                return chosen
            branches = [r for r in ready if isinstance(r, Branch)]
            hungry = [r for (r, _), n in zip(chosen, needs) if n and isinstance(r, Reader)]
            if hungry and branches:
                left_out.append(hungry[-1])
            elif hungry:
                self.readers.remove(hungry[-1])
                hungry[-1].fail(self._no_pages("sequence", hungry[-1]))
            else:
                self._preempt_youngest(branches)

    def _no_pages(self, name: str, row: Branch | Reader) -> OutOfCapacity:
        pages = self.cache.pages
        return OutOfCapacity(
            f"{name}: KV pages must be free to continue at {row.sequence.length} tokens, free "
            f"{pages.free} of {pages.size}; close open sequences or give the engine more "
            "kv_cache_memory_bytes"
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

    def _fork(self, branch: Branch) -> list[Branch]:
        """After the prompt: gives the other branches of the request their own sequences."""
        request = branch.request
        if request.first_token is not None:
            return [branch]
        request.first_token = time.perf_counter()
        self._share_start(branch)
        for other in request.branches[1:]:
            other.sequence = self.cache.fork(branch.sequence)
        return list(request.branches)

    # -- tokens ------------------------------------------------------------------------------

    def _guard(self, branch: Branch, action) -> None:
        """Runs what may call a user's code; its failure ends this branch alone."""
        try:
            action()
        except Exception as error:
            self._fail(branch, error)

    def _take(self, branch: Branch, drawn: Drawn) -> None:
        """Adds a sampled token and decides what comes next."""
        if drawn.token < 0:
            raise branch.request.error or NonFiniteLogits(
                f"{branch.request.request_id}: logits must be finite to be sampled, got NaN or "
                f"nothing finite at token {len(branch.token_ids)} at width {branch.width}"
            )
        branch.entropy = drawn.entropy
        if not self._append(branch, drawn.token, branch.phase, False, drawn):
            self._decide(branch, [drawn.token])

    def _decide(self, branch: Branch, unread: list[int]) -> None:
        """Asks the plan for the next width, appends what it forces, prepares the reads."""
        decision: Decision = branch.plan.next(branch.token_ids, branch.entropy)
        if decision.width not in self._width_index:
            known = ", ".join(self._width_index)
            raise WidthError(f"plan: width must be one of {known}, got {decision.width!r}")
        before, branch.phase = branch.phase, decision.phase
        changed = branch.width not in ("", decision.width)
        branch.width = decision.width
        for token in decision.forced:
            unread.append(token)
            if self._append(branch, token, before, True, None):
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
        branch.pending = [part for read in reads for part in _single_steps(read)]

    def _append(
        self, branch: Branch, token: int, phase, forced: bool, drawn: Drawn | None
    ) -> bool:
        """Adds one token to the output; True if the branch ended with it."""
        request, params = branch.request, branch.request.params
        branch.token_ids.append(token)
        count = len(branch.token_ids)
        may_stop = count >= params.min_tokens
        hidden = False
        if not forced and may_stop:
            is_eos = token in self.eos_ids and not params.ignore_eos
            if is_eos or token in params.stop_token_ids:
                hidden = True
                branch.finish_reason = "stop"
                branch.stop_reason = token if token in params.stop_token_ids else None
        full = len(request.prompt_ids) + count >= self.model.max_length
        if branch.finish_reason is None and (count == params.max_tokens or full):
            branch.finish_reason = "length"
        ended = branch.finish_reason is not None
        text = branch.push_text(token, ended, hidden, may_stop)
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

    def _fail(self, branch: Branch, error: Exception) -> None:
        """Ends a branch with an error, and with it its request."""
        request = branch.request
        logger.warning("%s ended with an error: %s", request.request_id, error)
        request.error = error
        for other in request.branches:
            if other.finish_reason is None:
                other.finish_reason, other.stop_reason = "error", str(error)
                self._end(other)

    def _end_request(self, request: Request, reason: str) -> None:
        for branch in request.branches:
            if branch.finish_reason is None:
                branch.finish_reason = reason
                self._end(branch)

    def _drop_cancelled(self) -> None:
        for request in {b.request: None for b in self.running if b.request.cancelled}:
            self._end_request(request, "cancelled")
        for request in [r for r in self.waiting if r.cancelled]:
            self.waiting.remove(request)
            self._end_request(request, "cancelled")

    def abandon_running(self, error: Exception) -> None:
        """Ends every request that has a place in the cache, and every reader."""
        for request in {b.request: None for b in self.running}:
            self._fail(request.branches[0], error)
        self._abandon_readers(error)

    def abandon(self, error_of: Callable[[Request], Exception], other: Exception) -> None:
        """Ends everything: requests with the error that `error_of(request)` makes, readers with
        `other`."""
        for request in {b.request: None for b in self.running}:
            self._fail(request.branches[0], error_of(request))
        while self.waiting:
            request = self.waiting.popleft()
            request.abandon(error_of(request))
        self._abandon_readers(other)

    def _abandon_readers(self, error: Exception) -> None:
        while self.readers:
            self.readers.pop().fail(error)


def _single_steps(read: Read) -> list[Read]:
    """A read of several steps as one read per token: a pass takes one step of a sequence."""
    if read.kind != "step":
        return [read]
    return [Read([token], read.width, "step") for token in read.tokens]
