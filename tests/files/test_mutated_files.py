"""Every file that the library reads, with one thing wrong: it opens and runs, or is refused by an
error of the library, in little time and memory.

Stands for every damaged, odd or hostile file: values of other types and sizes, other structure,
other bytes.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import time

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from elastic_infer import ElasticError, Engine, SamplingParams
from elastic_infer.checkpoint import config
from elastic_infer.cli import info
from support import engines, mutation, quantized, tiny

SECONDS, MEGABYTES = 30, 1500  # of one file; what is right takes a hundredth
LIMITS = {"threads": 1, "max_num_seqs": 2, "max_model_len": None, "kv_cache_memory_bytes": 8 << 20}


def write_text(folder):
    engines.write_text_model(
        folder,
        elastic_widths=engines.base_widths(),
        generation_config={
            "temperature": 0.7,
            "top_k": 5,
            "eos_token_id": [engines.EOS, 2],
            "max_new_tokens": 3,
        },
        special_tokens_map={
            "pad_token": {"content": "<|end|>"},
            "additional_special_tokens": ["<think>"],
        },
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"258": {"content": "<|end|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_shards(folder):
    tiny.write_tiny(folder, engines.base_config(), engines.base_widths(), seed=7, shards=2)


def write_quantized(folder, layout):
    formats = {"experts": "nvfp4", "in_proj": "fp8"}
    quantized.write_quantized(
        folder, engines.base_config(), engines.base_widths(), formats, layout=layout, seed=2
    )
    if layout == "modelopt":  # what config.json states lies beside it
        raw = json.loads((folder / "config.json").read_text())
        stated = raw.pop("quantization_config")
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": stated}))
        (folder / "config.json").write_text(json.dumps(raw))


def write_mlp(folder):
    tiny.write_tiny(folder, tiny.tiny_config(4, hybrid_override_pattern="-"), None, seed=4)


KINDS = {
    "config.json": write_text,
    "elastic_widths.json": write_text,
    "generation_config.json": write_text,
    "tokenizer_config.json": write_text,
    "special_tokens_map.json": write_text,
    "tokenizer.json": write_text,
    "model.safetensors": write_text,
    "model.safetensors.index.json": write_shards,
    "hf_quant_config.json": lambda folder: write_quantized(folder, "modelopt"),
    "config.json of groups": lambda folder: write_quantized(folder, "compressed-tensors"),
    "config.json of MLP layers": write_mlp,
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """{kind: folder} with right files."""
    out = {}
    for i, (kind, write) in enumerate(KINDS.items()):
        out[kind] = tmp_path_factory.mktemp(f"right{i}")
        write(out[kind])
    return out


def use(folder):
    """Opens a folder, and makes one pass at every width and some text."""
    with Engine.from_pretrained(folder, **LIMITS) as engine:
        for width in engine.widths:
            engine.generate([5, 6, 7], SamplingParams(max_tokens=2), width=width)
        if engine.tokenizer is not None:
            engine.generate("ab")
            engine.generate(engine.tokenizer.decode([97]), SamplingParams(max_tokens=1))


def bounded(run, what):
    """Runs what may fail by an error of the library, and looks at its time and memory."""
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        run()
    except ElasticError as error:
        assert len(str(error)) < 5000 and str(error).encode("utf-8"), what
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert time.process_time() - start < SECONDS and peak < MEGABYTES << 10, what


def check_folder(kind, original, place, seeds):
    name = kind.split(" ")[0]
    data = (original / name).read_bytes()
    mutate = mutation.mutate_safetensors if name.endswith("safetensors") else mutation.mutate_text
    for seed in seeds:
        folder = shutil.copytree(original, place / "m")
        (folder / name).write_bytes(mutate(random.Random(f"{kind} {seed}"), data))
        bounded(lambda: use(folder), f"{kind}, seed {seed}")  # noqa: B023 (called at once)
        shutil.rmtree(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_files_open_or_are_refused(tmp_path, originals, kind):
    use(originals[kind])
    check_folder(kind, originals[kind], tmp_path, range(25))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_files_open_or_are_refused(tmp_path, originals, kind):
    check_folder(kind, originals[kind], tmp_path, range(1000, 2500))


SIZES = (*config._SIZES, "num_hidden_layers", "layer_norm_epsilon", "routed_scaling_factor")


@pytest.mark.parametrize("pattern", ["-", "M", "*", "E"])
def test_a_size_of_any_kind_of_layer_takes_no_memory(tmp_path, pattern):
    """Every size that config.json states, far too large, of layers that are there or not: for an
    engine, and for `info`, which also describes a folder without weights."""
    folder = tiny.write_tiny(tmp_path / "m", tiny.tiny_config(4, hybrid_override_pattern=pattern))
    bare = tmp_path / "bare"
    bare.mkdir()
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["*"]}

    def describe_bare():
        opened = info.open_sizes(str(bare), None, None)
        info.describe(opened, 2**36, 4096, "auto", "auto")

    for key in SIZES:
        for value in (10**9, 2**31 - 1, 2**31, 2**62, 10**40, -1):
            text = json.dumps({**raw, key: value})
            (folder / "config.json").write_text(text)
            (bare / "config.json").write_text(text)
            bounded(lambda: use(folder), f"{key} {value}, pattern {pattern}")
            bounded(describe_bare, f"info: {key} {value}, pattern {pattern}")


def check_sequences(originals, tmp_path, seeds):
    with engines.open_engine(originals["model.safetensors"], threads=1) as engine:
        path, bad = tmp_path / "right.safetensors", tmp_path / "bad.safetensors"
        with engine.open([5, 6, 7, 8, 9], width="S") as sequence:
            sequence.step(), sequence.step()
            sequence.save(path)
        with safe_open(str(path), "pt") as stored:
            metadata = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118

        def load():
            with engine.load(bad) as sequence:
                sequence.step()
                sequence.switch("L", "carry")
                sequence.step()
                sequence.rollback(3)
                sequence.step()

        for seed in seeds:
            rng = random.Random(f"sequence {seed}")
            if rng.random() < 0.3:
                bad.write_bytes(mutation.mutate_safetensors(rng, path.read_bytes()))
            else:
                save_file(tensors, bad, mutation.mutate_metadata(rng, metadata))
            bounded(load, f"sequence file, seed {seed}")
        assert engine.generate([5, 6], SamplingParams(max_tokens=2)).token_ids
        engines.assert_all_free(engine)


def test_sequence_files_load_or_are_refused(tmp_path, originals):
    """A bad file ends nobody else's: the engine goes on, with nothing of it left in the cache."""
    check_sequences(originals, tmp_path, range(150))


@pytest.mark.slow
def test_many_sequence_files_load_or_are_refused(tmp_path, originals):
    check_sequences(originals, tmp_path, range(1000, 5000))
