"""Peers of the kernels on a GPU: torch's own best way to do the same.

Most are those of `torch_peers.py`. Here are the ones that a GPU has something better for, or that
would wait for the device where a graph cannot. `mamba_ssm` and `causal_conv1d` are used where they
can be imported. A peer may have `finish`: untimed, puts the results where they are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch.nn import functional as F

from bench.common import torch_peers
from bench.common.torch_peers import Peer
from elastic_infer.ops._segments import spans
from elastic_infer.ops._spec import Arguments
from elastic_infer.ops.matmul import plain_weight
from elastic_infer.ops.moe_matmul import plain_weights

COMPILED = (  # by torch.compile too
    "mamba_step",
    "ssm_step",
    "gated_norm",
    "rms_norm",
    "causal_conv",
    "moe_route",
)


def matmul(a: Arguments) -> Peer:
    """torch.mm (cuBLAS) on strided views of the full weight, one for each run of rows; of codes, on
    their values in bfloat16."""
    k, used = int(a["k_sizes"][0]), a["n_sizes"][0].tolist()
    runs: list[list[int]] = []
    first = 0
    for rows, n in zip(a["segments"], used):
        if runs and runs[-1][1] == first:
            runs[-1][1] = first + n
        else:
            runs.append([first, first + n])
        first += rows
    x, whole = a["x"][:, :k], plain_weight(a, a["x"].dtype)
    jobs = [(whole[b:e, :k].T, a["out"][:, b:e]) for b, e in runs]
    squared = a["activation"] == "relu2"
    a["out"].zero_()

    def run():
        for weight, out in jobs:
            if squared:
                out.copy_(F.relu(torch.mm(x, weight)).square())
            elif out.is_contiguous():
                torch.mm(x, weight, out=out)
            else:
                out.copy_(torch.mm(x, weight))

    return run


def causal_conv(a: Arguments) -> Peer:
    """One product with the taps over history and token, all sequences at once; a prompt by
    torch_peers."""
    ranges = spans(a)
    if any(end - begin != 1 for begin, end, _ in ranges):
        return torch_peers.causal_conv(a)
    slots, S = a["slots"].long(), len(ranges)
    weight = a["weight"]

    def run():
        x = torch.cat([a["state"][slots], a["x"][:S, :, None]], 2)
        y = (x * weight).sum(2) + a["bias"]
        a["out"][:S] = F.silu(y)
        a["state"][slots] = x[:, :, 1:]

    return run


def moe_matmul(a: Arguments) -> Peer:
    """torch._grouped_mm over rows sorted by expert, on strided views of the full weights."""
    k, f = int(a["k_sizes"][0]), int(a["f_sizes"][0])
    up, down = (plain_weights(a, name, a["x"].dtype) for name in ("up", "down"))
    E, J = up.shape[0], a["ids"].shape[1]
    up, down = up[:, :f, :k].transpose(1, 2), down[:, :k, :f].transpose(1, 2)
    every = torch.arange(E, device=a["ids"].device, dtype=torch.int32)
    a["out"].zero_()

    def run():
        flat = a["ids"].flatten()
        chosen, order = flat.sort()
        ends = torch.searchsorted(chosen, every, right=True).to(torch.int32)
        x = a["x"][:, :k][order // J]
        middle = F.relu(torch._grouped_mm(x, up, offs=ends)).square()
        y = torch._grouped_mm(middle, down, offs=ends)
        y = y * a["weights"].flatten()[order, None].to(y.dtype)
        total = torch.zeros(a["x"].shape[0], k, dtype=torch.float32, device=y.device)
        total.index_add_(0, order // J, y.float())
        if a["shared"] is not None:
            total += a["shared"][:, :k]
        a["out"][:, :k] = total

    return run


def _group_major(a: Arguments, values: torch.Tensor) -> torch.Tensor:
    """Heads [..., H, *] from our order (head h in group h % G) to theirs (group h // (H / G))."""
    G = a["B"].shape[1] // a["state"].shape[3]
    H = values.shape[1]
    order = torch.arange(H, device=values.device).view(H // G, G).T.flatten()
    return values.index_select(1, order)


def _mamba_arguments(a: Arguments):
    """(x, dt, A, B, C, D, dt_bias) [T, H, P], [T, H], [H], [T, G, N], ... in mamba_ssm's order."""
    _, H, P, N = a["state"].shape
    T = a["x"].shape[0]
    x = _group_major(a, a["x"].reshape(T, H, P)).contiguous()
    dt = _group_major(a, a["dt"]).contiguous()
    per_head = (_group_major(a, v[None])[0] for v in (-a["A_log"].exp(), a["D"], a["dt_bias"]))
    B, C = (a[name].reshape(T, -1, N).contiguous() for name in "BC")
    A, D, dt_bias = (v.contiguous() for v in per_head)
    return x, dt, A, B, C, D, dt_bias


def _put_back(a: Arguments, y: torch.Tensor, state: torch.Tensor | None = None) -> None:
    """Writes y [T, H, P] and the state's heads back in our order."""
    _, H, P, _ = a["state"].shape
    G = a["B"].shape[1] // a["state"].shape[3]
    order = torch.arange(H, device=y.device).view(G, H // G).T.flatten()
    a["y"][:] = y.index_select(1, order).reshape(y.shape[0], H * P)
    if state is not None:
        a["state"].copy_(state.index_select(1, order))


def triton_step(a: Arguments) -> Peer:
    """mamba_ssm's Triton selective_state_update."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    x, dt, A, B, C, D, dt_bias = _mamba_arguments(a)
    _, H, P, N = a["state"].shape
    state = _group_major(a, a["state"]).contiguous()
    slots = a["slots"]
    wide = {
        "dt": dt[..., None].expand(-1, H, P),
        "A": A[:, None, None].expand(H, P, N),
        "D": D[:, None].expand(H, P),
        "dt_bias": dt_bias[:, None].expand(H, P),
    }
    kept = {}

    def run():
        kept["y"] = selective_state_update(
            state,
            x,
            wide["dt"],
            wide["A"],
            B,
            C,
            wide["D"],
            dt_bias=wide["dt_bias"],
            dt_softplus=True,
            state_batch_indices=slots,
        )

    run.finish = lambda: _put_back(a, kept["y"], state)
    return run


def mamba_scan(a: Arguments) -> Peer:
    """mamba_ssm's Triton mamba_chunk_scan_combined, of sequences of one length."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    ranges = spans(a)
    S, n = len(ranges), ranges[0][1] - ranges[0][0]
    x, dt, A, B, C, D, dt_bias = _mamba_arguments(a)
    batched = [v.view(S, n, *v.shape[1:]) for v in (x, dt, B, C)]
    slots = a["slots"].long()
    state = _group_major(a, a["state"])
    kept = {}

    def run():
        kept["y"], kept["end"] = mamba_chunk_scan_combined(
            batched[0],
            batched[1],
            A,
            batched[2],
            batched[3],
            chunk_size=128,
            D=D,
            dt_bias=dt_bias,
            dt_softplus=True,
            initial_states=state[slots],
            return_final_states=True,
        )

    def finish():
        after = state.clone()
        after[slots] = kept["end"].to(after.dtype)
        _put_back(a, kept["y"].flatten(0, 1), after)

    run.finish = finish
    return run


def peers_of(op: str) -> list[Callable[[Arguments], Peer]]:
    """Peers of an op, the best first; empty for an op that has none here."""
    own = {"matmul": matmul, "causal_conv": causal_conv, "moe_matmul": moe_matmul}
    found = [own.get(op) or torch_peers.PEERS.get(op)]
    if find_spec("mamba_ssm"):
        better = {"ssm_step": triton_step, "ssm_scan": mamba_scan}.get(op)
        found.insert(0, better)
    return [maker for maker in found if maker]
