"""Files that others wrote: read within bounds, and refused by CheckpointError in every other case.

All JSON is read here, and calls of other libraries that read files are wrapped by `foreign`.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ElasticError, shown

__all__ = [
    "CHAT_TEMPLATE",
    "CHAT_TEMPLATES",
    "GENERATION_CONFIG",
    "SPECIAL_TOKENS",
    "TAKEN_ALONG",
    "TEXT_FILES",
    "TOKENIZER",
    "TOKENIZER_CONFIG",
    "file_size",
    "foreign",
    "is_file",
    "is_folder",
    "parse_json",
    "plain_name",
    "read_bytes",
    "read_json",
    "read_text",
    "require_file",
    "user_path",
]

# Files of a checkpoint folder beside its weights that are read for text; what is read is also
# fetched from the Hub, demanded of a snapshot without a network, and taken along by exports.
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
CHAT_TEMPLATE = "chat_template.jinja"
CHAT_TEMPLATES = "additional_chat_templates/*.jinja"
GENERATION_CONFIG = "generation_config.json"
TEXT_FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS,
    CHAT_TEMPLATE,
    CHAT_TEMPLATES,
    GENERATION_CONFIG,
)
# Other programs read these: they are fetched and taken along where they are.
TAKEN_ALONG = (
    "tokenizer.model",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
)

JSON_BYTES = 64 << 20  # an index of a million tensors
_DEPTH = 100  # levels of lists and objects; a reader that recurses needs a few frames for each
_DIGITS = 300  # of an integer: each of them is a float, too


def user_path(path: Any, what: str) -> Path:
    """A path that a caller gave, with ~ expanded.

    Args:
        path: str or path-like.
        what: the argument's name with its call, for the message.

    Raises:
        CheckpointError: a value that is no path.
    """
    try:
        return Path(path).expanduser()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{what} must be a path, got {shown(path)} ({error})") from error


def _mode(path: str | Path) -> int:
    try:
        return os.stat(path).st_mode
    except (OSError, ValueError):  # not there, too long a name, a null byte in it
        return 0


def is_file(path: str | Path) -> bool:
    """True for a regular file, or a link to one. No pipe, device or impossible name is."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: str | Path) -> bool:
    """True for a folder, or a link to one; False also for an impossible name."""
    return stat.S_ISDIR(_mode(path))


def plain_name(name: Any) -> bool:
    """True for the name of a file in a folder itself: no other folder, and no way out of it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def require_file(path: str | Path, what: str, limit: int) -> int:
    """The size of a regular file of at most `limit` bytes, before it is opened.

    Args:
        path: the file.
        what: the message's subject.
        limit: bytes.

    Raises:
        CheckpointError: anything else.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{what} must be a readable file, got {error}") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{what} must be a regular file, got a folder, pipe or device")
    if found.st_size > limit:
        raise CheckpointError(f"{what} must be at most {limit} bytes long, got {found.st_size}")
    return found.st_size


def file_size(path: str | Path) -> int:
    """Bytes of a file for a message, 0 for one that cannot be looked at."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return 0


def read_bytes(path: str | Path, what: str, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Args:
        path: the file.
        what: the message's subject.
        limit: bytes.

    Raises:
        CheckpointError: anything else.
    """
    size = require_file(path, what, limit)
    try:
        with open(path, "rb") as stream:
            data = stream.read(size + 1)
    except (OSError, MemoryError) as error:
        raise CheckpointError(f"{what} must be readable, got: {error}") from error
    if len(data) > size:
        raise CheckpointError(f"{what} must stay as it is while it is read, got more")
    return data


def read_text(path: str | Path, what: str, limit: int = JSON_BYTES) -> str:
    """The text of a regular UTF-8 file of at most `limit` bytes.

    Raises:
        CheckpointError: anything else.
    """
    try:
        return read_bytes(path, what, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{what} must be readable UTF-8, got {error}") from error


def read_json(path: str | Path, what: str | None = None, kind: type | None = None) -> Any:
    """The value of a JSON file.

    Args:
        path: the file.
        what: the message's subject; None: the path, as part of a checkpoint.
        kind: dict or list, what the file must hold; None: anything.

    Returns:
        Plain values as of `parse_json`.

    Raises:
        CheckpointError: no regular file, too large, not UTF-8, or as of `parse_json`.
    """
    what = f"checkpoint: {path}" if what is None else what
    return parse_json(read_text(path, what), what, kind)


def parse_json(text: Any, what: str, kind: type | None = None) -> Any:
    """The value of a JSON text. NaN and the infinities are accepted, as Python writes them; of two
    equal keys the last counts.

    Args:
        text: the text.
        what: the message's subject.
        kind: dict or list, what it must be; None: anything.

    Returns:
        Plain values, at most 100 levels deep. An integer has at most 300 digits, so it can be
        made a float; strings hold no lone surrogates, so they can be written.

    Raises:
        CheckpointError: a text that is not such JSON.
    """
    if not isinstance(text, str):
        raise CheckpointError(f"{what} must be readable JSON, got {type(text).__name__}")
    try:
        value = json.loads(text, parse_int=_integer)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise CheckpointError(
            f"{what} must be readable JSON of at most {_DEPTH} levels, got more"
        ) from error
    except (ValueError, MemoryError) as error:
        raise CheckpointError(f"{what} must be readable JSON, got {error}") from error
    _check_depth(value, what)
    if kind is not None and not isinstance(value, kind):
        name = {dict: "a JSON object", list: "a JSON list"}[kind]
        raise CheckpointError(f"{what} must be {name}, got {type(value).__name__}")
    return value


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _check_depth(value: Any, what: str) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > _DEPTH:
            raise CheckpointError(
                f"{what} must be readable JSON of at most {_DEPTH} levels, got more"
            )
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(v for v in item.values() if isinstance(v, (dict, list)))
            elif isinstance(item, list):
                inner.extend(v for v in item if isinstance(v, (dict, list)))
        level = inner


@contextmanager
def foreign(rule: str, kind: type[ElasticError] = CheckpointError) -> Iterator[None]:
    """Turns whatever another library raises over a file, or over what it made of it, into an error
    of this library.

    Libraries in Rust raise plain Exception, and a BaseException where they panic. What ends a
    program or a generator on purpose, and errors of this library, pass.

    Args:
        rule: the message up to "got": what must be what.
        kind: of the error.
    """
    try:
        yield
    except (ElasticError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise kind(f"{rule}, got {text}") from error
