"""The differentiable operations of the model in plain torch, each with an optional mask.

A mask m [C] of ones and then zeros gives what the first ones alone would give, up to rounding;
values in between are what the sizes are learnt through.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from ..checkpoint.widths import Width


def rms_norm(x: Tensor, weight: Tensor, eps: float, mask: Tensor | None = None) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, in float32, cast back.

    Args:
        x: [..., C]
        weight: [C]
        eps: added to the mean.
        mask: [C] or None; weighs the mean, and multiplies the result.
    """
    wide = x.float()
    if mask is None:
        mean = wide.pow(2).mean(-1, keepdim=True)
    else:
        mean = (wide.pow(2) * mask).sum(-1, keepdim=True) / mask.sum()
        wide = wide * mask
    return (weight.float() * (wide * torch.rsqrt(mean + eps))).to(x.dtype)


def gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float, mask: Tensor | None = None
) -> Tensor:
    """RMSNorm of x * silu(gate) per group of channels, times weight: gate before norm.

    Args:
        x: [..., C]
        gate: [..., C]
        weight: [C]
        groups: C is cut into this many equal groups.
        mask: [C] or None; weighs the mean of each group, and multiplies the result.
    """
    wide = x.float() * F.silu(gate.float())
    grouped = wide.unflatten(-1, (groups, -1))
    if mask is None:
        mean = grouped.pow(2).mean(-1, keepdim=True)
    else:
        kept = mask.view(groups, -1)
        mean = (grouped.pow(2) * kept).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True)
        grouped = grouped * kept
    grouped = grouped * torch.rsqrt(mean + eps)
    return weight * grouped.flatten(-2).to(gate.dtype)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise causal convolution: out[t] = bias + sum_k weight[:, k] * x[t - K + 1 + k].

    Args:
        x: [B, T, C]
        weight: [C, K]
        bias: [C].
    """
    taps = weight.shape[1]
    length = x.shape[1]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    out = bias + padded[:, :length] * weight[:, 0]
    for k in range(1, taps):
        out = torch.addcmul(out, padded[:, k : k + length], weight[:, k])
    return out


def in_float32(function):
    """The function with autocast switched off, for what must not be rounded to bfloat16."""

    @functools.wraps(function)
    def wrapped(*arguments):
        device = next(a.device.type for a in arguments if isinstance(a, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    return wrapped


@in_float32
def ssd_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk: int) -> Tensor:
    """Mamba-2 scan in chunked matrix form, from a zero state.

    state_t = exp(a dt_t) state_{t-1} + dt_t b_t x_t;  y_t = c_t state_t  (per head).

    Args:
        x: [B, T, G, R, P] with R heads per group
        dt: [B, T, G, R], after softplus
        a: [G, R], negative
        b: [B, T, G, N]
        c: [B, T, G, N]
        chunk: positions handled as one matrix product.

    Returns:
        y [B, T, G, R, P].
    """
    length = x.shape[1]
    state = None
    outputs = []
    for start in range(0, length, chunk):
        part = slice(start, min(start + chunk, length))
        last = part.stop == length
        xp = x[:, part].permute(0, 2, 3, 1, 4)  # B G R T P
        dtp = dt[:, part].permute(0, 2, 3, 1)  # B G R T
        bp, cp = b[:, part].transpose(1, 2), c[:, part].transpose(1, 2)  # B G T N
        decay = torch.cumsum(dtp * a[..., None], -1)
        size = decay.shape[-1]
        future = torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1)
        weights = (decay[..., :, None] - decay[..., None, :]).masked_fill(future, -torch.inf)
        scores = torch.matmul(cp, bp.transpose(-1, -2))[:, :, None]  # B G 1 T S
        inputs = xp * dtp[..., None]
        y = torch.matmul(weights.exp() * scores, inputs)
        if state is not None:
            y = y + torch.matmul(cp[:, :, None], state) * decay.exp()[..., None]
        if not last:
            keep = (decay[..., -1:] - decay).exp()
            new = torch.matmul(bp[:, :, None].transpose(-1, -2), inputs * keep[..., None])
            if state is not None:
                new = new + state * decay[..., -1].exp()[..., None, None]
            state = new  # B G R N P
        outputs.append(y.permute(0, 3, 1, 2, 4))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


class Dispatch(torch.autograd.Function):
    """rows[i] = x[order[i] // J]; its gradient is a gather instead of a scatter."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor, per_token: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.per_token = per_token
        return x[order // per_token]

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        return grad[inverse].unflatten(0, (-1, ctx.per_token)).sum(1), None, None, None


class Permute(torch.autograd.Function):
    """rows[inverse]; its gradient is grad[order]."""

    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows[inverse]

    @staticmethod
    def backward(ctx, grad: Tensor):
        (order,) = ctx.saved_tensors
        return grad[order], None, None


def heads_of(weight: Tensor, groups: int, total: int, kept: int, size: int) -> Tensor:
    """First kept/groups heads of every group of rows [total*size, ...], or all of them."""
    if kept == total:
        return weight
    split = weight.unflatten(0, (groups, total // groups, size))
    return split[:, : kept // groups].flatten(0, 2)


class Carried:
    """The cache that one width leaves for another: keys and values, raw convolution inputs and
    time steps of all heads of the reader (a narrow writer tracks those beyond its own).

    No dataclass: sharded modules (FSDP) copy those, and the layers would fill a copy.

    Args:
        reader: the width that goes on.
        positions: [B, T] bool, true where the writer read the token.

    Attributes:
        layers: what the writer left, by layer.
        reading: false while the writer runs.
    """

    def __init__(self, reader: Width, positions: Tensor):
        self.reader, self.positions = reader, positions
        self.layers: dict[int, tuple[Tensor, ...]] = {}
        self.reading = False

    def pass_on(self, layer: int, own: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The reader's view: the writer's tensors [B, T, ...] at its positions, or its own."""
        at = self.positions
        return tuple(
            torch.where(at.view(*at.shape, *[1] * (mine.ndim - 2)), left, mine)
            for left, mine in zip(self.layers[layer], own)
        )
