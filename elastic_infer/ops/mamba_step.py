"""mamba_step: convolution, recurrence and gated norm of a Mamba layer for one token of each
sequence, in one call."""

from __future__ import annotations

import torch

from .. import _C
from ..rounding import round_up
from . import _ssm
from ._segments import active, at_width, draw_slots, offsets
from ._spec import Arguments, Case, OpSpec, draw_widths, randn
from .causal_conv import SPECS as _CONVOLUTION
from .gated_norm import SPECS as _NORM


def mamba_step(
    z: torch.Tensor,
    xbc: torch.Tensor,
    dt: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    conv_state: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    norm_weight: torch.Tensor,
    out: torch.Tensor,
    arrivals: torch.Tensor,
    *,
    slots: torch.Tensor,
    eps: float = 1e-5,
    seq_width: torch.Tensor | None = None,
    h_sizes: torch.Tensor | None = None,
    out_sizes: torch.Tensor | None = None,
    context: torch.Tensor | None = None,
    seed: int = 0,
    run=None,
) -> torch.Tensor:
    """``out = gated_norm(ssm_step(causal_conv(xbc), dt), z)``, one token per sequence: what lies
    between the two projections of a Mamba layer, with the bits of those three ops.

    On a GPU it is one launch; the convolved row and y leave the chip no more than the norm needs.

    Args:
        z: [S, H*P] float32 or bfloat16, the gate.
        xbc: [S, H*P + 2*G*N], dtype of `z`: x, B and C before the convolution; G divides H.
        dt: [S, H] float32 or z's dtype, before bias and softplus; never clamped.
        conv_weight: [C, 4] float32 or z's dtype, oldest tap first; C columns of `xbc`.
        conv_bias: [C], dtype of `conv_weight`.
        conv_state: [slots, C, 3], dtype of `z`: the last inputs, oldest first, updated in place.
        A_log: [H] float32; the decay rate is -exp(A_log).
        D: [H] float32, the skip connection.
        dt_bias: [H] float32.
        state: [slots, H, P, N] float32 or float16, updated in place. P and N are multiples of 16,
            N at most 256.
        norm_weight: [H*P] float32 or bfloat16.
        out: [S, H*P], dtype of `z`; exact zeros in heads that are not kept, and in rows of -1.
        arrivals: [S, G] int32 zeros, which it leaves zero: counters of its blocks on a GPU. Calls
            that may run at once must not share them.
        slots: [S] int32 distinct slots; -1 touches no history and no state.
        eps: added to the mean of squares; does not depend on the width.
        seq_width: [S] int32 index of each sequence's width, or None for all heads.
        h_sizes: [W] int32 heads whose history and state are updated, multiples of G; those of the
            others keep their values.
        out_sizes: [W] int32 heads kept in `out`, multiples of G, at most `h_sizes`. Where a
            sequence tracks, they are fewer.
        context: [S] int32 tokens that each sequence read before; needed for a float16 state.
        seed: in [0, 2**31), of the rounding of a float16 state; the layer's number in the model.
        run: None, a Pool or a Step.

    Returns:
        `out`.

    Raises:
        ValueError: names the argument that has the wrong shape, dtype, stride or value.

    Source: Dao and Gu, "Transformers are SSMs" (Mamba-2 block).
    """
    conv, heads = (conv_weight, conv_bias, conv_state), (A_log, D, dt_bias, state)
    sizes, made = (seq_width, h_sizes, out_sizes), (norm_weight, out, arrivals)
    _C.mamba_step(z, xbc, dt, *conv, *heads, *made, slots, eps, *sizes, context, seed, run)
    return out


def parts(a: Arguments) -> tuple[Arguments, Arguments, Arguments]:
    """Arguments of causal_conv, ssm_step and gated_norm that together do the same: the first
    writes what the second reads, and so on. Histories and states are `a`'s own."""
    _, H, P, N = a["state"].shape
    S, bc = len(a["slots"]), (a["xbc"].shape[1] - H * P) // 2
    given = {"slots": a["slots"], "seq_width": a["seq_width"]}
    sizes = a["h_sizes"]
    mixed, y = torch.zeros_like(a["xbc"]), torch.zeros_like(a["z"])
    convolution = given | {
        "x": a["xbc"],
        "weight": a["conv_weight"],
        "bias": a["conv_bias"],
        "state": a["conv_state"],
        "out": mixed,
        "cu_seqlens": offsets([1] * S),
        "x_channels": H * P,
        "x_sizes": None if sizes is None else sizes * P,
    }
    recurrence = given | {name: a[name] for name in ("dt", "A_log", "D", "dt_bias", "state")}
    recurrence |= dict(zip("xBC", mixed.split([H * P, bc, bc], 1)))
    recurrence |= {"y": y, "h_sizes": sizes}
    recurrence |= {name: a[name] for name in ("context", "seed") if name in a}
    norm = {
        "y": y,
        "z": a["z"],
        "weight": a["norm_weight"],
        "out": a["out"],
        "groups": bc // N,
        "head_dim": P,
        "eps": a["eps"],
        "row_width": a["seq_width"],
        "h_sizes": a["out_sizes"],
    }
    return convolution, recurrence, norm


def _reference(a: Arguments) -> dict[str, torch.Tensor]:
    """The references of the three ops, one after another."""
    convolution, recurrence, norm = parts(a)
    convolved = _CONVOLUTION[0].reference(convolution)
    for name in "xBC":
        source = recurrence[name]
        begin = source.storage_offset()
        recurrence[name] = convolved["out"][:, begin : begin + source.shape[1]]
    stepped = _ssm.reference(recurrence)
    norm["y"] = stepped["y"]
    if norm["row_width"] is None:
        every = torch.zeros(len(a["slots"]), dtype=torch.int32)
        norm |= {"row_width": every, "h_sizes": every + a["state"].shape[1]}
    out = _NORM[0].reference(norm)["out"]
    out[a["slots"] < 0] = 0
    return {
        "out": out,
        "conv_state": convolved["state"],
        "state": stepped["state"],
        "arrivals": torch.zeros_like(a["arrivals"]),
    }


def _cases():
    yield {"S": 1, "H": 1, "P": 16, "N": 16, "G": 1, "widths": (1,)}
    yield {"S": 5, "H": 6, "P": 16, "N": 48, "G": 2, "widths": (2, 6, 4), "padded": 1}
    yield {
        "S": 5,
        "H": 8,
        "P": 80,
        "N": 48,
        "G": 4,
        "widths": (4, 8),
        "tracked": (8, 8),
        "padded": 1,
        "state": "f16",
    }
    yield {
        "S": 6,
        "H": 6,
        "P": 48,
        "N": 32,
        "G": 2,
        "widths": (2, 6, 4, 0),
        "tracked": (6, 6, 6, 0),
        "padded": 5,
        "dt": "f32",
        "w": "f32",
    }
    bench = {"H": 32, "P": 64, "N": 128, "G": 8, "widths": (32,), "bench": True}
    for S in (1, 8):
        yield {"S": S, **bench}
    yield {"S": 8, **bench, "state": "f16"}


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    """z, xbc and dt are columns of one wider tensor where dt has their dtype, as in the model."""
    S, H, P, N, G = (case[n] for n in "SHPNG")
    C, f32 = H * P + 2 * G * N, torch.float32
    plain = f32 if case.get("w") == "f32" else dtype
    projected = randn(generator, S, H * P + C + round_up(H, 16), dtype=dtype)
    z, xbc, dt = projected[:, : H * P + C + H].split([H * P, C, H], 1)
    dt.mul_(2.0)[0, 0] = 25.0  # beyond softplus' threshold
    a = {
        "z": z,
        "xbc": xbc,
        "dt": dt.to(f32) if case.get("dt") == "f32" else dt,
        "conv_weight": randn(generator, C, 4, dtype=plain, scale=0.5),
        "conv_bias": randn(generator, C, dtype=plain, scale=0.1),
        "conv_state": randn(generator, S + 2, C, 3, dtype=dtype),
        "A_log": torch.rand(H, generator=generator).mul(2.7),
        "D": randn(generator, H, dtype=f32),
        "dt_bias": randn(generator, H, dtype=f32) - 2,
        "state": randn(generator, S + 2, H, P, N, dtype=f32),
        "norm_weight": 1 + randn(generator, H * P, dtype=plain, scale=0.1),
        "out": randn(generator, S, H * P, dtype=dtype),
        "arrivals": torch.zeros(S, G, dtype=torch.int32),
        "slots": draw_slots(generator, S, S + 2, case.get("padded")),
        "eps": 1e-5,
        "seq_width": draw_widths(generator, S, len(case["widths"]), sort=False),
        "h_sizes": torch.tensor(case.get("tracked", case["widths"]), dtype=torch.int32),
        "out_sizes": torch.tensor(case["widths"], dtype=torch.int32),
    }
    if case.get("state") == "f16":
        a["state"] = a["state"].half()
        a["context"] = torch.randint(0, 200, (S,), generator=generator, dtype=torch.int32)
        a["seed"] = 5
    return a


def _call(a: Arguments, run) -> None:
    mamba_step(run=run, **a)


def _channels(a: Arguments, heads: int) -> torch.Tensor:
    """Columns of xbc that so many heads use."""
    _, H, P, _ = a["state"].shape
    return torch.cat([torch.arange(heads * P), torch.arange(H * P, a["xbc"].shape[1])])


def _poison(a: Arguments) -> None:
    """NaN in heads beyond each sequence's own, in padding, and in unowned slots."""
    nan = float("nan")
    _, H, P, _ = a["state"].shape
    state, history = (torch.full_like(a[n], nan) for n in ("state", "conv_state"))
    xbc = torch.full_like(a["xbc"], nan)
    sizes, kept = active(a, "h_sizes", H), active(a, "out_sizes", H)
    for s, (slot, n, k) in enumerate(zip(a["slots"].tolist(), sizes, kept, strict=True)):
        if slot < 0:
            n = k = 0
        else:
            c = _channels(a, n)
            state[slot, :n] = a["state"][slot, :n]
            history[slot, c] = a["conv_state"][slot, c]
            xbc[s, c] = a["xbc"][s, c]
        a["z"][s, k * P :] = nan
        a["dt"][s, n:] = nan
    for name, value in (("state", state), ("conv_state", history), ("xbc", xbc)):
        a[name].copy_(value)
    n = max(sizes)
    for name in ("A_log", "D", "dt_bias"):
        a[name][n:] = nan
    for name in ("conv_weight", "conv_bias"):
        a[name][n * P : H * P] = nan
    a["norm_weight"][max(kept) * P :] = nan


def _cut(a: Arguments, chosen: list[int], n: int, kept: int):
    """The problem of some sequences on contiguous copies of n heads; where it lies."""
    P, rows, c = a["state"].shape[2], torch.tensor(chosen), _channels(a, n)
    slots = a["slots"][rows]
    own = slots[slots >= 0].long()
    cut = {name: a[name][rows][:, : n * P].contiguous() for name in ("z", "out")}
    cut |= {name: a[name][:n].contiguous() for name in ("A_log", "D", "dt_bias")}
    cut |= {
        "xbc": a["xbc"][rows][:, c].contiguous(),
        "dt": a["dt"][rows, :n].contiguous(),
        "conv_weight": a["conv_weight"][c].contiguous(),
        "conv_bias": a["conv_bias"][c].contiguous(),
        "conv_state": a["conv_state"][own][:, c].contiguous(),
        "state": a["state"][own, :n].contiguous(),
        "norm_weight": a["norm_weight"][: n * P].contiguous(),
        "arrivals": a["arrivals"][rows].clone(),
        "eps": a["eps"],
        "slots": torch.where(slots < 0, -1, (slots >= 0).cumsum(0) - 1).to(torch.int32),
        "seq_width": None,
        "h_sizes": None,
        "out_sizes": None,
    }
    if kept < n:
        cut["seq_width"] = torch.zeros(len(chosen), dtype=torch.int32)
        cut |= {"h_sizes": torch.tensor([n], dtype=torch.int32)}
        cut |= {"out_sizes": torch.tensor([kept], dtype=torch.int32)}
    if "context" in a:
        cut |= {"context": a["context"][rows].clone(), "seed": a["seed"]}
    return cut, {
        "out": ((rows[:, None], torch.arange(n * P)), ...),
        "conv_state": ((own[:, None], c), ...),
        "state": ((own[:, None], torch.arange(n)), ...),
        "arrivals": ((rows,), ...),
    }


def _sliced(a: Arguments):
    """Each width's sequences on contiguous copies of its heads."""
    for w, (n, kept) in enumerate(zip(a["h_sizes"].tolist(), a["out_sizes"].tolist())):
        chosen, _ = at_width(a, w)
        if chosen and n:
            yield _cut(a, chosen, n, kept)


def _row(a: Arguments, s: int):
    """One sequence alone, on contiguous copies; of a width without heads, with one per group."""
    H, G = a["state"].shape[1], a["arrivals"].shape[1]
    n = active(a, "h_sizes", H)[s]
    one, where = _cut(a, [s], max(n, G), active(a, "out_sizes", H)[s])
    if n == 0:
        one["h_sizes"] = torch.zeros(1, dtype=torch.int32)
    return one, where


def _cost(case: Case, itemsize: int) -> tuple[int, int]:
    """Bytes: state and history in and out, every row and weight once; flops of the three ops."""
    S, H, P, N, G = (case[n] for n in "SHPNG")
    C = H * P + 2 * G * N
    moved = (4 if case.get("state") == "f16" else 8) * S * H * P * N
    moved += (S * (6 * C + C + 2 * H * P + H) + 5 * C + H * P) * itemsize + 12 * H
    return moved, S * (12 * C + H * (5 * P * N + 3 * P) + 20 * H * P)


SPECS = [
    OpSpec(
        name="mamba_step",
        call=_call,
        reference=_reference,
        cases=_cases,
        inputs=_inputs,
        outputs=("out", "conv_state", "state", "arrivals"),
        cost=_cost,
        poison=_poison,
        sliced=_sliced,
        row=_row,
        rows=lambda a: len(a["slots"]),
    )
]
