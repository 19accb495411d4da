"""A bound on the text that a tokenizer's replacements can make."""

from __future__ import annotations

from typing import Any

from ..errors import CheckpointError
from .stream_rule import _flatten

MOST_GROWTH = 1024  # real tokenizers have a few replacements of single characters


def check_growth(name: str, part: dict[str, Any] | None) -> None:
    """Refuses replacements that, one after the other, could make very much of little text.

    Args:
        name: "normalizer" or "decoder".
        part: what tokenizer.json says of it, None if it has none.

    Raises:
        CheckpointError: for replacements that could.
    """
    growth = 1.0
    for step in [] if part is None else _flatten(part):
        if step["type"] == "Replace":
            made = len(step["content"])
            # A regular expression may match single characters, or stand between any two.
            found = len(step["pattern"].get("String", ""))
            growth *= max(1.0, made / found if found else 1 + made)
    if growth > MOST_GROWTH:
        raise CheckpointError(
            f"tokenizer.json: {name} must make at most {MOST_GROWTH} characters of one by its "
            f"replacements, got {growth:.3g}"
        )
