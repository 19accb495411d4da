"""attention_prefill: the tokens of a chunk of each sequence against its paged cache, causally."""

from __future__ import annotations

import torch

from .. import _C
from ._segments import offsets
from ._spec import Arguments, Case, OpSpec, draw_widths, randn
from .attention_decode import active_heads, attend, cached, draw_cache, poison_cache, sliced_heads
from .kv_append import kv_itemsize


def attention_prefill(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    out: torch.Tensor,
    *,
    page_table: torch.Tensor,
    cu_seqlens: torch.Tensor,
    context: torch.Tensor,
    scale: float,
    seq_width: torch.Tensor | None = None,
    q_sizes: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    run=None,
) -> torch.Tensor:
    """``out[t, n] = softmax(scale * q[t, n] @ keys.T) @ values`` over the tokens of t's sequence up
    to t itself, whose keys and values are in the cache already; query head n uses KV head
    ``n % Hkv``.

    Key tiles are pages and blocks of queries lie within one page, both at absolute positions, so
    where a prompt is cut into chunks changes no bit.

    Args:
        q: [T, Hq*K] float32 or bfloat16; Hq a multiple of Hkv, K of 16.
        k_pages: [pages, Hkv, 64, K], dtype of `q` or uint8 (E4M3, see `kv_append`), contiguous.
            Nothing beyond a sequence's last token is read.
        v_pages: as `k_pages`.
        out: [T, Hq*K], dtype of `q`: exact zero for inactive heads; rows from ``cu_seqlens[S]`` on
            stay as they are.
        page_table: [S, P] int32: token j of sequence s is in page ``page_table[s, j // 64]`` at
            offset ``j % 64``. Entries that are not needed are never read.
        cu_seqlens: [S+1] int32; sequence s owns rows cu_seqlens[s] to cu_seqlens[s + 1] of `q`.
        context: [S] int32 tokens of each sequence in the cache before this chunk.
        scale: multiplies the scores.
        seq_width: [S] int32 index of each sequence's width, or None for all heads.
        q_sizes: [W] int32 active query heads of each width.
        k_scale: factor of the codes of E4M3 pages; 1 for other pages.
        v_scale: as `k_scale`.
        run: None, a Pool or a Step.

    Returns:
        `out`.

    Raises:
        ValueError: names the argument that has the wrong shape, dtype, stride or value. Values
            of tables in device memory are the caller's to check.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax"; Dao et al.,
    "FlashAttention"; pages as in Kwon et al., "PagedAttention".
    """
    _C.attention_prefill(
        q,
        k_pages,
        v_pages,
        out,
        page_table,
        cu_seqlens,
        context,
        scale,
        seq_width,
        q_sizes,
        k_scale,
        v_scale,
        run,
    )
    return out


def _tokens(a: Arguments) -> list[int]:
    """Tokens of each sequence in the cache, its chunk included; 0 where the chunk is empty."""
    return [
        n + before if n else 0
        for n, before in zip(a["cu_seqlens"].diff().tolist(), a["context"].tolist())
    ]


def _chunks(a: Arguments):
    """(sequence, first row, tokens of the chunk, tokens before it)."""
    cu = a["cu_seqlens"].tolist()
    for s, before in enumerate(a["context"].tolist()):
        yield s, cu[s], cu[s + 1] - cu[s], before


def _reference(a: Arguments) -> dict[str, torch.Tensor]:
    out, K = a["out"].clone(), a["k_pages"].shape[3]
    for s, first, n, before in _chunks(a):
        heads = active_heads(a, s)
        k, v = (cached(a, name, s, before + n) for name in ("k_pages", "v_pages"))
        for i in range(n):
            seen = before + i + 1
            out[first + i] = 0
            if heads:
                q = a["q"][first + i, : heads * K].view(heads, K)
                out[first + i, : heads * K] = attend(q, k[:seen], v[:seen], a["scale"]).flatten()
    return {"out": out}


def _cases():
    base = {"Hkv": 2, "K": 48, "widths": None}
    yield {**base, "tokens": (1,), "context": (0,), "Hq": 1, "Hkv": 1, "K": 16}
    yield {
        **base,
        "tokens": (5, 0, 70, 1),
        "context": (0, 9, 61, 128),
        "Hq": 6,
        "widths": (2, 4, 6),
    }
    yield {
        **base,
        "tokens": (5, 0, 70, 1),
        "context": (0, 9, 61, 128),
        "Hq": 6,
        "widths": (2, 4, 6),
        "kv": "fp8",
    }
    yield {**base, "tokens": (130,), "context": (64,), "Hq": 8, "Hkv": 1, "K": 80}
    yield {**base, "tokens": (65, 3), "context": (0, 700), "Hq": 54, "K": 32, "widths": (0, 52)}
    bench = {"Hq": 16, "Hkv": 2, "K": 128, "widths": None, "bench": True}
    yield {**bench, "tokens": (256,), "context": (0,)}
    yield {**bench, "tokens": (1024,), "context": (0,)}
    yield {**bench, "tokens": (256,), "context": (4096,)}


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    tokens, context, widths = list(case["tokens"]), list(case["context"]), case["widths"]
    S, T, Hq, K = len(tokens), sum(tokens), case["Hq"], case["K"]
    cache = [n + before if n else 0 for n, before in zip(tokens, context)]
    pages = draw_cache(generator, cache, case["Hkv"], K, dtype, case.get("kv"))
    return pages | {
        "q": randn(generator, T + 2, Hq * K + 32, dtype=dtype, scale=2.0)[:, : Hq * K],
        "out": randn(generator, T + 2, Hq * K, dtype=dtype),
        "cu_seqlens": offsets(tokens),
        "context": torch.tensor(context, dtype=torch.int32),
        "scale": K**-0.5,
        "seq_width": draw_widths(generator, S, len(widths), sort=False) if widths else None,
        "q_sizes": torch.tensor(widths, dtype=torch.int32) if widths else None,
    }


def _call(a: Arguments, run) -> None:
    attention_prefill(run=run, **a)


def _poison(a: Arguments) -> None:
    poison_cache(a, _tokens(a))
    kept = torch.zeros(a["q"].shape, dtype=torch.bool)
    for s, first, n, _ in _chunks(a):
        kept[first : first + n, : active_heads(a, s) * a["k_pages"].shape[3]] = True
    a["q"][~kept] = float("nan")


def _sliced(a: Arguments):
    for s, first, n, _ in _chunks(a):
        cut, columns = sliced_heads(a, s, _row(a, s)[0])
        if n and columns:
            yield cut, {"out": ((slice(first, first + n), slice(columns)), ...)}


def _row(a: Arguments, s: int):
    first, end = a["cu_seqlens"][s : s + 2].tolist()
    one = dict(a)
    for name in ("page_table", "context", "seq_width"):
        one[name] = None if a[name] is None else a[name][s : s + 1].clone()
    for name in ("q", "out"):
        one[name] = a[name][first:end].clone()
    one["cu_seqlens"] = offsets([end - first])
    return one, {"out": (slice(first, end), ...)}


def _cost(case: Case, itemsize: int) -> tuple[int, int]:
    width = case["Hq"] * case["K"]
    chunks = list(zip(case["tokens"], case["context"]))
    read = 2 * case["Hkv"] * case["K"] * kv_itemsize(case, itemsize)
    cache = read * sum(n + before for n, before in chunks)
    pairs = sum(n * before + n * (n + 1) // 2 for n, before in chunks)
    return cache + 2 * sum(case["tokens"]) * width * itemsize, 4 * pairs * width


SPECS = [
    OpSpec(
        name="attention_prefill",
        call=_call,
        reference=_reference,
        cases=_cases,
        inputs=_inputs,
        outputs=("out",),
        cost=_cost,
        poison=_poison,
        sliced=_sliced,
        row=_row,
        rows=lambda a: len(a["context"]),
    )
]
