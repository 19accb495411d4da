"""Weights in memory: every matmul weight once, as 64x64 tiles; heads in rank-major order.

Rank-major: Mamba head ``i * G + g`` here is the i-th head of group g in the checkpoint, and query
head ``i * Hkv + h`` the i-th of KV head h, so that the heads of every width are a flat prefix.
Only the served width's part is read from the checkpoint. Quantized matrices are kept as codes:
no dequantized copy is made. A permutation of heads moves whole blocks of 16 columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch

from ..checkpoint.widths import Width
from ..ops.tiles import ExpertWeights, TiledWeight


def rank_major(total: int, kept: int, groups: int) -> list[int]:
    """Checkpoint indices of the kept heads in rank-major order: the best head of every group, then
    the second best of every group, and so on. total, kept: heads, multiples of groups."""
    per_group = total // groups
    return [g * per_group + i for i in range(kept // groups) for g in range(groups)]


@dataclass
class MambaWeights:
    """One Mamba layer. in_proj has the segments z | x | B | C | dt."""

    norm: torch.Tensor  # [D]
    in_proj: TiledWeight
    conv_weight: torch.Tensor  # [C, 4] float32
    conv_bias: torch.Tensor  # [C] float32
    A_log: torch.Tensor  # [H] float32
    D: torch.Tensor  # [H] float32
    dt_bias: torch.Tensor  # [H] float32
    gated_norm: torch.Tensor  # [H * P]
    out_proj: TiledWeight


@dataclass
class AttentionWeights:
    """One attention layer. qkv has the segments q | k | v. k_scale, v_scale: what a checkpoint says
    that the codes of an 8-bit KV cache are multiplied by."""

    norm: torch.Tensor
    qkv: TiledWeight
    o_proj: TiledWeight
    k_scale: float = 1.0
    v_scale: float = 1.0


@dataclass
class MlpWeights:
    """One plain MLP layer: down(relu(up x)^2)."""

    norm: torch.Tensor
    up: TiledWeight
    down: TiledWeight


@dataclass
class MoeWeights:
    """One mixture-of-experts layer with its shared expert; the router is float32."""

    norm: torch.Tensor
    gate: TiledWeight
    correction_bias: torch.Tensor  # [E] float32
    up: ExpertWeights
    down: ExpertWeights
    shared_up: TiledWeight
    shared_down: TiledWeight


LayerWeights = MambaWeights | AttentionWeights | MlpWeights | MoeWeights


@dataclass
class Weights:
    """All weights of the served width.

    Attributes:
        formats: {checkpoint name: "nvfp4" or "fp8"} of the matrices that are quantized.
    """

    embedding: torch.Tensor  # [V, D] row-major
    layers: list[LayerWeights]
    final_norm: torch.Tensor
    head: TiledWeight
    served: Width
    dtype: torch.dtype
    formats: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights in memory; a tied head counts as the copy that it is."""
        return sum(_nbytes(getattr(self, f.name)) for f in fields(self))


def _nbytes(value) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (TiledWeight, ExpertWeights)):
        return _nbytes(value.image) + _nbytes(value.scale)
    if isinstance(value, list):
        return sum(_nbytes(v) for v in value)
    if isinstance(value, LayerWeights):
        return sum(_nbytes(getattr(value, f.name)) for f in fields(value))
    return 0
