"""Memory that passes reuse: activations, and the small tables that say what a pass consists of."""

from __future__ import annotations

import torch

from .cache import PAGE
from .config import ModelConfig, Width
from .memory import lazy_zeros
from .ops.moe_matmul import moe_workspace_bytes
from .weights import activation_columns

LOGIT_ROWS = 256  # logits are computed for at most this many rows at a time


class Buffers:
    """Buffers for passes of up to `rows` tokens of up to `segments` sequences.

    Activations hold whatever the last pass left; every op writes before another reads. Tables are
    int32 and filled by the host before a pass.
    """

    def __init__(
        self,
        config: ModelConfig,
        served: Width,
        dtype: torch.dtype,
        rows: int,
        segments: int,
        max_length: int,
    ):
        D = served.hidden_size
        widest = activation_columns(config, served)
        inner = config.mamba_head_dim * max(served.mamba_num_heads, default=0)
        conv = inner + 2 * config.n_groups * config.ssm_state_size
        heads = config.head_dim * max(served.num_attention_heads, default=0)
        J = config.num_experts_per_tok

        def activation(columns: int) -> torch.Tensor:
            return lazy_zeros(rows, columns, dtype=dtype)

        def table(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.int32)

        self.residual, self.normed, self.delta = (activation(D) for _ in range(3))
        self.shared, self.projected = activation(D), activation(widest)
        self.inner = activation(max(inner, heads, 16))
        self.conv, self.scanned = activation(conv), activation(inner)
        self.expert_ids = table(rows, J)
        self.expert_weights = torch.zeros(rows, J)
        self.workspace = lazy_zeros(_workspace(config, served, rows, dtype), dtype=torch.uint8)
        self.gathered = lazy_zeros(LOGIT_ROWS, D, dtype=dtype)
        self.logits = lazy_zeros(LOGIT_ROWS, config.vocab_size)

        self.ids, self.row_mode, self.slot_mapping = table(rows), table(rows), table(rows)
        self.seq_mode, self.slots = table(segments), table(segments)
        self.cu_seqlens, self.cu_prefill = table(segments + 1), table(segments + 1)
        self.lengths, self.context = table(segments), table(segments)
        self.page_table = table(segments, -(-max_length // PAGE))
        self.logit_rows, self.logit_mode = table(LOGIT_ROWS), table(LOGIT_ROWS)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in vars(self).values())


def _workspace(config: ModelConfig, served: Width, rows: int, dtype: torch.dtype) -> int:
    sizes = [
        moe_workspace_bytes(
            rows, config.num_experts_per_tok, served.n_routed_experts[layer], served.hidden_size,
            served.moe_intermediate_size[layer], dtype,
        )
        for layer in config.layers_of("E")
    ]  # fmt: skip
    return max(sizes, default=16)
