"""llama.cpp in a process of its own, timed in turn with this library."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.llama.folder import ROOT, library_folder, sdist_folder

PROMPT_TOKENS = 16  # read before the timed single-token steps


class Peer:
    """One GGUF file loaded by llama.cpp in a child process; a context manager.

    Args:
        gguf: path of the file, as `convert` (convert.py) returns it; None loads no model (for
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
        worker = Path(__file__).with_name("worker.py")
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
