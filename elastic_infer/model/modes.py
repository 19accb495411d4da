"""Width tables: for every layer, the active sizes of every mode, as the ops read them.

A *mode* is what a row carries: width index * 2 + (1 if the sequence tracks). A tracked row updates
the convolution and state of all served Mamba heads, whatever its width.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields

import torch

from ..checkpoint.config import ATTENTION, MAMBA, MOE, ModelConfig
from ..checkpoint.geometry import STATE_HEADS, Axis, Sizes, layer_sizes, projection, size_of
from ..checkpoint.widths import Width


def _column(values: list[int]) -> torch.Tensor:
    """One size per width, repeated for its two modes: [modes] int32."""
    return torch.tensor([v for v in values for _ in range(2)], dtype=torch.int32)


@dataclass
class LayerSizes:
    """Sizes of one layer by mode; which are set depends on the layer's kind.

    Attributes:
        rows: [modes, segments] rows of the first projection.
        inner: channels between the projections (Mamba heads * P, query heads * K, or FFN width).
        heads: Mamba heads that are used.
        state_heads: Mamba heads whose state is updated.
        conv: x channels of `state_heads`.
        q_heads: query heads.
        experts: number of experts.
        expert: width of an expert.
    """

    rows: torch.Tensor | None = None
    inner: torch.Tensor | None = None
    heads: torch.Tensor | None = None
    state_heads: torch.Tensor | None = None
    conv: torch.Tensor | None = None
    q_heads: torch.Tensor | None = None
    experts: torch.Tensor | None = None
    expert: torch.Tensor | None = None

    def to(self, place: torch.device) -> LayerSizes:
        """The same on another device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return LayerSizes(**{n: None if t is None else t.to(place) for n, t in values.items()})


class WidthTables:
    """Tables of all widths that are served.

    Args:
        widths: in the order of their indices.
        served: axis-wise maximum of them, or more.
        place: the torch device of the tables.
    """

    def __init__(
        self,
        config: ModelConfig,
        widths: Seq[Width],
        served: Width,
        place: torch.device | None = None,
    ):
        place = place or torch.device("cpu")
        self.index = {w.name: i for i, w in enumerate(widths)}
        self.hidden = _column([w.hidden_size for w in widths]).to(place)
        self.hidden_rows = self.hidden[:, None].contiguous()
        self.vocabulary = torch.full_like(self.hidden_rows, config.vocab_size)
        modes = [layer_sizes(w, tracked) for w in widths for tracked in (None, served)]
        axes = {kind: projection(config, kind) for kind in set(config.layers)}
        self.layers = [
            _layer(kind, *axes[kind], sizes, config.mamba_head_dim).to(place)
            for kind, *sizes in zip(config.layers, *modes)
        ]

    def mode(self, width: str, track: bool) -> int:
        """The number a row of this width carries."""
        return 2 * self.index[width] + bool(track)


def _layer(kind: str, segments: Axis, inner: Axis, modes: Seq[Sizes], head_dim: int) -> LayerSizes:
    """The table of one layer from its sizes in every mode."""

    def column(axis: Axis) -> torch.Tensor:
        return torch.tensor([size_of(axis, sizes) for sizes in modes], dtype=torch.int32)

    def units(key: str) -> torch.Tensor:
        return torch.tensor([sizes[key] for sizes in modes], dtype=torch.int32)

    rows = torch.stack([column((part,)) for part in segments], 1).contiguous()
    out = LayerSizes(rows=rows, inner=column(inner))
    if kind == MAMBA:
        out.heads, out.state_heads = units("mamba_num_heads"), units(STATE_HEADS)
        out.conv = out.state_heads * head_dim
    elif kind == ATTENTION:
        out.q_heads = units("num_attention_heads")
    elif kind == MOE:
        out.experts, out.expert = units("n_routed_experts"), units("moe_intermediate_size")
    return out
