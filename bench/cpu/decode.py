"""Milliseconds per token of one sequence at every width of a benchmark model.

    python -m bench.cpu.decode --out bench/results/decode-620m.json

Tokens are random and given, as everywhere in these benchmarks: a random model that feeds on its own
tokens soon repeats itself, and repeated tokens find their experts in the processor's cache. Widths
are timed in turns, so that a change in what else the machine does meets all of them; the figure of
a width is the median of its rounds. The file is read by `elastic-infer demo` and by the README.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from bench.common.commit import ROOT, commit
from bench.common.models import MODELS, write_model
from bench.common.tokens import random_tokens
from elastic_infer import Engine
from elastic_infer.codes import dtype_name
from elastic_infer.device.machine import machine, today

PROMPT = 16  # tokens read before the timed steps


def time_steps(engine: Engine, width: str, prompt: list[int], steps: list[int]) -> float:
    """Seconds per token of reading `steps` one by one after `prompt`, each with its logits."""
    with engine.open(prompt, width=width, track=False) as sequence:
        sequence.logits()
        begin = time.perf_counter()
        for token in steps:
            sequence.append([token])
            sequence.logits()
        return (time.perf_counter() - begin) / len(steps)


def measure(engine: Engine, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """One row per width, narrow to wide: milliseconds per token and those of every round."""
    from elastic_infer.sizing.footprint import bytes_per_token

    vocabulary, weights = engine.config.vocab_size, engine.core.model.weights
    prompt = random_tokens(PROMPT, vocabulary, 0)
    seconds: dict[str, list[float]] = {name: [] for name in engine.widths}
    for turn in range(rounds + 1):
        steps = random_tokens(tokens, vocabulary, 1 + turn)
        for name in engine.widths:
            taken = time_steps(engine, name, prompt, steps)
            if turn:  # the first turn records the pass and brings the weights into memory
                seconds[name].append(taken)
    return [
        {
            "width": name,
            "ms_per_token": round(1e3 * statistics.median(taken), 4),
            "rounds_ms": [round(1e3 * t, 4) for t in taken],
            "weight_bytes_per_token": bytes_per_token(
                engine.config, engine.widths[name], weights.dtype
            ),
        }
        for name, taken in seconds.items()
    ]


def run(model: str, folder: Path, tokens: int, rounds: int, threads: int | None) -> dict[str, Any]:
    """Everything that the file holds; the model is written first where it is not there."""
    if not (folder / "config.json").is_file():
        write_model(model, folder)
    about = {"model": model, "date": today(), "commit": commit(), "machine": machine()}
    with Engine.from_pretrained(
        folder, threads=threads, max_num_seqs=1, max_model_len=PROMPT + tokens + 1
    ) as engine:
        pool = engine.core.model.pool
        about |= {
            "threads": pool.threads,
            "kernels": pool.isa,
            "dtype": dtype_name(engine.core.model.weights.dtype),
        }
        return {**about, "rows": measure(engine, tokens, rounds)}


def main() -> None:
    """Command line; prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="620m")
    parser.add_argument("--folder", type=Path, help="default: build/models/MODEL")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    folder = given.folder or ROOT / "build" / "models" / given.model
    figures = run(given.model, folder, given.tokens, given.rounds, given.threads)
    for row in figures["rows"]:
        rate = row["weight_bytes_per_token"] / row["ms_per_token"] / 1e6
        print(f"{row['width']}: {row['ms_per_token']:.2f} ms per token, {rate:.1f} GB/s of weights")
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
