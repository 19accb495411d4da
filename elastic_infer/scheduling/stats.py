"""Counters of an engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Stats:
    """Counters since the engine was opened."""

    passes: int = 0
    passes_ahead: int = 0
    tokens_read: int = 0
    preemptions: int = 0
    rebuilt_tokens: int = 0
    requests: int = 0
