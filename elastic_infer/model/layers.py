"""The layers of a pass, as functions that run or record its ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import _C
from ..cache.cache import Cache
from ..cache.dtypes import FP8
from ..checkpoint.config import ATTENTION, MAMBA, MLP, ModelConfig
from ..device.shared import Shared
from ..ops.attention_decode import attention_decode
from ..ops.attention_prefill import attention_prefill
from ..ops.causal_conv import causal_conv
from ..ops.embed import embed
from ..ops.gated_norm import gated_norm
from ..ops.kv_append import kv_append
from ..ops.mamba_step import mamba_step
from ..ops.matmul import matmul
from ..ops.moe_matmul import moe_matmul
from ..ops.moe_route import moe_route
from ..ops.rms_norm import rms_norm
from ..ops.ssm_scan import ssm_scan
from ..ops.ssm_step import ssm_step
from ..ops.tiles import NVFP4, ExpertWeights, TiledWeight
from .batch import Shape
from .buffers import Buffers
from .modes import WidthTables
from .weights import Weights


@dataclass(frozen=True)
class Pass:
    """Everything that the ops of one pass read and write.

    Attributes:
        run: the Pool that runs them at once, or the Step that records them.
        batch: the tables of the pass.
        fed: tokens come from those that the last pass drew, where the table `feed` says so.
        activation_quantization: form of activations in products with NVFP4 weights.
    """

    run: _C.Pool | _C.Step
    shape: Shape
    config: ModelConfig
    weights: Weights
    cache: Cache
    modes: WidthTables
    buffers: Buffers
    batch: Shared
    fed: bool
    activation_quantization: str


def run_layers(p: Pass) -> None:
    """Embedding, all layers and the final norm; the normed rows are left in `buffers.normed`."""
    b, w, R = p.buffers, p.weights, p.shape.rows
    fed = {"drawn": b.drawn, "feed": p.batch.feed[:R]} if p.fed else {}
    embed(
        p.batch.ids[:R],
        w.embedding,
        b.residual[:R],
        row_width=p.batch.row_mode[:R],
        sizes=p.modes.hidden,
        run=p.run,
        **fed,
    )
    delta, kv, state = None, 0, 0
    for i, kind in enumerate(p.config.layers):
        norm(p, w.layers[i].norm, delta)
        if kind == MAMBA:
            mamba(p, i, state)
            state += 1
        elif kind == ATTENTION:
            attention(p, i, kv)
            kv += 1
        elif kind == MLP:
            ffn(p, w.layers[i].up, w.layers[i].down, i, b.delta)
        else:
            moe(p, i)
        delta = b.delta[:R]
    norm(p, w.final_norm, delta)


def head(p: Pass, rows: torch.Tensor, modes: torch.Tensor) -> None:
    """Logits of `rows` [n, D], whose modes are `modes` [n], into `buffers.logits`."""
    product(
        p,
        rows,
        p.weights.head,
        p.buffers.logits[: rows.shape[0]],
        row_width=modes,
        k_sizes=p.modes.hidden,
        n_sizes=p.modes.vocabulary,
    )


def quantization(p: Pass, weight: TiledWeight | ExpertWeights) -> str:
    """Format of the activations that meet a weight."""
    return p.activation_quantization if weight.dtype == NVFP4 else "none"


def product(p: Pass, x: torch.Tensor, weight: TiledWeight, out: torch.Tensor, **sizes) -> None:
    """out = x weight^T, each row at the sizes of its mode."""
    quantized = quantization(p, weight)
    matmul(x, weight, out, activation_quantization=quantized, run=p.run, **sizes)


def norm(p: Pass, weight: torch.Tensor, delta: torch.Tensor | None) -> None:
    """Adds `delta` to the residual, and leaves its norm in `buffers.normed`."""
    b, R = p.buffers, p.shape.rows
    rms_norm(
        b.residual[:R],
        weight,
        b.normed[:R],
        eps=p.config.layer_norm_epsilon,
        delta=delta,
        row_width=p.batch.row_mode[:R],
        sizes=p.modes.hidden,
        run=p.run,
    )


def project(
    p: Pass, weight: TiledWeight, layer: int, out: torch.Tensor, activation: str = "none"
) -> None:
    """First projection of a layer: from the normed rows to the layer's own channels."""
    R = p.shape.rows
    product(
        p,
        p.buffers.normed[:R],
        weight,
        out,
        activation=activation,
        row_width=p.batch.row_mode[:R],
        k_sizes=p.modes.hidden,
        n_sizes=p.modes.layers[layer].rows,
    )


def project_back(
    p: Pass, x: torch.Tensor, weight: TiledWeight, layer: int, out: torch.Tensor
) -> None:
    """Last projection of a layer: from its channels to the hidden ones."""
    R = p.shape.rows
    product(
        p,
        x,
        weight,
        out[:R],
        row_width=p.batch.row_mode[:R],
        k_sizes=p.modes.layers[layer].inner,
        n_sizes=p.modes.hidden_rows,
    )


def mamba(p: Pass, layer: int, state: int) -> None:
    """A Mamba layer; `state` is its number among the Mamba layers."""
    b, c, w = p.buffers, p.config, p.weights.layers[layer]
    R, H = p.shape.rows, w.A_log.shape[0]
    inner, bc = H * c.mamba_head_dim, c.n_groups * c.ssm_state_size
    projected = b.projected[:R, : 2 * inner + 2 * bc + H]
    project(p, w.in_proj, layer, projected)
    mix = mix_steps if p.shape.steps == R else mix_tokens
    mix(p, layer, state, projected)
    project_back(p, b.inner[:R, :inner], w.out_proj, layer, b.delta)


def mix_steps(p: Pass, layer: int, state: int, projected: torch.Tensor) -> None:
    """Convolution, recurrence and gated norm, for one token of every sequence.

    Args:
        projected: [B, z | xBC | dt], in_proj's output; out_proj's input goes to `buffers.inner`.
    """
    b, w, batch, B = p.buffers, p.weights.layers[layer], p.batch, p.shape.steps
    t, H, inner = p.modes.layers[layer], w.A_log.shape[0], w.gated_norm.shape[0]
    z, xbc, dt = projected.split([inner, projected.shape[1] - inner - H, H], 1)
    mamba_step(
        z,
        xbc,
        dt,
        w.conv_weight,
        w.conv_bias,
        p.cache.conv[state],
        w.A_log,
        w.D,
        w.dt_bias,
        p.cache.ssm[state],
        w.gated_norm,
        b.inner[:B, :inner],
        b.arrivals[:B],
        slots=batch.slots[:B],
        eps=p.config.layer_norm_epsilon,
        seq_width=batch.seq_mode[:B],
        h_sizes=t.state_heads,
        out_sizes=t.heads,
        context=batch.context[:B],
        seed=layer,
        run=p.run,
    )


def mix_tokens(p: Pass, layer: int, state: int, projected: torch.Tensor) -> None:
    """As `mix_steps`, for a pass in which some sequences read several tokens; its steps have the
    same bits."""
    b, c, w, batch, run = p.buffers, p.config, p.weights.layers[layer], p.batch, p.run
    t, R, B, S = p.modes.layers[layer], p.shape.rows, p.shape.steps, p.shape.segments
    H = w.A_log.shape[0]
    inner, bc = H * c.mamba_head_dim, c.n_groups * c.ssm_state_size
    z, xbc, dt = projected.split([inner, inner + 2 * bc, H], 1)
    conv = b.conv[:R, : inner + 2 * bc]
    causal_conv(
        xbc,
        w.conv_weight,
        w.conv_bias,
        p.cache.conv[state],
        conv,
        cu_seqlens=batch.cu_seqlens[: S + 1],
        slots=batch.slots[:S],
        x_channels=inner,
        seq_width=batch.seq_mode[:S],
        x_sizes=t.conv,
        run=run,
    )
    x, B_in, C_in = conv.split([inner, bc, bc], 1)
    y = b.scanned[:R, :inner]
    heads = (w.A_log, w.D, w.dt_bias, p.cache.ssm[state])
    if B:
        ssm_step(
            x[:B],
            B_in[:B],
            C_in[:B],
            dt[:B],
            *heads,
            y[:B],
            slots=batch.slots[:B],
            seq_width=batch.seq_mode[:B],
            h_sizes=t.state_heads,
            context=batch.context[:B],
            seed=layer,
            run=run,
        )
    if S > B:
        ssm_scan(
            x[B:],
            B_in[B:],
            C_in[B:],
            dt[B:],
            *heads,
            y[B:],
            cu_seqlens=batch.cu_prefill[: S - B + 1],
            slots=batch.slots[B:S],
            seq_width=batch.seq_mode[B:S],
            h_sizes=t.state_heads,
            context=batch.context[B:S],
            seed=layer,
            run=run,
        )
    gated_norm(
        y,
        z,
        w.gated_norm,
        b.inner[:R, :inner],
        groups=c.n_groups,
        head_dim=c.mamba_head_dim,
        eps=c.layer_norm_epsilon,
        row_width=batch.row_mode[:R],
        h_sizes=t.heads,
        run=run,
    )


def attention(p: Pass, layer: int, kv: int) -> None:
    """An attention layer; `kv` is its number among the attention layers."""
    b, w, batch = p.buffers, p.weights.layers[layer], p.batch
    R, B, S = p.shape.rows, p.shape.steps, p.shape.segments
    q_width, kv_width = (w.qkv.segments[i].rows for i in (0, 1))
    projected = b.projected[:R, : q_width + 2 * kv_width]
    project(p, w.qkv, layer, projected)
    q, k, v = projected.split([q_width, kv_width, kv_width], 1)
    pages = (p.cache.k[kv], p.cache.v[kv])
    coded = pages[0].dtype == FP8
    scales = {"k_scale": w.k_scale, "v_scale": w.v_scale} if coded else {}
    kv_append(k, v, *pages, slot_mapping=batch.slot_mapping[:R], run=p.run, **scales)
    out, q_sizes = b.inner[:R, :q_width], p.modes.layers[layer].q_heads
    shared = {"scale": p.config.head_dim**-0.5, "q_sizes": q_sizes, "run": p.run, **scales}
    if B:
        attention_decode(
            q[:B],
            *pages,
            out[:B],
            page_table=batch.page_table[:B],
            lengths=batch.lengths[:B],
            seq_width=batch.seq_mode[:B],
            **shared,
        )
    if S > B:
        attention_prefill(
            q[B:],
            *pages,
            out[B:],
            page_table=batch.page_table[B:S],
            cu_seqlens=batch.cu_prefill[: S - B + 1],
            context=batch.context[B:S],
            seq_width=batch.seq_mode[B:S],
            **shared,
        )
    project_back(p, out, w.o_proj, layer, b.delta)


def ffn(p: Pass, up: TiledWeight, down: TiledWeight, layer: int, out: torch.Tensor) -> None:
    """out = down(relu(up normed)^2): a dense layer, or the shared expert."""
    middle = p.buffers.projected[: p.shape.rows, : up.rows]
    project(p, up, layer, middle, activation="relu2")
    project_back(p, middle, down, layer, out)


def moe(p: Pass, layer: int) -> None:
    """A mixture of experts: the router, the shared expert, the chosen ones."""
    b, w, R = p.buffers, p.weights.layers[layer], p.shape.rows
    t, modes, hidden = p.modes.layers[layer], p.batch.row_mode[:R], p.modes.hidden
    ids, weights = b.expert_ids[:R], b.expert_weights[:R]
    moe_route(
        b.normed[:R],
        w.gate,
        w.correction_bias,
        ids,
        weights,
        scaling_factor=p.config.routed_scaling_factor,
        row_width=modes,
        k_sizes=hidden,
        e_sizes=t.experts,
        run=p.run,
    )
    ffn(p, w.shared_up, w.shared_down, layer, b.shared)
    moe_matmul(
        b.normed[:R],
        w.up,
        w.down,
        ids,
        weights,
        b.delta[:R],
        shared=b.shared[:R],
        workspace=b.workspace,
        row_width=modes,
        k_sizes=hidden,
        f_sizes=t.expert,
        activation_quantization=quantization(p, w.up),
        run=p.run,
    )
