"""Text that can be encoded: no lone surrogates."""

from __future__ import annotations


def encodable(text: str) -> bool:
    """True if UTF-8 can hold the text: it has no lone surrogates."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
