"""Reading and writing the safetensors files of a checkpoint folder, a piece of a tensor at a time.

Nothing here knows the model: names, shapes and dtypes only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from ..errors import CheckpointError, shown
from ..files.reading import file_size, foreign, is_file, plain_name, read_json
from ..files.writing import Stream, write_json, write_whole
from ..value_checks import check_count

__all__ = [
    "DTYPES",
    "Axis",
    "Selection",
    "TensorFiles",
    "axis_ranges",
    "fingerprint",
    "open_safetensors",
    "save_tensors",
    "take",
    "write_safetensors",
]

logger = logging.getLogger(__name__)

# What is kept of one axis: all of it, a slice, or an index list.
Axis = slice | Sequence[int] | None


class Selection(NamedTuple):
    """The part of one tensor that a width keeps: indices of dimensions 0 and 1, None = all."""

    rows: slice | list[int] | None
    cols: slice | list[int] | None


INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def axis_ranges(axis: Axis, size: int, what: str = "axis") -> list[tuple[int, int]]:
    """The selection of one axis as ascending runs: [(start, stop), ...] in the order asked for.

    Args:
        axis: None (all), a slice with step 1, or a sequence of int indices.
        size: length of the axis.
        what: names the axis in errors.

    Returns:
        Runs of consecutive indices; an index list is split where it does not continue by one.

    Raises:
        ValueError: a step other than 1, or an index outside 0..size-1.
    """
    if axis is None:
        return [(0, size)]
    if isinstance(axis, slice):
        start, stop, step = axis.indices(size)
        if step != 1:
            raise ValueError(f"tensor: {what} must be a slice with step 1, got step {step}")
        if axis.stop is not None and axis.stop > size:
            raise ValueError(f"tensor: {what} must end at or before {size}, got {axis.stop}")
        return [(start, max(start, stop))]
    runs: list[tuple[int, int]] = []
    for index in axis:
        if not 0 <= index < size:
            raise ValueError(f"tensor: {what} must hold indices in 0..{size - 1}, got {index}")
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs


def take(tensor: torch.Tensor, rows: Axis = None, cols: Axis = None) -> torch.Tensor:
    """A contiguous copy of ``tensor[rows][:, cols]``; None keeps the whole axis.

    Args:
        tensor: [rows, ...] or [rows, cols, ...], any dtype.
        rows: what is kept of dimension 0.
        cols: what is kept of dimension 1; must be None for a vector.

    Returns:
        A new tensor of the same dtype that shares no memory with ``tensor``.
    """
    out = tensor
    for dim, axis in ((0, rows), (1, cols)):
        if axis is not None:
            runs = axis_ranges(axis, out.shape[dim], ("rows", "cols")[dim])
            out = torch.cat([out.narrow(dim, a, b - a) for a, b in runs], dim=dim)
    return out.clone() if out is tensor else out.contiguous()


class TensorFiles:
    """The tensors of a checkpoint folder: headers are read at once, data only when asked for.

    Data comes from memory-mapped files: a request copies the rows and columns it names and
    nothing else.
    """

    def __init__(self, folder: str | Path):
        """Opens model.safetensors.index.json and its shards, or model.safetensors.

        Args:
            folder: checkpoint folder.

        Raises:
            CheckpointError: no safetensors file, a shard of the index that is missing, a file
                that is truncated or no safetensors file, a tensor in two files, or a tensor that
                the index places in a file which does not hold it. Names the file.
        """
        self.folder = Path(folder)
        self._handles: dict[Path, Any] = {}
        self._where: dict[str, Any] = {}
        self._file: dict[str, Path] = {}
        for path in self._paths():
            handle = self._handles[path] = open_safetensors(path)
            for name in handle.keys():  # noqa: SIM118 (no dict)
                if name in self._file:
                    raise CheckpointError(
                        f"checkpoint: tensor {name} must be in one file, got it in "
                        f"{self._file[name].name} and in {path.name} of {self.folder}"
                    )
                self._file[name] = path
                self._where[name] = handle.get_slice(name)
        self._check_index()

    def _paths(self) -> list[Path]:
        index, single = self.folder / INDEX_NAME, self.folder / SINGLE_NAME
        self._map: dict[str, str] = {}
        if not os.path.lexists(index):
            if is_file(single):
                return [single]
            raise CheckpointError(
                f"checkpoint: {self.folder} must hold {SINGLE_NAME} or {INDEX_NAME}, got neither"
            )
        weight_map = read_weight_map(index)
        files = sorted(set(weight_map.values()))
        missing = [file for file in files if not is_file(self.folder / file)]
        if missing and is_file(single) and SINGLE_NAME not in files:
            logger.warning(
                "checkpoint: %s names files that are not there (%s): %s is read in their place",
                index,
                shown(missing[0]),
                SINGLE_NAME,
            )
            return [single]
        if missing:
            raise CheckpointError(
                f"checkpoint: {self.folder} must hold every file of {INDEX_NAME}, got no "
                f"{', '.join(missing[:8])}; download or copy what is missing"
            )
        self._map = weight_map
        return [self.folder / file for file in files]

    def _check_index(self) -> None:
        for name, file in self._map.items():
            found = self._file.get(name)
            if found is None or found.name != Path(file).name:
                where = "no file" if found is None else found.name
                raise CheckpointError(
                    f"checkpoint: tensor {name} must be in {file} as {INDEX_NAME} of "
                    f"{self.folder} says, got {where}"
                )

    def __len__(self) -> int:
        """The number of tensors."""
        return len(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._where)

    def file_of(self, name: str) -> Path:
        """The file that holds tensor ``name``."""
        self._entry(name)
        return self._file[name]

    def _entry(self, name: str) -> Any:
        try:
            return self._where[name]
        except KeyError:
            raise CheckpointError(f"checkpoint: {self.folder} has no tensor {name}") from None

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of tensor ``name`` as stored."""
        return tuple(self._entry(name).get_shape())

    def dtype_of(self, name: str) -> torch.dtype:
        """Stored dtype of tensor ``name``.

        Raises:
            CheckpointError: no such tensor, or a stored dtype this library does not read.
        """
        stored = self._entry(name).get_dtype()
        if stored not in DTYPES:
            raise CheckpointError(
                f"checkpoint: tensor {name} must have a dtype of {', '.join(DTYPES)}, got {stored}"
            )
        return DTYPES[stored]

    def tensor(self, name: str, rows: Axis = None, cols: Axis = None) -> torch.Tensor:
        """``stored[name][rows][:, cols]`` as a new contiguous tensor in its stored dtype.

        Args:
            name: checkpoint name.
            rows: None (all), slice of step 1, or index list, of dimension 0.
            cols: the same of dimension 1; must be None for a vector.

        Returns:
            CPU tensor that owns its memory; only the rows and columns asked for are read.

        Raises:
            CheckpointError: no such tensor.
            ValueError: an index outside the tensor, or ``cols`` for a vector.
        """
        entry, shape, dtype = self._entry(name), self.shape_of(name), self.dtype_of(name)
        if cols is not None and len(shape) < 2:
            raise ValueError(f"tensor: cols must be None for the vector {name}, got {cols!r}")
        row_runs = axis_ranges(rows, shape[0], f"rows of {name}") if shape else []
        if len(shape) < 2 or cols is None:
            parts = [(run, None) for run in row_runs]
            tail = list(shape[1:])
        else:
            col_runs = axis_ranges(cols, shape[1], f"cols of {name}")
            parts = [(run, col) for run in row_runs for col in col_runs]
            tail = [sum(b - a for a, b in col_runs), *shape[2:]]
        if not shape:
            return entry[...].clone()
        rows_read = sum(b - a for a, b in row_runs)
        out = torch.empty([rows_read, *tail], dtype=dtype, device="cpu")
        row, col, previous = 0, 0, None
        for (r0, r1), c in parts:
            if previous is not None and previous != (r0, r1):
                row, col = row + previous[1] - previous[0], 0
            previous = (r0, r1)
            if c is None:
                out[row : row + r1 - r0] = entry[r0:r1]
            else:
                width = c[1] - c[0]
                out[row : row + r1 - r0, col : col + width] = entry[r0:r1, c[0] : c[1]]
                col += width
        return out


def open_safetensors(path: str | Path, what: str = "checkpoint") -> Any:
    """A safetensors file whose header was read and checked; its data is mapped.

    Args:
        path: the file.
        what: begins the message.

    Raises:
        CheckpointError: a file that is no regular one, is not whole, or cannot be mapped.
    """
    if not is_file(path):
        raise CheckpointError(f"{what}: {path} must be readable, got no regular file")
    rule = f"{what}: {path} must be a complete safetensors file ({file_size(path)} bytes)"
    with foreign(f"{rule}; copy or download it again"):
        return safe_open(path, framework="pt", device="cpu")


def read_weight_map(index: Path) -> dict[str, str]:
    """{tensor: file name} of an index; the files lie in its own folder.

    Raises:
        CheckpointError: an index that cannot be used.
    """
    found = read_json(index)
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"checkpoint: {index} must have a weight_map {{tensor: file}}, got none"
        )
    for name, file in weight_map.items():
        if not plain_name(file):
            raise CheckpointError(
                f"checkpoint: {index} must name files of its own folder, got {shown(file)} for "
                f"{shown(name)}"
            )
    return weight_map


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any dtype, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


_WHOLE = 4096  # tensors of at most this many elements are hashed whole
_PIECE = 256  # elements read at each of the three places of a larger one


def fingerprint(files: TensorFiles, names: Iterable[str]) -> str:
    """SHA-256 (64 hex digits) of the names, dtypes, shapes and sampled bytes of the tensors.

    It covers, for every tensor in ascending order of name: name, stored dtype, shape, and its
    values: all of them up to 4096 elements, else 256 columns of three rows (start of the first
    row, middle of the middle row, end of the last row). It does not depend on sharding, file
    names or file order. A change confined to values that are not sampled is not seen: it tells
    checkpoints apart, it is no integrity check.

    Args:
        files: the open tensors.
        names: which of them to cover.

    Returns:
        64 hex digits.
    """
    digest = hashlib.sha256(b"elastic_infer weights 1\n")
    for name in sorted(names):
        shape, dtype = files.shape_of(name), files.dtype_of(name)
        digest.update(f"{name} {_NAMES[dtype]} {list(shape)}\n".encode())
        for rows, cols in _samples(shape):
            digest.update(raw_bytes(files.tensor(name, rows, cols)))
    return digest.hexdigest()


def _samples(shape: tuple[int, ...]) -> Iterator[tuple[Axis, Axis]]:
    count = 1
    for size in shape:
        count *= size
    if count <= _WHOLE:
        yield None, None
        return
    if len(shape) == 1:
        for start in (0, (shape[0] - _PIECE) // 2, shape[0] - _PIECE):
            yield slice(start, start + _PIECE), None
        return
    piece = min(_PIECE, shape[1])
    starts = (0, (shape[1] - piece) // 2, shape[1] - piece)
    for row, start in zip((0, shape[0] // 2, shape[0] - 1), starts, strict=True):
        yield slice(row, row + 1), slice(start, start + piece)


def write_safetensors(
    folder: Path,
    specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    tensor: Callable[[str], torch.Tensor],
    max_shard_bytes: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Writes tensors one after another as model.safetensors, or as shards with an index.

    Sizes are known before the first tensor is produced, so headers are written first and no
    more than one tensor is in memory.

    Args:
        folder: existing folder.
        specs: {name: (shape, dtype)} in the order of writing.
        tensor: called once per name; must return that shape and dtype.
        max_shard_bytes: a file is closed before it would exceed this (one larger tensor gets a
            file of its own).
        progress: called with (bytes written, bytes in all) after every tensor.

    Returns:
        The files written.

    Raises:
        CheckpointError: a file cannot be written.
    """
    check_count("checkpoint: shard_bytes", max_shard_bytes)
    sizes = {name: _nbytes(*spec) for name, spec in specs.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    total, done = sum(sizes.values()), 0
    paths, weight_map = [], {}

    def write_shard(stream: Stream, names: list[str]) -> None:
        nonlocal done
        stream.write(_header(names, specs, sizes, {"format": "pt"}))
        for name in names:
            data = tensor(name)
            shape, dtype = specs[name]
            if tuple(data.shape) != shape or data.dtype != dtype:
                raise AssertionError(f"{name}: {data.dtype}{list(data.shape)} for {specs[name]}")
            stream.write(raw_bytes(data.contiguous()))
            done += sizes[name]
            if progress is not None:
                progress(done, total)

    for number, names in enumerate(shards, 1):
        file = SINGLE_NAME
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(names, file))
        paths.append(folder / file)
        write_whole(paths[-1], partial(write_shard, names=names), "checkpoint")
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        paths.append(write_json(folder / INDEX_NAME, index, "checkpoint"))
    return paths


def save_tensors(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    what: str,
) -> None:
    """Writes one safetensors file, whole (`writing.write_whole`).

    Args:
        path: the file.
        tensors: by name.
        metadata: text by key.
        what: begins the message of an error.

    Raises:
        CheckpointError: it cannot be written.
    """
    # The largest elements first, so that all are aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    specs = {name: (tuple(tensors[name].shape), tensors[name].dtype) for name in names}
    sizes = {name: _nbytes(*spec) for name, spec in specs.items()}

    def fill(stream: Stream) -> None:
        stream.write(_header(names, specs, sizes, metadata))
        for name in names:
            stream.write(raw_bytes(tensors[name].detach().cpu().contiguous()))

    write_whole(path, fill, what)


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count


def _header(
    names: list[str],
    specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    sizes: Mapping[str, int],
    metadata: Mapping[str, str],
) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in names:
        shape, dtype = specs[name]
        entries[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + sizes[name]],
        }
        offset += sizes[name]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text
