"""From the tensors of a checkpoint to tiles in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import MAMBA
from ..checkpoint.geometry import channels, joined, layer_tensors, places
from ..checkpoint.layout import EMBEDDING, head_name
from ..checkpoint.stored import check_fused
from ..checkpoint.widths import Width
from ..codes import Packed
from ..device.device import CPU, Device
from ..device.memory import WeightMemory
from ..errors import shown
from ..ops.tiles import FP8, NVFP4, ExpertWeights, TiledWeight
from .weights import (
    AttentionWeights,
    MambaWeights,
    MlpWeights,
    MoeWeights,
    Weights,
    rank_major,
)

Progress = Callable[[str, int], None]
_CODES = {"fp8": FP8, "nvfp4": NVFP4}  # how the images name their formats


class WeightLoader:
    """Reads the served width of a checkpoint into tiles.

    Args:
        checkpoint: an open one.
        served: sizes to keep.
        dtype: float32 or bfloat16, of activations, norms and the matmul weights that are not
            quantized.
        run: a Pool for packing.
        progress: called with (what, bytes).
        device: where they go, slice by slice; tiles are filled there.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        served: Width,
        dtype: torch.dtype,
        run=None,
        progress: Progress | None = None,
        device: Device = CPU,
    ):
        self.checkpoint, self.config, self.served = checkpoint, checkpoint.config, served
        self.dtype, self.run, self.progress = dtype, run, progress
        self.D = served.hidden_size
        self.device, self._memory = device, WeightMemory(device.place)

    def load(self) -> Weights:
        """Reads and packs everything.

        Raises:
            CheckpointError: a quantized tensor that cannot be used.
        """
        c = self.config
        check_fused(c, self.checkpoint.formats)
        readers = {"M": self._mamba, "*": self._attention, "-": self._mlp, "E": self._moe}
        embedding = self._read(EMBEDDING, cols=slice(0, self.D))
        layers = [readers[kind](i) for i, kind in enumerate(c.layers)]
        return Weights(
            embedding=embedding,
            layers=layers,
            final_norm=self._read("backbone.norm_f.weight", rows=slice(0, self.D)),
            head=self._tiled([(head_name(c), slice(0, c.vocab_size))], slice(0, self.D)),
            served=self.served,
            dtype=self.dtype,
            formats=self.checkpoint.formats,
        )

    def _read(self, name: str, rows=None, cols=None, dtype: torch.dtype | None = None):
        tensor = self.checkpoint.tensor(name, rows, cols)
        if self.progress:
            self.progress(name, tensor.numel() * tensor.element_size())
        return tensor.to(self.device.place, dtype or self.dtype).contiguous()

    def _tiled(self, parts: list[tuple[str, object]], cols, dtype=None) -> TiledWeight:
        """A tiled matrix whose segments are (tensor, rows) of `parts`, all cut to `cols`."""
        if parts[0][0] in self.checkpoint.quantized:
            return self._tiled_codes(parts, cols)
        first = self._read(*parts[0], cols, dtype)
        counts = [_count(rows) for _, rows in parts]
        tiled = TiledWeight.empty(counts, first.shape[1], first.dtype, self._memory)
        for i, (name, rows) in enumerate(parts):
            tiled.fill(i, first if i == 0 else self._read(name, rows, cols, dtype), self.run)
        return tiled

    def _packed(self, name: str, rows, cols) -> Packed:
        """Rows and columns of a quantized matrix."""
        packed = self.checkpoint.packed(name, rows, cols)
        if self.progress:
            blocks = packed.block_scales
            self.progress(name, packed.codes.numel() + (0 if blocks is None else blocks.numel()))
        place = self.device.place
        blocks = None if packed.block_scales is None else packed.block_scales.to(place)
        return Packed(packed.codes.to(place), blocks, packed.scale)

    def _tiled_codes(self, parts: list[tuple[str, object]], cols) -> TiledWeight:
        """The same of quantized matrices of one format; every segment has its tensor's scale."""
        first = self._packed(*parts[0], cols)
        counts = [_count(rows) for _, rows in parts]
        tiled = TiledWeight.empty(counts, first.shape[1], _CODES[first.format], self._memory)
        for i, (name, rows) in enumerate(parts):
            codes, blocks, scale = first if i == 0 else self._packed(name, rows, cols)
            tiled.fill(i, codes, self.run, block_scales=blocks, scale=scale, check=False)
        return tiled

    def _experts(self, at: str, matrix: str, rows: int, cols: int, count: int) -> ExpertWeights:
        """The first `count` experts' matrices of a layer, cut to `rows` and `cols`."""
        kind = self.checkpoint.formats.get(f"{at}experts.0.{matrix}.weight")
        dtype = self.dtype if kind is None else _CODES[kind]
        out = ExpertWeights.empty(count, rows, cols, dtype, self._memory)
        for e in range(count):
            name = f"{at}experts.{e}.{matrix}.weight"
            if kind is None:
                out.fill(e, self._read(name, slice(0, rows), slice(0, cols)), self.run)
                continue
            codes, blocks, scale = self._packed(name, slice(0, rows), slice(0, cols))
            out.fill(e, codes, self.run, block_scales=blocks, scale=scale, check=False)
        return out

    def _norm(self, layer: int) -> torch.Tensor:
        return self._read(f"backbone.layers.{layer}.norm.weight", slice(0, self.D))

    def _mamba(self, layer: int) -> MambaWeights:
        c, at = self.config, f"backbone.layers.{layer}.mixer."
        axes = {tensor.name: tensor.axes for tensor in layer_tensors(c, MAMBA)}
        heads = rank_major(c.mamba_num_heads, self.served.mamba_num_heads[layer], c.n_groups)
        rows = places(axes["in_proj.weight"][0], heads)  # z | x | B | C | dt
        conv_rows = joined(places(axes["conv1d.weight"][0], heads))
        inner = rows[0]  # gate, norm and output have the channels of the heads, in their order
        per_head = {
            n: self._read(at + n, heads, dtype=torch.float32) for n in ("A_log", "D", "dt_bias")
        }
        conv = self._read(at + "conv1d.weight", conv_rows, dtype=torch.float32)
        return MambaWeights(
            norm=self._norm(layer),
            in_proj=self._tiled([(at + "in_proj.weight", part) for part in rows], slice(0, self.D)),
            conv_weight=conv.reshape(len(conv_rows), -1),
            conv_bias=self._read(at + "conv1d.bias", conv_rows, dtype=torch.float32),
            gated_norm=self._read(at + "norm.weight", inner),
            out_proj=self._tiled([(at + "out_proj.weight", slice(0, self.D))], inner),
            **per_head,
        )

    def _attention(self, layer: int) -> AttentionWeights:
        c, at = self.config, f"backbone.layers.{layer}.mixer."
        kv, size = c.num_key_value_heads, c.head_dim
        heads = rank_major(c.num_attention_heads, self.served.num_attention_heads[layer], kv)
        q_rows, kv_rows = channels(heads, size), slice(0, kv * size)
        parts = [
            (at + "q_proj.weight", q_rows),
            (at + "k_proj.weight", kv_rows),
            (at + "v_proj.weight", kv_rows),
        ]
        return AttentionWeights(
            norm=self._norm(layer),
            qkv=self._tiled(parts, slice(0, self.D)),
            o_proj=self._tiled([(at + "o_proj.weight", slice(0, self.D))], q_rows),
            k_scale=self.checkpoint.kv_factor(layer, "k") or 1.0,
            v_scale=self.checkpoint.kv_factor(layer, "v") or 1.0,
        )

    def _up_down(self, at: str, width: int) -> tuple[TiledWeight, TiledWeight]:
        up = self._tiled([(at + "up_proj.weight", slice(0, width))], slice(0, self.D))
        down = self._tiled([(at + "down_proj.weight", slice(0, self.D))], slice(0, width))
        return up, down

    def _mlp(self, layer: int) -> MlpWeights:
        at, width = f"backbone.layers.{layer}.mixer.", self.served.intermediate_size[layer]
        return MlpWeights(self._norm(layer), *self._up_down(at, width))

    def _moe(self, layer: int) -> MoeWeights:
        at, served = f"backbone.layers.{layer}.mixer.", self.served
        E, F = served.n_routed_experts[layer], served.moe_intermediate_size[layer]
        up = self._experts(at, "up_proj", F, self.D, E)
        down = self._experts(at, "down_proj", self.D, F, E)
        gate = [(at + "gate.weight", slice(0, E))]
        shared = served.moe_shared_expert_intermediate_size[layer]
        shared_up, shared_down = self._up_down(at + "shared_experts.", shared)
        bias = at + "gate.e_score_correction_bias"
        return MoeWeights(
            norm=self._norm(layer),
            gate=self._tiled(gate, slice(0, self.D), torch.float32),
            correction_bias=self._read(bias, slice(0, E), dtype=torch.float32),
            up=up,
            down=down,
            shared_up=shared_up,
            shared_down=shared_down,
        )


def _count(rows) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def activation_dtype(checkpoint: Checkpoint, dtype: str | torch.dtype) -> torch.dtype:
    """The dtype the model runs in: "auto" takes the stored dtype of the embedding (float16, which
    the kernels do not take, becomes float32).

    Raises:
        ValueError: anything but auto, float32 and bfloat16.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if isinstance(dtype, str) and dtype == "auto":
        stored = checkpoint.dtype_of(EMBEDDING)
        return torch.bfloat16 if stored == torch.bfloat16 else torch.float32
    if isinstance(dtype, torch.dtype) and dtype in known.values():
        return dtype
    if isinstance(dtype, str) and dtype in known:
        return known[dtype]
    raise ValueError(f"engine: dtype must be auto, float32 or bfloat16, got {shown(dtype)}")
