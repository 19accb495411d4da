"""One row per op and bench case: time, traffic, arithmetic, share of the roof, torch beside it.

    python -m bench.cpu.ops                       # all ops, writes bench/results/ops-cpu.json
    python -m bench.cpu.ops --only matmul --threads 1 --isa avx2 --quick

Every op runs as a recorded step, as in the engine, so weights are packed once. Us and torch take
turns, round by round; times are medians, the ratio is the median of the rounds' ratios (above one:
we are faster). Problems are rotated through copies that together exceed the caches, as the weights
of a model do; a problem too small for that (its traffic is in the row) may still be found there,
and then its share of the memory roof can pass 100 %.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.common.commit import ROOT, commit
from bench.common.pairs import UNCHECKED, compare
from bench.common.roof import roof
from bench.common.torch_peers import PEERS
from elastic_infer.codes import dtype_name
from elastic_infer.device.machine import machine, today
from elastic_infer.ops import OpSpec, Pool, Step, registry
from elastic_infer.ops._spec import Case, case_id
from elastic_infer.ops.testing.laws import copy

CACHED = 256 << 20  # bytes that no cache holds
COPIES = 2 << 30  # bytes that all copies of one problem may take


def seconds_per_call(calls: list[Callable[[], Any]], repeats: int) -> float:
    """Time of one call, over `repeats` turns through all of them."""
    begin = time.perf_counter()
    for _ in range(repeats):
        for call in calls:
            call()
    return (time.perf_counter() - begin) / (repeats * len(calls))


def time_case(
    spec: OpSpec, case: Case, dtype: torch.dtype, pool: Pool, rounds: int, least: float
) -> dict[str, float]:
    """Seconds of ours and the peer's, and their ratio.

    Args:
        rounds: timed turns of each side.
        least: seconds that a side's turn takes at least, by repeating the call.

    Returns: {"seconds", "peer_seconds", "ratio"}.
    """
    problem = spec.inputs(case, dtype, torch.Generator().manual_seed(0))
    size = sum(v.nbytes for v in problem.values() if isinstance(v, torch.Tensor))
    moved, _ = spec.cost(case, dtype.itemsize)
    copies = min(8, math.ceil(CACHED / moved), COPIES // (3 * size))
    ours, theirs = [], []
    for i in range(max(1, copies)):
        mine, other, step = copy(problem), copy(problem), Step(pool)
        spec.call(mine, step)
        peer = PEERS[spec.name](other)
        step.run(), peer()
        if i == 0 and spec.name not in UNCHECKED:
            compare(spec, mine, other, problem)
        ours.append(step.run), theirs.append(peer)
    sides = [ours, theirs]
    repeats = [math.ceil(least / (seconds_per_call(s, 1) * len(s))) for s in sides]
    taken: list[list[float]] = [[], []]
    for turn in range(rounds):
        for i in (0, 1) if turn % 2 else (1, 0):
            taken[i].append(seconds_per_call(sides[i], repeats[i]))
    return {
        "seconds": statistics.median(taken[0]),
        "peer_seconds": statistics.median(taken[1]),
        "ratio": statistics.median(b / a for a, b in zip(*taken)),
    }


def row_of(
    spec: OpSpec, case: Case, dtype: torch.dtype, times: dict[str, float], roofs: dict[str, Any]
) -> dict[str, Any]:
    """The figures of one row; the roof is whichever allows less: memory or arithmetic."""
    moved, flops = spec.cost(case, dtype.itemsize)
    kind = "bf16" if dtype == torch.bfloat16 else "fp32"
    product = max(roofs[f"{kind}_flops_s"], roofs["fp32_flops_s"])
    floors = {"read": moved / roofs["read_bytes_s"], "product": flops / product}
    limit = max(floors, key=lambda name: floors[name])
    seconds = times["seconds"]
    return {
        "op": spec.name,
        "case": case_id(case),
        "dtype": dtype_name(dtype),
        "us": round(1e6 * seconds, 2),
        "bytes": moved,
        "flops": flops,
        "gb_s": round(moved / seconds / 1e9, 2),
        "gflop_s": round(flops / seconds / 1e9, 2),
        "roof": limit,
        "percent_of_roof": round(100 * floors[limit] / seconds, 1),
        "peer": (PEERS[spec.name].__doc__ or "").strip().split("\n")[0],
        "peer_us": round(1e6 * times["peer_seconds"], 2),
        "ratio": round(times["ratio"], 3),
    }


def run(only: list[str], threads: int, isa: str, quick: bool) -> dict[str, Any]:
    """Measures roof and ops; prints each row as it comes."""
    specs = registry()
    unknown = set(only) - set(specs)
    if unknown:
        raise ValueError(f"ops: --only must be of {', '.join(specs)}, got {', '.join(unknown)}")
    about = {"date": today(), "commit": commit(), "machine": machine()}
    torch.set_num_threads(threads)
    pool = Pool(threads, isa)
    roofs = roof(threads, 0.25 if quick else 2.0)
    rows = []
    for spec in specs.values():
        if only and spec.name not in only:
            continue
        dtype = torch.bfloat16 if torch.bfloat16 in spec.dtypes else torch.float32
        for case in (c for c in spec.cases() if c.get("bench")):
            rounds, least = (3, 0.002) if quick else (15, 0.02)
            times = time_case(spec, case, dtype, pool, rounds, least)
            rows.append(row_of(spec, case, dtype, times, roofs))
            print(text(rows[-1]), flush=True)
    return {**about, "threads": threads, "kernels": pool.isa, "roof": roofs, "rows": rows}


def text(row: dict[str, Any]) -> str:
    """A row as a line of the terminal."""
    return (
        f"{row['op']:17} {row['us']:11.1f} us {row['gb_s']:7.1f} GB/s {row['gflop_s']:7.1f} GFLOP/s"
        f" {row['percent_of_roof']:6.1f} % of {row['roof']:7} {row['ratio']:6.2f}x torch  "
        f"{row['case']}"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="OP")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", default="auto", help="auto, portable, avx2 or avx512")
    parser.add_argument("--quick", action="store_true", help="fewer rounds; prints, writes nothing")
    parser.add_argument("--out", type=Path, help="default: bench/results/ops-cpu.json")
    given = parser.parse_args()
    figures = run(given.only, given.threads, given.isa, given.quick)
    whole = not given.quick and not given.only and given.isa == "auto"
    out = given.out or (ROOT / "bench/results/ops-cpu.json" if whole else None)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
