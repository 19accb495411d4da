"""Reads: tokens that are due, at a width, as a prefill or as steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..cache.sequence import Sequence


@dataclass
class Read:
    """Tokens that a sequence has still to read, at one width, as "prefill" or "step".

    Attributes:
        mark: a snapshot is due at its end, under policy `window`.
    """

    tokens: list[int]
    width: str
    kind: str
    mark: bool = False

    def after(self, count: int) -> Read:
        """The rest of it after `count` tokens were read."""
        return replace(self, tokens=self.tokens[count:])


def single_steps(read: Read) -> list[Read]:
    """A read of several steps as one read per token: a pass takes one step of a sequence."""
    if read.kind != "step":
        return [read]
    return [Read([token], read.width, "step") for token in read.tokens]


def replay_reads(sequence: Sequence, start: int, length: int) -> list[Read]:
    """The recorded reads of tokens [start, length), as they were made."""
    reads, at = [], 0
    for run in sequence.runs:
        a, b = max(at, start), min(at + run.count, length)
        if a < b:
            reads.append(Read(sequence.tokens[a:b], run.width, run.kind))
        at += run.count
    return reads
