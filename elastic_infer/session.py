"""A sequence that its owner drives token by token: step, switch width, fork, roll back, save."""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from .cache import Cache, Run, Sequence
from .errors import InvalidRequest, NonFiniteLogits, RequestCancelled, shown
from .outputs import Token
from .plan import Policy
from .reading import Reader, state_is_lost
from .sampling import SamplingParams
from .switching import Read, replay_reads, switch
from .text_stream import StepText
from .torch_modes import plain_torch

if TYPE_CHECKING:
    from .engine import Engine
    from .worker import Worker


def _give_back(worker: Worker, cache: Cache, sequence: Sequence) -> None:
    worker.post(lambda: cache.close(sequence))


class EngineSequence:
    """One open sequence of an engine; made by `Engine.open`. Close it, or use it in a `with`.

    Its place in the cache is its own until it is closed: it is never preempted. Methods may be
    called from any thread, but from one at a time.
    """

    def __init__(
        self,
        engine: Engine,
        sequence: Sequence,
        width: str,
        unread: list[int],
        text: StepText | None = None,
    ):
        self._engine, self._sequence = engine, sequence
        self._text = text or StepText(engine.tokenizer)
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

        Raises:
            WidthError: for an unknown width, or by "carry" to a width whose Mamba heads were not
                tracked; nothing has changed then.
        """
        self._engine._intake.check_width(width)
        policy = Policy.parse(policy)

        self._settle()

        def job() -> int:
            self._check_settled()
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

        again = self._engine._call(job)
        self._settle()
        return again

    def append(self, token_ids: list[int]) -> None:
        """Adds tokens to be read, at the width that is set when they are, before the next step."""
        self._engine._intake.check_tokens("append: token_ids", token_ids)
        self._check_room(len(token_ids))
        self._unread = self._unread + list(token_ids)

    def logits(self) -> torch.Tensor:
        """Float32 logits [V] of the next token, after everything unread has been read."""
        return self._read_all().clone()

    def step(self, width: str | None = None, params: SamplingParams | None = None) -> Token:
        """Samples the next token and adds it; it is read by the step that follows.

        The joined texts of steps are their tokens decoded: half a character is held back until the
        step that completes it, or until `close`. An `append` between them ends what is held back.

        Args:
            width: switches to it first, by policy "carry".
            params: sampling parameters; None = greedy. Penalties count all tokens as output.

        Raises: NonFiniteLogits, with nothing added; InvalidRequest at max_model_len.
        """
        if width is not None and width != self._width:
            self.switch(width)
        self._check_room(1)
        params = SamplingParams(temperature=0.0) if params is None else params

        row, tokens = self._read_all(), self.token_ids
        branch = self._engine._intake.lone_branch(tokens, params, self._width)
        branch.token_ids = tokens  # positions and penalties count all tokens
        sampler = self._engine._scheduler.sampler  # its tables are the worker's alone
        drawn = self._engine._call(lambda: sampler.draw(row[None], [0], [branch])[0])
        if drawn.token < 0:
            raise branch.request.error or NonFiniteLogits(
                f"step: logits must be finite to be sampled, got NaN or nothing finite at token "
                f"{len(tokens)} at width {self._width}"
            )
        self._unread = [drawn.token]
        text = self._text.push(drawn.token, len(tokens))
        logprob = drawn.logprobs[drawn.token][0] if drawn.logprobs else None
        return Token(drawn.token, text, self._width, None, False, logprob, drawn.logprobs)

    def snapshot(self) -> int:
        """Keeps a snapshot of the sequence as read so far; gives its length. Rolling back to it or
        beyond is then cheap. Takes a state slot until the sequence is closed."""
        self._settle()

        def job() -> int:
            self._check_settled()
            self._engine._scheduler.claim_slots()
            kept = self._engine._model.cache.snapshot(self._sequence)
            kept.logits = self._logits
            return kept.length

        return self._engine._call(job, wait_for_room=True)

    def rollback(self, length: int) -> None:
        """Goes back to the first `length` tokens: restores the nearest snapshot before and replays
        the rest as it was read, so that the cache is bit-equal to what it was. The width that
        reads on stays what it is."""
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise InvalidRequest(f"rollback: length must be an int >= 1, got {shown(length)}")
        if length > len(self.token_ids):
            raise InvalidRequest(
                f"rollback: length must be at most {len(self.token_ids)}, got {shown(length)}"
            )
        self._settle()

        def job() -> None:
            self._check_settled()
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

        self._engine._call(job)
        self._text.cut(self.token_ids)
        self._settle()

    def fork(self) -> EngineSequence:
        """A twin that continues on its own; pages are shared until one of them writes."""
        self._settle()

        def job() -> EngineSequence:
            self._check_settled()
            self._engine._scheduler.claim_slots()
            place = self._engine._model.cache.fork(self._sequence)
            text = self._text.fork()
            twin = EngineSequence(self._engine, place, self._width, list(self._unread), text)
            twin._logits = self._logits
            return twin

        return self._engine._call(job, wait_for_room=True)

    def save(self, path) -> None:
        """Writes tokens, width runs, state and KV to a safetensors file, with the weights'
        fingerprint; `Engine.load` continues bit-equal. A file there is replaced at the end."""
        from .sequence_file import sequence_content, write_sequence
        self._settle()

        def job() -> Any:
            self._check_settled()
            with plain_torch():  # a user's function may have left the worker in some mode
                return sequence_content(
                    self._engine, self._sequence, self._width, self._unread, self._logits
                )

        content = self._engine._call(job)
        with plain_torch():
            write_sequence(path, content)  # here: the disk keeps only its caller waiting

    def close(self) -> str | None:
        """Gives its place in the cache back; closing twice does nothing.

        Returns: the text of steps that was held back, such as half a character; None without a
            tokenizer.
        """
        if self._closed:
            return self._text.finish()
        self._closed = True
        self._dropped.detach()
        engine, sequence = self._engine, self._sequence

        def job() -> None:
            engine._scheduler.drop_readers(sequence, _closed_error())
            engine._model.cache.close(sequence)

        with suppress(RequestCancelled):  # the engine may be closed, and its cache with it
            engine._call(job)
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
        """On the worker: that nothing is being read, as it would by a call from another thread."""
        self._check_open()
        if self._queue:
            raise InvalidRequest("sequence: one call at a time must be made on it, got a second")

    def _check_room(self, count: int) -> None:
        have, most = len(self.token_ids), self._engine.max_model_len
        if have + count > most:
            raise InvalidRequest(
                f"sequence: tokens must stay within max_model_len {most}, got {have} + {count}"
            )

    def _settle(self) -> None:
        """Makes the reads whose width is settled, in passes that requests share. When pages run
        out, what was read is kept and the rest stays queued."""
        self._check_open()
        if self._queue:
            self._engine._call(self._reader)

    def _reader(self) -> Reader:
        self._check_open()
        self._logits = None
        return Reader(self._sequence, self._queue, "last", self._keep, self._lose)

    def _keep(self, rows: torch.Tensor) -> None:
        self._logits = rows[-1]

    def _lose(self, error: Exception) -> None:
        if state_is_lost(error):
            self._failure = error

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


def _closed_error() -> RequestCancelled:
    return RequestCancelled("sequence: must be open, got one that was closed")
