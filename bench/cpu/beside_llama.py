"""The 620M model beside llama.cpp in one run: decode, prefill, mixed widths, switches, batches.

    python -m bench.cpu.beside_llama --threads 2 --out bench/results/compare-620m.json

Both libraries hold the same weights in bf16. Every figure with a peer comes from interleaved pairs
(`llama/process.py`); figures without one come from turns that are interleaved in the same way.
Medians decide; the fastest runs are given too, since on a shared machine they say what the code can
do when it is left alone. The streaming-read rate moves with what else the machine does, so it is
measured in turns with the decode that is given as a share of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bench.common.commit import ROOT, commit
from bench.common.models import MODELS, write_model
from bench.common.roof import read_rate
from bench.common.tokens import random_tokens
from bench.cpu.decode import PROMPT
from bench.llama.convert import convert
from bench.llama.process import Peer, interleave
from elastic_infer import Engine
from elastic_infer.device.machine import available_cpus, machine, today
from elastic_infer.model.batch import Segment
from elastic_infer.sizing.footprint import bytes_per_token

PREFILL = (256, 1024)
BATCHES = (1, 8, 64)


class Ours:
    """The library's passes, timed: `Model.forward` is what the engine's scheduler calls."""

    def __init__(self, engine: Engine):
        self.engine, self.model, self.cache = engine, engine.core.model, engine.core.model.cache

    @contextmanager
    def sequences(self, prompts: list[list[int]], widths: list[str], track: bool) -> Iterator[list]:
        """Open sequences that have read their prompts."""
        opened = [self.cache.open(track=track) for _ in prompts]
        try:
            for sequence, prompt, width in zip(opened, prompts, widths):
                if prompt:
                    self.model.forward([Segment(sequence, prompt, width, "prefill", "none")])
            yield opened
        finally:
            for sequence in opened:
                self.cache.close(sequence)

    def prefill(self, tokens: list[int], width: str) -> float:
        """Seconds of one pass over a new sequence, with the logits of its last token."""
        with self.sequences([[]], [width], False) as (sequence,):
            begin = time.perf_counter()
            self.model.forward([Segment(sequence, tokens, width, "prefill", "last")])
            return time.perf_counter() - begin

    def decode(self, prompts: list[list[int]], widths: list[str], steps: list[int]) -> float:
        """Seconds of reading `steps` one by one after each prompt, all sequences in one batch;
        every sequence reads another token."""
        vocabulary = self.engine.config.vocab_size
        with self.sequences(prompts, widths, False) as opened:
            begin = time.perf_counter()
            for token in steps:
                self.model.forward(
                    [
                        Segment(sequence, [(token + 101 * i) % vocabulary], width)
                        for i, (sequence, width) in enumerate(zip(opened, widths))
                    ]
                )
            return time.perf_counter() - begin

    def alternating(self, prompt: list[int], widths: list[str], steps: list[int]) -> list[float]:
        """Seconds of each step of one tracked sequence whose step i runs at widths[i]."""
        with self.sequences([prompt], widths[:1], True) as (sequence,):
            seconds = []
            for token, width in zip(steps, widths):
                begin = time.perf_counter()
                self.model.forward([Segment(sequence, [token], width)])
                seconds.append(time.perf_counter() - begin)
            return seconds


def turns(cases: dict[str, Callable[[], float]], count: int) -> dict[str, list[float]]:
    """Seconds of every case, taken in turns, after one untimed turn."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(count + 1):
        for name, case in cases.items():
            seconds = case()
            if turn:
                taken[name].append(seconds)
    return taken


def state_bytes(engine: Engine, width: str) -> int:
    """Bytes of recurrent state that one token reads and writes at a width."""
    config = engine.config
    per_head = config.mamba_head_dim * config.ssm_state_size * 4
    heads = (engine.widths[width].mamba_num_heads[i] for i in config.layers_of("M"))
    return sum(2 * n * per_head for n in heads)


def paired(row: dict[str, Any], count: int) -> dict[str, Any]:
    """Rates and ratios of one interleaved pair of cases that read `count` tokens."""
    best = [min(pair[i] for pair in row["pairs"]) for i in (0, 1)]
    return {
        "tokens_s": count / row["ours_s"],
        "peer_tokens_s": count / row["theirs_s"],
        "ratio": row["ratio"],
        "best_tokens_s": count / best[0],
        "peer_best_tokens_s": count / best[1],
        "best_ratio": best[1] / best[0],
        "pairs": [[round(t, 6) for t in pair] for pair in row["pairs"]],
    }


def with_peer(ours: Ours, peer: Peer, tokens: int, pairs: int) -> dict[str, Any]:
    """Decode and prefill of one sequence at the full width, beside llama.cpp."""
    widest = list(ours.engine.widths)[-1]
    prompt, steps = random_tokens(PROMPT, peer.vocab, 0), random_tokens(tokens, peer.vocab, 1)
    found = {
        "decode": paired(
            interleave(
                lambda: ours.decode([prompt], [widest], steps),
                lambda: peer.decode(prompt, steps),
                pairs,
            ),
            tokens,
        )
    }
    for length in PREFILL:
        long = random_tokens(length, peer.vocab, length)
        found[f"prefill {length}"] = paired(
            interleave(partial(ours.prefill, long, widest), partial(peer.prefill, long), pairs),
            length,
        )
    return found


def by_width(ours: Ours, tokens: int, count: int, threads: int) -> list[dict[str, Any]]:
    """Decode of one sequence at every width, with the bytes that a token moves and their rate as a
    share of the streaming-read rate of the same turn (median over turns)."""
    engine, vocabulary = ours.engine, ours.engine.config.vocab_size
    prompt, steps = random_tokens(PROMPT, vocabulary, 0), random_tokens(tokens, vocabulary, 2)
    cases = {n: partial(ours.decode, [prompt], [n], steps) for n in engine.widths}
    reads = "streaming reads"
    taken = turns({reads: lambda: 1.0 / read_rate(threads, 0.5, 2), **cases}, count)
    roofs = [1.0 / seconds for seconds in taken.pop(reads)]
    rows = []
    for name, seconds in taken.items():
        weights = bytes_per_token(engine.config, engine.widths[name], ours.model.weights.dtype)
        moved = weights + state_bytes(engine, name)
        shares = [tokens * moved / s / roof for s, roof in zip(seconds, roofs)]
        rows.append(
            {
                "width": name,
                "tokens_s": tokens / statistics.median(seconds),
                "best_tokens_s": tokens / min(seconds),
                "bytes": moved,
                "weight_bytes": weights,
                "share_of_roof": statistics.median(shares),
                "read_bytes_s": statistics.median(roofs),
            }
        )
    return rows


def mixed(ours: Ours, tokens: int, count: int) -> dict[str, Any]:
    """A batch with two rows of every width beside the same batch all at the widest."""
    names = list(ours.engine.widths)
    vocabulary = ours.engine.config.vocab_size
    prompts = [random_tokens(PROMPT, vocabulary, 10 + i) for i in range(2 * len(names))]
    steps = random_tokens(tokens, vocabulary, 3)
    taken = turns(
        {
            "mixed": lambda: ours.decode(prompts, names * 2, steps),
            "widest": lambda: ours.decode(prompts, names[-1:] * len(prompts), steps),
        },
        count,
    )
    ratios = [m / w for m, w in zip(taken["mixed"], taken["widest"])]
    return {
        "rows": len(prompts),
        "ratio": statistics.median(ratios),
        "best_ratio": min(taken["mixed"]) / min(taken["widest"]),
        "ms": {n: 1e3 * statistics.median(t) / tokens for n, t in taken.items()},
    }


def switches(ours: Ours, tokens: int) -> dict[str, Any]:
    """Steps right after a switch beside steps at the same width without one: widths change every
    third step, so that both kinds come in turns."""
    names = list(ours.engine.widths)
    ends, vocabulary = (names[0], names[-1]), ours.engine.config.vocab_size
    order = [ends[i // 3 % 2] for i in range(6 * tokens)]
    seconds = ours.alternating(
        random_tokens(PROMPT, vocabulary, 0), order, random_tokens(len(order), vocabulary, 4)
    )
    found = {}
    for name in ends:
        steps = [i for i in range(3, len(order)) if order[i] == name]
        after = statistics.median(seconds[i] for i in steps if i % 3 == 0)
        steady = statistics.median(seconds[i] for i in steps if i % 3 == 2)
        found[f"to {name}"] = {
            "ms_after": 1e3 * after,
            "ms_steady": 1e3 * steady,
            "ratio": after / steady,
        }
    return found


def batches(ours: Ours, tokens: int, count: int) -> list[dict[str, Any]]:
    """Tokens per second of batches at the widest width."""
    widest, vocabulary = list(ours.engine.widths)[-1], ours.engine.config.vocab_size
    steps, found = random_tokens(tokens, vocabulary, 5), []
    for size in BATCHES:
        prompts = [random_tokens(PROMPT, vocabulary, 20 + i) for i in range(size)]
        case = {"batch": lambda p=prompts: ours.decode(p, [widest] * len(p), steps)}
        seconds = turns(case, count)["batch"]
        found.append(
            {
                "sequences": size,
                "tokens_s": size * tokens / statistics.median(seconds),
                "best_tokens_s": size * tokens / min(seconds),
            }
        )
    return found


def run(folder: Path, threads: int, tokens: int, pairs: int) -> dict[str, Any]:
    """Everything that the file holds."""
    about = {
        "model": folder.name,
        "date": today(),
        "commit": commit(),
        "machine": machine(),
        "threads": threads,
        "peer": "llama.cpp bf16",
        "load": os.getloadavg()[0],
    }
    with Engine.from_pretrained(
        folder,
        threads=threads,
        max_model_len=2048,
        max_num_seqs=max(BATCHES),
        kv_cache_memory_bytes=1 << 30,
    ) as engine:
        ours = Ours(engine)
        with Peer(convert(folder, "bf16"), threads, max(PREFILL)) as peer:
            beside = with_peer(ours, peer, tokens, pairs)
        found = {
            "with_peer": beside,
            "widths": by_width(ours, tokens, pairs, threads),
            "mixed": mixed(ours, max(4, tokens // 4), pairs),
            "switches": switches(ours, tokens),
            "batches": batches(ours, max(4, tokens // 4), max(2, pairs // 3)),
        }
    return {**about, **found}


def table(figures: dict[str, Any]) -> Iterator[str]:
    """The lines that the command prints."""
    yield (
        f"{figures['machine']['processor']}, {figures['threads']} threads, load "
        f"{figures['load']:.1f}"
    )
    yield "case            ours tok/s  llama.cpp  ratio   best of each  ratio"
    for name, row in figures["with_peer"].items():
        yield (
            f"{name:15} {row['tokens_s']:10.1f} {row['peer_tokens_s']:10.1f} {row['ratio']:6.2f}"
            f" {row['best_tokens_s']:8.1f} {row['peer_best_tokens_s']:7.1f}"
            f" {row['best_ratio']:5.2f}"
        )
    for row in figures["widths"]:
        yield (
            f"decode {row['width']:8} {row['tokens_s']:10.1f} tok/s, "
            f"{row['bytes'] / 1e6:.0f} MB per token, {100 * row['share_of_roof']:.0f} % of the "
            f"streaming reads of the same turn ({row['read_bytes_s'] / 1e9:.1f} GB/s)"
        )
    row = figures["mixed"]
    yield f"mixed widths / all widest, {row['rows']} rows: {row['ratio']:.3f} of the time"
    for name, row in figures["switches"].items():
        yield (
            f"step after a switch {name}: {row['ms_after']:.2f} ms, steady "
            f"{row['ms_steady']:.2f} ms ({row['ratio']:.3f})"
        )
    for row in figures["batches"]:
        yield f"batch of {row['sequences']}: {row['tokens_s']:.1f} tok/s"


def main() -> None:
    """Command line; prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="620m")
    parser.add_argument("--folder", type=Path, help="default: build/models/MODEL")
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--tokens", type=int, default=32, help="steps of one timed decode")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    folder = given.folder or ROOT / "build" / "models" / given.model
    if not (folder / "config.json").is_file():
        write_model(given.model, folder)
    figures = run(folder, given.threads, given.tokens, given.pairs)
    for line in table(figures):
        print(line)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
