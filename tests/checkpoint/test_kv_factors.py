"""Factors of 8-bit keys and values: under every name, in every export, and missed aloud."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from elastic_infer.checkpoint.checkpoint import Checkpoint
from elastic_infer.checkpoint.slicing import slice_checkpoint
from elastic_infer.elastify.pipeline import export_elastic
from elastic_infer.elastify.sorting import random_order, sort_checkpoint
from elastic_infer.errors import CheckpointError
from elastic_infer.quantize.write import choose_formats, quantize_checkpoint
from support import tiny
from support.engines import base_config, base_widths, draw, open_engine

LAYER = 2  # the attention layer of `base_config`
AT = f"backbone.layers.{LAYER}.mixer."
MODELOPT = {f"{AT}k_proj.k_scale": 50.0, f"{AT}v_proj.v_scale": 1.5}
COMPRESSED = {f"{AT}k_scale": 50.0, f"{AT}v_scale": 1.5}


def write(folder, factors, **config):
    """The fixed model whose keys are far beyond what E4M3 holds without a factor."""
    tiny.write_tiny(folder, {**base_config(), **config}, base_widths(), seed=7)
    state = load_file(folder / "model.safetensors")
    state[f"{AT}k_proj.weight"] *= 4000
    state[f"{AT}q_proj.weight"] /= 4000
    state |= {name: torch.tensor(value) for name, value in factors.items()}
    save_file(state, folder / "model.safetensors")
    return folder


def rows(folder, width=None):
    with open_engine(folder, kv_cache_dtype="fp8") as engine:
        return engine.score(draw(40), width=width)


def test_a_factor_is_the_same_under_either_name(tmp_path, caplog):
    """ModelOpt's k_proj.k_scale and compressed-tensors' mixer.k_scale give the same bits, alone and
    together; none of them is called foreign."""
    with caplog.at_level(logging.WARNING):
        one = rows(write(tmp_path / "a", MODELOPT))
        other = rows(write(tmp_path / "b", COMPRESSED))
        both = rows(write(tmp_path / "c", MODELOPT | COMPRESSED))
    assert torch.equal(one, other) and torch.equal(one, both)
    assert not caplog.records
    assert not torch.equal(one, rows(write(tmp_path / "d", {})))


@pytest.mark.parametrize(
    "factors, message",
    [
        (MODELOPT | {f"{AT}k_scale": 49.0}, "must be equal"),
        ({f"{AT}k_scale": [1.0, 2.0]}, "must be one number"),
        ({f"{AT}k_scale": 0.0}, "must be one finite number above 0"),
        ({f"{AT}v_scale": float("nan")}, "must be one finite number above 0"),
        ({f"{AT}v_scale": 5}, "must be float32, bfloat16 or float16"),
    ],
)
def test_factors_that_cannot_be_used(tmp_path, factors, message):
    with pytest.raises(CheckpointError, match=message):
        rows(write(tmp_path / "m", factors))


@pytest.mark.parametrize("factors", [MODELOPT, COMPRESSED])
@pytest.mark.parametrize("export", ["slice", "quantize", "sort", "elastify"])
def test_every_export_has_the_factors_of_its_source(tmp_path, factors, export):
    """Every writer of checkpoints, while attention itself is not quantized."""
    checkpoint = Checkpoint.open(write(tmp_path / "m", factors))
    out = tmp_path / "out"
    if export == "slice":
        slice_checkpoint(checkpoint, "S", out)
    elif export == "quantize":
        formats = choose_formats(checkpoint.config, checkpoint.names, {"mlp": "nvfp4"})
        quantize_checkpoint(checkpoint, out, formats)
    elif export == "sort":
        sort_checkpoint(checkpoint, random_order(checkpoint.config, 3), out)
    else:
        out.mkdir()
        export_elastic(checkpoint, result_of(checkpoint), out)
    state = load_file(out / "model.safetensors")
    assert {name: float(state[name]) for name in factors} == factors
    made = Checkpoint.open(out)
    assert [made.kv_factor(LAYER, kind) for kind in "kv"] == [50.0, 1.5]
    assert not made.lacks_kv_factors


def result_of(checkpoint):
    """The result of a distillation that changed nothing."""
    from types import SimpleNamespace

    from elastic_infer.elastify.torch_model import ElasticNemotronH

    model = ElasticNemotronH.load(checkpoint.folder)
    widths = {"L": checkpoint.widths["L"]}
    return SimpleNamespace(weights=model.state_dict(), widths=widths, budgets={"L": 1.0})


def test_a_width_equals_its_slice_with_keys_in_8_bits(tmp_path):
    folder = write(tmp_path / "m", MODELOPT)
    slice_checkpoint(Checkpoint.open(folder), "S", tmp_path / "s")
    assert torch.equal(rows(folder, "S"), rows(tmp_path / "s"))


def test_the_fingerprint_tells_factors_apart(tmp_path):
    each = ({}, MODELOPT, COMPRESSED, {**MODELOPT, f"{AT}k_proj.k_scale": 51.0})
    folders = [write(tmp_path / str(i), factors) for i, factors in enumerate(each)]
    assert len({Checkpoint.open(folder).fingerprint for folder in folders}) == 4


STATED = {
    "modelopt": {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"},
    "a scheme": {
        "quant_method": "modelopt",
        "quant_algo": None,
        "kv_cache_scheme": {"num_bits": 8, "type": "float"},
    },
}


@pytest.mark.parametrize("factors", [{}, MODELOPT, {f"{AT}k_scale": 50.0}])
@pytest.mark.parametrize("told", ["asked", *STATED, "nothing"])
def test_missing_factors_are_told(tmp_path, caplog, told, factors):
    """FP8 keys that are asked for or stated, and a layer without a factor for keys or values."""
    stated = {"quantization_config": STATED[told]} if told in STATED else {}
    folder = write(tmp_path / "m", factors, **stated)
    with caplog.at_level(logging.WARNING):
        open_engine(folder, kv_cache_dtype="fp8" if told == "asked" else "auto").close()
    found = [r.getMessage() for r in caplog.records if "the factor is 1" in r.getMessage()]
    assert len(found) == (told != "nothing" and factors != MODELOPT)


def test_quantize_keeps_what_is_stated_of_keys_and_values(tmp_path):
    folder = write(tmp_path / "m", MODELOPT, quantization_config=STATED["modelopt"])
    checkpoint = Checkpoint.open(folder)
    formats = choose_formats(checkpoint.config, checkpoint.names, {"mlp": "fp8"})
    quantize_checkpoint(checkpoint, tmp_path / "q", formats)
    sidecar = json.loads((tmp_path / "q" / "hf_quant_config.json").read_text())
    assert sidecar["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert Checkpoint.open(tmp_path / "q").published.kv_cache == "FP8"
