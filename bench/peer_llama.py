"""llama.cpp on the same weights: the speed peer, and a second oracle for logits.

    python bench/peer_llama.py check build/models/tiny
    python bench/peer_llama.py measure build/models/620m --types bf16 q8_0 --threads 1 2

``Peer`` holds one model in a process of its own and times single passes, so that a benchmark can
interleave it with the library it is compared with (``interleave``). Tokens are always given, and
random: every token of a repeated id picks the same experts, which flatters a mixture of experts.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peer_build import CONVERTED, QUANTIZED, ROOT, build_peer, convert, library_folder, sdist_folder

PROMPT_TOKENS = 16  # read before the timed single-token steps


def random_tokens(count: int, vocab: int, seed: int = 0) -> list[int]:
    """``count`` uniform token ids below ``vocab``; the same seed gives the same ids."""
    rng = random.Random(f"tokens {seed}")
    return [rng.randrange(vocab) for _ in range(count)]


class Peer:
    """One GGUF file loaded by llama.cpp in a child process; a context manager.

    Args:
        gguf: path of the file, as ``peer_build.convert`` returns it; None loads no model (for
            ``quantize`` alone).
        threads: int, compute threads, for prefill and decode alike.
        context: int, the longest sequence, and the most tokens of one pass.
        ubatch: int, tokens that llama.cpp computes at a time (512 is its default).
        kv: str, dtype of the KV cache: ``f16`` (llama.cpp's default), ``bf16`` or ``f32``.
        flash: str, flash attention: ``auto`` (its default), ``off`` or ``on``.
        root: folder that ``build_peer`` filled.

    Raises:
        RuntimeError: the library is not built, or llama.cpp refused the file.
    """

    def __init__(
        self,
        gguf: str | Path | None,
        threads: int = 1,
        context: int = 2048,
        ubatch: int = 512,
        kv: str = "f16",
        flash: str = "auto",
        root: Path = ROOT,
    ) -> None:
        library = library_folder(root)
        if not (library / "libllama.so").exists():
            raise RuntimeError(f"peer: no libllama.so in {library}; run `make bench-peer-build`")
        worker = Path(__file__).with_name("peer_worker.py")
        # Closed in close(); it outlives this call because the child writes its log there.
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(worker), str(sdist_folder(root)), str(library)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.vocab = 0
        self.info: dict[str, Any] = {}
        if gguf is None:
            return
        try:
            self.info = self._ask(
                "load",
                gguf=str(gguf),
                threads=threads,
                context=context,
                ubatch=ubatch,
                kv=kv,
                flash=flash,
            )
        except BaseException:
            self.close()
            raise
        self.vocab = self.info["vocab"]

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child process and frees its memory."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def _ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": "the process of llama.cpp ended"}
        if "error" in answer:
            self._log.seek(0)
            raise RuntimeError(f"peer: {op}: {answer['error']}\n{self._log.read()[-2000:]}")
        return answer

    def prefill(self, tokens: Sequence[int]) -> float:
        """Seconds for one pass over a new sequence, logits of its last token only."""
        return self._ask("prefill", tokens=list(tokens))["seconds"]

    def decode(self, prompt: Sequence[int], tokens: Sequence[int]) -> float:
        """Seconds for reading ``tokens`` one by one after ``prompt``, which is not timed."""
        return self._ask("decode", prompt=list(prompt), tokens=list(tokens))["seconds"]

    def logits(self, tokens: Sequence[int], stepwise: bool = False) -> Any:
        """float32 logits [T, V] as a torch tensor; in one pass, or one token at a time."""
        import torch

        with tempfile.NamedTemporaryFile() as file:
            answer = self._ask("logits", tokens=list(tokens), stepwise=stepwise, path=file.name)
            data = bytearray(Path(file.name).read_bytes())
        return torch.frombuffer(data, dtype=torch.float32).view(answer["shape"])

    def quantize(self, source: Path, target: Path, ftype: int, threads: int = 2) -> int:
        """Writes a quantized copy of a GGUF file (every matrix in one type); returns its bytes."""
        answer = self._ask(
            "quantize", source=str(source), target=str(target), ftype=ftype, threads=threads
        )
        return answer["bytes"]


def interleave(
    ours: Callable[[], float], theirs: Callable[[], float], pairs: int = 5
) -> dict[str, Any]:
    """Times two callables in turn, so that what disturbs the machine disturbs both.

    One untimed call of each comes first; then ``pairs`` pairs, the order inside a pair alternating.

    Args:
        ours, theirs: callables that do the same work once and return the seconds it took.
        pairs: int >= 1.

    Returns:
        ``{"ours_s", "theirs_s"}`` medians, ``"ratio"`` (median over pairs of theirs / ours: above
        one means ours is faster) and ``"pairs"`` [[ours, theirs], …].

    Raises:
        ValueError: ``pairs`` < 1.
    """
    if pairs < 1:
        raise ValueError(f"interleave: pairs must be at least 1, got {pairs}")
    ours()
    theirs()
    times = []
    for index in range(pairs):
        if index % 2:
            second = theirs()
            times.append((ours(), second))
        else:
            first = ours()
            times.append((first, theirs()))
    return {
        "ours_s": statistics.median(pair[0] for pair in times),
        "theirs_s": statistics.median(pair[1] for pair in times),
        "ratio": statistics.median(pair[1] / pair[0] for pair in times),
        "pairs": [list(pair) for pair in times],
    }


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
        kind: str, weight type (``peer_build.convert``).
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
