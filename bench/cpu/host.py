"""Cost of the host path: a model whose pass costs nothing, and everything around it.

    python -m bench.cpu.host                          # every case, writes bench/results/host.json
    python -m bench.cpu.host --rows 64 256 --cases greedy budget
    python -m bench.cpu.host --rows 256 --json        # one line of JSON with `us_per_row`

The engine is whole: requests, scheduler, batch former, tables of a pass, sampling, text, plans.
Only the kernels of a pass are left out; its logits are written once and say the same token for
every row. A figure is microseconds of CPU time (all threads) per row and pass, the median of the
runs; requests are submitted before the clock starts, and all of them run together from the first
pass to the last. The split comes from another run, whose clock around every part makes it slower:
take shares from it.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.common.commit import ROOT, commit
from elastic_infer import Engine, Plan, SamplingParams, demo_model
from elastic_infer.cache.cache import Cache
from elastic_infer.device.machine import machine, today
from elastic_infer.files.writing import write_json
from elastic_infer.model.batch import Batch, Segment, Shape, wanted_rows
from elastic_infer.model.model import Model
from elastic_infer.plans.run import PlanRun
from elastic_infer.scheduling import scheduler as scheduling
from elastic_infer.scheduling.request import Branch, Request
from elastic_infer.scheduling.sampler import Sampler
from elastic_infer.scheduling.scheduler import Scheduler

ROWS = (1, 8, 64, 256, 512, 1024)
PROMPT = "1+2=<think>"
TOKENS = 96  # of every request: few enough for 1024 rows, many enough for beginnings not to count
THINK, ANSWER = "S", "L"
WORD = "7"  # the token that every row says

# Where the time of a pass goes, by function. A call counts without the calls of others inside.
PARTS: tuple[tuple[str, Any, str], ...] = (
    ("scheduler", Scheduler, "step"),
    ("tokens", Scheduler, "_append"),
    ("tokens", Scheduler, "_decide"),
    ("batch former", Scheduler, "_form"),
    ("batch former", scheduling, "form_batch"),
    ("model", Model, "forward"),
    ("tables", Batch, "fill"),
    ("cache", Cache, "reserve"),
    ("cache", Cache, "advance"),
    ("sampling", Sampler, "draw"),
    ("text", Branch, "push_text"),
    ("streams", Branch, "emit"),
    ("plans", PlanRun, "next"),
)


def params(**changes: Any) -> SamplingParams:
    """Greedy parameters of a request that ends by its length."""
    given = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True, "seed": 1}
    return SamplingParams(**given | changes)


def switching() -> Plan:
    """A width of its own for every eight tokens."""
    return Plan.schedule([(i, "SML"[i // 8 % 3]) for i in range(0, TOKENS, 8)])


# name: (parameters, plan, whether every row has a listener)
CASES: dict[str, tuple[SamplingParams, Plan | None, bool]] = {
    "greedy": (params(), None, False),
    "sampled, log-probabilities": (
        params(temperature=1.0, top_p=0.9, top_k=20, logprobs=5),
        None,
        False,
    ),
    "stop strings": (params(stop=["\n\nUser:", "###", "<|end|>"]), None, False),
    "budget": (params(), Plan.think_answer(THINK, ANSWER, think_tokens=TOKENS // 2), False),
    "switches": (params(), switching(), False),
    "streams": (params(), None, True),
}
SHORT = {name.split(",")[0].replace(" ", "-"): name for name in CASES}


@contextmanager
def no_kernels(engine: Engine) -> Iterator[None]:
    """Inside, the passes of an engine run no kernel, and every row says WORD."""
    model = engine.core.model
    [word] = engine.tokenizer.encode(WORD, add_special_tokens=False)
    logits = torch.zeros(max(ROWS), engine.config.vocab_size)
    logits[:, word] = 30.0

    def run(
        model: Model, segments: list[Segment], shape: Shape
    ) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        rows, spans = wanted_rows(segments)
        return logits[: len(rows)], spans

    with (
        mock.patch.object(Model, "_replay", lambda model, steps: None),
        mock.patch.object(Model, "_run", run),
    ):
        model.buffers.logits.copy_(logits[: len(model.buffers.logits)])
        yield


def hold(engine: Engine, passes: float) -> None:
    """Lets so many passes run from now on."""
    worker = engine.core.worker
    engine.core.call(lambda: setattr(worker, "passes_left", passes))


def submit(engine: Engine, rows: int, case: str) -> list[Request]:
    """The requests of one run; none begins while the worker is held."""
    given, plan, _ = CASES[case]
    return [engine.submit(PROMPT, given, plan) for _ in range(rows)]


def listen(requests: list[Request]) -> list[threading.Thread]:
    """A thread for every request, which takes its tokens as they come."""
    threads = [threading.Thread(target=lambda r=r: sum(1 for _ in r)) for r in requests]
    for thread in threads:
        thread.start()
    return threads


def timed(engine: Engine, rows: int, case: str) -> tuple[float, float]:
    """One run: (CPU seconds of all threads, passes)."""
    hold(engine, 0)
    requests = submit(engine, rows, case)
    before = engine.stats()["passes"]
    threads = listen(requests) if CASES[case][2] else []
    gc.collect()
    began = time.process_time()
    hold(engine, math.inf)
    for thread in threads:
        thread.join()
    for request in requests:
        request.wait()
    return time.process_time() - began, engine.stats()["passes"] - before


class Clock:
    """Exclusive time by part, in nanoseconds. All that is timed runs on the worker's thread."""

    def __init__(self) -> None:
        self.spent: dict[str, int] = {}
        self._inside: list[int] = []

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def call(*given: Any, **named: Any) -> Any:
            began = time.perf_counter_ns()
            self._inside.append(0)
            try:
                return function(*given, **named)
            finally:
                whole, inner = time.perf_counter_ns() - began, self._inside.pop()
                self.spent[part] = self.spent.get(part, 0) + whole - inner
                if self._inside:
                    self._inside[-1] += whole

        return call


def split(engine: Engine, rows: int, case: str) -> dict[str, float]:
    """Share of every part in a run's time on the worker's thread."""
    clock = Clock()
    with ExitStack() as patches:
        for part, owner, name in PARTS:
            made = clock.around(part, getattr(owner, name))
            patches.enter_context(mock.patch.object(owner, name, made))
        timed(engine, rows, case)
    whole = sum(clock.spent.values())
    return {part: round(spent / whole, 3) for part, spent in sorted(clock.spent.items())}


def measure(engine: Engine, rows: int, case: str, runs: int) -> dict[str, Any]:
    """One row of the result."""
    timed(engine, rows, case)
    seconds = [timed(engine, rows, case)[0] for _ in range(runs)]
    us = [1e6 * s / (rows * TOKENS) for s in seconds]
    return {
        "case": case,
        "rows": rows,
        "us_per_row": round(statistics.median(us), 2),
        "us_least": round(min(us), 2),
        "us_most": round(max(us), 2),
        "split": split(engine, rows, case),
    }


def run(rows: list[int], cases: list[str], runs: int) -> dict[str, Any]:
    """Everything that the file holds."""
    about = {"commit": commit(), "date": today(), "machine": machine(), "tokens": TOKENS}
    found = []
    with (
        Engine.from_pretrained(
            demo_model(),
            device="cpu",
            threads=1,
            max_num_seqs=max(rows),
            max_model_len=TOKENS + 64,
            max_num_batched_tokens=16384,
        ) as engine,
        no_kernels(engine),
    ):
        for case in cases:
            for count in rows:
                row = measure(engine, count, case, runs)
                found.append(row)
                print(
                    f"{case:28} {count:5} rows: {row['us_per_row']:7.2f} us a row and pass",
                    file=sys.stderr,
                    flush=True,
                )
    return {**about, "rows": found}


def main() -> None:
    """Command line; prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--cases", nargs="+", choices=sorted(SHORT), default=list(SHORT))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--out", type=Path, help="default: bench/results/host.json for a full run")
    given = parser.parse_args()
    if not all(1 <= rows <= max(ROWS) for rows in given.rows):
        parser.error(f"--rows must be 1 to {max(ROWS)}, got {given.rows}")
    whole = given.rows == list(ROWS) and given.cases == list(SHORT)
    figures = run(given.rows, [SHORT[name] for name in given.cases], given.runs)
    out = given.out or (ROOT / "bench" / "results" / "host.json" if whole else None)
    if out is not None:
        write_json(out, figures)
    if given.json:
        worst = max(row["us_per_row"] for row in figures["rows"])
        print(json.dumps({"us_per_row": worst, **figures}))


if __name__ == "__main__":
    main()
