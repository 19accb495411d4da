"""The process that holds llama.cpp: one JSON request per line on stdin, one JSON answer on stdout.

A process of its own, so that llama.cpp's thread pool, memory and OpenMP run time never meet those
of the library it is compared with; while it waits for a request it only sleeps in ``read``.
``process.Peer`` starts it. Its imports are the standard library and the ctypes bindings.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

KV_TYPES = {"f32": 0, "f16": 1, "bf16": 30}  # ggml_type
FLASH = {"auto": -1, "off": 0, "on": 1}  # llama_flash_attn_type


def load_bindings(sdist: Path, library: Path) -> Any:
    """The low-level ctypes module of llama-cpp-python, bound to the library in ``library``."""
    # The package's __init__ imports its high-level API with further dependencies: an empty
    # package of the same name, with the same folder, leaves only the module asked for.
    package = types.ModuleType("llama_cpp")
    package.__path__ = [str(sdist / "llama_cpp")]
    sys.modules["llama_cpp"] = package
    os.environ["LLAMA_CPP_LIB_PATH"] = str(library)
    return importlib.import_module("llama_cpp.llama_cpp")


class Worker:
    """One model and one context of llama.cpp; every public method answers one request."""

    def __init__(self, sdist: Path, library: Path) -> None:
        self._lib = load_bindings(sdist, library)
        self._lib.llama_backend_init()
        self._model: Any = None
        self._context: Any = None
        self._batch: Any = None

    def load(
        self, gguf: str, threads: int, context: int, ubatch: int, kv: str, flash: str
    ) -> dict[str, Any]:
        """Loads a file and makes a context of ``context`` tokens for one sequence."""
        lib = self._lib
        model_params = lib.llama_model_default_params()
        self._model = lib.llama_model_load_from_file(gguf.encode(), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp could not load {gguf}")
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = context
        params.n_ubatch = ubatch
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = KV_TYPES[kv]
        params.flash_attn_type = FLASH[flash]
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp could not make a context")
        self._batch = lib.llama_batch_init(context, 0, 1)
        vocab = lib.llama_model_get_vocab(self._model)
        return {
            "vocab": lib.llama_vocab_n_tokens(vocab),
            "bytes": lib.llama_model_size(self._model),
            "system": lib.llama_print_system_info().decode(),
        }

    def _clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _fill(self, tokens: list[int], start: int, every: bool = False) -> None:
        """Puts one sequence's ``tokens`` from position ``start`` into the batch."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = start + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = int(every)
        batch.logits[len(tokens) - 1] = 1

    def _decode(self) -> float:
        """Reads the batch; returns the seconds until the last token's logits are there."""
        begin = time.perf_counter()
        status = self._lib.llama_decode(self._context, self._batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        self._lib.llama_get_logits_ith(self._context, -1)  # waits for the computation
        return time.perf_counter() - begin

    def prefill(self, tokens: list[int]) -> dict[str, Any]:
        """Seconds for one pass over a new sequence, with the logits of its last token only."""
        self._clear()
        self._fill(tokens, 0)
        return {"seconds": self._decode()}

    def decode(self, prompt: list[int], tokens: list[int]) -> dict[str, Any]:
        """Seconds of each single-token step after ``prompt``, which is not timed."""
        self._clear()
        self._fill(prompt, 0)
        self._decode()
        steps = []
        for index, token in enumerate(tokens):
            self._fill([token], len(prompt) + index)
            steps.append(self._decode())
        return {"seconds": sum(steps), "steps": steps}

    def logits(self, tokens: list[int], stepwise: bool, path: str) -> dict[str, Any]:
        """Writes the raw float32 logits [T, V] of one sequence, in one pass or token by token."""
        self._clear()
        vocab = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))
        with open(path, "wb") as file:
            if not stepwise:
                self._fill(tokens, 0, every=True)
                self._decode()
            for index, token in enumerate(tokens):
                if stepwise:
                    self._fill([token], index)
                    self._decode()
                row = self._lib.llama_get_logits_ith(self._context, -1 if stepwise else index)
                file.write(ctypes.string_at(row, 4 * vocab))
        return {"shape": [len(tokens), vocab]}

    def quantize(self, source: str, target: str, ftype: int, threads: int) -> dict[str, Any]:
        """Writes ``target`` with every matrix that llama.cpp quantizes in one and the same type."""
        params = self._lib.llama_model_quantize_default_params()
        params.nthread = threads
        params.ftype = ftype
        params.pure = True
        status = self._lib.llama_model_quantize(
            source.encode(), target.encode(), ctypes.byref(params)
        )
        if status != 0:
            raise RuntimeError(f"llama_model_quantize returned {status}")
        return {"bytes": os.path.getsize(target)}


def main() -> None:
    """Answers requests ``{"op": method name, argument: value}`` until stdin closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    worker = Worker(Path(sys.argv[1]), Path(sys.argv[2]))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("op"))(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
