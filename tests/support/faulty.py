"""A file system that fails: the calls that change files, counted, and one of them broken."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

CHANGING = ("open", "write", "replace", "rename", "mkdir", "unlink", "rmdir", "fsync")
GROWING = ("open", "write", "mkdir")


class Killed(BaseException):
    """Stands for the end of the process: nothing that changes a file happens after it."""


class Disk:
    """Breaks the n-th call of `CHANGING`: "full" (that growing call and all later ones say ENOSPC),
    "fails" (this one says EIO), "killed" (half a write, then nothing more happens)."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.calls: list[str] = []
        self._broken: tuple[int, str] | None = None
        self._counting = False
        patch.setattr(os, "fsync", lambda descriptor: None)  # no test cuts the power
        for name in CHANGING:
            patch.setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name: str, real: Callable) -> Callable:
        def call(*arguments, **options):
            writes = name != "open" or arguments[1] & (os.O_WRONLY | os.O_RDWR)
            if not self._counting or not writes:
                return real(*arguments, **options)
            self.calls.append(name)
            if self._broken is not None:
                n, way = self._broken
                here, past = len(self.calls) - 1 == n, len(self.calls) - 1 > n
                if way == "killed" and (here or past):
                    if here and name == "write":
                        real(arguments[0], memoryview(arguments[1])[: len(arguments[1]) // 2])
                    raise Killed
                if way == "full" and (here or past) and name in GROWING:
                    raise OSError(errno.ENOSPC, "No space left on device")
                if way == "fails" and here:
                    raise OSError(errno.EIO, "Input/output error")
            return real(*arguments, **options)

        return call

    @contextlib.contextmanager
    def broken(self, n: int | None, way: str = "") -> Iterator[None]:
        """Counts the calls of the `with`; breaks call `n` of them."""
        self.calls, self._counting = [], True
        self._broken = None if n is None else (n, way)
        try:
            yield
        finally:
            self._counting = False


def content(folder: Path) -> dict[str, bytes]:
    """{relative path: bytes} of all files below a folder, those that are no checkpoint's too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
