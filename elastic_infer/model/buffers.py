"""Memory that passes reuse: activations, and the small tables that describe a pass."""

from __future__ import annotations

import torch

from ..cache.pages import pages_for
from ..checkpoint.config import ModelConfig
from ..checkpoint.geometry import layer_sizes, projection, size_of
from ..checkpoint.widths import Width
from ..device.device import CPU, Device
from ..device.shared import Shared, Sizes
from ..ops.moe_matmul import moe_workspace_bytes
from .draw import draw_tables

LOGIT_ROWS = 256  # whose logits are computed at a time, where no pass has more sequences


def logit_rows(segments: int) -> int:
    """Rows whose logits are computed at a time: at least one of each of `segments` sequences."""
    return max(LOGIT_ROWS, segments)


class Buffers:
    """Activations of passes of up to `rows` tokens of up to `segments` sequences: every op writes
    before another reads.

    Args:
        config: sizes of the checkpoint.
        served: the served width.
        dtype: of activations.
        device: where they are.
    """

    def __init__(
        self,
        config: ModelConfig,
        served: Width,
        dtype: torch.dtype,
        rows: int,
        segments: int,
        device: Device = CPU,
    ):
        D, zeros = served.hidden_size, device.zeros
        widest = activation_columns(config, served)
        inner = config.mamba_head_dim * max(served.mamba_num_heads)
        # Sizes of a kind of layer that the model lacks count as absent.
        has = {kind: kind in config.layers for kind in "ME"}
        conv = config.conv_dim(max(served.mamba_num_heads)) * has["M"]
        heads = config.head_dim * max(served.num_attention_heads, default=0)
        J = config.num_experts_per_tok * has["E"]

        def activation(columns: int) -> torch.Tensor:
            return zeros(rows, columns, dtype=dtype)

        self.residual, self.normed, self.delta = (activation(D) for _ in range(3))
        self.shared, self.projected = activation(D), activation(widest)
        self.inner = activation(max(inner, heads, 16))
        self.conv, self.scanned = activation(conv), activation(inner)
        # Counters that mamba_step leaves zero: the passes of a model come one after another.
        self.arrivals = zeros(rows, config.n_groups * has["M"], dtype=torch.int32)
        self.expert_ids = zeros(rows, J, dtype=torch.int32)
        self.expert_weights = zeros(rows, J)
        self.workspace = zeros(_workspace(config, served, rows, dtype), dtype=torch.uint8)
        head = logit_rows(segments)
        self.gathered = zeros(head, D, dtype=dtype)
        self.logits = zeros(head, config.vocab_size)
        self.drawn = zeros(head, dtype=torch.int32)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in vars(self).values())


def batch_tables(rows: int, segments: int, max_length: int) -> Sizes:
    """Names and sizes of the tables of a pass of up to `rows` tokens of up to `segments` sequences
    of up to `max_length` tokens. The page table, the largest by far, comes last: it is copied to a
    device only when it changes."""
    return {
        **draw_tables(segments),
        "feed": (segments,),
        "ids": (rows,),
        "row_mode": (rows,),
        "slot_mapping": (rows,),
        "seq_mode": (segments,),
        "slots": (segments,),
        "lengths": (segments,),
        "context": (segments,),
        "cu_seqlens": (segments + 1,),
        "cu_prefill": (segments + 1,),
        "logit_rows": (logit_rows(segments),),
        "logit_mode": (logit_rows(segments),),
        "page_table": (segments, pages_for(max_length)),
    }


def working_bytes(
    config: ModelConfig, served: Width, dtype: torch.dtype, rows: int, segments: int, length: int
) -> int:
    """Bytes that passes of `rows` tokens of `segments` sequences of up to `length` tokens need
    beside weights and cache."""
    with torch.device("meta"):  # sizes only, no memory
        activations = Buffers(config, served, dtype, rows, segments).nbytes
    return activations + Shared.nbytes(batch_tables(rows, segments, length))


def _workspace(config: ModelConfig, served: Width, rows: int, dtype: torch.dtype) -> int:
    sizes = [
        moe_workspace_bytes(
            rows,
            config.num_experts_per_tok,
            served.n_routed_experts[layer],
            served.hidden_size,
            served.moe_intermediate_size[layer],
            dtype,
        )
        for layer in config.layers_of("E")
    ]
    return max(sizes, default=16)


def activation_columns(config: ModelConfig, served: Width) -> int:
    """Widest projection output that a pass needs room for, in elements per row."""
    segments = {kind: projection(config, kind)[0] for kind in set(config.layers)}
    return max(
        size_of(segments[kind], sizes) for kind, sizes in zip(config.layers, layer_sizes(served))
    )
