"""kv_append: keys and values of new tokens into the paged cache."""

from __future__ import annotations

import torch

from .. import _C
from ._spec import Arguments, Case, OpSpec, randn

PAGE = 64  # tokens of one page


def kv_append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    *,
    slot_mapping: torch.Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    run=None,
) -> None:
    """``k_pages[slot // 64, h, slot % 64] = k[r, h*K : (h+1)*K]``, and v alike, where slot is
    ``slot_mapping[r]``; a row with slot -1 is skipped.

    Pages of uint8 hold 8-bit floats (E4M3, `torch.float8_e4m3fn` viewed as uint8): ``k / k_scale``,
    divided in float32, rounded to nearest with ties to even; beyond 448 becomes 448, NaN stays NaN.

    Args:
        k: [R, Hkv*K] float32 or bfloat16, rows dense (a view into a wider matrix will do).
        v: as `k`.
        k_pages: [pages, Hkv, 64, K], dtype of `k` or uint8 (E4M3), contiguous; updated in place.
        v_pages: as `k_pages`.
        slot_mapping: [R] int32 ``page * 64 + offset``, each at most once, or -1.
        k_scale: factor above 0 of the codes of E4M3 pages; 1 for other pages.
        v_scale: as `k_scale`.
        run: None, a Pool or a Step.

    Raises:
        ValueError: names the argument that has the wrong shape, dtype, stride or value; a slot
            outside the pages is found at the call, or at the replay of a recorded call.
    """
    _C.kv_append(k, v, k_pages, v_pages, slot_mapping, k_scale, v_scale, run)


def to_codes(x: torch.Tensor, scale: float) -> torch.Tensor:
    """E4M3 codes (uint8) of x / scale."""
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)


def from_codes(codes: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Values of E4M3 codes."""
    return codes.view(torch.float8_e4m3fn).to(dtype) * scale


def _reference(a: Arguments) -> dict[str, torch.Tensor]:
    done = {}
    for name in ("k", "v"):
        pages = a[f"{name}_pages"].clone()
        for r, slot in enumerate(a["slot_mapping"].tolist()):
            if slot >= 0:
                row = a[name][r].view(pages.shape[1], pages.shape[3])
                if pages.dtype == torch.uint8:
                    row = to_codes(row, a[f"{name}_scale"])
                pages[slot // PAGE, :, slot % PAGE] = row
        done[f"{name}_pages"] = pages
    return done


def _cases():
    yield {"R": 1, "pages": 1, "Hkv": 1, "K": 16, "skip": 0}
    yield {"R": 7, "pages": 3, "Hkv": 2, "K": 48, "skip": 2}
    yield {"R": 9, "pages": 3, "Hkv": 2, "K": 48, "skip": 2, "kv": "fp8"}
    yield {"R": 300, "pages": 6, "Hkv": 3, "K": 32, "skip": 9}
    yield {"R": 64, "pages": 256, "Hkv": 2, "K": 128, "skip": 0, "bench": True}


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    R, pages, Hkv, K = case["R"], case["pages"], case["Hkv"], case["K"]
    slots = torch.randperm(pages * PAGE, generator=generator)[:R].to(torch.int32)
    slots[torch.randperm(R, generator=generator)[: case["skip"]]] = -1
    packed = randn(generator, R, 2 * Hkv * K, dtype=dtype)  # k | v, as a projection leaves them
    a = {
        "k": packed[:, : Hkv * K],
        "v": packed[:, Hkv * K :],
        "k_pages": randn(generator, pages, Hkv, PAGE, K, dtype=dtype),
        "v_pages": randn(generator, pages, Hkv, PAGE, K, dtype=dtype),
        "slot_mapping": slots,
    }
    if case.get("kv") == "fp8":
        packed[0, :4] = torch.tensor([448.0, 1e6, -300.0, 0.004])  # saturated, subnormal
        a |= {"k_scale": 0.37, "v_scale": 1.0}
        for name in ("k_pages", "v_pages"):
            a[name] = to_codes(a[name], 0.02)
    return a


def _call(a: Arguments, run) -> None:
    kv_append(run=run, **a)


def _poison(a: Arguments) -> None:
    skipped = a["slot_mapping"] == -1
    a["k"][skipped] = float("nan")
    a["v"][skipped] = float("nan")


def _row(a: Arguments, r: int):
    one = dict(a)
    one |= {name: a[name][r : r + 1].clone() for name in ("k", "v", "slot_mapping")}
    one |= {name: a[name].clone() for name in ("k_pages", "v_pages")}
    slot = int(a["slot_mapping"][r])
    if slot < 0:
        return one, {}
    where = (slot // PAGE, slice(None), slot % PAGE)
    return one, {"k_pages": (where, where), "v_pages": (where, where)}


def kv_itemsize(case: Case, itemsize: int) -> int:
    """Bytes of one value of a case's pages."""
    return 1 if case.get("kv") == "fp8" else itemsize


def _cost(case: Case, itemsize: int) -> tuple[int, int]:
    moved = itemsize + kv_itemsize(case, itemsize)
    return 2 * case["R"] * case["Hkv"] * case["K"] * moved, 0


SPECS = [
    OpSpec(
        name="kv_append",
        call=_call,
        reference=_reference,
        cases=_cases,
        inputs=_inputs,
        outputs=("k_pages", "v_pages"),
        cost=_cost,
        poison=_poison,
        row=_row,
        rows=lambda a: a["k"].shape[0],
    )
]
