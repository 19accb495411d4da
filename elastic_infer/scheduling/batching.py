"""Forming of batches: a pure function from waiting rows to the next pass.

Rows of different widths can share a pass: weights are then read once, at the widest width. They
can also run apart, narrow rows at their own lower cost. Which is cheaper is decided by measured
costs of (width, rows).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import InvalidRequest, shown
from ..value_checks import is_one_of

GRID = 64


@dataclass(frozen=True)
class Candidate:
    """One sequence that has tokens to read.

    Attributes:
        key: whose it is.
        width: index of its width, ascending by cost.
        tokens: unread tokens of the next run.
        kind: "step" or "prefill".
        position: tokens it has in the cache.
        waited: passes that it was ready for and left out of.
    """

    key: int
    width: int
    tokens: int
    kind: str
    position: int = 0
    waited: int = 0


@dataclass(frozen=True)
class Limits:
    """Limits of one pass.

    Attributes:
        max_num_batched_tokens: its rows.
        max_num_seqs: its sequences.
        max_wait: passes that a ready row may be left out of.
    """

    max_num_batched_tokens: int
    max_num_seqs: int
    max_wait: int = 4


Cost = Callable[[int, int], float]  # (width index, rows) -> seconds of a pass of steps


def check_mixing(mixing: str) -> None:
    """Raises InvalidRequest unless it is one of the three."""
    if not is_one_of(mixing, ("auto", "always", "never")):
        raise InvalidRequest(f"engine: mixing must be auto, always or never, got {shown(mixing)}")


def chunk_length(position: int, tokens: int, room: int) -> int:
    """Number of `tokens` that a pass with `room` rows reads: all, or up to a multiple of 64 in
    absolute position, so that where a prompt is cut never depends on its neighbours."""
    if tokens <= room:
        return tokens
    return max(0, (position + room) // GRID * GRID - position)


def form_batch(
    candidates: Sequence[Candidate], limits: Limits, cost: Cost, mixing: str = "auto"
) -> list[tuple[int, int]]:
    """The next pass, as (key, number of tokens to read).

    Steps come before prefill, so that long prompts never stall running sequences; what room is
    left goes to prefill in order of arrival. With a candidate waiting the pass is never empty.

    Args:
        candidates: in order of arrival.
        limits: of one pass.
        cost: measured seconds of a pass of steps at a width with a number of rows.
        mixing: "always" puts steps of all widths together; "never" keeps passes to one width, in
            turns; "auto" runs the group of widths with the lowest cost per token, but never leaves
            a row out for more than ``max_wait`` passes.
    """
    check_mixing(mixing)
    if mixing == "never" and candidates:
        # The width of the row that has waited longest; among equals, steps before prefill.
        first = max(candidates, key=lambda c: (c.waited, c.kind == "step"))
        candidates = [c for c in candidates if c.width == first.width]
    steps = [c for c in candidates if c.kind == "step"]
    late = any(c.kind == "prefill" and c.waited >= limits.max_wait for c in candidates)
    # A prompt that waits gets its row.
    most = min(limits.max_num_seqs, limits.max_num_batched_tokens) - late
    chosen = _steps(steps, limits, cost, mixing)[:most]
    batch = [(c.key, 1) for c in chosen]
    room = limits.max_num_batched_tokens - len(chosen)
    for c in candidates:
        if c.kind != "prefill":
            continue
        n = chunk_length(c.position, c.tokens, room)
        if n == 0 or len(batch) >= limits.max_num_seqs:
            break  # a later, shorter prompt must not overtake for ever
        batch.append((c.key, n))
        room -= n
    return batch


def _steps(steps: Sequence[Candidate], limits: Limits, cost: Cost, mixing: str) -> list[Candidate]:
    """The steps that should run, those that waited longest first."""
    if not steps:
        return []
    groups: dict[int, list[Candidate]] = {}
    for c in steps:
        groups.setdefault(c.width, []).append(c)
    overdue = [c for c in steps if c.waited >= limits.max_wait]
    widths = sorted(groups)
    if mixing != "auto" or len(widths) == 1:
        chosen = list(steps)
    elif overdue:
        # Everything up to the widest that must run now; narrower rows come along for little.
        top = max(c.width for c in overdue)
        chosen = [c for c in steps if c.width <= top]
    else:
        best, best_rate = widths[-1], float("inf")
        rows = 0
        for w in widths:
            rows += len(groups[w])
            rate = cost(w, rows) / rows
            if rate < best_rate:
                best, best_rate = w, rate
        chosen = [c for c in steps if c.width <= best]
    return sorted(chosen, key=lambda c: -c.waited)  # stable: arrival order among equals


class StepCosts:
    """Seconds of a pass of steps by (width index, rows), learned while running.

    Args:
        weight_bytes: bytes of weights that each width reads per token, ascending; before anything
            is measured the estimate is proportional to these.
    """

    def __init__(self, weight_bytes: Sequence[float]):
        self._bytes = list(weight_bytes)
        self._seconds: dict[tuple[int, int], float] = {}

    def record(self, width: int, rows: int, seconds: float) -> None:
        """Takes a measured pass into a moving average."""
        key = (width, rows)
        known = self._seconds.get(key)
        self._seconds[key] = seconds if known is None else 0.9 * known + 0.1 * seconds

    def __call__(self, width: int, rows: int) -> float:
        """Measured seconds, else scaled from the nearest measured number of rows of this width,
        else from another width by bytes, else by bytes alone (1 GB/s per row counted once)."""
        if (width, rows) in self._seconds:
            return self._seconds[width, rows]
        same = [(abs(r - rows), r) for w, r in self._seconds if w == width]
        if same:
            return self._seconds[width, min(same)[1]]
        other = [(abs(w - width), abs(r - rows), w, r) for w, r in self._seconds]
        if other:
            _, _, w, r = min(other)
            return self._seconds[w, r] * self._bytes[width] / self._bytes[w]
        return self._bytes[width] * 1e-9
