"""Making quantized checkpoints: scales, what is written, distillation, the command."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from elastic_infer.checkpoint.checkpoint import Checkpoint
from elastic_infer.checkpoint.layout import tensor_selections
from elastic_infer.checkpoint.slicing import slice_checkpoint
from elastic_infer.checkpoint.tensor_files import Selection, take
from elastic_infer.cli import app
from elastic_infer.codes import BLOCK, Packed, decode_e4m3, round_e2m1
from elastic_infer.elastify.corpus import IteratorData
from elastic_infer.elastify.pipeline import elastify
from elastic_infer.elastify.settings import Settings, Stage
from elastic_infer.elastify.sorting import random_order, sort_checkpoint
from elastic_infer.errors import CheckpointError, InvalidRequest, NonFiniteLoss
from elastic_infer.ops.fp8_quantize import fp8_quantize
from elastic_infer.ops.nvfp4_quantize import nvfp4_quantize
from elastic_infer.quantize.distill import DistillSettings, _Rounded, distill_quantized
from elastic_infer.quantize.search import (
    block_importance,
    held_blocks,
    quantize_fp8,
    quantize_nvfp4,
    quantize_with,
)
from elastic_infer.quantize.write import GROUPS, Quantizer, choose_formats, quantize_checkpoint
from support import engines, tiny
from support.quantized import dequantize

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = [5, 77, 12, 3, 99, 41, 8, 8, 120, 64, 2, 17]
ALL = dict.fromkeys(GROUPS, "nvfp4")


def random_matrix(seed=0, rows=40, columns=160):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    weight[3, 16:32] = 0
    weight[7, 5] = 1.5
    return weight


@pytest.mark.parametrize("kind", ["nvfp4", "fp8"])
def test_told_errors_are_those_of_the_codes(kind):
    """By numpy's reading of what was written, block by block; the search beats plain scales."""
    weight = random_matrix()
    found = (quantize_nvfp4 if kind == "nvfp4" else quantize_fp8)(weight)
    codes, blocks, scale = found.packed
    values = dequantize(codes.numpy(), None if blocks is None else blocks.numpy(), scale)
    got = (torch.from_numpy(values) - weight.double()).square().view(40, -1, BLOCK).sum(-1)
    torch.testing.assert_close(found.error.double(), got, rtol=1e-4, atol=1e-12)
    energy = weight.double().square().view(40, -1, BLOCK).sum(-1)
    torch.testing.assert_close(found.energy.double(), energy, rtol=1e-5, atol=1e-12)
    assert found.error.sum() <= found.plain.sum()
    assert found.packed.format == kind and found.packed.shape == (40, 160)


def test_block_scales_are_nearly_the_best_there_are():
    """Against all 127 scales of every block: no block is far off, and few are off at all."""
    weight = random_matrix(1)
    found = quantize_nvfp4(weight)
    blocks = weight.view(40, -1, BLOCK).abs()
    steps = decode_e4m3(torch.arange(1, 127, dtype=torch.uint8)) * found.packed.scale
    each = [(round_e2m1(blocks / s) * s - blocks).square().sum(-1) for s in steps]
    best = torch.stack(each).amin(0)
    assert bool((found.error <= 1.6 * best + 1e-12).all())
    assert found.error.sum() <= 1.01 * best.sum()


@pytest.mark.parametrize("kind", ["nvfp4", "fp8"])
def test_codes_at_given_scales_are_the_kernels(kind):
    """At the scales of the quantizing op, the same bytes as the op writes."""
    weight = random_matrix(2)
    codes = torch.empty(40, 80 if kind == "nvfp4" else 160, dtype=torch.uint8)
    if kind == "nvfp4":
        blocks = torch.empty(40, 10, dtype=torch.uint8)
        scale = nvfp4_quantize(weight, codes, blocks)
    else:
        blocks, scale = None, fp8_quantize(weight, codes)
    like = Packed(codes, blocks, scale)
    assert torch.equal(quantize_with(weight, like).codes, codes)


def test_a_matrix_of_zeros():
    for quantize in (quantize_nvfp4, quantize_fp8):
        found = quantize(torch.zeros(4, 32))
        assert not found.packed.dequantize().any() and not found.error.any()
        assert not quantize_with(torch.ones(4, 32), found.packed).dequantize().any()


def test_widths_decide_by_their_weight():
    """Importance sums to the mean of the widths' relative errors, and moves the FP8 scale."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    weight[:, :128] *= 0.02
    kept = {"S": Selection(slice(0, 16), slice(0, 128)), "L": Selection(None, None)}
    found, errors = quantize_fp8(weight), {}
    counts = block_importance(found.energy, kept, {"S": 2.0, "L": 1.0})
    want = sum(
        share * (found.error * inside).sum() / (found.energy * inside).sum()
        for share, inside in (
            (2.0, held_blocks(found.energy.shape, kept["S"])),
            (1.0, torch.ones(64, 16)),
        )
    )
    torch.testing.assert_close((found.error * counts).sum(), want)
    for name, shares in (("S", {"S": 1.0, "L": 0.0}), ("L", {"S": 0.0, "L": 1.0})):
        one = quantize_fp8(weight, block_importance(found.energy, kept, shares))
        errors[name] = [
            float((one.error * held_blocks(one.error.shape, kept[w])).sum()) for w in kept
        ]
    assert errors["S"][0] <= errors["L"][0] and errors["L"][1] <= errors["S"][1]


def base(tmp_path, dtype=torch.bfloat16, **overrides):
    folder = tiny.write_tiny(
        tmp_path / "full", engines.base_config(**overrides), engines.base_widths(), dtype, 7
    )
    return Checkpoint.open(folder, config_home=tmp_path / "home")


def made(tmp_path, checkpoint, groups, name="q", **options):
    formats = choose_formats(checkpoint.config, checkpoint.names, groups)
    report = quantize_checkpoint(checkpoint, tmp_path / name, formats, **options)
    return Checkpoint.open(tmp_path / name, config_home=tmp_path / "home"), report


@pytest.mark.parametrize("groups", [ALL, {"experts": "nvfp4", "mamba": "fp8"}, {"head": "fp8"}])
def test_what_is_written_opens_and_is_near(tmp_path, groups):
    checkpoint = base(tmp_path)
    found, report = made(tmp_path, checkpoint, groups, threads=2)
    assert set(found.formats.values()) == set(groups.values())
    assert found.widths == checkpoint.widths
    for name in checkpoint.names:
        if name not in found.formats:
            assert found.dtype_of(name) == checkpoint.dtype_of(name)
            assert torch.equal(found.tensor(name), checkpoint.tensor(name)), name
    limits = {"nvfp4": 0.12, "fp8": 0.04}
    lines = {line: told for line, told in report.lines.items()}
    for name, kind in found.formats.items():
        for width_name, width in checkpoint.widths.items():
            kept = tensor_selections(checkpoint.config, width).get(name)
            if kept is None:
                continue
            want = take(checkpoint.tensor(name).float(), *kept)
            error = (found.selected(name, kept) - want).norm() / want.norm()
            assert error < limits[kind], (name, width_name, float(error))
            if name.removesuffix(".weight") in lines:
                told = lines[name.removesuffix(".weight")]["relative_error"][width_name]
                assert told == pytest.approx(float(error), abs=2e-6)
    assert json.loads((tmp_path / "q" / "quantization.json").read_text()) == json.loads(
        json.dumps(report.to_dict())
    )
    again, _ = made(tmp_path, checkpoint, groups, "again", threads=1)
    assert again.fingerprint == found.fingerprint


def test_slices_of_what_is_written_equal_the_prefix(tmp_path):
    found, _ = made(tmp_path, base(tmp_path), ALL)
    out = slice_checkpoint(found, "S", tmp_path / "S")
    with engines.open_engine(out, threads=1) as alone:
        want = alone.score(TOKENS).clone()
    with engines.open_engine(found.folder, threads=1) as engine:
        assert torch.equal(engine.score(TOKENS, width="S"), want)


def test_a_tied_head_gets_weights_of_its_own(tmp_path):
    checkpoint = base(tmp_path, tie_word_embeddings=True)
    names = [*checkpoint.names, "lm_head.weight"]
    formats = choose_formats(checkpoint.config, names, {"head": "nvfp4"})
    quantize_checkpoint(checkpoint, tmp_path / "q", formats)
    found = Checkpoint.open(tmp_path / "q")
    assert not found.config.tie_word_embeddings and found.format_of("lm_head.weight") == "nvfp4"
    embedding = checkpoint.tensor("backbone.embeddings.weight").float()
    assert torch.equal(found.tensor("backbone.embeddings.weight").float(), embedding)
    error = (found.tensor("lm_head.weight") - embedding).norm() / embedding.norm()
    assert error < 0.12


def test_what_cannot_be_chosen_is_refused(tmp_path):
    checkpoint = base(tmp_path)
    config, names = checkpoint.config, checkpoint.names
    with pytest.raises(InvalidRequest, match="groups must be of experts"):
        choose_formats(config, names, {"norms": "nvfp4"})
    with pytest.raises(InvalidRequest, match="groups must be of experts"):
        choose_formats(config, names, {"head": "int4"})
    with pytest.raises(InvalidRequest, match="keep must match a matrix of head, got 'nothing'"):
        choose_formats(config, names, {"head": "fp8"}, ["nothing"])
    with pytest.raises(InvalidRequest, match="at least one matrix"):
        choose_formats(config, names, {"head": "fp8"}, ["lm_head"])
    with pytest.raises(CheckpointError, match="one matrix in memory"):
        choose_formats(config, names, {"attention": "fp8"}, ["*.k_proj"])
    kept = choose_formats(config, names, {"attention": "fp8"}, ["*.[qkv]_proj"])
    assert kept and all(name.endswith("o_proj.weight") for name in kept)
    with pytest.raises(InvalidRequest, match="weights must be numbers"):
        Quantizer(checkpoint, kept, {"S": 1.0})


def test_a_quantized_checkpoint_and_a_used_folder_are_refused(tmp_path):
    checkpoint = base(tmp_path)
    found, _ = made(tmp_path, checkpoint, {"head": "fp8"})
    with pytest.raises(CheckpointError, match=r"must not be quantized, got lm_head\.weight in fp8"):
        made(tmp_path, found, {"head": "nvfp4"}, "other")
    data = tmp_path / "none"
    with pytest.raises(CheckpointError, match="elastify: the checkpoint must not be quantized"):
        elastify(found, data, tmp_path / "e", Settings((Stage(1, 8),)))
    with pytest.raises(CheckpointError, match="sort: the checkpoint must not be quantized"):
        sort_checkpoint(found, random_order(found.config, 0), tmp_path / "s")
    with pytest.raises(CheckpointError, match="out must be a new or empty folder"):
        made(tmp_path, checkpoint, {"head": "fp8"})


# Distillation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nvfp4", "fp8"])
def test_rounding_in_training_is_that_of_the_codes(kind):
    """For one matrix and for stacked experts; the gradient passes unchanged."""
    weights = torch.stack([random_matrix(s) for s in range(3)]).requires_grad_()
    search = quantize_nvfp4 if kind == "nvfp4" else quantize_fp8
    packed = [search(w).packed for w in weights.detach()]
    rounded = _Rounded(packed)(weights)
    want = torch.stack([p.dequantize() for p in packed])
    torch.testing.assert_close(rounded.detach(), want, rtol=1e-6, atol=1e-9)
    factors = torch.randn(weights.shape)
    (rounded * factors).sum().backward()
    assert torch.equal(weights.grad, factors)
    one = _Rounded(packed[:1])(weights[0])
    torch.testing.assert_close(one.detach(), want[0], rtol=1e-6, atol=1e-9)


def distilled(tmp_path, steps=12, lr=4e-4):
    checkpoint = base(tmp_path, torch.float32)
    formats = choose_formats(checkpoint.config, checkpoint.names, ALL)
    quantizer = Quantizer(checkpoint, formats)
    packed = dict(quantizer.each())
    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(3, 130, (4, 24), generator=generator) for _ in range(steps)]
    held = torch.randint(3, 130, (8, 24), generator=generator)
    settings = DistillSettings(steps=steps, lr=lr)
    found = distill_quantized(checkpoint, packed, IteratorData(data, [held]), settings)
    return checkpoint, formats, quantizer, packed, found


def test_distillation_brings_every_width_nearer(tmp_path):
    """On tokens that it never saw, and what it returns is what is written and loaded."""
    checkpoint, formats, quantizer, packed, (codes, state, told) = distilled(tmp_path)
    for name in checkpoint.widths:
        assert told["loss_after"][name] < told["loss_before"][name]
    assert any(not torch.equal(codes[n].codes, packed[n].codes) for n in codes)
    for name, found in codes.items():
        assert found.scale == packed[name].scale
        assert torch.equal(found.codes, quantize_with(state[name], packed[name]).codes)
    quantizer.report.distilled = told
    quantize_checkpoint(
        checkpoint, tmp_path / "q", formats, packed=codes, state=state, report=quantizer.report
    )
    found = Checkpoint.open(tmp_path / "q")
    for name in found.names:
        if name in codes:
            assert torch.equal(found.packed(name).codes, codes[name].codes)
        else:
            assert torch.equal(found.tensor(name), state[name].to(found.dtype_of(name)))
    assert json.loads((tmp_path / "q" / "quantization.json").read_text())["distilled"] == told


def test_a_run_that_diverges_is_stopped(tmp_path):
    with pytest.raises(NonFiniteLoss, match="loss must stay finite"):
        distilled(tmp_path, steps=6, lr=1e30)


def test_bad_settings_are_refused():
    for wrong in ({"steps": 0}, {"lr": 0.0}, {"sequence_length": 1.5}, {"clip": float("nan")}):
        with pytest.raises(
            InvalidRequest,
            match=f"distill: {next(iter(wrong))} must be positive|"
            f"{next(iter(wrong))} must be a positive int",
        ):
            DistillSettings(**wrong)


# The command ------------------------------------------------------------------------------------


def run(*arguments, code=0):
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == code, done.output
    return done


def test_the_command(tmp_path):
    folder = base(tmp_path).folder
    done = run(
        "quantize",
        folder,
        "--format",
        "nvfp4",
        "--fp8-layers",
        "mamba",
        "--keep",
        "*shared_experts*",
        "--out",
        tmp_path / "q",
        "--threads",
        1,
    )
    assert "matrices quantized" in done.stdout and "in_proj" in done.stdout
    kinds = Checkpoint.open(tmp_path / "q").formats
    assert not any("shared" in name for name in kinds)
    assert {kinds[n] for n in kinds if "in_proj" in n} == {"fp8"}
    facts = json.loads(run("info", tmp_path / "q", "--json", "--memory", "1GB").stdout)
    plain = json.loads(run("info", folder, "--json").stdout)
    assert facts["quantized_tensors"]["nvfp4"] > facts["quantized_tensors"]["fp8"] > 0
    for name, width in facts["widths"].items():
        assert width["weight_bytes_per_token"] < plain["widths"][name]["weight_bytes_per_token"]
        assert width["parameters"] == plain["widths"][name]["parameters"]
    (tmp_path / "sizes").mkdir()
    for file in ("config.json", "hf_quant_config.json"):
        (tmp_path / "sizes" / file).write_bytes((tmp_path / "q" / file).read_bytes())
    small = json.loads(run("info", tmp_path / "sizes", "--json", "--memory", "1GB").stdout)
    assert small["widths"] == facts["widths"] and not small["tensors_checked"]
    run("slice", tmp_path / "q", "--width", "S", "--out", tmp_path / "S")
    run("widths", tmp_path / "q", "--slice", f"tiny={tmp_path / 'S'}", "--out", tmp_path / "t.json")
    table = json.loads((tmp_path / "t.json").read_text())
    assert table["widths"]["tiny"]["hidden_size"] == 48


def test_the_command_distils(tmp_path):
    folder = base(tmp_path).folder
    lines = [json.dumps({"input_ids": [(7 * i + j) % 130 for j in range(40)]}) for i in range(8)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    done = run(
        "quantize",
        folder,
        "--out",
        tmp_path / "q",
        "--distill",
        "--data",
        tmp_path / "data.jsonl",
        "--steps",
        2,
        "--batch-size",
        2,
        "--sequence-length",
        32,
        "--threads",
        1,
    )
    assert "KL from the unquantized weights" in done.output
    assert set(load_file(tmp_path / "q" / "model.safetensors")) >= {"lm_head.weight_scale_2"}


def test_the_command_refuses(tmp_path):
    folder = base(tmp_path).folder
    for options in (
        ("--format", "int4"),
        ("--layers", "norms"),
        ("--distill",),
        ("--width-weights", "S"),
        ("--width-weights", "S=1"),
        ("--keep", "nothing"),
        ("--threads", "0"),
        ("--out", str(folder)),
    ):
        run("quantize", folder, "--out", tmp_path / "q", *options, code=2)
    assert not (tmp_path / "q").exists()
