"""A sequence's cache when its width changes, and the reads that follow."""

from __future__ import annotations

from dataclasses import replace

from ..cache.cache import Cache
from ..cache.pages import PAGE
from ..cache.sequence import Sequence
from ..checkpoint.widths import Width
from ..errors import WidthError
from ..plans.policy import Policy
from .reads import Read


def state_is_complete(sequence: Sequence, target: Width, widths: dict[str, Width]) -> bool:
    """True if the state of all of the target's Mamba heads has seen every token: each run either
    tracked or was at a width with as many heads."""
    return all(
        run.tracked
        or all(
            have >= need
            for have, need in zip(widths[run.width].mamba_num_heads, target.mamba_num_heads)
        )
        for run in sequence.runs
    )


def check_carry(sequence: Sequence, target: str, widths: dict[str, Width]) -> None:
    """Refuses to widen by `carry` a sequence whose state lacks heads.

    Raises:
        WidthError: that names the remedy.
    """
    if not state_is_complete(sequence, widths[target], widths):
        raise WidthError(
            f"switch: a sequence must have tracked the Mamba heads of {target!r} to be widened by "
            f"policy 'carry', got one read by {sequence.runs[-1].width!r} without tracking; use "
            "policy 'exact', or open it with track=True"
        )


def keep_snapshots(cache: Cache, sequence: Sequence, policy: Policy, mark: bool) -> None:
    """Under `window(n)`, at the end of a read: takes a snapshot where one is marked, and n tokens
    after the last; keeps the newest two. Reads end where `split_for_snapshots` cut them, never
    where a pass happened to stop, so where snapshots lie does not depend on scheduling."""
    if policy.kind != "window" or not sequence.tokens:
        return
    last = sequence.snapshots[-1].length if sequence.snapshots else -policy.n
    if mark or sequence.length - last >= policy.n:
        cache.drop_snapshots(sequence, keep=1)
        cache.snapshot(sequence)


def split_for_snapshots(reads: list[Read], start: int, policy: Policy) -> list[Read]:
    """Under `window(n)`: cuts each prefill n to n + 63 tokens before its end, on the grid of 64,
    so that a switch right after it finds a snapshot to go back to.

    Args:
        start: tokens in the cache before the reads.
    """
    if policy.kind != "window":
        return reads
    parts = []
    for read in reads:
        end = start + len(read.tokens)
        cut = (end - policy.n) // PAGE * PAGE - start
        if read.kind == "prefill" and cut > 0:
            parts += [replace(read, tokens=read.tokens[:cut], mark=True), read.after(cut)]
        else:
            parts.append(read)
        start = end
    return parts


def snapshot_slots(policy: Policy) -> int:
    """State slots that a sequence under this policy may hold beyond its own."""
    return 2 if policy.kind == "window" else 0


def switch(
    cache: Cache,
    sequence: Sequence,
    unread: list[int],
    target: str,
    policy: Policy,
    widths: dict[str, Width],
) -> tuple[list[Read], int]:
    """Prepares the cache for `target` reading on.

    carry: nothing is rebuilt. exact: the cache is emptied and every token is read again as a
    prompt. window(n): the newest snapshot with at least n tokens since is restored, and these are
    read again; without one, all are.

    Args:
        unread: tokens after those in the cache, still to be read.

    Returns:
        The reads that leave the sequence where it was with `unread` read too, and how many tokens
        of them had been read before.

    Raises:
        WidthError: nothing is changed then.
    """
    if policy.kind == "carry" or not sequence.tokens:
        check_carry(sequence, target, widths)
        return [Read(unread, target, "step")], 0
    tokens = list(sequence.tokens)
    if policy.kind == "window":
        enough = [s for s in sequence.snapshots if len(tokens) - s.length >= policy.n]
        if enough and state_is_complete(Sequence(runs=enough[-1].runs), widths[target], widths):
            cache.restore(sequence, enough[-1])
            again = tokens[sequence.length :]
            return [Read(again + unread, target, "prefill")], len(again)
    cache.reset(sequence)
    return [Read(tokens + unread, target, "prefill")], len(tokens)
