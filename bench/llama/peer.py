"""llama.cpp on the same weights: the speed peer, and a second oracle for logits.

    python -m bench.llama.peer check build/models/tiny
    python -m bench.llama.peer measure build/models/620m --types bf16 q8_0 --threads 1 2

``Peer`` holds one model in a process of its own and times single passes, so that a benchmark can
interleave it with the library it is compared with (``interleave``). Tokens are always given, and
random: every token of a repeated id picks the same experts, which flatters a mixture of experts.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.common.tokens import random_tokens
from bench.llama.build import build_peer
from bench.llama.convert import CONVERTED, QUANTIZED, convert
from bench.llama.folder import ROOT
from bench.llama.process import PROMPT_TOKENS, Peer


def measure(
    folder: str | Path,
    threads: int,
    kind: str = "bf16",
    decode_tokens: int = 32,
    prefill: Sequence[int] = (256, 1024),
    repeats: int = 3,
    seed: int = 0,
    root: Path = ROOT,
) -> dict[str, Any]:
    """Speed of llama.cpp on a checkpoint folder: one sequence, random tokens, medians.

    Args:
        folder: checkpoint folder; converted on first use.
        threads: int, compute threads.
        kind: str, weight type (``bench.llama.convert.convert``).
        decode_tokens: int, single-token steps timed, after a prompt of 16 tokens.
        prefill: lengths of the timed prompts (one pass, logits of the last token only).
        repeats: int, timed runs of each; the first, untimed, run warms up.
        seed: int, chooses the tokens.
        root: folder that ``build_peer`` filled.

    Returns:
        ``{"peer", "kind", "threads", "weight_bytes", "load", "decode_tokens_s",
        "prefill_tokens_s": {length: …}, "seconds": {case: [per run]}}``; ``load`` is the
        machine's load average before the first run.
    """
    gguf = convert(folder, kind, root)
    load = os.getloadavg()[0]
    seconds: dict[str, list[float]] = {}
    with Peer(gguf, threads, context=max([PROMPT_TOKENS + decode_tokens, *prefill])) as peer:
        prompt = random_tokens(PROMPT_TOKENS, peer.vocab, seed)
        steps = random_tokens(decode_tokens, peer.vocab, seed + 1)
        cases: dict[str, Callable[[], float]] = {"decode": lambda: peer.decode(prompt, steps)}
        for length in prefill:
            tokens = random_tokens(length, peer.vocab, seed + length)
            cases[f"prefill {length}"] = lambda tokens=tokens: peer.prefill(tokens)
        for name, case in cases.items():
            case()
            seconds[name] = [case() for _ in range(repeats)]
        weight_bytes = peer.info["bytes"]
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "peer": "llama.cpp",
        "kind": kind,
        "threads": threads,
        "weight_bytes": weight_bytes,
        "load": load,
        "decode_tokens_s": decode_tokens / median["decode"],
        "prefill_tokens_s": {length: length / median[f"prefill {length}"] for length in prefill},
        "seconds": seconds,
    }


def check(folder: str | Path, length: int = 150, seed: int = 0, root: Path = ROOT) -> dict:
    """Compares llama.cpp's fp32 logits with those of transformers on a small checkpoint.

    Both compute in fp32 on the stored weights, llama.cpp with a fp32 KV cache and without flash
    attention, in one pass and token by token. transformers clamps dt to ``time_step_min`` in
    prefill only, so it runs here with 1e-12 (no clamp), as every other implementation does.

    Args:
        folder: checkpoint folder small enough for fp32.
        length: int, tokens of the random prompt; above the chunk size it crosses chunks.
        seed: int, chooses the tokens.
        root: folder that ``build_peer`` filled.

    Returns:
        ``{"tokens", "largest_logit", "pass": {…}, "steps": {…}}``, each part with ``max_error``
        (absolute), ``relative_error`` (to the largest logit) and ``argmax_agreement`` (0..1).
    """
    import torch
    from transformers import AutoConfig, NemotronHForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.time_step_min = 1e-12
    config._attn_implementation = "eager"
    model = NemotronHForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    tokens = random_tokens(length, config.vocab_size, seed)
    with torch.no_grad():
        want = model(torch.tensor([tokens]), use_cache=False).logits[0].float()
    largest = want.abs().max().item()
    result: dict[str, Any] = {"tokens": length, "largest_logit": largest}
    with Peer(convert(folder, "f32", root), kv="f32", flash="off", context=length) as peer:
        for name, stepwise in (("pass", False), ("steps", True)):
            got = peer.logits(tokens, stepwise)
            error = (got - want).abs().max().item()
            agreement = (got.argmax(-1) == want.argmax(-1)).float().mean().item()
            result[name] = {
                "max_error": error,
                "relative_error": error / largest,
                "argmax_agreement": agreement,
            }
    return result


def main() -> None:
    """Command line: ``check FOLDER`` or ``measure FOLDER``; prints JSON."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description="llama.cpp beside us: agreement and speed.")
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("check", help="fp32 logits against transformers")
    checking.add_argument("folder", type=Path)
    checking.add_argument("--length", type=int, default=150)
    timing = commands.add_parser("measure", help="tokens per second")
    timing.add_argument("folder", type=Path)
    timing.add_argument("--types", nargs="+", default=["bf16"], choices=[*CONVERTED, *QUANTIZED])
    timing.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    timing.add_argument("--decode", type=int, default=32)
    timing.add_argument("--prefill", nargs="+", type=int, default=[256, 1024])
    timing.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    build_peer()
    if arguments.command == "check":
        result = check(arguments.folder, arguments.length)
        print(json.dumps(result, indent=2))
        if not all(result[name]["relative_error"] < 1e-4 for name in ("pass", "steps")):
            sys.exit("peer: logits of llama.cpp and transformers differ by more than 1e-4")
        return
    rows = []
    for kind in arguments.types:
        for threads in arguments.threads:
            logging.info("peer: %s, %d threads", kind, threads)
            rows.append(
                measure(
                    arguments.folder,
                    threads,
                    kind,
                    arguments.decode,
                    arguments.prefill,
                    arguments.repeats,
                )
            )
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
