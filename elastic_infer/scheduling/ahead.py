"""One pass ahead: on a device, a pass of steps is launched before the tokens of the one before it
are read out, where these can change nothing about it. The device reads them where it drew them.

`next_parts` says what every branch reads after a pass in flight whatever its tokens are, or that
this depends on them. When they are known, a branch may have ended with its token (an end token, a
stop string): what was read ahead for it is discarded. Its place in the cache is free at once,
since the device does everything in one order: the next owner writes after that pass.
The cache's record of a sequence gets a token when it is known, never before.
"""

from __future__ import annotations

from collections.abc import Iterable

from .passes import Flight, Part
from .reads import Read
from .request import Branch

UNKNOWN = 0  # any id, in the place of one that only the device knows


def next_parts(flight: Flight, running: Iterable[Branch], max_length: int) -> list[Part] | None:
    """Reads of the branches after `flight`, in order of arrival; those that end with the token in
    flight, whatever it is, are left out. None where it depends on the tokens in flight, or where
    the host must see the logits that they were drawn from.

    Args:
        running: all branches.
        max_length: tokens of the longest sequence.
    """
    drawn = {p.row: i for i, p in enumerate(flight.parts) if p.samples}
    if flight.ids is None or not all(isinstance(r, Branch) and r.needs_no_logits for r in drawn):
        return None
    parts = []
    for branch in running:
        if branch not in drawn:
            if branch.ready:
                parts.append(Part(branch, branch.pending[0]))
        elif not branch.is_full(len(branch.token_ids) + 1, max_length):
            width = _settled_width(branch)
            if width is None:
                return None
            row, _ = flight.result.spans[drawn[branch]]
            parts.append(Part(branch, Read([UNKNOWN], width, "step"), feed=row))
    return parts


def _settled_width(branch: Branch) -> str | None:
    """The width that reads the branch's next token, None where that depends on it, or where more is
    read than the token: other branches' forks of the prompt, or what a switch builds anew."""
    if branch.request.first_token is None:
        return None
    width = branch.run.settled(len(branch.token_ids) + 1)
    switches = width != branch.width and branch.request.plan.policy.kind != "carry"
    return None if switches else width
