"""Training data: batches from any iterator, or token sequences from a folder of text.

A batch is token ids [B, T] int64, or (ids, weights [B, T]) where positions of weight 0 teach
nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, InvalidRequest
from ..files.reading import is_file, is_folder, parse_json, user_path
from ..files.writing import Stream, write_whole

__all__ = ["Batch", "Corpus", "IteratorData", "as_data"]

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".md")
LINE_SUFFIXES = (".jsonl", ".json")
HELD_OUT = 0.02


class Batch(NamedTuple):
    """ids [B, T] int64; weights [B, T] float32, None where every position counts."""

    ids: Tensor
    weights: Tensor | None

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        weights = None if self.weights is None else self.weights.to(device)
        return Batch(self.ids.to(device), weights)


def as_batch(item: Any, what: str = "data") -> Batch:
    """Reads one batch: a tensor, a pair, or {"input_ids": …, "weights": …}.

    Raises:
        InvalidRequest: not integer [B, T], or weights of another shape, or no position counts.
    """
    if isinstance(item, dict):
        item = (item.get("input_ids"), item.get("weights"))
    ids, weights = (item, None) if isinstance(item, Tensor) else (item[0], item[1])
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
        got = f"{ids.dtype}{list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise InvalidRequest(f"{what}: a batch must be integer token ids [B, T], got {got}")
    if weights is not None and weights.shape != ids.shape:
        raise InvalidRequest(
            f"{what}: weights must be {list(ids.shape)} as the ids, got {list(weights.shape)}"
        )
    if weights is not None and not bool((weights > 0).any()):
        raise InvalidRequest(f"{what}: a batch must hold a position of positive weight, got none")
    return Batch(ids.long(), None if weights is None else weights.float())


class IteratorData:
    """Batches of an iterable, as they come; a stage cuts them to its sequence length.

    A list or another re-iterable object starts again when it ends. To continue a run, the batches
    that were used are drawn and skipped, so the iterable must give the same ones every time.

    Args:
        batches: iterable of batches.
        validation: held-out batches, a list, or None.
    """

    def __init__(self, batches: Iterable[Any], validation: Sequence[Any] | None = None):
        self.source, self.held_out = batches, list(validation or [])
        self.position, self._items = 0, self._all()

    def _all(self) -> Iterator[Batch]:
        while True:
            start = self.position
            for item in self.source:
                self.position += 1
                yield as_batch(item)
            if self.position == start:
                some = "at least one batch, got none"
                more = f"more than {start} batches, got no other"
                raise InvalidRequest(f"data: must hold {more if start else some}")

    def batches(
        self, batch_size: int, length: int, seed: int, skip: int = 0, before: int = 0
    ) -> Iterator[Batch]:
        """Batches of a stage: `before` belong to earlier stages, `skip` were used in this one."""
        wanted = before + skip
        if self.position > wanted:
            if iter(self.source) is self.source:
                raise InvalidRequest(
                    f"data: an iterator cannot go back to batch {wanted}, it is at "
                    f"{self.position}; give a list or a fresh iterator"
                )
            self.position, self._items = 0, self._all()
        while self.position < wanted:
            next(self._items)
        for batch in self._items:
            yield _cut(batch, length)

    def sequences(self, length: int) -> int | None:
        """Number of different sequences; unknown for an iterable."""
        return None

    def validation(self, batch_size: int, length: int, count: int) -> list[Batch]:
        """At most `count` held-out batches; empty if there are none."""
        return [_cut(as_batch(item), length) for item in self.held_out[:count]]


def _cut(batch: Batch, length: int) -> Batch:
    weights = None if batch.weights is None else batch.weights[:, :length]
    return Batch(batch.ids[:, :length], weights)


class Corpus:
    """Token sequences cut from one long array on disk.

    The last 2 % (at least one longest sequence) are held out; the rest is cut into sequences of
    the stage's length, shuffled anew in every epoch.

    Args:
        tokens: int32 array, memory-mapped or not.
        longest: longest sequence that will be asked for.
    """

    def __init__(self, tokens: np.ndarray, longest: int):
        if len(tokens) == 0:
            raise InvalidRequest("data: must hold at least one token, got none")
        if len(tokens) < 2 * longest:
            raise InvalidRequest(
                f"data: must hold at least {2 * longest} tokens (two sequences, one of them held "
                f"out), got {len(tokens)}"
            )
        cut = len(tokens) - max(longest, int(len(tokens) * HELD_OUT))
        self.train, self.held_out = tokens[:cut], tokens[cut:]

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        encode: Callable[[str], list[int]] | None,
        longest: int,
        *,
        end_token: int | None = None,
        vocab_size: int | None = None,
        cache: str | Path | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Corpus:
        """Reads .txt and .md files (a document each) and .jsonl or .json lines.

        A line is an object with "text", with "prompt" and "completion", or with "input_ids".
        Files are taken in the order of their names.

        Args:
            folder: searched with its subfolders; or one file.
            encode: text to token ids; None where every line has input_ids.
            longest: longest sequence that will be asked for.
            end_token: put after every document.
            vocab_size: ids must be below it.
            cache: file that keeps the tokens; used again if it is there.
            progress: called with the bytes of each file that was read.

        Raises:
            InvalidRequest: no such folder, no file of these kinds, a line that cannot be read
                (names file and line), ids outside the vocabulary, or too few tokens.
        """
        if cache is not None and Path(cache).is_file():
            return cls(np.memmap(cache, np.int32, "r"), longest)
        files = _files(user_path(folder, "data: folder"))
        pieces = _documents(files, encode, vocab_size, progress)
        if cache is None:
            parts = [np.asarray([*ids, *_end(end_token)], np.int32) for ids in pieces]
            return cls(np.concatenate(parts) if parts else np.empty(0, np.int32), longest)

        def fill(stream: Stream) -> None:
            written = 0
            for ids in pieces:
                written += stream.write(np.asarray([*ids, *_end(end_token)], np.int32))
            if not written:
                raise InvalidRequest(f"data: {folder} must hold at least one token, got none")

        write_whole(cache, fill, "data")
        return cls(np.memmap(cache, np.int32, "r"), longest)

    def batches(
        self, batch_size: int, length: int, seed: int, skip: int = 0, before: int = 0
    ) -> Iterator[Batch]:
        """Endless batches [batch_size, length]; `skip` of this stage were used already.

        Args:
            batch_size: of the stage.
            length: of the stage.
            seed: of the order of the sequences.
            skip: batches to leave out.
            before: batches of earlier stages (no part in the order).
        """
        count = len(self.train) // length
        place, epoch, order = skip * batch_size, -1, None
        while True:
            rows = []
            for index in range(place, place + batch_size):
                if index // count != epoch:
                    epoch = index // count
                    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                    order = torch.randperm(count, generator=generator)
                start = int(order[index % count]) * length
                rows.append(self.train[start : start + length])
            place += batch_size
            yield Batch(torch.from_numpy(np.stack(rows).astype(np.int64)), None)

    def sequences(self, length: int) -> int | None:
        """Number of different training sequences of a length."""
        return len(self.train) // length

    def validation(self, batch_size: int, length: int, count: int) -> list[Batch]:
        """At most `count` batches of held-out sequences."""
        rows = len(self.held_out) // length
        data = self.held_out[: rows * length].reshape(rows, length).astype(np.int64)
        parts = torch.from_numpy(data).split(batch_size)[:count]
        return [Batch(part, None) for part in parts]


def _end(end_token: int | None) -> list[int]:
    return [] if end_token is None else [end_token]


def _files(folder: Path) -> list[Path]:
    kinds = TEXT_SUFFIXES + LINE_SUFFIXES
    if is_file(folder):
        found = [folder]
    elif is_folder(folder):
        found = sorted(p for p in folder.rglob("*") if p.suffix in kinds and is_file(p))
    else:
        raise InvalidRequest(f"data: must be a folder or a file, got {folder}, which is neither")
    if not found:
        raise InvalidRequest(f"data: {folder} must hold {', '.join(kinds)} files, got none")
    return found


def _documents(
    files: Sequence[Path],
    encode: Callable[[str], list[int]] | None,
    vocab_size: int | None,
    progress: Callable[[int], None] | None,
) -> Iterator[list[int]]:
    for file in files:
        lines = file.suffix in LINE_SUFFIXES
        try:
            with open(file, encoding="utf-8") as stream:
                texts = enumerate(stream, 1) if lines else [(1, stream.read())]
                for number, text in texts:
                    if not text.strip():
                        continue
                    where = f"{file} line {number}" if lines else str(file)
                    ids = (_read_line if lines else _encoded)(text, where, encode)
                    if ids:
                        _check_ids(ids, vocab_size, where)
                        yield ids
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"data: {file} must be UTF-8 text, got {error}") from error
        if progress is not None:
            progress(file.stat().st_size)


def _check_ids(ids: list[int], vocab_size: int | None, where: str) -> None:
    if vocab_size is not None and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise InvalidRequest(
            f"data: token ids must lie in 0..{vocab_size - 1}, got {min(ids)}..{max(ids)} in "
            f"{where}"
        )


def _encoded(text: str, where: str, encode: Callable[[str], list[int]] | None) -> list[int]:
    if encode is None:
        raise InvalidRequest(
            f"data: the checkpoint must have a tokenizer to read text, got none for {where}; give "
            'JSON lines with "input_ids"'
        )
    return encode(text)


def _read_line(text: str, where: str, encode: Callable[[str], list[int]] | None) -> list[int]:
    try:
        data = parse_json(text, "a line")
    except CheckpointError as error:
        raise InvalidRequest(f"data: {where} must be one JSON object, got {error}") from error
    if isinstance(data, dict):
        ids = data.get("input_ids")
        if isinstance(ids, list) and all(type(item) is int for item in ids):
            return ids
        if isinstance(data.get("text"), str):
            return _encoded(data["text"], where, encode)
        if isinstance(data.get("prompt"), str) and isinstance(data.get("completion"), str):
            return _encoded(data["prompt"] + data["completion"], where, encode)
    raise InvalidRequest(
        f'data: {where} must be an object with "text", "prompt" and "completion", or "input_ids"'
    )


def as_data(data: Any) -> Corpus | IteratorData:
    """A source with `batches` and `validation` as it is; any other iterable as `IteratorData`."""
    if hasattr(data, "batches") and hasattr(data, "validation"):
        return data
    if isinstance(data, (str, Path)):
        raise InvalidRequest(
            f"data: must be batches or a Corpus, got the path {data}; use Corpus.from_folder"
        )
    if not isinstance(data, Iterable):
        raise InvalidRequest(f"data: must be iterable, got {type(data).__name__}")
    return IteratorData(data)
