"""Reference-counted ids: KV pages and state slots are handed out by pools of these."""

from __future__ import annotations

from ..errors import OutOfCapacity
from ..rounding import ceil_div

PAGE = 64  # tokens


def pages_for(tokens: int) -> int:
    """Pages that so many tokens occupy."""
    return ceil_div(tokens, PAGE)


class IdPool:
    """Hands out ids in [0, size), counts references, takes ids back at zero.

    Args:
        name: noun for an id, in errors ("KV page", "state slot").
    """

    def __init__(self, size: int, name: str):
        self.size, self.name = size, name
        self._free = list(range(size - 1, -1, -1))
        self._references = [0] * size

    @property
    def free(self) -> int:
        """Ids that can be taken now."""
        return len(self._free)

    @property
    def used(self) -> int:
        return self.size - len(self._free)

    def take(self, count: int = 1) -> list[int]:
        """Takes `count` ids, each with one reference; all or none.

        Raises:
            OutOfCapacity: states needed and free counts.
        """
        if count > len(self._free):
            raise OutOfCapacity(
                f"cache: {self.name}s must be free to continue, needed {count}, "
                f"free {len(self._free)} of {self.size}"
            )
        taken = [self._free.pop() for _ in range(count)]
        for i in taken:
            self._references[i] = 1
        return taken

    def share(self, ids: list[int]) -> None:
        """Adds a reference to each id, all of which are in use."""
        for i in ids:
            if self._references[i] <= 0:
                raise RuntimeError(f"cache: {self.name} {i} must be in use to be shared")
            self._references[i] += 1

    def release(self, ids: list[int]) -> None:
        """Drops a reference of each id; at zero the id is free again."""
        for i in ids:
            if self._references[i] <= 0:
                raise RuntimeError(f"cache: {self.name} {i} must be in use to be released")
            self._references[i] -= 1
            if self._references[i] == 0:
                self._free.append(i)

    def shared(self, i: int) -> bool:
        """True if more than one holder refers to id i."""
        return self._references[i] > 1
