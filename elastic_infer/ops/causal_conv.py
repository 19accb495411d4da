"""causal_conv: depthwise convolution over packed sequences, with bias, silu and kept history."""

from __future__ import annotations

import torch

from .. import _C
from ._segments import active, at_width, compute_dtype, draw_slots, offsets, spans
from ._spec import Arguments, Case, OpSpec, draw_widths, randn


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    state: torch.Tensor,
    out: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    slots: torch.Tensor,
    x_channels: int,
    seq_width: torch.Tensor | None = None,
    x_sizes: torch.Tensor | None = None,
    run=None,
) -> torch.Tensor:
    """``out[t, c] = silu(bias[c] + sum_k weight[c, k] * x[t - 3 + k, c])`` within each sequence.

    Tokens before a sequence's first come from its history, which afterwards holds its last three
    inputs: a step is a sequence of one token, and any cutting of a sequence gives equal bits.

    Args:
        x: [T, C] float32 or bfloat16: the channels x, B, C side by side; C a multiple of 16. Must
            not overlap `out`.
        weight: [C, 4] float32 or x's dtype, oldest tap first.
        bias: [C], dtype of `weight`.
        state: [slots, C, 3], dtype of `x`: raw inputs, oldest first, updated in place.
        out: [T, C], dtype of `x`.
        cu_seqlens: [S+1] int32; sequence s owns tokens cu_seqlens[s] to cu_seqlens[s + 1].
        slots: [S] int32 distinct slots; -1 skips the sequence (nothing read or written).
        x_channels: how many leading channels depend on the width; B and C are always whole.
        seq_width: [S] int32 index of each sequence's width, or None for all channels.
        x_sizes: [W] int32 active ones of the first `x_channels`, multiples of 16. The others are
            not read, and their `out` and `state` keep their values.
        run: None, a Pool or a Step.

    Returns:
        `out`.

    Raises:
        ValueError: names the argument that has the wrong shape, dtype, stride or value.

    Source: Dao and Gu, "Transformers are SSMs" (Mamba-2 block).
    """
    _C.causal_conv(
        x, weight, bias, state, out, cu_seqlens, slots, x_channels, seq_width, x_sizes, run
    )
    return out


def _channels(a: Arguments, active_x: int) -> torch.Tensor:
    return torch.cat([torch.arange(active_x), torch.arange(a["x_channels"], a["x"].shape[1])])


def _reference(a: Arguments) -> dict[str, torch.Tensor]:
    out, state = a["out"].clone(), a["state"].clone()
    dtype = compute_dtype(a["x"])
    sizes = active(a, "x_sizes", a["x_channels"])
    for (begin, end, slot), n in zip(spans(a), sizes, strict=True):
        if slot < 0:
            continue
        c = _channels(a, n)
        history = torch.cat([state[slot, c].T, a["x"][begin:end, c]]).to(dtype)
        weight = a["weight"][c].to(dtype)
        for t in range(begin, end):
            y = (history[t - begin : t - begin + 4] * weight.T).sum(0) + a["bias"][c].to(dtype)
            out[t, c] = torch.nn.functional.silu(y).to(out.dtype)
        state[slot, c] = history[-3:].T.to(state.dtype)
    return {"out": out, "state": state}


def _cases():
    yield {"lengths": (1,), "x": 16, "bc": 16, "widths": (16,)}
    yield {"lengths": (2, 1, 7, 0, 3), "x": 176, "bc": 48, "widths": (48, 176), "padded": 1}
    yield {"lengths": (4, 70, 1, 1), "x": 320, "bc": 160, "widths": (0, 144, 320), "w": "f32"}
    yield {"lengths": (256,), "x": 2048, "bc": 2048, "widths": (2048,), "bench": True}
    yield {"lengths": (1,), "x": 2048, "bc": 2048, "widths": (2048,), "bench": True}


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    lengths = case["lengths"]
    S, T, C = len(lengths), sum(lengths), case["x"] + case["bc"]
    weight_dtype = torch.float32 if case.get("w") == "f32" else dtype
    return {
        "x": randn(generator, T + 2, C + 32, dtype=dtype)[:, 16 : C + 16],
        "weight": randn(generator, C, 4, dtype=weight_dtype, scale=0.5),
        "bias": randn(generator, C, dtype=weight_dtype, scale=0.1),
        "state": randn(generator, S + 2, C, 3, dtype=dtype),
        "out": randn(generator, T + 2, C, dtype=dtype),
        "cu_seqlens": offsets(list(lengths)),
        "slots": draw_slots(generator, S, S + 2, case.get("padded")),
        "x_channels": case["x"],
        "seq_width": draw_widths(generator, S, len(case["widths"]), sort=False),
        "x_sizes": torch.tensor(case["widths"], dtype=torch.int32),
    }


def _call(a: Arguments, run) -> None:
    causal_conv(run=run, **a)


def _poison(a: Arguments) -> None:
    nan, top = float("nan"), a["x_channels"]
    sizes = active(a, "x_sizes", top)
    x, state = torch.full_like(a["x"], nan), torch.full_like(a["state"], nan)
    for (begin, end, slot), n in zip(spans(a), sizes, strict=True):
        if slot >= 0:
            c = _channels(a, n)
            x[begin:end, c] = a["x"][begin:end, c]
            state[slot, c] = a["state"][slot, c]
    a["x"].copy_(x)
    a["state"].copy_(state)
    a["weight"][max(sizes) : top] = nan
    a["bias"][max(sizes) : top] = nan


def _cut(a: Arguments, chosen: list[int], tokens: torch.Tensor, c: torch.Tensor, n: int):
    """The problem of some sequences on contiguous copies of their channels; where it lies."""
    lengths = [spans(a)[s][1] - spans(a)[s][0] for s in chosen]
    owned = [s for s in chosen if spans(a)[s][2] >= 0]
    own = torch.tensor([spans(a)[s][2] for s in owned], dtype=torch.long)
    slots = [owned.index(s) if s in owned else -1 for s in chosen]
    cut = {
        "x": a["x"][tokens][:, c].contiguous(),
        "weight": a["weight"][c].contiguous(),
        "bias": a["bias"][c].contiguous(),
        "state": a["state"][own][:, c].contiguous(),
        "out": a["out"][tokens][:, c].contiguous(),
        "cu_seqlens": offsets(lengths),
        "slots": torch.tensor(slots, dtype=torch.int32),
        "x_channels": n,
        "seq_width": None,
        "x_sizes": None,
    }
    return cut, {"out": ((tokens[:, None], c), ...), "state": ((own[:, None], c), ...)}


def _sliced(a: Arguments):
    for w, n in enumerate(a["x_sizes"].tolist()):
        chosen, tokens = at_width(a, w)
        if chosen:
            yield _cut(a, chosen, tokens, _channels(a, n), n)


def _row(a: Arguments, s: int):
    begin, end, _ = spans(a)[s]
    n = active(a, "x_sizes", a["x_channels"])[s]
    return _cut(a, [s], torch.arange(begin, end), _channels(a, n), n)


def _cost(case: Case, itemsize: int) -> tuple[int, int]:
    C, T = case["x"] + case["bc"], sum(case["lengths"])
    return (C * (2 * T + 6 * len(case["lengths"]) + 5)) * itemsize, 12 * T * C


SPECS = [
    OpSpec(
        name="causal_conv",
        call=_call,
        reference=_reference,
        cases=_cases,
        inputs=_inputs,
        outputs=("out", "state"),
        cost=_cost,
        poison=_poison,
        sliced=_sliced,
        row=_row,
        rows=lambda a: len(a["slots"]),
    )
]
