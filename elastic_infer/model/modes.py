"""Width tables: for every layer, the active sizes of every mode, as the ops read them.

A *mode* is what a row carries: width index * 2 + (1 if the sequence tracks). A tracked row updates
the convolution and state of all served Mamba heads, whatever its width.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields

import torch

from ..checkpoint.config import ModelConfig
from ..checkpoint.widths import Width


def _column(values: list[int]) -> torch.Tensor:
    """One size per width, repeated for its two modes: [modes] int32."""
    return torch.tensor([v for v in values for _ in range(2)], dtype=torch.int32)


def _stack(*columns: torch.Tensor) -> torch.Tensor:
    """[modes, segments] int32."""
    return torch.stack(columns, 1).contiguous()


@dataclass
class LayerSizes:
    """Sizes of one layer by mode; which are set depends on the layer's kind.

    rows: [modes, segments] rows of the first projection. inner: channels between the projections
    (Mamba heads * P, query heads * K, or FFN width). heads: Mamba heads that are used, state_heads
    those whose state is updated, conv the x channels of these; q_heads query heads; experts, and
    expert their width.
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

    widths: in the order of their indices. served: axis-wise maximum of them, or more. place: the
    torch device of the tables.
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
        make = {"M": self._mamba, "*": self._attention, "-": self._mlp, "E": self._moe}
        self.layers = [
            make[kind](config, widths, served, layer).to(place)
            for layer, kind in enumerate(config.layers)
        ]

    def mode(self, width: str, track: bool) -> int:
        """The number a row of this width carries."""
        return 2 * self.index[width] + bool(track)

    @staticmethod
    def _mamba(config: ModelConfig, widths: Seq[Width], served: Width, layer: int) -> LayerSizes:
        P, bc = config.mamba_head_dim, config.n_groups * config.ssm_state_size
        heads = _column([w.mamba_num_heads[layer] for w in widths])
        state = heads.clone()
        state[1::2] = served.mamba_num_heads[layer]
        whole = torch.full_like(heads, bc)
        rows = _stack(heads * P, state * P, whole, whole, state)
        return LayerSizes(
            rows=rows, inner=heads * P, heads=heads, state_heads=state, conv=state * P
        )

    @staticmethod
    def _attention(config: ModelConfig, widths: Seq[Width], served: Width, layer: int):
        q = _column([w.num_attention_heads[layer] for w in widths])
        kv = torch.full_like(q, config.num_key_value_heads * config.head_dim)
        inner = q * config.head_dim
        return LayerSizes(rows=_stack(inner, kv, kv), inner=inner, q_heads=q)

    @staticmethod
    def _mlp(config: ModelConfig, widths: Seq[Width], served: Width, layer: int) -> LayerSizes:
        inner = _column([w.intermediate_size[layer] for w in widths])
        return LayerSizes(rows=inner[:, None].contiguous(), inner=inner)

    @staticmethod
    def _moe(config: ModelConfig, widths: Seq[Width], served: Width, layer: int) -> LayerSizes:
        shared = _column([w.moe_shared_expert_intermediate_size[layer] for w in widths])
        return LayerSizes(
            rows=shared[:, None].contiguous(),
            inner=shared,
            experts=_column([w.n_routed_experts[layer] for w in widths]),
            expert=_column([w.moe_intermediate_size[layer] for w in widths]),
        )
