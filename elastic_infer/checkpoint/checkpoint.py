"""Opening a checkpoint: a folder or a Hub id, its config, its widths and its tensors."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..codes import Packed, dtype_name
from ..errors import CheckpointError, WidthError
from ..files.reading import is_file, read_json, user_path
from ..public import public
from ..showing import count_text, name_text, names_text, one_line
from ..torch_modes import plain_torch
from .config import ModelConfig
from .hub import WIDTHS_NAME, config_folder, resolve_folder
from .layout import expected_shapes, iterate_shapes
from .published import Published, read_published
from .stored import StoredWeight, kv_factors, read_packed, stored_weights
from .tensor_files import Axis, Selection, TensorFiles, fingerprint
from .width_table import default_width_name, parse_widths
from .widths import Width

__all__ = ["Checkpoint"]

logger = logging.getLogger(__name__)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@public
class Checkpoint:
    """An opened checkpoint: config, widths, and tensors that are read piece by piece.

    Attributes:
        folder: Path of the folder.
        name: the folder's own, or the Hub id.
        config: ModelConfig of the full checkpoint.
        names: of the model's tensors in checkpoint order, quantized ones under their plain name.
        quantized: {name: StoredWeight} of the quantized ones.
        published: the checkpoint's statement of its quantization, None without one.
        widths: {name: Width} in ascending order of active parameters.
        default_width: name of the width used where none is named.
        widths_source: where the table came from, for messages.
    """

    def __init__(
        self,
        folder: Path,
        files: TensorFiles,
        config: ModelConfig,
        names: list[str],
        quantized: dict[str, StoredWeight],
        published: Published | None,
        widths: str | Path | Mapping[str, Any] | None = None,
        config_home: str | Path | None = None,
    ):
        """Use ``Checkpoint.open``; this takes values that it has read and checked."""
        self.folder = folder
        self.name = Path(os.path.abspath(folder)).name or str(folder)
        self.config = config
        self.names = names
        self.quantized = quantized
        self.published = published
        self._files = files
        self._kv_factors = kv_factors(files, config)
        self._known = frozenset(names)
        table, self.widths_source = self._find_table(widths, config_home)
        try:
            self.widths = parse_widths(config, table)
            self.default_width = default_width_name(self.widths, table)
        except WidthError as error:
            raise WidthError(f"{error} (width table of {self.widths_source})") from error

    widths: dict[str, Width]
    default_width: str

    @classmethod
    def open(
        cls,
        path_or_hub_id: str | Path,
        revision: str | None = None,
        widths: str | Path | Mapping[str, Any] | None = None,
        *,
        config_home: str | Path | None = None,
    ) -> Checkpoint:
        """Opens a checkpoint and checks that every tensor is there with the right shape.

        The width table is read from the first that exists of: ``widths``; elastic_widths.json
        beside config.json; ``<config_home>/elastic_infer/widths/<fingerprint>.json``; the
        ``elastic`` key of config.json. With none there is one width, "full".

        Args:
            path_or_hub_id: folder, or ``owner/name`` on the Hub.
            revision: branch, tag or commit of a Hub id.
            widths: table as a dict, or path of a JSON file with one.
            config_home: the user's config folder, None = ``~/.config``.

        Returns:
            The open checkpoint; tensor data is not yet read.

        Raises:
            CheckpointError: folder, file or tensor missing, damaged, misshapen or unsupported.
            WidthError: the width table does not fit the checkpoint.
        """
        folder = resolve_folder(path_or_hub_id, revision)
        config = ModelConfig.from_folder(folder)
        files = TensorFiles(folder)
        published = read_published(config.raw, folder)
        _check_names(files, config)
        quantized = stored_weights(files, expected_shapes(config), published)
        names = _check_tensors(files, config, quantized)
        opened = cls(folder, files, config, names, quantized, published, widths, config_home)
        if folder != user_path(path_or_hub_id, "checkpoint: path"):
            opened.name = str(path_or_hub_id)
        return opened

    @one_line
    def __repr__(self) -> str:
        formats = "".join(f", {name}" for name in sorted(set(self.formats.values())))
        return (
            f"Checkpoint({name_text(self.name)}, widths {names_text(list(self.widths), ' < ')}, "
            f"{count_text(len(self.names), 'tensor')}{formats})"
        )

    def _find_table(
        self, widths: str | Path | Mapping[str, Any] | None, config_home: str | Path | None
    ) -> tuple[Mapping[str, Any] | None, str]:
        if isinstance(widths, Mapping):
            return widths, "widths="
        if widths is not None:
            path = user_path(widths, "checkpoint: widths")
            if not is_file(path):
                raise CheckpointError(f"checkpoint: widths must name a JSON file, got {path}")
            return read_json(path), str(path)
        beside = self.folder / WIDTHS_NAME
        if os.path.lexists(beside):
            return read_json(beside), str(beside)
        users = config_folder(config_home)
        # The fingerprint reads from every tensor: it is taken only if the user keeps any table.
        if users.is_dir() and any(users.glob("*.json")):
            path = users / f"{self.fingerprint}.json"
            if os.path.lexists(path):
                return read_json(path), str(path)
        table = self.config.elastic
        return table, "config.json" if table is not None else "no table"

    @cached_property
    @plain_torch()
    def fingerprint(self) -> str:
        """64 hex digits that tell these weights from others, whatever the sharding.

        Covers name, dtype, shape and sampled values of every tensor of the model in checkpoint
        order (see ``tensor_files.fingerprint``), not config.json, not ``mtp.*``.
        """
        plain = [name for name in self.names if name not in self.quantized]
        parts = [part for stored in self.quantized.values() for part in stored.parts]
        return fingerprint(self._files, [*plain, *parts, *self.kv_factor_names])

    @property
    def kv_factor_names(self) -> list[str]:
        """The tensors of `kv_factor` that are part of no quantized weight."""
        parts = {part for stored in self.quantized.values() for part in stored.parts}
        names = (name for found in self._kv_factors.values() for name in found)
        return [name for name in names if name not in parts]

    def kv_factor(self, layer: int, kind: str) -> float | None:
        """Factor of the codes of an attention layer's 8-bit keys or values.

        Args:
            layer: index of the layer.
            kind: "k" or "v".

        Returns:
            The number; None where the checkpoint has none.

        Raises:
            CheckpointError: no finite number above 0, or two that differ.
        """
        values = {name: self.scalar(name) for name in self._kv_factors[layer, kind]}
        if len(set(values.values())) > 1:
            raise CheckpointError(
                f"checkpoint: {' and '.join(values)} must be equal, got "
                f"{' and '.join(map(str, values.values()))}"
            )
        return next(iter(values.values()), None)

    @property
    def lacks_kv_factors(self) -> bool:
        """True where an attention layer has no factor for its 8-bit keys or values."""
        return not all(self._kv_factors.values())

    @property
    def formats(self) -> dict[str, str]:
        """{name: "nvfp4" or "fp8"} of the quantized tensors."""
        return {name: stored.format for name, stored in self.quantized.items()}

    def require_plain(self, what: str) -> None:
        """Refuses a quantized checkpoint for `what`, naming its first quantized tensor.

        Raises:
            CheckpointError: a quantized checkpoint.
        """
        for name, found in self.formats.items():
            raise CheckpointError(
                f"{what}: the checkpoint must not be quantized, got {name} in {found}; start from "
                "the one that it was made of"
            )

    def format_of(self, name: str) -> str:
        """Format of a quantized tensor ("nvfp4" or "fp8"), or dtype of another ("bfloat16")."""
        if name in self.quantized:
            return self.quantized[name].format
        return dtype_name(self._files.dtype_of(name))

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of tensor ``name``; of a quantized one the shape of its values."""
        if name in self.quantized:
            return self.quantized[name].shape
        return self._files.shape_of(name)

    def dtype_of(self, name: str) -> torch.dtype:
        """Dtype of ``tensor``'s result: the stored one, float32 for a quantized tensor."""
        return torch.float32 if name in self.quantized else self._files.dtype_of(name)

    def scalar(self, name: str) -> float | None:
        """The value of a stored tensor of one element; None where there is no such tensor.

        Raises:
            CheckpointError: one of more elements, or that is no finite number above 0.
        """
        if name not in self._files:
            return None
        shape = self._files.shape_of(name)  # before any data is read
        if math.prod(shape) != 1:
            raise CheckpointError(
                f"checkpoint: {name} must be one finite number above 0, got shape {list(shape)}"
            )
        value = float(self._files.tensor(name).float())
        if not math.isfinite(value) or value <= 0:
            raise CheckpointError(
                f"checkpoint: {name} must be one finite number above 0, got {value}"
            )
        return value

    def packed(self, name: str, rows: Axis = None, cols: Axis = None) -> Packed:
        """Rows and columns of a quantized tensor as they are stored, checked.

        Args:
            name: a key of ``quantized``.
            rows: as of ``tensor``.
            cols: as of ``tensor``; NVFP4 keeps whole blocks of 16 columns.

        Raises:
            CheckpointError: no such tensor, or scales or codes that are no usable numbers.
            ValueError: an index outside the tensor, or columns that cut a block.
        """
        if name not in self.quantized:
            raise CheckpointError(f"checkpoint: {self.folder} has no quantized tensor {name}")
        return read_packed(self._files, self.quantized[name], rows, cols)

    def part(self, name: str, rows: Axis = None, cols: Axis = None) -> torch.Tensor:
        """Rows and columns of one stored tensor of a quantized weight (``StoredWeight.parts``)."""
        return self._files.tensor(name, rows, cols)

    def part_spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """(shape, dtype) of one stored tensor of a quantized weight."""
        return self._files.shape_of(name), self._files.dtype_of(name)

    def tensor(self, name: str, rows: Axis = None, cols: Axis = None) -> torch.Tensor:
        """``weights[name][rows][:, cols]`` as a new contiguous CPU tensor in its stored dtype;
        a quantized tensor is dequantized to float32.

        Args:
            name: one of ``names``.
            rows: None (all), slice of step 1, or index list, of dimension 0.
            cols: the same of dimension 1; must be None for a vector.

        Returns:
            Tensor that owns its memory; only the selection is read from the file.

        Raises:
            CheckpointError: no such tensor.
            ValueError: an index outside the tensor.
        """
        if name not in self._known:
            raise CheckpointError(f"checkpoint: {self.folder} has no model tensor {name}")
        if name in self.quantized:
            return self.packed(name, rows, cols).dequantize()
        return self._files.tensor(name, rows, cols)

    def selected(self, name: str, selection: Selection) -> torch.Tensor:
        """``tensor`` with the rows and columns of a ``Selection`` (see ``tensor_selections``)."""
        return self.tensor(name, *selection)


def _check_names(files: TensorFiles, config: ModelConfig) -> None:
    """Refuses a checkpoint without one of its tensors. It ends at the first that is missing, so
    the files bound the time, however many tensors config.json speaks of."""
    for name, shape in iterate_shapes(config):
        if name not in files and f"{name.removesuffix('.weight')}.weight_packed" not in files:
            raise CheckpointError(
                f"checkpoint: {files.folder} must hold {name} of shape {list(shape)}, got none; "
                "config.json and the weights must belong together"
            )


def _check_tensors(
    files: TensorFiles, config: ModelConfig, quantized: Mapping[str, StoredWeight]
) -> list[str]:
    """Names of the model's tensors in checkpoint order, after all were checked."""
    expected = expected_shapes(config)
    for name, shape in expected.items():
        if name in quantized:
            continue
        found, dtype = files.shape_of(name), files.dtype_of(name)
        if found != shape:
            raise CheckpointError(
                f"checkpoint: {name} must have shape {list(shape)} as config.json says, got "
                f"{list(found)} in {files.file_of(name).name}"
            )
        if dtype not in _FLOATS:
            raise CheckpointError(
                f"checkpoint: {name} must be float32, bfloat16 or float16, got {dtype} in "
                f"{files.file_of(name).name}"
            )
    if config.tie_word_embeddings and "lm_head.weight" in files:
        raise CheckpointError(
            "checkpoint: lm_head.weight must be absent where tie_word_embeddings is true, got it "
            f"in {files.file_of('lm_head.weight').name}; set tie_word_embeddings to false in "
            "config.json if the head has weights of its own"
        )
    parts = {part for stored in quantized.values() for part in stored.parts}
    parts |= {part for found in kv_factors(files, config).values() for part in found}
    extra = [name for name in files.names if name not in expected and name not in parts]
    mtp = [name for name in extra if name.startswith("mtp.")]
    if mtp:
        logger.info("checkpoint: %d mtp.* tensors (token look-ahead) are skipped", len(mtp))
    other = [name for name in extra if not name.startswith("mtp.")]
    if other:
        some = ", ".join(other[:8]) + (", …" if len(other) > 8 else "")
        logger.warning("checkpoint: %d tensors are no part of the model: %s", len(other), some)
    return list(expected)
