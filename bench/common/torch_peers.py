"""The ops as one would write them in torch: what `ops.py` times beside the native ones.

Each function takes an op's arguments (`elastic_infer/ops/<op>.py`), prepares what a torch program
would hold anyway (keys and values side by side, heads in torch's order), and returns a function
that computes the op into `arguments`' outputs. Only that function is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from elastic_infer.ops import registry
from elastic_infer.ops._segments import spans
from elastic_infer.ops._spec import Arguments
from elastic_infer.ops.kv_append import PAGE
from elastic_infer.ops.mamba_step import parts
from elastic_infer.ops.matmul import plain_weight
from elastic_infer.ops.moe_matmul import plain_weights
from elastic_infer.rounding import ceil_div

Peer = Callable[[], None]


def _by_width(a: Arguments, sizes: str) -> list[tuple[torch.Tensor, int]]:
    """(rows, active size) of every width that has rows."""
    found = []
    for w, n in enumerate(a[sizes].tolist()):
        rows = (a["row_width"] == w).nonzero().flatten()
        if len(rows):
            found.append((rows, n))
    return found


def embed(a: Arguments) -> Peer:
    """Advanced indexing, once per width."""
    groups = [(rows[:, None], a["ids"][rows].long(), n) for rows, n in _by_width(a, "sizes")]
    columns = torch.arange(a["out"].shape[1])

    def run():
        for rows, ids, n in groups:
            a["out"][rows, columns[:n]] = a["table"][ids, :n]

    return run


def rms_norm(a: Arguments) -> Peer:
    """Addition and F.rms_norm, once per width, on slices (rows are sorted by width)."""
    groups = [(slice(int(r[0]), int(r[-1]) + 1), n) for r, n in _by_width(a, "sizes")]

    def run():
        for rows, n in groups:
            residual = a["residual"][rows, :n]
            residual += a["delta"][rows, :n]
            a["out"][rows, :n] = F.rms_norm(residual, (n,), a["weight"][:n], a["eps"])
            a["out"][rows, n:] = 0

    return run


def matmul(a: Arguments) -> Peer:
    """torch.mm into the output: the library behind F.linear."""
    weight = plain_weight(a, a["x"].dtype).T

    def run():
        torch.mm(a["x"], weight, out=a["out"])

    return run


def causal_conv(a: Arguments) -> Peer:
    """Four shifted products over history and tokens, per sequence."""
    taps, ranges = a["weight"].T.contiguous(), spans(a)

    def run():
        for begin, end, slot in ranges:
            x = torch.cat([a["state"][slot].T, a["x"][begin:end]])
            n = end - begin
            y = a["bias"] + x[:n] * taps[0]
            for k in range(1, 4):
                y.addcmul_(x[k : k + n], taps[k])
            a["out"][begin:end] = F.silu(y)
            a["state"][slot] = x[-3:].T

    return run


def _heads(a: Arguments, rows: slice):
    """x [T, H/G, G, P], B and C [T, 1, G, N], dt [T, H/G, G] in float32."""
    _, H, P, N = a["state"].shape
    G = a["B"].shape[1] // N
    x = a["x"][rows].float().view(-1, H // G, G, P)
    B, C = (a[name][rows].float().view(-1, 1, G, N) for name in "BC")
    dt = F.softplus(a["dt"][rows].float() + a["dt_bias"]).view(-1, H // G, G)
    return x, B, C, dt


def ssm_step(a: Arguments) -> Peer:
    """The recurrence over all sequences at once."""
    slots = a["slots"].long()
    S, H, P, N = len(slots), *a["state"].shape[1:]

    def run():
        x, B, C, dt = _heads(a, slice(None))
        A, D = (-a["A_log"].exp()).view(dt.shape[1:]), a["D"].view(dt.shape[1:])
        state = a["state"][slots].float().view(S, *dt.shape[1:], P, N)
        state *= torch.exp(A * dt)[..., None, None]
        state += (dt[..., None] * x)[..., None] * B[..., None, :]
        y = (state @ C.expand(*dt.shape, N)[..., None]).squeeze(-1) + D[..., None] * x
        a["y"][:] = y.reshape(S, H * P)
        a["state"][slots] = state.view(S, H, P, N).to(a["state"].dtype)

    return run


def mamba_step(a: Arguments) -> Peer:
    """The convolution of all sequences at once, then the two peers around this one."""
    convolution, recurrence, norm = parts(a)
    slots, mixed = a["slots"].long(), convolution["out"]
    step, gate = ssm_step(recurrence), gated_norm(norm)

    def run():
        inputs = torch.cat([a["conv_state"][slots], a["xbc"][:, :, None]], 2)
        mixed[:] = F.silu((inputs * a["conv_weight"]).sum(2) + a["conv_bias"])
        a["conv_state"][slots] = inputs[:, :, 1:]
        step(), gate()

    return run


def ssm_scan(a: Arguments) -> Peer:
    """The chunked form (state space duality) in 64 tokens, one sequence after the other."""
    H, P, N = a["state"].shape[1:]
    chunk = 64
    causal, ranges = torch.ones(chunk, chunk, dtype=torch.bool).tril(), spans(a)

    def run():
        for begin, end, slot in ranges:
            x, B, C, dt = _heads(a, slice(begin, end))
            A, D = (-a["A_log"].exp()).view(dt.shape[1:]), a["D"].view(dt.shape[1:])
            h = a["state"][slot].float().view(*dt.shape[1:], P, N)
            for t in range(0, end - begin, chunk):
                xs, b, c, d = (
                    x[t : t + chunk],
                    B[t : t + chunk, 0],
                    C[t : t + chunk, 0],
                    dt[t:][:chunk],
                )
                n = len(xs)
                total = (A * d).cumsum(0)  # [n, H/G, G]
                by_head = total.permute(1, 2, 0)
                decay = torch.exp(by_head[..., :, None] - by_head[..., None, :])
                scores = torch.einsum("tgn,sgn->gts", c, b) * decay.where(causal[:n, :n], 0.0)
                driven = xs * d[..., None]
                y = torch.einsum("igts,sigp->tigp", scores, driven)
                y += torch.einsum("tgn,igpn->tigp", c, h) * total.exp()[..., None]
                a["y"][begin + t : begin + t + n] = (y + D[..., None] * xs).reshape(n, H * P)
                late = driven * torch.exp(total[-1] - total)[..., None]
                h = h * total[-1].exp()[..., None, None]
                h = h + torch.einsum("tigp,tgn->igpn", late, b)
            a["state"][slot] = h.reshape(H, P, N)

    return run


def gated_norm(a: Arguments) -> Peer:
    """silu, product and a norm over groups, in float32."""
    R, G, P = a["y"].shape[0], a["groups"], a["head_dim"]

    def run():
        u = a["y"].float() * F.silu(a["z"].float())
        u = u.view(R, -1, G, P)
        u = u * torch.rsqrt(u.square().mean((1, 3), keepdim=True) + a["eps"])
        a["out"][:] = u.view(R, -1) * a["weight"]

    return run


def kv_append(a: Arguments) -> Peer:
    """Advanced indexing into the pages."""
    page, place = a["slot_mapping"].long() // 64, a["slot_mapping"].long() % 64
    R, (_, Hkv, _, K) = len(page), a["k_pages"].shape

    def run():
        a["k_pages"][page, :, place] = a["k"].view(R, Hkv, K)
        a["v_pages"][page, :, place] = a["v"].view(R, Hkv, K)

    return run


def _sequence(a: Arguments, s: int, tokens: int) -> list[torch.Tensor]:
    """Keys and values of a sequence as scaled_dot_product_attention wants them, [1, Hkv, n, K]."""
    pages = a["page_table"][s, : ceil_div(tokens, PAGE)].long()
    return [
        a[name][pages].transpose(0, 1).flatten(1, 2)[None, :, :tokens].contiguous()
        for name in ("k_pages", "v_pages")
    ]


def _queries(a: Arguments, first: int, n: int) -> torch.Tensor:
    """Rows of q as [1, Hq, n, K], the heads of one KV head side by side."""
    Hkv, K = a["k_pages"].shape[1], a["k_pages"].shape[3]
    q = a["q"][first : first + n].reshape(n, -1, Hkv, K)
    return q.permute(2, 1, 0, 3).reshape(1, -1, n, K).contiguous()


def _write_heads(a: Arguments, first: int, out: torch.Tensor) -> None:
    Hkv, n = a["k_pages"].shape[1], out.shape[2]
    out = out.view(Hkv, -1, n, out.shape[3]).permute(2, 1, 0, 3)
    a["out"][first : first + n] = out.reshape(n, -1)


def attention_decode(a: Arguments) -> Peer:
    """scaled_dot_product_attention over keys and values that already lie side by side."""
    lengths = a["lengths"].tolist()
    together = len(set(lengths)) == 1
    kv = [_sequence(a, s, n) for s, n in enumerate(lengths)]
    q = [_queries(a, s, 1) for s in range(len(lengths))]
    if together:
        kv, q = [[torch.cat(x) for x in zip(*kv)]], [torch.cat(q)]

    def run():
        for i, (one, (k, v)) in enumerate(zip(q, kv)):
            out = F.scaled_dot_product_attention(one, k, v, scale=a["scale"], enable_gqa=True)
            for s in range(out.shape[0]):
                _write_heads(a, i + s, out[s : s + 1])

    return run


def attention_prefill(a: Arguments) -> Peer:
    """scaled_dot_product_attention, causal, over keys and values that already lie side by side."""
    cu, jobs = a["cu_seqlens"].tolist(), []
    for s, before in enumerate(a["context"].tolist()):
        n = cu[s + 1] - cu[s]
        mask = None if before == 0 else torch.ones(n, before + n, dtype=torch.bool).tril(before)
        jobs.append((cu[s], _queries(a, cu[s], n), *_sequence(a, s, before + n), mask))

    def run():
        for first, q, k, v, mask in jobs:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=a["scale"], enable_gqa=True
            )
            _write_heads(a, first, out)

    return run


def moe_route(a: Arguments) -> Peer:
    """F.linear, sigmoid, topk, gather, in float32."""

    def run():
        score = F.linear(a["x"].float(), a["gate"]).sigmoid()
        a["ids"][:] = chosen = (score + a["bias"]).topk(a["ids"].shape[1]).indices
        weights = score.gather(1, chosen)
        a["weights"][:] = weights / (weights.sum(1, keepdim=True) + 1e-20) * a["scaling_factor"]

    return run


def nvfp4_quantize(a: Arguments) -> Peer:
    """Whole-tensor operations in the order of the definition."""
    return _quantizer("nvfp4_quantize", a)


def fp8_quantize(a: Arguments) -> Peer:
    """A division and a cast."""
    return _quantizer("fp8_quantize", a)


def _quantizer(name: str, a: Arguments) -> Peer:
    def run():
        for output, value in registry()[name].reference(a).items():
            a[output][:] = value

    return run


def moe_matmul(a: Arguments) -> Peer:
    """A loop over the experts that rows name: gather, two F.linear, index_add."""
    up, down = (plain_weights(a, name, a["x"].dtype) for name in ("up", "down"))

    def run():
        total = torch.zeros(a["out"].shape)
        for e in a["ids"].unique().tolist():
            rows, place = (a["ids"] == e).nonzero(as_tuple=True)
            middle = F.relu(F.linear(a["x"][rows], up[e])).square()
            y = F.linear(middle, down[e]) * a["weights"][rows, place, None]
            total.index_add_(0, rows, y.float())
        a["out"][:] = total + a["shared"]

    return run


def sample(a: Arguments) -> Peer:
    """Division, topk and a sort for top_p, then argmax over exponential noise."""
    cut, k = bool((a["top_p"] < 1).any()), int(a["top_k"].max())

    def run():
        z = a["logits"] / a["temperature"][:, None]
        if cut:
            values, ids = z.topk(k)  # descending, so that top_p needs no further sort
            p = values.softmax(-1)
            p = p.where(p.cumsum(-1) - p < a["top_p"][:, None], 0.0)
        else:
            p, ids = z.softmax(-1), None
        best = (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True)
        a["ids"][:] = (best if ids is None else ids.gather(1, best)).flatten()

    return run


def softmax_stats(a: Arguments) -> Peer:
    """Division, log_softmax, and sums over it."""

    def run():
        z = a["logits"] / a["temperature"][:, None]
        logp = z.log_softmax(-1)
        a["log_sum"][:] = z[:, 0] - logp[:, 0]
        a["entropy"][:] = -(logp.exp() * logp).sum(-1)

    return run


PEERS: dict[str, Callable[[Arguments], Peer]] = {
    f.__name__: f
    for f in (
        embed,
        rms_norm,
        matmul,
        causal_conv,
        ssm_step,
        ssm_scan,
        gated_norm,
        mamba_step,
        kv_append,
        attention_decode,
        attention_prefill,
        moe_route,
        moe_matmul,
        sample,
        softmax_stats,
        nvfp4_quantize,
        fp8_quantize,
    )
}
