"""Tokens that benchmarks read."""

from __future__ import annotations

import random


def random_tokens(count: int, vocabulary: int, seed: int = 0) -> list[int]:
    """Uniform token ids below `vocabulary`; the same seed gives the same ids."""
    rng = random.Random(f"tokens {seed}")
    return [rng.randrange(vocabulary) for _ in range(count)]
