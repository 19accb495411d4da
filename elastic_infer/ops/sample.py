"""sample: one token id per row of logits, repeatable whatever the batch."""

from __future__ import annotations

import torch

from .. import _C
from ..rounding import ceil_div
from ._spec import Arguments, Case, OpSpec, randn


def sample(
    logits: torch.Tensor,
    ids: torch.Tensor,
    *,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    run=None,
) -> torch.Tensor:
    """``ids[r] ~ softmax(logits[r] / temperature[r])`` cut by min_p, then top_k, then top_p; the
    largest logit (of equal ones the smallest id) where the temperature is 0.

    The draw is Gumbel-max with counter-based random numbers: it depends on the row's logits,
    parameters, seed and position alone, never on the batch.

    Args:
        logits: [R, V] float32, rows dense; -inf forbids a token.
        ids: [R] int32, written: -1 where a row holds NaN or +inf, or nothing finite.
        temperature: [R] float32 >= 0; 0 ignores every other parameter.
        top_k: [R] int32: keep the tokens at least as likely as the k-th; 0 or -1 keeps all.
        top_p: [R] float32 in (0, 1]: keep the likeliest tokens until they hold this share of the
            probability; of equally likely ones the smallest id comes first.
        min_p: [R] float32 in [0, 1]: keep tokens at least this fraction as likely as the likeliest.
        seed: [R] int64 key of the random numbers.
        position: [R] int64 number of the token within its request.
        run: None, a Pool or a Step.

    Returns:
        `ids`.

    Raises:
        ValueError: names the argument that has the wrong shape, dtype, stride or value. Values
            of tables in device memory are the caller's to check.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (Philox4x32-10); order and
    meaning of the cuts are vLLM's.
    """
    _C.sample(logits, ids, temperature, top_k, top_p, min_p, seed, position, run)
    return ids


def philox(seed: int, position: int, count: int) -> torch.Tensor:
    """[count] int64: the random words in [0, 2**32) of tokens 0 to count - 1 (csrc/ops/sample)."""
    mask = 0xFFFFFFFF

    def product(x: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
        """High and low 32 bits of x * m, without leaving int64."""
        low, high = (x & 0xFFFF) * m, (x >> 16) * m
        return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & mask

    a = torch.arange(ceil_div(count, 4), dtype=torch.int64)
    b, c, d = (torch.full_like(a, x) for x in (position & mask, position >> 32 & mask, 0))
    k0, k1 = seed & mask, seed >> 32 & mask
    for _ in range(10):
        (p_high, p_low), (q_high, q_low) = product(a, 0xD2511F53), product(c, 0xCD9E8D57)
        a, b, c, d = q_high ^ b ^ k0, q_low, p_high ^ d ^ k1, p_low
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return torch.stack([a, b, c, d], 1).flatten()[:count]


def _row_reference(a: Arguments, r: int) -> tuple[int, float]:
    """The id of row r, and how far (relative) any choice on the way was from another outcome."""
    x = a["logits"][r]
    if x.isnan().any() or not x.max().isfinite():
        return -1, 1.0
    if a["temperature"][r] == 0:
        return int((x == x.max()).nonzero()[0]), 1.0
    z = (x - x.max()) / a["temperature"][r]
    p, margins = z.exp(), [1.0]
    margins.append(float((p / a["min_p"][r].clamp(min=1e-30) - 1).abs().min()))
    z = z.masked_fill(p < a["min_p"][r], -torch.inf)
    k = int(a["top_k"][r])
    order = torch.sort(z, descending=True, stable=True).indices
    if 0 < k < len(z):
        z = z.masked_fill(z < z[order[k - 1]], -torch.inf)
    if a["top_p"][r] < 1:
        p = z.double().exp()[order]
        above = (p.cumsum(0) - p) / (p.sum() * a["top_p"][r].double())
        margins.append(100 * float((above - 1).abs().min()))  # summed in double: known better
        z[order[above >= 1]] = -torch.inf
    u = (philox(int(a["seed"][r]), int(a["position"][r]), len(z)).double() + 0.5) / 2**32
    score = z.double() - (-torch.log1p(-u)).log()
    best = score.topk(min(2, len(z))).values
    if len(best) == 2:
        margins.append(float(best[0] - best[1]))
    return int((score == score.max()).nonzero()[0]), min(margins)


def _reference(a: Arguments) -> dict[str, torch.Tensor]:
    chosen = [_row_reference(a, r)[0] for r in range(len(a["ids"]))]
    return {"ids": torch.tensor(chosen, dtype=torch.int32)}


def _cases():
    yield {"R": 1, "V": 1}
    yield {"R": 40, "V": 7}
    yield {"R": 48, "V": 131, "flat": True}
    yield {"R": 24, "V": 5000}
    yield {"R": 1, "V": 32768, "cut": False, "bench": True}
    yield {"R": 1, "V": 32768, "cut": True, "bench": True}
    yield {"R": 64, "V": 131072, "cut": True, "bench": True}


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    R, V, rows = case["R"], case["V"], torch.arange(case["R"])
    scale = 0.1 if case.get("flat") else 3.0
    logits = randn(generator, R, V + 5, dtype=dtype, scale=scale)[:, 2:-3]  # rows not packed
    a = {
        "logits": logits,
        "ids": torch.empty(R, dtype=torch.int32),
        "temperature": torch.tensor([0.7, 1.0, 0.0, 1e-3, 2.5], dtype=dtype)[rows % 5],
        "top_k": torch.tensor([0, 3, -1, 50, 1, V + 9, 20], dtype=torch.int32)[rows % 7],
        "top_p": torch.tensor([1.0, 0.9, 0.3, 1.0], dtype=dtype)[rows % 4],
        "min_p": torch.tensor([0.0, 0.05, 0.0], dtype=dtype)[rows % 3],
        "seed": torch.randint(-(2**63), 2**63 - 1, (R,), generator=generator),
        "position": torch.randint(0, 2**40, (R,), generator=generator),
    }
    if case.get("bench"):
        cut = case["cut"]
        a["temperature"].fill_(0.8), a["min_p"].zero_()
        a["top_k"].fill_(50 if cut else 0), a["top_p"].fill_(0.95 if cut else 1.0)
        return a
    if R > 8:
        logits[3, V // 2] = float("nan")
        logits[4] = -torch.inf
        logits[5, V - 1] = torch.inf
        logits[6, ::2] = -torch.inf
        logits[7] = logits[7].round()  # ties
        a["temperature"][7], logits[12] = 0.0, logits[12].round()
    for r in range(R):  # rounding alone must not change a choice
        while _row_reference(a, r)[1] < 1e-4:
            logits[r] = randn(generator, V, dtype=dtype, scale=3.0)
            a["seed"][r] += 1
    return a


def _call(a: Arguments, run) -> None:
    sample(run=run, **a)


def _row(a: Arguments, r: int):
    return {name: value[r : r + 1].clone() for name, value in a.items()}, {"ids": ((r,), (0,))}


def _cost(case: Case, itemsize: int) -> tuple[int, int]:
    return case["R"] * (case["V"] * 4 + 40), 0


SPECS = [
    OpSpec(
        name="sample",
        call=_call,
        reference=_reference,
        cases=_cases,
        inputs=_inputs,
        outputs=("ids",),
        cost=_cost,
        row=_row,
        rows=lambda a: len(a["ids"]),
        dtypes=(torch.float32,),
    )
]
