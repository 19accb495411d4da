"""Reference, inputs and cases that ssm_scan and ssm_step share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ._segments import active, at_width, compute_dtype, draw_slots, offsets, spans
from ._spec import Arguments, Case, OpSpec, draw_widths, randn

STORED = 64  # a float16 state is rounded after tokens whose number is a multiple of this
PER_TOKEN = ("x", "B", "C", "dt", "y")


def _mix64(z: int) -> int:
    mask = (1 << 64) - 1
    z = (z + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def _words(seed: int, position: int, shape: torch.Size) -> torch.Tensor:
    """The random 32-bit word of every element of a state [heads, P, N], as int64."""
    heads, P, N = shape
    keys = torch.tensor(
        [_mix64(_mix64(seed << 32 | position) + head) & 0xFFFFFFFF for head in range(heads)]
    )
    x = (keys[:, None] + torch.arange(P * N)) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return (x ^ (x >> 16)).view(shape)


def round_stochastic(h: torch.Tensor, seed: int, position: int) -> torch.Tensor:
    """float16 of a float32 state [heads, P, N] after `position` tokens: the neighbour above with
    the probability that the distance to the one below tells, in steps of 2**-13."""
    bits, least = h.contiguous().view(torch.int32).long(), 0x38800000
    size = bits & 0x7FFFFFFF
    small = size < least
    moved = size.int().view(torch.float32) + 2.0**-14
    kept = torch.where(small, moved.view(torch.int32).long(), size)
    kept = (kept + (_words(seed, position, h.shape) & 0x1FFF)).clamp(max=0x47800000)
    code = (kept >> 13) - torch.where(small, 0x1C400, 0x1C000)
    code = torch.where(size > 0x7F800000, 0x7E00, code) | (bits >> 16 & 0x8000)
    return code.to(torch.int16).view(torch.float16)


def reference(a: Arguments) -> dict[str, torch.Tensor]:
    """The recurrence, token by token, in float32 (float64 for float64 arguments, unrounded)."""
    y, state = a["y"].clone(), a["state"].clone()
    _, H, P, N = state.shape
    G = a["B"].shape[1] // N
    dtype = compute_dtype(a["x"])
    A, D, dt_bias = -a["A_log"].to(dtype).exp(), a["D"].to(dtype), a["dt_bias"].to(dtype)
    for (begin, end, slot), n, number in zip(
        spans(a), active(a, "h_sizes", H), _context(a), strict=True
    ):
        if slot < 0:
            continue
        group, before = torch.arange(n) % G, number - begin
        h = state[slot, :n].to(dtype)
        for t in range(begin, end):
            x = a["x"][t, : n * P].to(dtype).view(n, P)
            B = a["B"][t].to(dtype).view(G, N)[group]
            C = a["C"][t].to(dtype).view(G, N)[group]
            raw = a["dt"][t, :n].to(dtype) + dt_bias[:n]
            dt = torch.where(raw > 20, raw, torch.log1p(raw.exp()))
            decay = torch.exp(A[:n] * dt)
            h = decay[:, None, None] * h + (dt[:, None] * x)[:, :, None] * B[:, None, :]
            out = (h * C[:, None, :]).sum(-1) + D[:n, None] * x
            y[t, : n * P] = out.flatten().to(y.dtype)
            read = before + t + 1
            if state.dtype == torch.float16 and (read % STORED == 0 or t == end - 1):
                h = round_stochastic(h, a["seed"], read).to(dtype)
        state[slot, :n] = h.to(state.dtype)
    return {"y": y, "state": state}


def _context(a: Arguments) -> list[int]:
    return a["context"].tolist() if "context" in a else [0] * len(a["slots"])


def inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    """Seeded arguments; x, B, C and dt are columns of wider tensors, as in the model."""
    lengths, H, P, N, G = case["lengths"], case["H"], case["P"], case["N"], case["G"]
    S, T = len(lengths), sum(lengths)
    conv = randn(generator, T, H * P + 2 * G * N, dtype=dtype)
    dt_dtype = torch.float32 if case.get("dt") == "f32" else dtype
    dt = randn(generator, T, H + 16, dtype=dt_dtype, scale=2.0)[:, 16:]
    dt[0, 0] = 25.0  # beyond softplus' threshold
    f32 = torch.float32
    a = {
        "x": conv[:, : H * P],
        "B": conv[:, H * P : H * P + G * N],
        "C": conv[:, H * P + G * N :],
        "dt": dt,
        "A_log": torch.rand(H, generator=generator).mul(2.7),
        "D": randn(generator, H, dtype=f32),
        "dt_bias": randn(generator, H, dtype=f32) - 2,
        "state": randn(generator, S + 2, H, P, N, dtype=f32),
        "y": randn(generator, T, H * P, dtype=dtype),
        "slots": draw_slots(generator, S, S + 2, case.get("padded")),
        "seq_width": draw_widths(generator, S, len(case["widths"]), sort=False),
        "h_sizes": torch.tensor(case["widths"], dtype=torch.int32),
    }
    if case.get("slow"):  # states that keep most of what they hold for hundreds of tokens
        a["A_log"] -= 7
        a["dt_bias"] -= 2
    if case.get("state") == "f16":
        a["state"] = a["state"].half()
        a["context"] = torch.randint(0, 200, (S,), generator=generator, dtype=torch.int32)
        a["seed"] = 5
    if not case.get("step"):
        a["cu_seqlens"] = offsets(list(lengths))
    return a


def poison(a: Arguments) -> None:
    """NaN in heads beyond each sequence's own, in padding, and in unowned slots."""
    nan = float("nan")
    _, H, P, _ = a["state"].shape
    sizes = active(a, "h_sizes", H)
    state = torch.full_like(a["state"], nan)
    for (begin, end, slot), n in zip(spans(a), sizes, strict=True):
        if slot >= 0:
            state[slot, :n] = a["state"][slot, :n]
            a["x"][begin:end, n * P :] = nan
            a["dt"][begin:end, n:] = nan
        else:
            for name in ("x", "B", "C", "dt"):
                a[name][begin:end] = nan
    a["state"].copy_(state)
    for name in ("A_log", "D", "dt_bias"):
        a[name][max(sizes) :] = nan


def _cut(a: Arguments, chosen: list[int], tokens: torch.Tensor, n: int):
    """The problem of some sequences on contiguous copies of n heads; where it lies."""
    P = a["state"].shape[2]
    owned = [s for s in chosen if spans(a)[s][2] >= 0]
    own = torch.tensor([spans(a)[s][2] for s in owned], dtype=torch.long)
    slots = [owned.index(s) if s in owned else -1 for s in chosen]
    columns = {"x": n * P, "y": n * P, "dt": n}
    cut = {name: a[name][tokens][:, : columns.get(name)].contiguous() for name in PER_TOKEN}
    cut |= {name: a[name][:n].contiguous() for name in ("A_log", "D", "dt_bias")}
    cut["state"] = a["state"][own, :n].contiguous()
    cut["slots"] = torch.tensor(slots, dtype=torch.int32)
    cut["seq_width"] = cut["h_sizes"] = None
    if "context" in a:
        cut |= {"context": a["context"][chosen].clone(), "seed": a["seed"]}
    if "cu_seqlens" in a:
        cut["cu_seqlens"] = offsets([spans(a)[s][1] - spans(a)[s][0] for s in chosen])
    return cut, {
        "y": ((tokens[:, None], torch.arange(n * P)), ...),
        "state": ((own[:, None], torch.arange(n)), ...),
    }


def sliced(a: Arguments):
    """Each width's sequences on contiguous copies of its heads."""
    for w, n in enumerate(a["h_sizes"].tolist()):
        chosen, tokens = at_width(a, w)
        if chosen and n:
            yield _cut(a, chosen, tokens, n)


def row(a: Arguments, s: int):
    """One sequence alone, on contiguous copies."""
    begin, end, _ = spans(a)[s]
    return _cut(a, [s], torch.arange(begin, end), active(a, "h_sizes", a["dt"].shape[1])[s])


def cost(case: Case, itemsize: int) -> tuple[int, int]:
    """Bytes: the state in and out once, and every per-token tensor; flops of the recurrence."""
    H, P, N, G, T = case["H"], case["P"], case["N"], case["G"], sum(case["lengths"])
    moved = (4 if case.get("state") == "f16" else 8) * len(case["lengths"]) * H * P * N + T * (
        2 * H * P + 2 * G * N + H
    ) * itemsize
    return moved, T * H * (5 * P * N + 3 * P)


def spec(
    name: str, call: Callable[[Arguments, object], None], cases: Callable[[], Iterator[Case]]
) -> OpSpec:
    """The spec of an op that computes `reference`."""
    return OpSpec(
        name=name,
        call=call,
        reference=reference,
        cases=cases,
        inputs=inputs,
        outputs=("y", "state"),
        cost=cost,
        poison=poison,
        sliced=sliced,
        row=row,
        rows=lambda a: len(a["slots"]),
    )
