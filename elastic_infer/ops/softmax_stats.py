"""softmax_stats: log-sum-exp and entropy of rows of logits, whatever runs it."""

from __future__ import annotations

import torch

from .. import _C
from ._spec import Arguments, Case, OpSpec, randn


def softmax_stats(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    log_sum: torch.Tensor,
    entropy: torch.Tensor,
    *,
    run=None,
) -> None:
    """log_sum = logsumexp(logits / temperature) and the entropy of that softmax, row by row.

    The order of summation is fixed: bits depend on the row alone, not on threads or on the batch.
    The log-probability of token v is ``logits[r, v] / temperature[r] - log_sum[r]``.

    Args:
        logits: [R, V] float32, rows dense; -inf forbids a token.
        temperature: [R] float32, finite and above 0.
        log_sum: [R] float32, written: NaN where a row holds NaN, infinite where its largest is.
        entropy: [R] float32, written, in nats: NaN where the largest logit is not finite.
        run: None, a Pool or a Step.

    Raises:
        ValueError: names the argument that has the wrong shape, dtype, stride or value. Values
            of tables in device memory are the caller's to check.
    """
    _C.softmax_stats(logits, temperature, log_sum, entropy, run)


def _reference(a: Arguments) -> dict[str, torch.Tensor]:
    z = a["logits"] / a["temperature"][:, None]
    logp = z.log_softmax(1)
    p = logp.exp()
    entropy = -torch.where(p > 0, p * logp, torch.zeros_like(p)).sum(1)
    finite = z.max(1).values.isfinite()
    return {
        "log_sum": z.logsumexp(1),
        "entropy": entropy.masked_fill(~finite, torch.nan),
    }


def _cases():
    yield {"R": 1, "V": 1}
    yield {"R": 40, "V": 7}
    yield {"R": 12, "V": 131, "flat": True}
    yield {"R": 9, "V": 5000}
    yield {"R": 1, "V": 131072, "bench": True}
    yield {"R": 64, "V": 131072, "bench": True}


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    R, V, rows = case["R"], case["V"], torch.arange(case["R"])
    scale = 0.1 if case.get("flat") else 3.0
    logits = randn(generator, R, V + 5, dtype=dtype, scale=scale)[:, 2:-3]  # rows not packed
    if R > 8 and not case.get("bench"):
        logits[3, V // 2] = torch.nan
        logits[4] = -torch.inf
        logits[5, V - 1] = torch.inf
        logits[6, ::2] = -torch.inf
        logits[7] += 80.0
        logits[8, V // 3] += 500.0  # certain
    return {
        "logits": logits,
        "temperature": torch.tensor([0.7, 1.0, 2.5], dtype=dtype)[rows % 3],
        "log_sum": torch.empty(R, dtype=dtype),
        "entropy": torch.empty(R, dtype=dtype),
    }


def _call(a: Arguments, run) -> None:
    softmax_stats(run=run, **a)


def _row(a: Arguments, r: int):
    one = {name: value[r : r + 1].clone() for name, value in a.items()}
    return one, {name: ((r,), (0,)) for name in ("log_sum", "entropy")}


def _cost(case: Case, itemsize: int) -> tuple[int, int]:
    return case["R"] * (case["V"] * 4 + 12), case["R"] * case["V"] * 4


SPECS = [
    OpSpec(
        name="softmax_stats",
        call=_call,
        reference=_reference,
        cases=_cases,
        inputs=_inputs,
        outputs=("log_sum", "entropy"),
        cost=_cost,
        row=_row,
        rows=lambda a: len(a["log_sum"]),
        dtypes=(torch.float32,),
    )
]
