"""A request and its branches: what was asked, how far it is, what it has produced."""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ..cache.sequence import Sequence
from ..errors import ElasticError, InvalidRequest, RequestCancelled, RequestFailed
from ..outputs import Choice, FinishReason, Output, Phase, Times, Token, Usage
from ..plans.plan import Plan
from ..plans.run import PlanRun
from ..public import public
from ..sampling.params import SamplingParams
from ..sampling.processors import RowProcessors
from ..showing import count_text, name_text, one_line
from ..text.stops import split_reasoning
from ..text.stream import TextStream
from ..text.tokenizer import Tokenizer
from ..user_calls import text_of
from ..value_checks import check_timeout
from .promise import Promise, take
from .reads import Read

_numbers = itertools.count(1)


class Branch:
    """One continuation of a request's prompt: its sequence, plan, text and result.

    Attributes:
        pending: reads still to be made before the next token can be sampled.
        phase: in which the next token is sampled.
        tags: ids of the plan's think tags.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        run: PlanRun,
        processors: RowProcessors,
        tokenizer: Tokenizer | None,
        tags: tuple[int, ...],
    ):
        params = request.params
        self.request, self.index, self.run, self.processors = request, index, run, processors
        self.sequence: Sequence | None = None
        self.pending: list[Read] = []
        self.width = ""
        self.phase: Phase | None = None
        self.entropy: float | None = None
        self.waited = 0
        self.token_ids: list[int] = []
        self.tokens: list[Token] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self._phases = run.phases()
        self.text: TextStream | None = None
        if tokenizer is not None:
            skip, spelled = params.skip_special_tokens, None
            if self._phases is None and _spelled(request.plan):
                spelled = request.plan.start_tag, request.plan.end_tag
            self.text = TextStream(tokenizer, params.stop, tags, skip, spelled)

    @property
    def ready(self) -> bool:
        """True if it has tokens to read and a place in the cache."""
        return bool(self.pending) and self.sequence is not None and self.sequence.slot >= 0

    @property
    def needs_no_logits(self) -> bool:
        """True if its tokens are drawn from the logits as they are, and no logits are needed."""
        return not (
            self.processors.active
            or self.request.params.logprobs is not None
            or self.request.plan.needs_entropy
        )

    def is_full(self, count: int, max_length: int) -> bool:
        """True if it ends with `count` tokens, whatever they are. max_length: of a sequence."""
        full = len(self.request.prompt_ids) + count >= max_length
        return full or count == self.request.params.max_tokens

    def emit(self, token: Token) -> None:
        """Adds a token to the result and, for the first branch, to the stream."""
        self.tokens.append(token)
        if self.index == 0:
            self.request.events.put(token)

    def place(self, token_id: int) -> Phase | None:
        """The phase that the next token of the output belongs to."""
        return None if self._phases is None else self._phases.push(token_id)

    def push_text(
        self, token_id: int, phase: Phase | None, last: bool, hidden: bool, search: bool
    ) -> str | None:
        """The text that becomes final with a token; sets the stop reason when a stop string is
        found. hidden: the token ends the text and is no part of it."""
        if self.text is None:
            return None
        inside = self.request.params.stop_in_thinking
        shown, hit = ("", None) if hidden else self.text.push(token_id, phase, search, inside)
        if hit is None and (last or hidden):
            more, hit = self.text.finish(search, inside)
            shown += more
        if hit is not None:
            self.finish_reason, self.stop_reason = "stop", hit
        return shown

    def _split(self) -> tuple[str | None, str | None]:
        """(reasoning, answer): by the tokens' phases; by the tags' text where the vocabulary has
        no tokens for them."""
        if self.text is None:
            return None, None
        if self._phases is not None:
            begun = self.run.prompt_is_thinking or self._phases.opened
            return self.text.split(begun)
        plan = self.request.plan
        if _spelled(plan):
            return split_reasoning(self.text.text, plan.start_tag, plan.end_tag, False)
        return None, self.text.text

    def choice(self) -> Choice:
        """The result so far."""
        runs: list[tuple[str, int]] = []
        for token in self.tokens:
            if runs and runs[-1][0] == token.width:
                runs[-1] = (token.width, runs[-1][1] + 1)
            else:
                runs.append((token.width, 1))
        reasoning, answer = self._split()
        wanted = self.request.params.logprobs is not None
        return Choice(
            text=None if self.text is None else self.text.text,
            reasoning=reasoning,
            answer=answer,
            token_ids=list(self.token_ids),
            logprobs=[t.top_logprobs for t in self.tokens] if wanted else None,
            width_runs=runs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


def _spelled(plan: Plan) -> bool:
    """Tells if both think tags are text."""
    return isinstance(plan.start_tag, str) and isinstance(plan.end_tag, str)


@public
@dataclass(eq=False)
class Request:
    """A submitted prompt: iterate over its tokens as they come, or wait for `result()`.

    Iterating gives the tokens of the first choice. `cancel()` takes effect before the next pass.
    """

    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    plan: Plan
    seed: int
    track: bool
    request_id: str = ""
    branches: list[Branch] = field(default_factory=list)
    events: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    cancelled: bool = False
    error: ElasticError | Exception | None = None
    preemptions: int = 0
    rebuilt_tokens: int = 0
    submitted: float = field(default_factory=time.perf_counter)
    started: float | None = None
    first_token: float | None = None
    ended: float | None = None

    def __post_init__(self) -> None:
        self.request_id = self.request_id or f"request-{next(_numbers)}"
        self._end = Promise()
        self._wake: Callable[[], None] | None = None
        self._is_worker: Callable[[], bool] | None = None
        self._owner: object = None

    @one_line
    def __repr__(self) -> str:
        if self.done:
            reasons = [branch.finish_reason for branch in self.branches[:1]]
            state = "error" if self.error is not None or not reasons else reasons[0]
        else:
            state = "waiting" if self.started is None else "running"
        tokens = count_text(sum(len(branch.tokens) for branch in self.branches), "token")
        return f"Request({name_text(self.request_id)}, {state}, {tokens})"

    def attach(self, wake: Callable[[], None], is_worker: Callable[[], bool]) -> None:
        """Called by the worker that takes the request.

        Args:
            wake: tells it that something changed.
            is_worker: True if the caller is its thread.
        """
        self._wake, self._is_worker = wake, is_worker

    def keep_alive(self, owner: object) -> None:
        """Holds a reference to `owner` (the engine) until the request has ended."""
        self._owner = owner

    def __iter__(self) -> Iterator[Token]:
        try:
            while True:
                self._check_waiter("iterate over a request that has not ended")
                if self.done and self.events.empty():
                    break
                event = take(self.events)
                if event is None:
                    break
                yield event
        finally:
            if self.done:  # other iterations end at once, also when this one was interrupted
                self.events.put(None)
        if isinstance(self.error, StopIteration):  # which would end the caller's loop in silence
            raise RequestFailed(
                f"{self.request_id}: ended by {type(self.error).__name__}; its cause is chained"
            ) from self.error
        if self.error is not None:
            raise self.error

    @property
    def done(self) -> bool:
        """True if the result is there."""
        return self._end.done

    def cancel(self) -> None:
        """Asks to stop; the generated tokens stay in the result, with finish_reason "cancelled"."""
        self.cancelled = True
        if self._wake:
            self._wake()

    def result(self, timeout: float | None = None) -> Output:
        """Waits for the end and gives the output.

        Args:
            timeout: seconds to wait at most, None (or infinity) for no limit; 0 or less only looks.

        Raises:
            InvalidRequest: for a timeout that is no number.
            TimeoutError: after `timeout`.
            RequestCancelled: if the engine was closed first.
            Exception: the error of a request that failed: an ElasticError, or the Exception that a
                plan or a logits processor raised. An exit, an interrupt, or what else went wrong is
                the cause of a RequestFailed.
        """
        output = self.wait(timeout)
        if self.error is not None:
            raise self.error
        return output

    def wait(self, timeout: float | None = None) -> Output:
        """As `result`, but a failed request gives its output too, with finish_reason "error"."""
        check_timeout(f"{self.request_id}: timeout", timeout)
        self._check_waiter("wait for a result")
        if not self._end.wait(timeout):
            raise TimeoutError(f"{self.request_id}: no result after {timeout} s")
        return self.output()

    def _check_waiter(self, what: str) -> None:
        """Refuses the worker, which would wait for itself."""
        if self._is_worker and self._is_worker() and not self.done:
            raise InvalidRequest(f"{self.request_id}: a plan or logits processor must not {what}")

    def finish(self, error: Exception | None = None) -> None:
        """Called by the scheduler when the last branch has ended."""
        if self.done:
            return
        self.error, self.ended = error, time.perf_counter()
        self._end.set()
        self.events.put(None)
        self._owner = None

    def abandon(self, error: Exception) -> None:
        """Ends a request that was never started."""
        for branch in self.branches:
            branch.finish_reason, branch.stop_reason = "error", text_of(error)
        self.finish(error)

    def output(self) -> Output:
        """The output so far."""
        tokens = [t for b in self.branches for t in b.tokens]
        end = self.ended or time.perf_counter()
        started, first = self.started or end, self.first_token or end
        return Output(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(self.prompt_ids),
            choices=[b.choice() for b in self.branches],
            usage=Usage(
                prompt_tokens=len(self.prompt_ids),
                completion_tokens=len(tokens),
                reasoning_tokens=sum(t.phase == "thinking" for t in tokens),
                forced_tokens=sum(t.forced for t in tokens),
            ),
            times=Times(
                queued_s=started - self.submitted,
                prefill_s=first - started,
                decode_s=end - first,
                first_token_s=first - self.submitted,
                total_s=end - self.submitted,
            ),
            preemptions=self.preemptions,
            rebuilt_tokens=self.rebuilt_tokens,
        )


class Stream(Iterator[Token]):
    """The tokens of a request as they come. To leave it before its end, in whatever way, cancels
    the request: by `close`, by dropping it, or when waiting for a token is interrupted."""

    def __init__(self, request: Request):
        self._request, self._tokens = request, iter(request)

    @one_line
    def __repr__(self) -> str:
        return f"Stream({self._request!r})"

    def __next__(self) -> Token:
        try:
            return next(self._tokens)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Cancels the request if it has not ended; there are no more tokens then."""
        self._tokens = iter(())
        if not self._request.done:
            self._request.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def closed_error(request: Request) -> RequestCancelled:
    """Error for callers that still wait when the engine closes."""
    return RequestCancelled(f"{request.request_id}: the engine was closed before the request ended")
