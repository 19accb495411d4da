"""A sequence that its owner drives token by token: step, switch width, fork, roll back, save."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .batching import chunk_length
from .cache import Run, Sequence
from .errors import InvalidRequest, NonFiniteLogits, RequestCancelled
from .model import Model, Segment
from .outputs import Token
from .plan import Policy
from .sampling import SamplingParams
from .switching import Read, replay_reads, switch

if TYPE_CHECKING:
    from .engine import Engine


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


class EngineSequence:
    """One open sequence of an engine; made by `Engine.open`. Close it, or use it in a `with`.

    Its place in the cache is its own until it is closed: it is never preempted.
    """

    def __init__(self, engine: Engine, sequence: Sequence, width: str, unread: list[int]):
        self._engine, self._sequence = engine, sequence
        self._width, self._unread, self._logits = width, unread, None
        self._closed = False

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
        return self._sequence.tokens + self._unread

    @property
    def runs(self) -> list[Run]:
        """Which width read which tokens, and how."""
        return list(self._sequence.runs)

    # -- what it does ------------------------------------------------------------------------

    def switch(self, width: str, policy: str | Policy = "carry") -> int:
        """Changes the width of what is read from now on.

        Returns: how many tokens were read again (0 for "carry").

        Raises: WidthError for an unknown width, or by "carry" to a width whose Mamba heads were
            not tracked; nothing has changed then.
        """
        self._engine._check_width(width)
        policy = Policy.parse(policy)

        def job() -> int:
            self._check_open()
            model, again, tokens = self._engine._model, 0, self.token_ids
            if width != self._width and self._sequence.tokens:
                reads, again = switch(
                    model.cache, self._sequence, [], width, policy, model.widths
                )
                self._width = width
                self._make([r for r in reads if r.tokens], tokens)
            self._width = width
            return again

        return self._engine._call(job)

    def append(self, token_ids: list[int]) -> None:
        """Adds tokens to be read, at the present width, before the next step."""
        self._engine._check_tokens("append: token_ids", token_ids)
        self._check_room(len(token_ids))
        self._unread.extend(token_ids)

    def logits(self) -> torch.Tensor:
        """Float32 logits [V] of the next token, after everything unread has been read."""
        return self._engine._call(self._read_all)

    def step(self, width: str | None = None, params: SamplingParams | None = None) -> Token:
        """Samples the next token and adds it; it is read by the step that follows.

        Args:
            width: switches to it first, by policy "carry".
            params: sampling parameters; None = greedy.
        """
        if width is not None and width != self._width:
            self.switch(width)
        self._check_room(1)
        params = params or SamplingParams(temperature=0.0)

        def job() -> Token:
            row = self._read_all()
            branch = self._engine._lone_branch(self.token_ids, params, self._width)
            branch.token_ids = self._sequence.tokens  # positions and penalties count all tokens
            drawn = self._engine._scheduler.sampler.draw(row[None], [0], [branch])[0]
            if drawn.token < 0:
                raise NonFiniteLogits(
                    f"step: logits must be finite to be sampled, got NaN or nothing finite at "
                    f"token {len(self.token_ids)} at width {self._width}"
                )
            self._unread.append(drawn.token)
            text = self._engine.decode([drawn.token])
            logprob = drawn.logprobs[drawn.token][0] if drawn.logprobs else None
            return Token(drawn.token, text, self._width, None, False, logprob, drawn.logprobs)

        return self._engine._call(job)

    def snapshot(self) -> int:
        """Keeps a snapshot of the sequence as read so far; gives its length. Rolling back to it or
        beyond is then cheap. Takes a state slot until the sequence is closed."""

        def job() -> int:
            self._check_open()
            return self._engine._model.cache.snapshot(self._sequence).length

        return self._engine._call(job)

    def rollback(self, length: int) -> None:
        """Goes back to the first `length` tokens: restores the nearest snapshot before and replays
        the rest as it was read, so that the cache is bit-equal to what it was."""
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise InvalidRequest(f"rollback: length must be an int >= 1, got {length!r}")
        if length > len(self.token_ids):
            raise InvalidRequest(
                f"rollback: length must be at most {len(self.token_ids)}, got {length}"
            )

        def job() -> None:
            self._check_open()
            sequence, model, tokens = self._sequence, self._engine._model, self.token_ids
            if length >= sequence.length:
                self._unread = self._unread[: length - sequence.length]
                return
            earlier = [s for s in sequence.snapshots if s.length <= length]
            reads = replay_reads(sequence, earlier[-1].length if earlier else 0, length)
            if earlier:
                model.cache.restore(sequence, earlier[-1])
            else:
                model.cache.reset(sequence)
            self._logits = None
            self._make(reads, tokens[:length])

        self._engine._call(job)

    def fork(self) -> EngineSequence:
        """A twin that continues on its own; pages are shared until one of them writes."""

        def job() -> EngineSequence:
            self._check_open()
            twin = EngineSequence(
                self._engine, self._engine._model.cache.fork(self._sequence), self._width,
                list(self._unread),
            )  # fmt: skip
            twin._logits = self._logits
            self._engine._sessions.add(twin)
            return twin

        return self._engine._call(job, wait_for_room=True)

    def save(self, path) -> None:
        """Writes tokens, width runs, state and KV to a safetensors file, with the weights'
        fingerprint; `Engine.load` continues bit-equal."""
        from .sequence_file import save_sequence

        def job() -> None:
            self._check_open()
            save_sequence(
                path, self._engine, self._sequence, self._width, self._unread, self._logits
            )

        self._engine._call(job)

    def close(self) -> None:
        """Gives its place in the cache back; closing twice does nothing."""
        if self._closed:
            return
        self._closed = True
        self._engine._sessions.discard(self)
        if not self._engine.closed:
            self._engine._call(lambda: self._engine._model.cache.close(self._sequence))

    def __enter__(self) -> EngineSequence:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # -- on the worker -----------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise RequestCancelled("sequence: must be open, got one that was closed")

    def _check_room(self, count: int) -> None:
        have, most = len(self.token_ids), self._engine.max_model_len
        if have + count > most:
            raise InvalidRequest(
                f"sequence: tokens must stay within max_model_len {most}, got {have} + {count}"
            )

    def _make(self, reads: list[Read], tokens: list[int]) -> None:
        """Makes reads; whatever of `tokens` is not in the cache at the end (also when pages ran out
        halfway) is unread."""
        try:
            for read in reads:
                self._logits = run_read(self._engine._model, self._sequence, read)[-1]
        finally:
            self._unread = tokens[self._sequence.length :]

    def _read_all(self) -> torch.Tensor:
        """Reads what is unread; logits [V] after the last token."""
        self._check_open()
        if self._unread:
            kind = "step" if self._sequence.tokens else "prefill"
            self._make([Read(self._unread, self._width, kind)], self.token_ids)
        if self._logits is None:
            raise InvalidRequest("sequence: tokens must be appended before the first step, got none")
        return self._logits

