"""Weights as 64x64 tiles: bfloat16 or float32 values, NVFP4 or FP8 codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import _C
from ..codes import BLOCK, dtype_name
from ..rounding import ceil_div

TILE = 64
NVFP4 = torch.float4_e2m1fn_x2  # how an image of NVFP4 tiles names its dtype
FP8 = torch.float8_e4m3fn
TILE_BYTES = {torch.float32: 16384, torch.bfloat16: 8192, FP8: 4096, NVFP4: 2304}
NAN_SCALE = 0x7F


def tile_bytes(dtype: torch.dtype) -> int:
    """Bytes of a 64x64 tile.

    Args:
        dtype: float32, bfloat16, float8_e4m3fn (FP8) or float4_e2m1fn_x2 (NVFP4).

    Raises:
        ValueError: another dtype.
    """
    if dtype not in TILE_BYTES:
        known = ", ".join(dtype_name(d) for d in TILE_BYTES)
        raise ValueError(f"matmul_pack: dtype must be one of {known}, got {dtype}")
    return TILE_BYTES[dtype]


def image_dtype(image: torch.Tensor) -> torch.dtype:
    """Format of the tiles of an image [..., tile bytes], as :func:`tile_bytes` names it."""
    return {size: dtype for dtype, size in TILE_BYTES.items()}[image.shape[-1]]


def check_codes(op: str, codes: torch.Tensor, block_scales: torch.Tensor | None) -> None:
    """Refuses what no quantizer writes: NaN codes of FP8, negative or NaN block scales of NVFP4.

    Raises:
        ValueError: names the op, the argument and the first offender.
    """
    if block_scales is not None:
        name, bad, values = "block_scales", block_scales >= NAN_SCALE, block_scales
        must = "be finite and not negative"
    else:
        name, bad, values = "source", (codes & 0x7F) == 0x7F, codes
        must = "hold no NaN"
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"{op}: {name} must {must}, got {int(values[at]):#04x} at {list(at)}")


def tile_count(n: int) -> int:
    """Tiles of 64 that n rows or columns occupy."""
    return ceil_div(n, TILE)


@dataclass(frozen=True)
class Segment:
    """A run of weight rows: where its tiles start, where its outputs go, how many rows it has."""

    tile_row: int
    column: int
    rows: int


@dataclass(frozen=True)
class TiledWeight:
    """A matrix stored once, as 64x64 tiles ``[rows/64][columns/64]``, zero-padded.

    Attributes:
        image: [row tiles, column tiles, tile bytes] uint8; the bytes of a tile tell what it holds
            (`dtype`).
        columns: K, the row length in elements.
        segments: the runs of rows; each starts its own tile, so every prefix of each is whole
            tiles.
        scale: [segments] float32 that FP8 and NVFP4 codes are multiplied with, None for float32 and
            bfloat16.
    """

    image: torch.Tensor
    columns: int
    segments: tuple[Segment, ...]
    scale: torch.Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """float32, bfloat16, float8_e4m3fn (FP8) or float4_e2m1fn_x2 (NVFP4)."""
        return image_dtype(self.image)

    @property
    def rows(self) -> int:
        return sum(s.rows for s in self.segments)

    @staticmethod
    def empty(
        segment_rows: list[int], columns: int, dtype: torch.dtype, memory=None
    ) -> TiledWeight:
        """Room for a matrix whose segments have `segment_rows` rows, outputs side by side.

        Args:
            dtype: float32, bfloat16, float8_e4m3fn (FP8) or float4_e2m1fn_x2 (NVFP4); K of NVFP4
                is a multiple of 16.
            memory: a `WeightMemory` to take it from, or None.
        """
        segments, tile, column = [], 0, 0
        for rows in segment_rows:
            segments.append(Segment(tile, column, rows))
            tile, column = tile + tile_count(rows), column + rows
        shape = (tile, tile_count(columns), tile_bytes(dtype))
        image = memory.empty(*shape) if memory else torch.empty(shape, dtype=torch.uint8)
        scale = empty_scale(image, len(segments), dtype)
        return TiledWeight(image, columns, tuple(segments), scale)

    def fill(
        self,
        segment: int,
        source: torch.Tensor,
        run=None,
        *,
        block_scales: torch.Tensor | None = None,
        scale: float | None = None,
        check: bool = True,
    ) -> None:
        """Packs one segment.

        Args:
            source: [rows, K] float32 or bfloat16; [rows, K] uint8 E4M3 codes for FP8 tiles;
                [rows, K/2] uint8 pairs of E2M1 codes, low four bits = even k, for NVFP4 tiles.
            run: None, or a Pool.
            block_scales: [rows, K/16] uint8 E4M3, for NVFP4 tiles alone.
            scale: factor of codes times block scales, for FP8 and NVFP4 tiles.
            check: look for NaN among codes and block scales.

        Raises:
            ValueError: names the argument that does not fit.
        """
        place = self.segments[segment]
        pack_tiles(
            self.image, place.tile_row, (place.rows, self.columns), source, block_scales, check, run
        )
        put_scale(self.scale, segment, scale)

    @staticmethod
    def pack(weight: torch.Tensor, segment_rows: list[int] | None = None, run=None) -> TiledWeight:
        """Tiles of `weight` [N, K] float32 or bfloat16; K a multiple of 16 for `matmul`."""
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
            got = list(weight.shape) if isinstance(weight, torch.Tensor) else type(weight).__name__
            raise ValueError(f"matmul_pack: weight must be a tensor of shape [N, K], got {got}")
        rows = segment_rows or [weight.shape[0]]
        if sum(rows) != weight.shape[0]:
            raise ValueError(
                f"matmul_pack: segment_rows must add up to the weight's {weight.shape[0]} rows, "
                f"got {rows}"
            )
        tiled = TiledWeight.empty(rows, weight.shape[1], weight.dtype)
        at = 0
        for i, n in enumerate(rows):
            tiled.fill(i, weight[at : at + n], run)
            at += n
        return tiled

    @staticmethod
    def pack_codes(
        codes: torch.Tensor,
        block_scales: torch.Tensor | None,
        scale: torch.Tensor,
        segment_rows: list[int] | None = None,
        run=None,
        *,
        check: bool = True,
    ) -> TiledWeight:
        """Tiles of a quantized matrix, as `nvfp4_quantize` or `fp8_quantize` gives it.

        Args:
            codes: [N, K/2] uint8 (NVFP4) or [N, K] uint8 (FP8).
            block_scales: [N, K/16] uint8 (NVFP4) or None (FP8).
            scale: [segments] float32.
            segment_rows: rows of each segment, or None for one segment.
            run: None, or a Pool.
            check: look for NaN among codes and block scales.

        Raises:
            ValueError: names the argument that does not fit.
        """
        dtype, columns = code_shape(codes, 2, block_scales)
        rows = segment_rows or [codes.shape[0]]
        check_scales(scale, [len(rows)])
        if sum(rows) != codes.shape[0]:
            raise ValueError(
                f"matmul_pack: segment_rows must add up to the codes' {codes.shape[0]} rows, "
                f"got {rows}"
            )
        tiled = TiledWeight.empty(rows, columns, dtype)
        at = 0
        for i, n in enumerate(rows):
            blocks = None if block_scales is None else block_scales[at : at + n]
            tiled.fill(
                i, codes[at : at + n], run, block_scales=blocks, scale=float(scale[i]), check=check
            )
            at += n
        return tiled


def empty_scale(image: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor | None:
    """Room for the `count` scales of an image of `dtype`, NaN until they are put in; None where
    there are none."""
    if dtype not in (FP8, NVFP4):
        return None
    return torch.full((count,), torch.nan, device=image.device)


def put_scale(scales: torch.Tensor | None, index: int, scale: float | None) -> None:
    """Keeps the scale of one segment or expert.

    Raises:
        ValueError: when it is missing, not finite or negative, or given without need.
    """
    if scales is None:
        if scale is not None:
            raise ValueError(
                f"matmul_pack: scale must be None for float32 and bfloat16 tiles, got {scale}"
            )
        return
    if scale is None or not 0 <= scale < float("inf"):
        raise ValueError(f"matmul_pack: scale must be finite and not negative, got {scale}")
    scales[index] = scale


def check_scales(scale: torch.Tensor, shape: list[int]) -> None:
    """Raises ValueError unless `scale` is a contiguous float32 tensor of this shape."""
    if not isinstance(scale, torch.Tensor):
        raise ValueError(f"matmul_pack: scale must be a tensor, got {type(scale).__name__}")
    if scale.dtype != torch.float32 or list(scale.shape) != shape or not scale.is_contiguous():
        got = f"{dtype_name(scale.dtype)}{list(scale.shape)} with strides {list(scale.stride())}"
        raise ValueError(f"matmul_pack: scale must be contiguous float32{shape}, got {got}")


def code_shape(
    codes: torch.Tensor, ndim: int, block_scales: torch.Tensor | None
) -> tuple[torch.dtype, int]:
    """The image dtype and the K of codes [..., N, K/2] with block scales, or [..., N, K] without.

    Raises:
        ValueError: unless both are tensors of `ndim` dimensions that belong together.
    """
    for name, value in (("source", codes), ("block_scales", block_scales)):
        if value is None and name == "block_scales":
            continue
        if not isinstance(value, torch.Tensor) or value.ndim != ndim:
            got = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(
                f"matmul_pack: {name} must be a tensor of {ndim} dimensions, got {got}"
            )
    if block_scales is None:
        return FP8, codes.shape[-1]
    expected = [*codes.shape[:-1], codes.shape[-1] * 2 // BLOCK]
    if list(block_scales.shape) != expected:
        raise ValueError(
            f"matmul_pack: block_scales must have shape {expected}, got {list(block_scales.shape)}"
        )
    return NVFP4, 2 * codes.shape[-1]


def pack_tiles(
    image: torch.Tensor,
    tile_row: int,
    shape: tuple[int, int],
    source: torch.Tensor,
    block_scales: torch.Tensor | None,
    check: bool,
    run,
) -> None:
    """Packs a matrix of `shape` (rows, K) into an image [row tiles, column tiles, tile bytes].

    Args: as of :meth:`TiledWeight.fill`; tile_row: the first row of tiles to write.

    Raises:
        ValueError: names the argument that does not fit.
    """
    dtype = image_dtype(image)
    rows, K = shape
    expected = [rows, K // 2 if dtype == NVFP4 else K]
    if list(source.shape) != expected:
        raise ValueError(
            f"matmul_pack: source must have shape {expected}, got {list(source.shape)}"
        )
    if dtype == NVFP4 and block_scales is None:
        raise ValueError("matmul_pack: block_scales must be given for NVFP4 tiles, got None")
    if check and dtype in (FP8, NVFP4) and source.dtype == torch.uint8:
        check_codes("matmul_pack", source, block_scales)
    _C.matmul_pack(source, image, tile_row, block_scales, run)


@dataclass(frozen=True)
class ExpertWeights:
    """One matrix per expert, each stored once as 64x64 tiles, zero-padded.

    Attributes:
        image: [E, row tiles, column tiles, tile bytes] uint8; the bytes of a tile tell what it
            holds (`dtype`).
        rows: rows of every expert's matrix.
        columns: columns of every expert's matrix.
        scale: [E] float32 that FP8 and NVFP4 codes are multiplied with, None for float32 and
            bfloat16.
    """

    image: torch.Tensor
    rows: int
    columns: int
    scale: torch.Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """float32, bfloat16, float8_e4m3fn (FP8) or float4_e2m1fn_x2 (NVFP4)."""
        return image_dtype(self.image)

    @property
    def experts(self) -> int:
        return self.image.shape[0]

    @staticmethod
    def empty(
        experts: int, rows: int, columns: int, dtype: torch.dtype, memory=None
    ) -> ExpertWeights:
        """Room for `experts` matrices [rows, columns]. dtype: as of `TiledWeight.empty`. memory: a
        `WeightMemory` to take it from, or None."""
        shape = (experts, tile_count(rows), tile_count(columns), tile_bytes(dtype))
        image = memory.empty(*shape) if memory else torch.empty(shape, dtype=torch.uint8)
        return ExpertWeights(image, rows, columns, empty_scale(image, experts, dtype))

    def fill(
        self,
        expert: int,
        source: torch.Tensor,
        run=None,
        *,
        block_scales: torch.Tensor | None = None,
        scale: float | None = None,
        check: bool = True,
    ) -> None:
        """Packs the matrix of one expert.

        Args: as of `TiledWeight.fill`.

        Raises:
            ValueError: names the argument that does not fit.
        """
        if not 0 <= expert < self.experts:
            raise ValueError(f"matmul_pack: expert must be in [0, {self.experts}), got {expert}")
        shape = (self.rows, self.columns)
        pack_tiles(self.image[expert], 0, shape, source, block_scales, check, run)
        put_scale(self.scale, expert, scale)

    @staticmethod
    def pack(weight: torch.Tensor, run=None) -> ExpertWeights:
        """Tiles of `weight` [E, rows, columns] float32 or bfloat16."""
        if not isinstance(weight, torch.Tensor) or weight.ndim != 3:
            got = list(weight.shape) if isinstance(weight, torch.Tensor) else type(weight).__name__
            raise ValueError(f"matmul_pack: weight must have shape [E, rows, columns], got {got}")
        packed = ExpertWeights.empty(*weight.shape, weight.dtype)
        for e in range(weight.shape[0]):
            packed.fill(e, weight[e], run)
        return packed

    @staticmethod
    def pack_codes(
        codes: torch.Tensor,
        block_scales: torch.Tensor | None,
        scale: torch.Tensor,
        run=None,
        *,
        check: bool = True,
    ) -> ExpertWeights:
        """Tiles of quantized matrices.

        Args:
            codes: [E, rows, K/2] uint8 (NVFP4) or [E, rows, K] uint8 (FP8).
            block_scales: [E, rows, K/16] uint8 (NVFP4) or None (FP8).
            scale: [E] float32.
            run: None, or a Pool.
            check: look for NaN among codes and block scales.

        Raises:
            ValueError: names the argument that does not fit.
        """
        dtype, columns = code_shape(codes, 3, block_scales)
        check_scales(scale, [codes.shape[0]])
        packed = ExpertWeights.empty(codes.shape[0], codes.shape[1], columns, dtype)
        for e in range(codes.shape[0]):
            blocks = None if block_scales is None else block_scales[e]
            packed.fill(e, codes[e], run, block_scales=blocks, scale=float(scale[e]), check=check)
        return packed
