"""ssm_scan: the Mamba-2 recurrence over packed sequences, continuing each one's state."""

from __future__ import annotations

import torch

from .. import _C
from . import _ssm
from ._spec import Arguments


def ssm_scan(
    x: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    dt: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    y: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    slots: torch.Tensor,
    seq_width: torch.Tensor | None = None,
    h_sizes: torch.Tensor | None = None,
    context: torch.Tensor | None = None,
    seed: int = 0,
    run=None,
) -> torch.Tensor:
    """``dt' = softplus(dt + dt_bias); h = exp(-exp(A_log) dt') h + (dt' x) B^T; y = h C + D x``,
    token by token within each sequence.

    Cutting a sequence anywhere, down to single tokens (`ssm_step`), gives equal bits. All of it is
    computed in float32; a float16 state is rounded stochastically after every token whose number in
    its sequence is a multiple of 64 and after the last one given, by random numbers that depend on
    (seed, number of the token, head, element) alone. Cuts at multiples of 64 then give equal bits.
    Heads are in rank-major order: head n reads group n % G of B and C.

    Args:
        x: [T, H*P] float32 or bfloat16, columns of the convolution's output.
        B: [T, G*N], dtype of `x`; G divides H.
        C: [T, G*N], dtype of `x`.
        dt: [T, H] float32 or x's dtype, before bias and softplus; never clamped.
        A_log: [H] float32; the decay rate is -exp(A_log).
        D: [H] float32, the skip connection.
        dt_bias: [H] float32.
        state: [slots, H, P, N] float32 or float16, h of every sequence, updated in place. P and N
            are multiples of 16, N at most 256.
        y: [T, H*P], dtype of `x`.
        cu_seqlens: [S+1] int32; sequence s owns tokens cu_seqlens[s] to cu_seqlens[s + 1].
        slots: [S] int32 distinct slots; -1 skips the sequence (nothing read or written).
        seq_width: [S] int32 index of each sequence's width, or None for all heads.
        h_sizes: [W] int32 active heads, multiples of G. State and y of the other heads keep their
            values.
        context: [S] int32 tokens that each sequence read before; needed for a float16 state.
        seed: in [0, 2**31), of the rounding of a float16 state; the layer's number in the model.
        run: None, a Pool or a Step.

    Returns:
        `y`.

    Raises:
        ValueError: names the argument that has the wrong shape, dtype, stride or value.

    Source: Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through
    Structured State Space Duality".
    """
    _C.ssm_scan(
        x,
        B,
        C,
        dt,
        A_log,
        D,
        dt_bias,
        state,
        y,
        cu_seqlens,
        slots,
        seq_width,
        h_sizes,
        context,
        seed,
        run,
    )
    return y


def _cases():
    yield {"lengths": (1,), "H": 1, "P": 16, "N": 16, "G": 1, "widths": (1,)}
    yield {
        "lengths": (3, 1, 0, 70, 2),
        "H": 6,
        "P": 16,
        "N": 48,
        "G": 2,
        "widths": (2, 6, 4),
        "padded": 1,
    }
    yield {"lengths": (5, 66), "H": 8, "P": 48, "N": 32, "G": 4, "widths": (4, 8), "dt": "f32"}
    yield {
        "lengths": (5, 0, 66, 130),
        "H": 8,
        "P": 48,
        "N": 32,
        "G": 4,
        "widths": (4, 8, 8),
        "state": "f16",
    }
    yield {"lengths": (5, 66), "H": 4, "P": 16, "N": 48, "G": 2, "widths": (2, 4), "padded": 0}
    yield {"lengths": (256,), "H": 32, "P": 64, "N": 128, "G": 8, "widths": (32,), "bench": True}


def _call(a: Arguments, run) -> None:
    ssm_scan(run=run, **a)


SPECS = [_ssm.spec("ssm_scan", _call, _cases)]
