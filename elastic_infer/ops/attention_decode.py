"""attention_decode: one query token per sequence against its paged cache."""

from __future__ import annotations

import torch

from .. import _C
from ..rounding import ceil_div
from ._spec import Arguments, Case, OpSpec, draw_widths, randn
from .kv_append import PAGE, from_codes, kv_itemsize, to_codes

NAN_CODE = 0x7F


def attention_decode(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    out: torch.Tensor,
    *,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    seq_width: torch.Tensor | None = None,
    q_sizes: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    run=None,
) -> torch.Tensor:
    """``out[s, n] = softmax(scale * q[s, n] @ keys.T) @ values`` over the first ``lengths[s]``
    tokens of sequence s; query head n uses KV head ``n % Hkv``.

    Args:
        q: [S, Hq*K] float32 or bfloat16; Hq a multiple of Hkv, K of 16.
        k_pages: [pages, Hkv, 64, K], dtype of `q` or uint8 (E4M3, see `kv_append`), contiguous.
            Nothing beyond a sequence's length is read.
        v_pages: as `k_pages`.
        out: [S, Hq*K], dtype of `q`: exact zero for inactive heads and sequences of length 0.
        page_table: [S, P] int32: token j of sequence s is in page ``page_table[s, j // 64]`` at
            offset ``j % 64``. Entries that the length does not need are never read.
        lengths: [S] int32 tokens in the cache, the current one included; 0 for a padding row.
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

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax"; splits of the keys
    as in Dao et al., "Flash-Decoding", at fixed places so that bits never depend on the batch.
    """
    _C.attention_decode(
        q,
        k_pages,
        v_pages,
        out,
        page_table,
        lengths,
        scale,
        seq_width,
        q_sizes,
        k_scale,
        v_scale,
        run,
    )
    return out


def active_heads(a: Arguments, s: int) -> int:
    """Active query heads of sequence s."""
    if a["seq_width"] is None:
        return a["q"].shape[1] // a["k_pages"].shape[3]
    return int(a["q_sizes"][int(a["seq_width"][s])])


def cached(a: Arguments, name: str, s: int, tokens: int) -> torch.Tensor:
    """The first `tokens` keys or values of sequence s, [tokens, Hkv, K]."""
    table = a["page_table"][s, : ceil_div(tokens, PAGE)].long()
    found = a[name][table].transpose(1, 2).flatten(0, 1)[:tokens]
    if found.dtype != torch.uint8:
        return found
    return from_codes(
        found, a[f"{name[0]}_scale"], torch.promote_types(a["q"].dtype, torch.float32)
    )


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """One token's attention in float32 or wider: q [heads, K], k and v [tokens, Hkv, K]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    heads = torch.arange(q.shape[0]) % k.shape[1]
    scores = torch.einsum("nk,jnk->nj", q.to(wide), k[:, heads].to(wide)) * scale
    return torch.einsum("nj,jnk->nk", scores.softmax(-1), v[:, heads].to(wide)).to(q.dtype)


def sliced_heads(a: Arguments, s: int, cut: Arguments) -> tuple[Arguments, int]:
    """(arguments of sequence s alone with its active heads only, their columns); 0 columns where
    they are no whole groups of heads, which no slice keeps."""
    heads, (Hkv, K) = active_heads(a, s), (a["k_pages"].shape[i] for i in (1, 3))
    if heads % Hkv:
        return cut, 0
    q = cut["q"][:, : heads * K].contiguous()
    return cut | {"q": q, "out": torch.empty_like(q), "seq_width": None, "q_sizes": None}, heads * K


def draw_cache(
    generator: torch.Generator,
    tokens: list[int],
    Hkv: int,
    K: int,
    dtype: torch.dtype,
    kv: str | None,
) -> Arguments:
    """k_pages, v_pages and page_table for sequences of the given lengths, pages in shuffled order,
    unneeded entries -1; with `kv` "fp8" pages of E4M3 codes, and their scales."""
    needed = [ceil_div(n, PAGE) for n in tokens]
    order = torch.randperm(sum(needed) + 2, generator=generator).to(torch.int32)
    table = torch.full((len(tokens), max(needed) + 1), -1, dtype=torch.int32)
    at = 0
    for s, n in enumerate(needed):
        table[s, :n] = order[at : at + n]
        at += n
    shape = (len(order), Hkv, PAGE, K)
    pages = {name: randn(generator, *shape, dtype=dtype) for name in ("k_pages", "v_pages")}
    if kv == "fp8":
        scales = {"k_scale": 0.37, "v_scale": 0.05}
        pages = {name: to_codes(x, scales[f"{name[0]}_scale"]) for name, x in pages.items()}
        pages |= scales
    return pages | {"page_table": table}


def poison_cache(a: Arguments, tokens: list[int]) -> None:
    """NaN into every place of the pages that no sequence's first tokens occupy."""
    used = torch.zeros(a["k_pages"].shape[0], PAGE, dtype=torch.bool)
    for s, n in enumerate(tokens):
        for p in range(ceil_div(n, PAGE)):
            used[int(a["page_table"][s, p]), : min(PAGE, n - p * PAGE)] = True
    for name in ("k_pages", "v_pages"):
        a[name].transpose(1, 2)[~used] = NAN_CODE if a[name].dtype == torch.uint8 else torch.nan


def _reference(a: Arguments) -> dict[str, torch.Tensor]:
    out = torch.zeros_like(a["out"])
    K = a["k_pages"].shape[3]
    for s, n in enumerate(a["lengths"].tolist()):
        heads = active_heads(a, s)
        if n and heads:
            q = a["q"][s, : heads * K].view(heads, K)
            k, v = cached(a, "k_pages", s, n), cached(a, "v_pages", s, n)
            out[s, : heads * K] = attend(q, k, v, a["scale"]).flatten()
    return {"out": out}


def _cases():
    yield {"lengths": (1,), "Hq": 1, "Hkv": 1, "K": 16, "widths": None}
    yield {"lengths": (65, 0, 7, 64, 130), "Hq": 6, "Hkv": 2, "K": 48, "widths": (2, 4, 6)}
    yield {
        "lengths": (65, 0, 7, 64, 130),
        "Hq": 6,
        "Hkv": 2,
        "K": 48,
        "widths": (2, 4, 6),
        "kv": "fp8",
    }
    yield {"lengths": (1100,), "Hq": 12, "Hkv": 1, "K": 80, "widths": None}
    yield {"lengths": (513, 1025), "Hq": 54, "Hkv": 2, "K": 32, "widths": (0, 52)}
    yield {"lengths": (512,), "Hq": 16, "Hkv": 2, "K": 128, "widths": None, "bench": True}
    yield {"lengths": (512,) * 8, "Hq": 16, "Hkv": 2, "K": 128, "widths": None, "bench": True}
    yield {"lengths": (16384,), "Hq": 32, "Hkv": 2, "K": 128, "widths": None, "bench": True}


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    lengths, widths = list(case["lengths"]), case["widths"]
    S, Hq, K = len(lengths), case["Hq"], case["K"]
    cache = draw_cache(generator, lengths, case["Hkv"], K, dtype, case.get("kv"))
    return cache | {
        "q": randn(generator, S, Hq * K + 32, dtype=dtype, scale=2.0)[:, : Hq * K],
        "out": torch.empty(S, Hq * K, dtype=dtype),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        "scale": K**-0.5,
        "seq_width": draw_widths(generator, S, len(widths), sort=False) if widths else None,
        "q_sizes": torch.tensor(widths, dtype=torch.int32) if widths else None,
    }


def _call(a: Arguments, run) -> None:
    attention_decode(run=run, **a)


def _poison(a: Arguments) -> None:
    lengths = a["lengths"].tolist()
    poison_cache(a, lengths)
    K = a["k_pages"].shape[3]
    for s, n in enumerate(lengths):
        a["q"][s, active_heads(a, s) * K if n else 0 :] = float("nan")


def _sliced(a: Arguments):
    for s in range(len(a["lengths"])):
        cut, columns = sliced_heads(a, s, _row(a, s)[0])
        if columns:
            yield cut, {"out": ((s, slice(columns)), (0,))}


def _row(a: Arguments, s: int):
    one = dict(a)
    for name in ("q", "out", "page_table", "lengths", "seq_width"):
        one[name] = None if a[name] is None else a[name][s : s + 1].clone()
    return one, {"out": ((s,), (0,))}


def _cost(case: Case, itemsize: int) -> tuple[int, int]:
    tokens, heads = sum(case["lengths"]), case["Hq"]
    cache = 2 * tokens * case["Hkv"] * case["K"] * kv_itemsize(case, itemsize)
    rows = 2 * len(case["lengths"]) * heads * case["K"] * itemsize
    return cache + rows, 4 * tokens * heads * case["K"]


SPECS = [
    OpSpec(
        name="attention_decode",
        call=_call,
        reference=_reference,
        cases=_cases,
        inputs=_inputs,
        outputs=("out",),
        cost=_cost,
        poison=_poison,
        sliced=_sliced,
        row=_row,
        rows=lambda a: a["q"].shape[0],
    )
]
