"""What lies between the two projections of a Mamba layer, for all rows of a pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..ops.causal_conv import causal_conv
from ..ops.gated_norm import gated_norm
from ..ops.mamba_step import mamba_step
from ..ops.ssm_scan import ssm_scan
from ..ops.ssm_step import ssm_step

if TYPE_CHECKING:
    from .model import Model, Shape


def mix_steps(model: Model, run, B: int, layer: int, state: int, projected: torch.Tensor) -> None:
    """One token of each of B sequences.

    model: whose buffers, tables and weights are used. run: a Pool or a Step. layer, state: the
    layer's number, and among the Mamba layers. projected: [B, z | xBC | dt], in_proj's output; what
    out_proj reads goes to ``model.buffers.inner``.
    """
    b, c, w, batch = model.buffers, model.config, model.weights.layers[layer], model.batch
    t, ssm, inner = model.tables.layers[layer], model.cache.ssm[state], w.gated_norm.shape[0]
    H = w.A_log.shape[0]
    z, xbc, dt = projected.split([inner, projected.shape[1] - inner - H, H], 1)
    mamba_step(
        z, xbc, dt, w.conv_weight, w.conv_bias, model.cache.conv[state], w.A_log, w.D,
        w.dt_bias, ssm, w.gated_norm, b.inner[:B, :inner], b.arrivals[:B],
        slots=batch.slots[:B], eps=c.layer_norm_epsilon, seq_width=batch.seq_mode[:B],
        h_sizes=t.state_heads, out_sizes=t.heads, context=batch.context[:B], seed=layer,
        run=run,
    )  # fmt: skip


def mix_tokens(
    model: Model, run, shape: Shape, layer: int, state: int, projected: torch.Tensor
) -> None:
    """As `mix_steps`, for a pass of this shape in which some sequences read several tokens; its
    steps have the same bits."""
    b, c, w, batch = model.buffers, model.config, model.weights.layers[layer], model.batch
    t, R, B, S = model.tables.layers[layer], shape.rows, shape.steps, shape.segments
    modes, H = batch.row_mode[:R], w.A_log.shape[0]
    inner, bc = H * c.mamba_head_dim, c.n_groups * c.ssm_state_size
    z, xbc, dt = projected.split([inner, inner + 2 * bc, H], 1)
    ssm, conv_state = model.cache.ssm[state], model.cache.conv[state]
    conv = b.conv[:R, : inner + 2 * bc]
    causal_conv(
        xbc, w.conv_weight, w.conv_bias, conv_state, conv, cu_seqlens=batch.cu_seqlens[: S + 1],
        slots=batch.slots[:S], x_channels=inner, seq_width=batch.seq_mode[:S], x_sizes=t.conv,
        run=run,
    )  # fmt: skip
    x, B_in, C_in = conv.split([inner, bc, bc], 1)
    y = b.scanned[:R, :inner]
    heads = (w.A_log, w.D, w.dt_bias, ssm)
    if B:
        ssm_step(x[:B], B_in[:B], C_in[:B], dt[:B], *heads, y[:B], slots=batch.slots[:B],
                 seq_width=batch.seq_mode[:B], h_sizes=t.state_heads, context=batch.context[:B],
                 seed=layer, run=run)  # fmt: skip
    if S > B:
        ssm_scan(
            x[B:], B_in[B:], C_in[B:], dt[B:], *heads, y[B:],
            cu_seqlens=batch.cu_prefill[: S - B + 1], slots=batch.slots[B:S],
            seq_width=batch.seq_mode[B:S], h_sizes=t.state_heads, context=batch.context[B:S],
            seed=layer, run=run,
        )  # fmt: skip
    gated_norm(
        y, z, w.gated_norm, b.inner[:R, :inner], groups=c.n_groups, head_dim=c.mamba_head_dim,
        eps=c.layer_norm_epsilon, row_width=modes, h_sizes=t.heads, run=run,
    )  # fmt: skip
