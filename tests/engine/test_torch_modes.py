"""An engine gives the same in whatever mode its caller has put torch: when it is opened, at every
call, and from a thread that never heard of the mode."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest
import torch

from elastic_infer import Checkpoint, Plan, SamplingParams
from elastic_infer.checkpoint.derive import derive_widths
from elastic_infer.checkpoint.slicing import slice_checkpoint
from elastic_infer.quantize.write import choose_formats, quantize_checkpoint
from support.engines import assert_all_free, open_engine, write_text_model


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES = {
    "plain": lambda: torch.enable_grad(),
    "inference_mode": lambda: torch.inference_mode(),
    "no_grad": lambda: torch.no_grad(),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default device meta": lambda: default_device("meta"),
    "device context": lambda: torch.device("meta"),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "deterministic": deterministic,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("model"))


def results(engine, path):
    """All kinds of calls: with penalties and biases, entropy, choices, switches, log-probabilities,
    sequences by hand, and a file."""
    params = SamplingParams(
        max_tokens=6,
        seed=2,
        temperature=0.8,
        logprobs=2,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias={65: 1.5},
        min_tokens=2,
        bad_words=["x"],
        n=2,
        logits_processors=[lambda ids, row, phase: row + 0.125],
    )
    found = [engine.generate("ab", params, plan=Plan.by_uncertainty("S", "L", 1.0, policy="exact"))]
    found += engine.generate(["a", [5, 6]], SamplingParams(temperature=0.0, max_tokens=4))
    tokens = [(c.token_ids, c.logprobs, c.width_runs) for o in found for c in o.choices]
    tokens += [t.id for t in engine.stream("c", SamplingParams(temperature=0.0, max_tokens=3))]
    rows = engine.score("abc").tolist()
    with engine.open("abcd", width="S") as sequence:
        tokens.append(sequence.step(params=SamplingParams(seed=1, presence_penalty=1.0)).id)
        sequence.snapshot()
        sequence.switch("L", "exact")
        with sequence.fork() as twin:
            tokens.append(twin.step().id)
        sequence.save(path)
        rows += sequence.logits().tolist()
    with engine.load(path) as sequence:
        tokens.append(sequence.step("M").id)
        sequence.rollback(2)
        rows += sequence.logits().tolist()
    return tokens, rows


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    with open_engine(folder, threads=1) as engine:
        return results(engine, tmp_path_factory.mktemp("saved") / "s.safetensors")


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_an_engine_opened_in_any_mode_works_everywhere(folder, tmp_path, expected, mode):
    """Stands for modes around opening, calls or both; the engine's own thread has none of them."""
    path = tmp_path / "s.safetensors"
    with mode():
        engine = open_engine(folder, threads=1)
    with engine:
        assert results(engine, path) == expected
        with mode():
            assert results(engine, path) == expected
        got = []
        thread = threading.Thread(target=lambda: got.append(results(engine, path)))
        thread.start()
        thread.join(60)
        assert got == [expected]
        assert_all_free(engine)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_modes_that_a_processor_leaves_behind_change_nothing(folder, tmp_path, expected, mode):
    """Stands for user's functions that change a mode of the engine's thread."""
    left = []

    def enter(ids, row, phase):
        left.append(mode())
        left[-1].__enter__()

    def leave(ids, row, phase):
        left.pop().__exit__(None, None, None)

    def call(function):
        engine.generate("a", SamplingParams(max_tokens=1, logits_processors=[function]))

    with open_engine(folder, threads=1) as engine:
        call(enter)
        try:
            assert results(engine, tmp_path / "s.safetensors") == expected
        finally:
            call(leave)


def written(folder, tmp_path):
    """Results of the tools for a checkpoint: its fingerprint, a slice's bytes, a table derived from
    it, the bytes of quantized weights."""
    source = Checkpoint.open(folder)
    cut, codes = tmp_path / "slice", tmp_path / "quantized"
    slice_checkpoint(source, "S", cut)
    formats = choose_formats(source.config, source.names, {"head": "fp8", "mlp": "nvfp4"})
    quantize_checkpoint(source, codes, formats)
    paths = [path for out in (cut, codes) for path in sorted(out.glob("*.safetensors"))]
    files = [path.read_bytes() for path in paths]
    return source.fingerprint, derive_widths(folder, {"S": cut}), files


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_files_are_the_same_in_every_mode(folder, tmp_path, mode):
    """Stands for the tools that read and write checkpoints."""
    expected = written(folder, tmp_path / "plain")
    with mode():
        got = written(folder, tmp_path / "mode")
    assert got == expected
