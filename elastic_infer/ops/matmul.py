"""matmul: activations times tiled weights, with a prefix of both sides per row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import _C
from ..codes import BLOCK
from ._activations import quantised
from ._quantised import (
    FP8,
    NAN_SCALE,
    NVFP4,
    TILE,
    check_codes,
    dequantise,
    draw_codes,
    image_dtype,
    tile_bytes,
)
from ._spec import Arguments, Case, OpSpec, draw_widths, randn, width_rows

WISHES = ("activation_quantization", "kernel")  # arguments that a case may have
INT8 = {"weights": "nvfp4", "activation_quantization": "int8"}  # for the CPU alone


def tile_count(n: int) -> int:
    """Tiles of 64 that n rows or columns occupy."""
    return -(-n // TILE)


@dataclass(frozen=True)
class Segment:
    """A run of weight rows: where its tiles start, where its outputs go, how many rows it has."""

    tile_row: int
    column: int
    rows: int


@dataclass(frozen=True)
class TiledWeight:
    """A matrix stored once, as 64x64 tiles ``[rows/64][columns/64]``, zero-padded.

    image: [row tiles, column tiles, tile bytes] uint8; the bytes of a tile tell what it holds
    (`dtype`). columns: K, the row length in elements. segments: the runs of rows; each starts its
    own tile, so every prefix of each is whole tiles. scale: [segments] float32 that FP8 and NVFP4
    codes are multiplied with, None for float32 and bfloat16.
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
            scale: what codes times block scales are multiplied with, for FP8 and NVFP4 tiles.
            check: whether to look for NaN among codes and block scales.

        Raises: ValueError naming the argument that does not fit.
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
        """Tiles of a quantised matrix, as `nvfp4_quantize` or `fp8_quantize` gives it.

        Args:
            codes: [N, K/2] uint8 (NVFP4) or [N, K] uint8 (FP8).
            block_scales: [N, K/16] uint8 (NVFP4) or None (FP8).
            scale: [segments] float32.
            segment_rows: rows of each segment, or None for one segment.
            run: None, or a Pool.
            check: whether to look for NaN among codes and block scales.

        Raises: ValueError naming the argument that does not fit.
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

    Raises: ValueError when it is missing, not finite or negative, or given without need.
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
    """Raises: ValueError unless `scale` is a contiguous float32 tensor of this shape."""
    if not isinstance(scale, torch.Tensor):
        raise ValueError(f"matmul_pack: scale must be a tensor, got {type(scale).__name__}")
    if scale.dtype != torch.float32 or list(scale.shape) != shape or not scale.is_contiguous():
        got = f"{str(scale.dtype)[6:]}{list(scale.shape)} with strides {list(scale.stride())}"
        raise ValueError(f"matmul_pack: scale must be contiguous float32{shape}, got {got}")


def code_shape(
    codes: torch.Tensor, ndim: int, block_scales: torch.Tensor | None
) -> tuple[torch.dtype, int]:
    """The image dtype and the K of codes [..., N, K/2] with block scales, or [..., N, K] without.

    Raises: ValueError unless both are tensors of `ndim` dimensions that belong together.
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

    Raises: ValueError naming the argument that does not fit.
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


def matmul(
    x: torch.Tensor,
    weight: TiledWeight,
    out: torch.Tensor,
    *,
    activation: str = "none",
    row_width: torch.Tensor | None = None,
    k_sizes: torch.Tensor | None = None,
    n_sizes: torch.Tensor | None = None,
    activation_quantization: str = "none",
    kernel: str = "auto",
    run=None,
) -> torch.Tensor:
    """``out[r, c] = act(sum_{k < k_r} x[r, k] * W[c, k])`` for the first n_r outputs of each
    segment, and exact zero in the rest of it.

    Args:
        x: [R, K] float32 or bfloat16; exactly zero is assumed between a row's own k and the widest
            k of its block, so nothing beyond a row's own k is read.
        weight: the tiled matrix; float32 tiles with float32 x, all others with either x.
        out: [R, N] float32 or bfloat16.
        activation: "none" or "relu2" (the projection is rounded to x's dtype, then relu squared).
        row_width: [R] int32 index of each row's width, or None: every row uses everything.
        k_sizes: [W] int32 columns used at each width, multiples of 16.
        n_sizes: [W, S] int32 rows used of each segment at each width.
        activation_quantization: "none"; or, with an NVFP4 weight, "int8" on the CPU: every 16
            columns of a row become whole numbers of -127..127 (exact sums of integers; about 0.5 %
            of error for normal x); or "nvfp4" on a GPU of compute capability 12.x: rows become
            NVFP4 as well (each with the scale of its own prefix), which tensor cores multiply in
            that form. The latter has never run on a GPU.
        kernel: "auto"; or "wgmma": for bfloat16 x and weight on a GPU of compute capability 9.0,
            the kernel with asynchronous products, which is for many rows. It has never run on one.
        run: None, a Pool or a Step.

    Returns: `out`.

    Raises: ValueError naming the argument that has the wrong shape, dtype, stride or value.
    """
    segments = [(s.tile_row, s.column, s.rows) for s in weight.segments]
    _C.matmul(
        x, weight.image, weight.columns, weight.scale, out, segments, activation, row_width,
        k_sizes, n_sizes, activation_quantization, kernel, run,
    )  # fmt: skip
    return out


def _split(case: Case) -> list[int]:
    return list(case["segments"])


def plain_weight(a: Arguments, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K] of an op's arguments; of codes the values, in `dtype`."""
    if "weight" in a:
        return a["weight"]
    scale = a["scale"].repeat_interleave(torch.tensor(a["segments"]))[:, None]
    return dequantise(a["codes"], a["block_scales"], scale, dtype)


def _reference(a: Arguments) -> dict[str, torch.Tensor]:
    x, out = a["x"], torch.zeros_like(a["out"])
    form = a.get("activation_quantization", "none")
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    w = plain_weight(a, wide)
    for r, k in enumerate(width_rows(a, "k_sizes")):
        own = quantised(form, x[r : r + 1, :k])[0]
        y = torch.nn.functional.linear(own.to(wide), w[:, :k].to(wide))
        if a["activation"] == "relu2":
            y = torch.relu(y.to(x.dtype).to(wide)).square()
        column = 0
        for s, rows in enumerate(a["segments"]):
            n = int(a["n_sizes"][int(a["row_width"][r]), s])
            out[r, column : column + n] = y[column : column + n].to(out.dtype)
            column += rows
    return {"out": out}


def _cases():
    yield {"R": 1, "K": 16, "segments": (16,), "k": (16,), "n": ((16,),), "act": "none"}
    yield {"R": 1, "K": 176, "segments": (80, 8), "k": (48, 176), "n": ((40, 4), (80, 8)),
           "act": "none"}  # fmt: skip
    yield {"R": 7, "K": 208, "segments": (130,), "k": (64, 144, 208),
           "n": ((32,), (96,), (130,)), "act": "relu2"}  # fmt: skip
    yield {"R": 37, "K": 96, "segments": (64, 100, 3), "k": (48, 96),
           "n": ((16, 100, 1), (64, 100, 3)), "act": "none"}  # fmt: skip
    yield {"R": 300, "K": 80, "segments": (72,), "k": (32, 80), "n": ((24,), (72,)),
           "act": "none"}  # fmt: skip
    for weights in ("fp8", "nvfp4"):
        yield {"R": 1, "K": 16, "segments": (16,), "k": (16,), "n": ((16,),), "act": "none",
               "weights": weights}  # fmt: skip
        yield {"R": 1, "K": 176, "segments": (80, 8), "k": (48, 176), "n": ((40, 4), (80, 8)),
               "act": "none", "weights": weights}  # fmt: skip
        yield {"R": 29, "K": 208, "segments": (130, 40), "k": (64, 144, 208),
               "n": ((32, 8), (96, 40), (130, 1)), "act": "relu2", "weights": weights}  # fmt: skip
        yield {"R": 7, "K": 96, "segments": (64, 100, 3), "k": (48, 96),
               "n": ((16, 100, 1), (64, 100, 3)), "act": "none", "weights": weights}  # fmt: skip
    yield {"R": 9, "K": 80, "segments": (72,), "k": (32, 80), "n": ((24,), (72,)), "act": "none",
           "weights": "nvfp4", "small": True}  # fmt: skip
    for R in (1, 8, 256):
        for weights in ({}, {"weights": "fp8"}, {"weights": "nvfp4"}, INT8):
            yield {"R": R, "K": 2688, "segments": (4096, 4096, 1024, 1024, 64), "k": (2688,),
                   "n": ((4096, 4096, 1024, 1024, 64),), "act": "none",
                   "bench": True} | weights  # fmt: skip


def _weights(case: Case, N: int, K: int, dtype: torch.dtype, generator) -> Arguments:
    if "weights" not in case:
        return {"weight": randn(generator, N, K, dtype=dtype, scale=K**-0.5)}
    drawn = draw_codes(generator, N, K, form=case["weights"], small=case.get("small", False))
    steps = torch.arange(1.0, len(case["segments"]) + 1)
    return drawn | {"scale": drawn["scale"] * steps}


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    R, K, N = case["R"], case["K"], sum(case["segments"])
    a = {
        "x": randn(generator, R, K, dtype=dtype),
        **_weights(case, N, K, dtype, generator),
        "segments": case["segments"],
        "out": torch.empty(R, N, dtype=dtype),
        "activation": case["act"],
        "row_width": draw_widths(generator, R, len(case["k"])),
        "k_sizes": torch.tensor(case["k"], dtype=torch.int32),
        "n_sizes": torch.tensor(case["n"], dtype=torch.int32),
    } | {name: case[name] for name in WISHES if name in case}
    for r, k in enumerate(width_rows(a, "k_sizes")):
        a["x"][r, k:] = 0
    return a


def _call(a: Arguments, run) -> None:
    given = dict(a)
    segments = list(given.pop("segments"))
    if "weight" in a:
        given["weight"] = TiledWeight.pack(a["weight"], segments)
    else:
        codes, blocks, scale = (given.pop(n) for n in ("codes", "block_scales", "scale"))
        given["weight"] = TiledWeight.pack_codes(codes, blocks, scale, segments, check=False)
    matmul(run=run, **given)


def _poison(a: Arguments) -> None:
    nan = float("nan")
    k_max = max(width_rows(a, "k_sizes"))
    for r, k in enumerate(width_rows(a, "k_sizes")):
        a["x"][r, k:] = nan  # a row's own prefix is all that is read
    _poison_columns(a, k_max)
    used = a["n_sizes"][a["row_width"].long()].max(0).values.tolist()
    at = 0
    for s, rows in enumerate(a["segments"]):
        _poison_rows(a, slice(at + used[s], at + rows))
        at += rows


def _poison_columns(a: Arguments, k: int) -> None:
    if "weight" in a:
        a["weight"][:, k:] = float("nan")
    elif a["block_scales"] is None:
        a["codes"][:, k:] = NAN_SCALE
    else:
        a["block_scales"][:, k // BLOCK :] = NAN_SCALE


def _poison_rows(a: Arguments, rows: slice) -> None:
    if "weight" in a:
        a["weight"][rows] = float("nan")
    elif a["block_scales"] is None:
        a["codes"][rows] = NAN_SCALE
    else:
        a["block_scales"][rows] = NAN_SCALE


def _cut_weight(a: Arguments, rows: torch.Tensor, k: int) -> Arguments:
    if "weight" in a:
        return {"weight": a["weight"][rows][:, :k].contiguous()}
    codes, blocks = a["codes"][rows], a["block_scales"]
    if blocks is None:
        return {"codes": codes[:, :k].contiguous(), "block_scales": None, "scale": a["scale"]}
    return {
        "codes": codes[:, : k // 2].contiguous(),
        "block_scales": blocks[rows][:, : k // BLOCK].contiguous(),
        "scale": a["scale"],
    }


def _sliced(a: Arguments):
    for w, k in enumerate(a["k_sizes"].tolist()):
        rows = (a["row_width"] == w).nonzero().flatten()
        n = a["n_sizes"][w].tolist()
        if not len(rows):
            continue
        starts = [sum(a["segments"][:s]) for s in range(len(n))]
        columns = torch.cat([torch.arange(b, b + m) for b, m in zip(starts, n)])
        cut = {
            "x": a["x"][rows, :k].contiguous(),
            **_cut_weight(a, columns, k),
            "segments": tuple(n),
            "out": torch.empty(len(rows), sum(n), dtype=a["out"].dtype),
            "activation": a["activation"],
            "row_width": None, "k_sizes": None, "n_sizes": None,
            **{name: a[name] for name in WISHES if name in a},
        }  # fmt: skip
        yield cut, {"out": ((rows[:, None], columns), ...)}


def _row(a: Arguments, r: int):
    one = dict(a)
    for name in ("x", "out", "row_width"):
        one[name] = a[name][r : r + 1].clone()
    return one, {"out": ((r,), (0,))}


def _cost(case: Case, itemsize: int) -> tuple[int, int]:
    R, K, N = case["R"], case["K"], sum(case["segments"])
    weights = N * K * weight_bytes(case, itemsize)
    return int(weights + R * (K + N) * itemsize), 2 * R * N * K


def weight_bytes(case: Case, itemsize: int) -> float:
    """Bytes per weight of a case, whose float weights have `itemsize`."""
    return {"fp8": 1.0, "nvfp4": 0.5625}.get(case.get("weights"), itemsize)


SPECS = [
    OpSpec(
        name="matmul", call=_call, reference=_reference, cases=_cases, inputs=_inputs,
        outputs=("out",), cost=_cost, poison=_poison, sliced=_sliced, row=_row,
        rows=lambda a: a["x"].shape[0],
    )
]  # fmt: skip
