"""A sequence that its owner drives token by token: step, switch width, fork, roll back, save."""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from .batching import chunk_length
from .cache import Cache, Run, Sequence
from .errors import InvalidRequest, NonFiniteLogits, OutOfCapacity, RequestCancelled
from .model import Model, Segment
from .outputs import Token
from .plan import Policy
from .sampling import SamplingParams
from .switching import Read, replay_reads, switch

if TYPE_CHECKING:
    from .engine import Engine
    from .worker import Worker


def run_read(model: Model, sequence: Sequence, read: Read, logits: str = "last") -> torch.Tensor:
    """Makes one read pass by pass and gives its logits [rows, V] (a copy): after the last token,
    or after all of them."""
    rows, left = [], read.tokens
    while left:
        n = 1
        if read.kind == "prefill":
            n = chunk_length(sequence.length, len(left), model.max_tokens)
        wanted = logits if logits == "all" or n == len(left) else "none"
        segment = Segment(sequence, left[:n], read.width, read.kind, wanted)
        result = model.forward([segment])
        if wanted != "none":
            rows.append(result.of(0).clone())
        left = left[n:]
    return torch.cat(rows)


def _give_back(worker: Worker, cache: Cache, sequence: Sequence) -> None:
    worker.post(lambda: cache.close(sequence))


class EngineSequence:
    """One open sequence of an engine; made by `Engine.open`. Close it, or use it in a `with`.

    Its place in the cache is its own until it is closed: it is never preempted. Methods may be
    called from any thread, but from one at a time.
    """

    def __init__(self, engine: Engine, sequence: Sequence, width: str, unread: list[int]):
        self._engine, self._sequence = engine, sequence
        self._width, self._unread = width, unread
        self._queue: list[Read] = []  # reads whose width is settled; they come before `_unread`
        self._logits: torch.Tensor | None = None  # after the last token read
        self._failure: Exception | None = None
        self._closed = False
        # A sequence that is dropped without being closed gives its place back all the same.
        self._dropped = weakref.finalize(
            self, _give_back, engine._worker, engine._model.cache, sequence
        )
        self._dropped.atexit = False

    # -- state -------------------------------------------------------------------------------

    @property
    def width(self) -> str:
        """The width that reads the next token; assigning switches by policy "carry"."""
        return self._width

    @width.setter
    def width(self, name: str) -> None:
        self.switch(name)

    @property
    def token_ids(self) -> list[int]:
        """All tokens, those not read yet included."""
        queued = [t for read in self._queue for t in read.tokens]
        return self._sequence.tokens + queued + self._unread

    @property
    def runs(self) -> list[Run]:
        """Which width read which tokens, and how."""
        return list(self._sequence.runs)

    @property
    def closed(self) -> bool:
        """Whether its place in the cache was given back."""
        return self._closed

    # -- what it does ------------------------------------------------------------------------

    def switch(self, width: str, policy: str | Policy = "carry") -> int:
        """Changes the width of what is read from now on.

        Returns: how many tokens were read again (0 for "carry").

        Raises: WidthError for an unknown width, or by "carry" to a width whose Mamba heads were
            not tracked; nothing has changed then.
        """
        self._engine._intake.check_width(width)
        policy = Policy.parse(policy)

        def job() -> int:
            self._settle()
            again = 0
            if width != self._width and self._sequence.tokens:
                model = self._engine._model
                reads, again = switch(
                    model.cache, self._sequence, self._unread, width, policy, model.widths
                )
                if policy.kind != "carry":
                    self._queue, self._unread = reads, []
            self._width = width
            return again

        again = self._read_call(job)
        if self._queue:
            self._read_call(self._settle)
        return again

    def append(self, token_ids: list[int]) -> None:
        """Adds tokens to be read, at the width that is set when they are, before the next step."""
        self._engine._intake.check_tokens("append: token_ids", token_ids)
        self._check_room(len(token_ids))
        self._unread = self._unread + list(token_ids)

    def logits(self) -> torch.Tensor:
        """Float32 logits [V] of the next token, after everything unread has been read."""
        return self._read_call(lambda: self._read_all().clone())

    def step(self, width: str | None = None, params: SamplingParams | None = None) -> Token:
        """Samples the next token and adds it; it is read by the step that follows.

        Args:
            width: switches to it first, by policy "carry".
            params: sampling parameters; None = greedy. Penalties count all tokens as output.

        Raises: NonFiniteLogits, with nothing added; InvalidRequest at max_model_len.
        """
        if width is not None and width != self._width:
            self.switch(width)
        self._check_room(1)
        params = params or SamplingParams(temperature=0.0)

        def job() -> Token:
            row = self._read_all()
            tokens = self.token_ids
            branch = self._engine._intake.lone_branch(tokens, params, self._width)
            branch.token_ids = tokens  # positions and penalties count all tokens
            drawn = self._engine._scheduler.sampler.draw(row[None], [0], [branch])[0]
            if drawn.token < 0:
                raise branch.request.error or NonFiniteLogits(
                    f"step: logits must be finite to be sampled, got NaN or nothing finite at "
                    f"token {len(tokens)} at width {self._width}"
                )
            self._unread = [drawn.token]
            text = self._engine.decode([drawn.token])
            logprob = drawn.logprobs[drawn.token][0] if drawn.logprobs else None
            return Token(drawn.token, text, self._width, None, False, logprob, drawn.logprobs)

        return self._read_call(job)

    def snapshot(self) -> int:
        """Keeps a snapshot of the sequence as read so far; gives its length. Rolling back to it or
        beyond is then cheap. Takes a state slot until the sequence is closed."""

        def job() -> int:
            self._settle()
            self._engine._scheduler.claim_slots()
            kept = self._engine._model.cache.snapshot(self._sequence)
            kept.logits = self._logits
            return kept.length

        return self._read_call(job)

    def rollback(self, length: int) -> None:
        """Goes back to the first `length` tokens: restores the nearest snapshot before and replays
        the rest as it was read, so that the cache is bit-equal to what it was. The width that
        reads on stays what it is."""
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise InvalidRequest(f"rollback: length must be an int >= 1, got {length!r}")
        if length > len(self.token_ids):
            raise InvalidRequest(
                f"rollback: length must be at most {len(self.token_ids)}, got {length}"
            )

        def job() -> None:
            self._settle()
            sequence, cache = self._sequence, self._engine._model.cache
            if length >= sequence.length:
                self._unread = self._unread[: length - sequence.length]
                return
            earlier = [s for s in sequence.snapshots if s.length <= length]
            reads = replay_reads(sequence, earlier[-1].length if earlier else 0, length)
            if earlier:
                cache.restore(sequence, earlier[-1])
            else:
                cache.reset(sequence)
            self._queue, self._unread = reads, []
            self._logits = earlier[-1].logits if earlier else None

        self._read_call(job)
        self._read_call(self._settle)

    def fork(self) -> EngineSequence:
        """A twin that continues on its own; pages are shared until one of them writes."""

        def job() -> EngineSequence:
            self._settle()
            self._engine._scheduler.claim_slots()
            place = self._engine._model.cache.fork(self._sequence)
            twin = EngineSequence(self._engine, place, self._width, list(self._unread))
            twin._logits = self._logits
            return twin

        return self._read_call(job)

    def save(self, path) -> None:
        """Writes tokens, width runs, state and KV to a safetensors file, with the weights'
        fingerprint; `Engine.load` continues bit-equal. A file there is replaced at the end."""
        from .sequence_file import save_sequence

        def job() -> None:
            self._settle()
            save_sequence(
                path, self._engine, self._sequence, self._width, self._unread, self._logits
            )

        self._read_call(job)

    def close(self) -> None:
        """Gives its place in the cache back; closing twice does nothing."""
        if self._closed:
            return
        self._closed = True
        self._dropped.detach()
        cache, sequence = self._engine._model.cache, self._sequence
        with suppress(RequestCancelled):  # the engine may be closed, and its cache with it
            self._engine._call(lambda: cache.close(sequence))

    def __enter__(self) -> EngineSequence:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # -- on the worker -----------------------------------------------------------------------

    def _read_call(self, job):
        """Runs a job that may need pages; it waits while running requests may give some back.
        Every job leaves the sequence such that trying again goes on where it stopped."""
        return self._engine._call(job, wait_for_room=True)

    def _check_open(self) -> None:
        if self._closed:
            raise RequestCancelled("sequence: must be open, got one that was closed")
        if self._failure is not None:
            raise RequestCancelled(
                f"sequence: a pass failed while it was read ({self._failure}), so that its state "
                "is lost; close it"
            )

    def _check_room(self, count: int) -> None:
        have, most = len(self.token_ids), self._engine.max_model_len
        if have + count > most:
            raise InvalidRequest(
                f"sequence: tokens must stay within max_model_len {most}, got {have} + {count}"
            )

    def _settle(self) -> None:
        """Makes the reads whose width is settled. When pages run out, what was read is kept."""
        self._check_open()
        while self._queue:
            read, start = self._queue[0], self._sequence.length
            self._logits = None
            try:
                self._logits = run_read(self._engine._model, self._sequence, read)[-1]
            except OutOfCapacity:
                raise
            except Exception as error:
                self._failure = error
                raise
            finally:
                left = read.after(self._sequence.length - start)
                self._queue[:1] = [left] if left.tokens else []

    def _read_all(self) -> torch.Tensor:
        """Reads what is unread; logits [V] after the last token."""
        self._check_open()
        if self._unread:
            begun = self._sequence.tokens or self._queue
            self._queue.append(Read(self._unread, self._width, "step" if begun else "prefill"))
            self._unread = []
        self._settle()
        if self._logits is None:
            raise InvalidRequest(
                "sequence: tokens must be appended before the first step, got none"
            )
        return self._logits
