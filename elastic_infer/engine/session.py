"""A sequence that its owner drives token by token: step, switch width, fork, roll back, save."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any, TypeVar

import torch

from ..cache.sequence import Run, Sequence
from ..errors import InvalidRequest, NonFiniteLogits, RequestCancelled, shown
from ..outputs import Token
from ..plans.policy import Policy
from ..public import public
from ..sampling.params import SamplingParams
from ..scheduling.reader import Reader, state_is_lost
from ..scheduling.reads import Read, replay_reads
from ..scheduling.scheduler import CLOSED
from ..scheduling.switching import switch
from ..showing import count_text, name_text, names_text, one_line
from ..text.stream import StepText
from ..torch_modes import plain_torch
from ..value_checks import check_int
from .core import Core
from .sequence_file import sequence_content, write_sequence

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _one_at_a_time(method: _Method) -> _Method:
    """A method that refuses to begin while another call on its sequence has not ended."""

    @wraps(method)
    def guarded(self: EngineSequence, *args: Any, **kwargs: Any) -> Any:
        mine, calls = object(), self._calls
        try:
            # An interrupt can come after every call. So taking the place records whose it is in
            # the same instruction, and giving it back calls nothing.
            if calls.setdefault("now", mine) is not mine:
                raise InvalidRequest(
                    f"sequence: one call at a time must be made on it, got {method.__name__} "
                    "during another; give every thread a sequence of its own (fork)"
                )
            return method(self, *args, **kwargs)
        finally:
            if "now" in calls and calls["now"] is mine:
                del calls["now"]

    return guarded  # type: ignore[return-value]  # `wraps` keeps the signature


@public
class EngineSequence:
    """One open sequence of an engine; made by `Engine.open`. Close it, or use it in a `with`.

    Its place in the cache is its own until it is closed: it is never preempted. Methods may be
    called from any thread, but from one at a time: a second call is refused, except `close`, which
    ends the first. A call that is interrupted (Control-C) leaves a sequence that goes on.
    """

    def __init__(
        self,
        core: Core,
        sequence: Sequence,
        width: str,
        unread: list[int],
        text: StepText | None = None,
    ):
        """On the worker's thread, so that its place has an owner before anything can go wrong."""
        self._core, self._sequence = core, sequence
        self._text = text or StepText(core.tokenizer)
        self._width, self._unread = width, unread
        self._queue: list[Read] = []  # reads whose width is settled; they come before `_unread`
        self._logits: torch.Tensor | None = None  # after the last token read
        self._failure: BaseException | None = None
        self._closed = False
        self._calls: dict[str, object] = {}  # "now": the call that has not ended
        self._reader: Reader | None = None  # what the worker still reads of `_queue`
        # A sequence that is dropped without being closed gives its place back all the same.
        core.worker.own(self, sequence)

    # -- state -------------------------------------------------------------------------------

    @one_line
    def __repr__(self) -> str:
        queued = sum(len(read.tokens) for read in self._queue)
        tokens = len(self._sequence.tokens) + queued + len(self._unread)
        parts = [count_text(tokens, "token"), f"at {name_text(self._width)}"]
        if self._closed or self._core.worker.closed:
            parts[1:] = ["closed"]
        elif self._failure is not None:
            parts[1:] = ["lost by a failed pass"]
        elif self._sequence.runs:
            counts: list[tuple[str, int]] = []
            for run in list(self._sequence.runs):  # neighbours may differ in how they were read
                before = counts.pop()[1] if counts and counts[-1][0] == run.width else 0
                counts.append((run.width, before + run.count))
            runs = [f"{name_text(width)}:{count}" for width, count in counts]
            parts.append(f"runs {names_text(runs, ' ')}")
        return f"EngineSequence({', '.join(parts)})"

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
        """Runs of tokens, each with its width and the kind of its reading."""
        return list(self._sequence.runs)

    @property
    def closed(self) -> bool:
        """True if its place in the cache was given back."""
        return self._closed

    # -- what it does ------------------------------------------------------------------------

    @_one_at_a_time
    def switch(self, width: str, policy: str | Policy = "carry") -> int:
        """Changes the width of all reads from now on.

        Returns:
            How many tokens were read again (0 for "carry").

        Raises:
            WidthError: for an unknown width, or by "carry" to a width whose Mamba heads were not
                tracked; nothing has changed then.
        """
        return self._switch(width, Policy.parse(policy))

    def _switch(self, width: str, policy: Policy) -> int:
        self._core.intake.check_width(width)
        self._settle()

        def job() -> int:
            self._check_settled()
            again = 0
            if width != self._width and self._sequence.tokens:
                model = self._core.model
                reads, again = switch(
                    model.cache, self._sequence, self._unread, width, policy, model.widths
                )
                if policy.kind != "carry":
                    self._queue, self._unread = reads, []
            self._width = width
            return again

        again = self._core.call(job)
        self._settle()
        return again

    @_one_at_a_time
    def append(self, token_ids: list[int]) -> None:
        """Adds tokens to be read, at the width that is set when they are, before the next step."""
        self._core.intake.check_tokens("append: token_ids", token_ids)
        self._check_room(len(token_ids))
        self._unread = self._unread + list(token_ids)

    @_one_at_a_time
    def logits(self) -> torch.Tensor:
        """Float32 logits [V] of the next token, after everything unread has been read."""
        return self._read_all().clone()

    @_one_at_a_time
    def step(self, width: str | None = None, params: SamplingParams | None = None) -> Token:
        """Samples the next token and adds it; it is read by the step that follows.

        The joined texts of steps are their tokens decoded: half a character is held back until the
        step that completes it, or until `close`. An `append` between them ends what is held back.

        Args:
            width: switches to it first, by policy "carry".
            params: sampling parameters; None = greedy. Penalties count all tokens as output.

        Raises:
            NonFiniteLogits: with nothing added.
            InvalidRequest: at max_model_len.
        """
        if width is not None:
            self._core.intake.check_width(width)
        if width is not None and width != self._width:
            self._switch(width, Policy.parse("carry"))
        self._check_room(1)
        params = SamplingParams(temperature=0.0) if params is None else params

        row, tokens = self._read_all(), self.token_ids
        branch = self._core.intake.detached_branch(tokens, params, self._width)
        branch.token_ids = tokens  # positions and penalties count all tokens
        sampler = self._core.scheduler.sampler  # its tables are the worker's alone
        drawn = self._core.call(lambda: sampler.draw(row[None], [0], [branch])[0])
        if drawn.token < 0:
            raise branch.request.error or NonFiniteLogits(
                f"step: logits must be finite to be sampled, got NaN or nothing finite at token "
                f"{len(tokens)} at width {self._width}"
            )
        try:
            text = self._text.push(drawn.token, len(tokens))
            logprob = drawn.logprobs[drawn.token][0] if drawn.logprobs else None
            token = Token(drawn.token, text, self._width, None, False, logprob, drawn.logprobs)
            self._unread = [drawn.token]  # at the end: an interrupted step has added nothing
            return token
        except BaseException:
            self._unread = []
            self._text.cut(tokens)
            raise

    @_one_at_a_time
    def snapshot(self) -> int:
        """Keeps a snapshot of the sequence as read so far; gives its length. Rolling back to it or
        beyond is then cheap. Takes a state slot until the sequence is closed."""
        self._settle()

        def job() -> int:
            self._check_settled()
            self._core.scheduler.claim_slots()
            kept = self._core.model.cache.snapshot(self._sequence)
            kept.logits = self._logits
            return kept.length

        return self._core.call(job, wait_for_room=True)

    @_one_at_a_time
    def rollback(self, length: int) -> None:
        """Goes back to the first `length` tokens: restores the nearest snapshot before and replays
        the rest as it was read, so that the cache is bit-equal to its earlier self. The width that
        reads on stays the same."""
        check_int("rollback: length", length, 1)
        if length > len(self.token_ids):
            raise InvalidRequest(
                f"rollback: length must be at most {len(self.token_ids)}, got {shown(length)}"
            )
        self._settle()
        text = self._text.fork()  # cut here: long texts would keep the worker
        text.cut(self.token_ids[:length])

        def job() -> None:
            self._check_settled()
            sequence, cache = self._sequence, self._core.model.cache
            self._text = text  # with the tokens: an interrupt comes before both or after both
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

        self._core.call(job)
        self._settle()

    @_one_at_a_time
    def fork(self) -> EngineSequence:
        """A twin that continues on its own; pages are shared until one of them writes."""
        self._settle()

        def job() -> EngineSequence:
            self._check_settled()
            self._core.scheduler.claim_slots()
            place = self._core.model.cache.fork(self._sequence)
            text = self._text.fork()
            twin = EngineSequence(self._core, place, self._width, list(self._unread), text)
            twin._logits = self._logits
            return twin

        return self._core.call(job, wait_for_room=True)

    @_one_at_a_time
    def save(self, path) -> None:
        """Writes tokens, width runs, state and KV to a safetensors file, with the weights'
        fingerprint; `Engine.load` continues bit-equal. A file there is replaced at the end."""
        self._settle()

        def job() -> Any:
            self._check_settled()
            with plain_torch():  # a user's function may have left the worker in some mode
                return sequence_content(
                    self._core, self._sequence, self._width, self._unread, self._logits
                )

        content = self._core.call(job)
        with plain_torch():
            write_sequence(path, content)  # here: the disk keeps only its caller waiting

    def close(self) -> str | None:
        """Gives its place in the cache back; closing twice does nothing.

        Returns:
            The text of steps that was held back, such as half a character; None without a
            tokenizer.
        """
        if self._closed:
            return self._text.finish()
        core, sequence = self._core, self._sequence
        core.worker.check_thread()

        def job() -> None:
            self._closed = True
            core.scheduler.release(sequence)
            core.worker.disown(sequence)

        with suppress(RequestCancelled):  # the engine may be closed, and its cache with it
            core.call(job)
        self._closed = True
        return self._text.finish()

    def __enter__(self) -> EngineSequence:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # -- reading -----------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise _closed_error()
        if self._failure is not None:
            raise RequestCancelled(
                f"sequence: a pass failed while it was read ({self._failure}), so that its state "
                "is lost; close it"
            )

    def _check_settled(self) -> None:
        """On the worker: checks that nothing is being read, as by a call from another thread."""
        self._check_open()
        if self._queue:
            raise InvalidRequest("sequence: one call at a time must be made on it, got a second")

    def _check_room(self, count: int) -> None:
        have, most = len(self.token_ids), self._core.max_model_len
        if have + count > most:
            raise InvalidRequest(
                f"sequence: tokens must stay within max_model_len {most}, got {have} + {count}"
            )

    def _settle(self) -> None:
        """Makes the reads whose width is settled, in passes that requests share. When pages run
        out, what was read is kept and the rest stays queued."""
        self._check_open()
        if self._queue or self._reader:
            self._core.call(self._begin_reading)

    def _begin_reading(self) -> Reader | None:
        """On the worker: reads what is queued; None if an interrupted call's reader has done it."""
        self._check_open()
        scheduler = self._core.scheduler
        scheduler.drop_readers(self._sequence, RequestCancelled("sequence: it was read on"))
        if not self._queue:
            return None
        self._logits = None
        self._reader = Reader(self._sequence, self._queue, None, self._keep, self._lose)
        return self._reader

    def _begin_reading_all(self) -> Reader | None:
        """On the worker: reads the unread tokens, after the queue."""
        if self._unread:
            begun = self._sequence.tokens or self._queue
            self._queue.append(Read(self._unread, self._width, "step" if begun else "prefill"))
            self._unread = []
        return self._begin_reading()

    def _keep(self, rows: torch.Tensor) -> None:
        self._logits, self._reader = rows[-1], None

    def _lose(self, error: BaseException) -> None:
        self._reader = None
        if state_is_lost(error):
            self._failure = error

    def _read_all(self) -> torch.Tensor:
        """Reads the unread tokens; logits [V] after the last token."""
        self._check_open()
        if self._unread or self._queue or self._reader:
            self._core.call(self._begin_reading_all)
        if self._logits is None:
            raise InvalidRequest(
                "sequence: tokens must be appended before the first step, got none"
            )
        return self._logits


def _closed_error() -> RequestCancelled:
    return RequestCancelled(CLOSED)
