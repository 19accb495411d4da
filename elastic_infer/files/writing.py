"""Files and folders that appear whole or not at all, and stay when the power fails.

All that the library writes goes through here. A file is written under a name of its own beside its
target (``.NAME.<16 hex digits>.partial``, created exclusively), brought to the disk (fsync) and
renamed. Its writer holds a lock on it, so that what a killed process left is told from what another
one is writing, and the next write of the same name removes it. What cannot be written is a
CheckpointError that names path and remedy.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, shown
from .reading import read_json, user_path

__all__ = [
    "Stream",
    "append_line",
    "make_folder",
    "new_folder",
    "only_writer",
    "require_new",
    "withdraw",
    "write_json",
    "write_whole",
]

CONFIG = "config.json"  # the last file of a checkpoint folder: without it nothing opens
PARTIAL = ".elastic_infer.partial"  # what a folder's writer has not finished
_NAMES = "names.json"  # in PARTIAL: what is moved out of it
_LONGEST_NAME = 200  # bytes of the target's name that a partial file's keeps

_REMEDIES = {
    "free space there, or name another place": (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    "name a place that you may write to": (errno.EACCES, errno.EPERM, errno.EROFS),
    "give it a shorter name": (errno.ENAMETOOLONG,),
    "make its folder first": (errno.ENOENT,),
    "a part of its path is no folder: name another place": (errno.ENOTDIR, errno.EEXIST),
}


def _unwritable(what: str, path: Path, error: OSError) -> CheckpointError:
    remedy = "name another place"
    for text, numbers in _REMEDIES.items():
        if error.errno in numbers:
            remedy = text
    reason = error.strerror or str(error)
    return CheckpointError(f"{what}: {path} must be writable, got: {reason}; {remedy}")


@contextlib.contextmanager
def _storing(what: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unwritable(what, path, error) from error


def _checked(what: str, path: Any) -> Path:
    """The path without ~, if it can be one."""
    try:
        encoded = os.fsencode(path)
    except (TypeError, ValueError):
        encoded = b"\0"
    if b"\0" in encoded or not encoded:
        raise CheckpointError(f"{what}: path must be a file's or folder's, got {shown(path)}")
    return user_path(os.fsdecode(path), f"{what}: path")


class Stream:
    """A file that is being written; remembers the error of a write that failed."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self.failed: OSError | None = None

    def write(self, data: Any) -> int:
        """Writes all of the bytes. Raises: OSError."""
        view = memoryview(data)
        size, left = view.nbytes, view.cast("B") if view.nbytes else view
        try:
            while size and left:
                left = left[os.write(self._descriptor, left) :]
        except OSError as error:
            self.failed = error
            raise
        return size

    def flush(self) -> None:
        """Does nothing: what was written is the system's already."""


Content = bytes | str | Callable[[Stream], object]


def write_whole(path: str | Path, content: Content, what: str = "file") -> Path:
    """Writes a file that appears whole: one that is there is replaced when the new one is on the
    disk, and stays as it is when that fails. Two writers of one path disturb each other in nothing;
    the later one stays.

    Args:
        path: the file, in an existing folder; a link is replaced, a pipe or device written to.
        content: bytes, text (UTF-8), or a function that writes them to the `Stream` that it gets.
        what: begins the message of an error.

    Returns:
        The file.

    Raises:
        CheckpointError: it cannot be written; names the path and what to do.
    """
    path = _checked(what, path)
    with _storing(what, path):
        mode = _mode_of(path)
        if mode is not None and stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "a folder of this name")
        if mode is not None and not stat.S_ISREG(mode):
            descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            os.set_blocking(descriptor, True)  # a pipe that nothing reads was refused
            partial = None
        else:
            _remove_left(path)
            partial, descriptor = _create(path)
    try:
        _fill(descriptor, content, what, path)
        if partial is not None:
            with _storing(what, path):
                _to_disk(descriptor)
                os.replace(partial, path)
    except BaseException:
        if partial is not None:
            with contextlib.suppress(OSError):
                os.unlink(partial)
        raise
    finally:
        os.close(descriptor)
    if partial is not None:
        _folder_to_disk(path.parent)
    return path


def write_json(path: str | Path, data: Any, what: str = "file", indent: int | None = 2) -> Path:
    """`write_whole` of data as JSON and a line end."""
    return write_whole(path, json.dumps(data, indent=indent) + "\n", what)


def append_line(path: Path, text: str, what: str) -> None:
    """Adds a line to a file. Raises: CheckpointError if it cannot be written."""
    with _storing(what, path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            Stream(descriptor).write(f"{text}\n".encode())
        finally:
            os.close(descriptor)


def withdraw(folder: Path, what: str) -> None:
    """Takes config.json away before other files of a folder are replaced, so that a mixture of old
    and new ones never opens. Raises: CheckpointError."""
    with _storing(what, folder / CONFIG):
        (folder / CONFIG).unlink(missing_ok=True)


def make_folder(path: str | Path, what: str) -> Path:
    """Makes a folder, with those above it, where there is none. Raises: CheckpointError."""
    path = _checked(what, path)
    with _storing(what, path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def _mode_of(path: Path) -> int | None:
    """Kind and rights of what the path leads to; None for nothing, and for a link to nothing."""
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None


def _fill(descriptor: int, content: Content, what: str, path: Path) -> None:
    stream = Stream(descriptor)
    if isinstance(content, str):
        content = content.encode("utf-8")
    try:
        if isinstance(content, bytes):
            stream.write(content)
        else:
            content(stream)
    except Exception as error:
        # Libraries that write to the stream turn its error into others.
        if stream.failed is not None:
            raise _unwritable(what, path, stream.failed) from error
        raise
    if stream.failed is not None:
        raise _unwritable(what, path, stream.failed) from stream.failed


def _to_disk(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without it
            raise


def _folder_to_disk(folder: Path) -> None:
    """Brings renames to the disk. The files are whole either way, so this is no error."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# Partial files ----------------------------------------------------------------------------------


def _stem(path: Path) -> bytes:
    return b"." + os.fsencode(path.name)[:_LONGEST_NAME] + b"."


def _create(path: Path) -> tuple[bytes, int]:
    """A new file beside `path`, locked: its name and descriptor."""
    folder = os.fsencode(path.parent)
    while True:
        name = _stem(path) + secrets.token_hex(8).encode() + b".partial"
        partial = os.path.join(folder, name)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(partial, flags, 0o666)
        # Between these two lines another writer may take it for one that was left, and remove it.
        if _lock(descriptor, wait=True) is None or _is_at(descriptor, partial):
            return partial, descriptor
        os.close(descriptor)


def _remove_left(path: Path) -> None:
    """Removes partial files of `path` that have no living writer."""
    folder, stem = os.fsencode(path.parent), _stem(path)
    pattern = re.compile(re.escape(stem) + rb"[0-9a-f]{16}\.partial")
    try:
        names = os.listdir(folder)
    except PermissionError:  # a folder that may be written to and not listed
        return
    for name in names:
        if not pattern.fullmatch(name):
            continue
        partial = os.path.join(folder, name)
        # A lock that cannot be opened or removed belongs to another user and disturbs nothing.
        with contextlib.suppress(OSError):
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(partial, flags)
            try:
                if _lock(descriptor):
                    os.unlink(partial)
            finally:
                os.close(descriptor)


def _lock(descriptor: int, wait: bool = False) -> bool | None:
    """Locks an open file until it is closed: whether that worked; None where the file system has
    no locks, so that no writer can be told from a dead one."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(descriptor: int, path: bytes | Path) -> bool:
    """True if the path still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


# Folders ----------------------------------------------------------------------------------------


def require_new(out: str | Path, what: str) -> Path:
    """Refuses a folder with something in it, and a file, before any work is done for it.

    What a killed writer left counts as nothing.

    Returns:
        The folder's path.

    Raises:
        CheckpointError
    """
    out = _checked(what, out)
    with _storing(what, out):
        mode = _mode_of(out)
        if mode is None:
            return out
        if not stat.S_ISDIR(mode):
            raise CheckpointError(
                f"{what}: out must be a new or empty folder, got the file {out}; name another one"
            )
        left = _moved(out / PARTIAL)
        others = sorted(set(os.listdir(out)) - {PARTIAL})
    if others and (CONFIG in others or not left.issuperset(others)):
        raise CheckpointError(
            f"{what}: out must be a new or empty folder, got {out} with {shown(others[0])} in it; "
            "name another one"
        )
    return out


def _moved(partial: Path) -> set[str]:
    """Names of what a killed writer has moved out of its partial folder."""
    try:
        names = read_json(partial / _NAMES, kind=list)
    except CheckpointError:
        return set()
    return {name for name in names if isinstance(name, str) and not (partial / name).exists()}


@contextlib.contextmanager
def new_folder(out: str | Path, what: str) -> Iterator[Path]:
    """A checkpoint folder that appears whole: what is written to the folder given inside the `with`
    moves to `out` at its end, config.json last, so that nothing half-written opens.

    One writer at a time; the second is refused. After an error `out` is as it was before; what a
    killed writer left is removed by the next one.

    Args:
        out: new or empty folder.
        what: begins the message of an error.

    Raises:
        CheckpointError: a folder in use, or one that cannot be written.
    """
    out = require_new(out, what)
    with _storing(what, out):
        made = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
    try:
        with only_writer(out / PARTIAL, what):
            require_new(out, what)  # another writer may just have finished
            with _storing(what, out):
                _clear(out)
            yield out / PARTIAL
            with _storing(what, out):
                _publish(out)
    except BaseException:
        if made:
            with contextlib.suppress(OSError):  # another writer may be in it
                out.rmdir()
        raise


@contextlib.contextmanager
def only_writer(folder: Path, what: str, keep: bool = False) -> Iterator[None]:
    """Makes a folder, and holds its lock: the only one who writes there.

    Args:
        keep: True if it stays when the `with` ends; otherwise it is removed with all that is in it.

    Raises:
        CheckpointError: if another one holds it, or it cannot be made.
    """
    with _storing(what, folder if keep else folder.parent):
        while True:
            try:
                folder.mkdir()
                new = True
            except FileExistsError:
                new = False
            try:
                descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError:
                if new:
                    folder.rmdir()
                raise
            locked = _lock(descriptor)
            if _is_at(descriptor, folder):
                break
            os.close(descriptor)  # removed by the writer before
    try:
        if locked is False or (locked is None and not (new or keep)):
            hint = "" if locked is False else f", or a killed one left it: then delete {folder}"
            raise CheckpointError(
                f"{what}: {folder.parent} must have one writer at a time, got one at work{hint}; "
                "wait for it, or name another folder"
            )
        try:
            yield
        finally:
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def _clear(out: Path) -> None:
    """Removes what a killed writer left; the caller holds the lock."""
    partial = out / PARTIAL
    for name in _moved(partial):
        (out / name).unlink(missing_ok=True)
    for path in partial.iterdir():
        if path.name != _NAMES:
            path.unlink()
    (partial / _NAMES).unlink(missing_ok=True)


def _publish(out: Path) -> None:
    """Moves what the partial folder holds to its place, config.json last. A writer that is killed
    meanwhile has left a list of what to remove."""
    partial = out / PARTIAL
    names = sorted(os.listdir(partial), key=lambda name: (name == CONFIG, name))
    write_json(partial / _NAMES, names)
    try:
        for name in names:
            if name == CONFIG:
                _folder_to_disk(out)
            os.replace(partial / name, out / name)
    except BaseException:
        for name in reversed(names):  # config.json first
            with contextlib.suppress(OSError):
                (out / name).unlink()
        raise
    _folder_to_disk(out)
