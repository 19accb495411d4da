"""The whole way from a parent to an elastic checkpoint that transformers and the Engine run."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from test_router import CHOICES
from typer.testing import CliRunner

from elastic_infer.checkpoint.checkpoint import Checkpoint
from elastic_infer.checkpoint.counts import count_parameters
from elastic_infer.checkpoint.slicing import slice_checkpoint
from elastic_infer.checkpoint.widths import full_width
from elastic_infer.cli import app
from elastic_infer.cli.elastify import answer_budget, numbers, stages
from elastic_infer.elastify import pipeline
from elastic_infer.elastify.budget import (
    ROUTER_NAME,
    LearnedSizes,
    add_width,
    width_for_budget,
    width_for_text,
)
from elastic_infer.elastify.corpus import Corpus
from elastic_infer.elastify.costs import Cost
from elastic_infer.elastify.distill import Result
from elastic_infer.elastify.pipeline import elastify
from elastic_infer.elastify.router import Router
from elastic_infer.elastify.settings import Settings, Stage
from elastic_infer.elastify.torch_model import ElasticNemotronH
from elastic_infer.errors import CheckpointError, ElasticError, InvalidRequest, WidthError
from support import mutation
from support.tiny import tiny_config, transformers_model, write_tiny
from support.torch_models import assert_close, random_model

ARGUMENTS = ["--steps", "4,2", "--sequence-length", "12,16", "--batch-size", "4,2"]
ARGUMENTS += ["--probabilities", "0.5,0.3,0.2", "--calibration", "6", "--device", "cpu"]
ARGUMENTS += ["--lr", "1e-3", "--warmup", "1", "--save-every", "2"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a parent, data, and the elastic checkpoint that the command made of them."""
    folder = tmp_path_factory.mktemp("elastify")
    parent = random_model(3)
    parent.save(folder / "parent", torch.bfloat16)
    (folder / "parent" / "generation_config.json").write_text('{"eos_token_id": 2}')
    draw = random.Random(0)
    lines = [{"input_ids": [draw.randrange(3, 48) for _ in range(20)]} for _ in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "choices.json").write_text(json.dumps(CHOICES))
    given = ["elastify", str(folder / "parent"), "--data", str(folder / "data.jsonl")]
    given += ["--out", str(folder / "out"), "--choices", str(folder / "choices.json"), *ARGUMENTS]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    assert "KL from the parent" in result.output and "L" in result.output
    return folder


def test_result_is_an_elastic_checkpoint_that_transformers_loads(folder, tmp_path):
    pytest.importorskip("transformers")
    out = Checkpoint.open(folder / "out")
    parent = Checkpoint.open(folder / "parent")
    assert set(out.widths) == {"L", "M", "S"} and out.default_width == "L"
    assert out.widths["L"].same_sizes(full_width(out.config))
    for name in out.names:
        assert out.dtype_of(name) == parent.dtype_of(name), name
    assert (folder / "out" / "generation_config.json").is_file()
    ids = torch.randint(0, 48, (2, 20), generator=torch.Generator().manual_seed(1))
    model = ElasticNemotronH.load(folder / "out")
    with torch.no_grad():
        assert_close(transformers_model(folder / "out")(ids).logits, model(ids))
        for name in ("M", "S"):
            slice_checkpoint(out, name, tmp_path / name)
            want = transformers_model(tmp_path / name)(ids).logits
            assert_close(model(ids, out.widths[name]), want)


def test_the_engine_runs_every_width(folder):
    from support.engines import open_engine

    model = ElasticNemotronH.load(folder / "out")
    ids = torch.randint(0, 48, (23,), generator=torch.Generator().manual_seed(2))
    with open_engine(folder / "out") as engine:
        for name, width in engine.widths.items():
            got = engine.score(ids.tolist(), width=name)
            with torch.no_grad():
                want = model(ids[None], width)[0]
            worst = (torch.as_tensor(got) - want).abs().max()
            assert worst <= 0.05 * want.abs().max()  # bfloat16 against float32


def test_the_run_leaves_its_files(folder):
    run = folder / "out" / "run"
    names = {path.name for path in run.iterdir()}
    expected = {"importance.safetensors", "metrics.jsonl", "state.pt", "tokens.int32", "run.png"}
    assert names == expected
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 6


def test_the_full_width_starts_as_the_parent_in_another_order(folder, monkeypatch):
    """Before any training the elastic model computes what the parent computes."""
    seen = {}

    class Stop(Exception):
        pass

    class Watch(pipeline.Distiller):
        def __init__(self, parent, *arguments, **options):
            seen["model"] = parent
            raise Stop

    monkeypatch.setattr(pipeline, "Distiller", Watch)
    settings = Settings(stages=(Stage(1, 12, 4),), choices=CHOICES)
    with pytest.raises(Stop):
        elastify(
            folder / "parent",
            folder / "data.jsonl",
            folder / "other",
            settings,
            calibration=6,
            device="cpu",
        )
    parent = ElasticNemotronH.load(folder / "parent")
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert_close(seen["model"](ids), parent(ids))
        assert not torch.equal(seen["model"].lm_head.weight, parent.lm_head.weight)


def test_a_finished_folder_or_a_foreign_one_is_refused(folder, tmp_path):
    settings = Settings(stages=(Stage(1, 12, 4),))
    with pytest.raises(CheckpointError, match=r"out must be a new or empty folder.*another run"):
        elastify(folder / "parent", folder / "data.jsonl", folder / "out", settings)
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"with .letter\.txt. in it"):
        elastify(folder / "parent", folder / "data.jsonl", tmp_path, settings)
    with pytest.raises(CheckpointError, match="parent must have one width, got S, "):
        elastify(folder / "out", folder / "data.jsonl", tmp_path / "new", settings)


def test_bad_input_of_the_command_is_one_line(folder, tmp_path):
    llama = tmp_path / "llama"
    llama.mkdir()
    (llama / "config.json").write_text('{"model_type": "llama"}')
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "bad.json").write_text('{"hidden_size": [64, 40]}')
    (tmp_path / "groups.json").write_text('{"mamba_num_heads": [6, 3]}')
    parent, data = str(folder / "parent"), str(folder / "data.jsonl")

    def refused(match, parent=parent, data=data, **options):
        given = {"--out": str(tmp_path / "out"), "--steps": "1", "--sequence-length": "12"}
        given.update({f"--{name}": value for name, value in options.items()})
        pairs = [part for pair in given.items() for part in pair]
        result = CliRunner().invoke(app, ["elastify", parent, "--data", data, *pairs])
        assert result.exit_code == 2
        assert match in " ".join(result.output.split()), result.output

    refused("model_type must be 'nemotron_h', got 'llama'", parent=str(llama))
    refused("each must lie in (0, 1], got 1.5", budgets="1.5,0.5")
    refused("each must lie in (0, 1], got 0", budgets="1,0")
    refused("--budgets: must be numbers with commas between them", budgets="1;0.5")
    two = {"sequence-length": "1,2"}
    refused("--sequence-length: must be one number, or one for each of 1", **two)
    refused("hidden_size must be a multiple of 16", choices=str(tmp_path / "bad.json"))
    refused("must be a multiple of 2 (n_groups)", choices=str(tmp_path / "groups.json"))
    refused("kind must be one of total, active, memory", cost="price")
    refused("must hold .txt, .md, .jsonl, .json files, got none", data=str(empty))
    (empty / "a.txt").write_text("some text")
    refused("must have a tokenizer to read text", data=str(empty))
    (empty / "a.txt").write_text(" ")
    refused("must hold at least one token, got none", data=str(empty))


def test_numbers_and_stages_of_the_command():
    assert numbers("--budgets", "1.0,0.5") == (1.0, 0.5)
    assert stages("10,5", "64,128", "8", "0.5,0.5") == (
        Stage(10, 64, 8, None),
        Stage(5, 128, 8, (0.5, 0.5)),
    )


# Any budget to a width ---------------------------------------------------------------------------


def learned(per_layer: bool = True) -> LearnedSizes:
    config = random_model(3).config
    router = Router(config, [1.0, 0.7, 0.4], CHOICES, per_layer=per_layer, inner=16, seed=4)
    optimizer = torch.optim.Adam(router.parameters(), lr=1e-2)
    cost = Cost("total")
    from elastic_infer.elastify.router import budget_loss

    for step in range(240):  # the budget loss alone
        budget = router.budgets[step % 3]
        loss, _ = budget_loss(router, router.probabilities(budget, 0.5, 2.0), budget, cost)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    names = {"L": 1.0, "M": 0.7, "S": 0.4}
    widths = {name: router.width(budget, name) for name, budget in names.items()}
    return LearnedSizes(router, cost, widths, {"L": 0.0, "M": 0.2, "S": 0.6})


def test_a_router_with_one_thing_wrong_loads_or_is_refused(tmp_path):
    """Every damaged or odd elastic_router.json: it gives widths, or an error of the library."""
    sizes = learned()
    sizes.save(tmp_path)
    path = tmp_path / ROUTER_NAME
    data = path.read_bytes()
    assert LearnedSizes.load(tmp_path, sizes.router.config).candidates()
    for seed in range(100):
        path.write_bytes(mutation.mutate_text(random.Random(f"router {seed}"), data))
        with contextlib.suppress(ElasticError):
            LearnedSizes.load(tmp_path, sizes.router.config).candidates()


def test_every_budget_gets_the_dearest_learnt_width_below_it():
    sizes = learned()
    config, cost = sizes.router.config, Cost("total")
    whole = cost.of(config, full_width(config))
    costs = sorted(cost.of(config, width) for width in sizes.candidates())
    assert len(costs) > 5 and costs[-1] == whole
    for share in (0.45, 0.6, 0.75, 0.9, 1.0):
        answer = width_for_budget(sizes, share * whole, cost)
        assert answer.value == max(value for value in costs if value <= share * whole)
        assert answer.counts == count_parameters(config, answer.width)
    with pytest.raises(InvalidRequest, match=r"at least .* parameters, the smallest learnt"):
        width_for_budget(sizes, costs[0] - 1, cost)


def test_budgets_in_memory_and_active_parameters():
    sizes = learned()
    config = sizes.router.config
    for cost in (Cost("memory", 4.5, 100, 2), Cost("active")):
        limit = 0.75 * cost.of(config, full_width(config))
        answer = width_for_budget(sizes, limit, cost)
        assert 0.5 * limit < answer.value <= limit
        assert answer.value == cost.of(config, answer.width)


def test_predicted_loss_interpolates_between_the_trained_widths():
    sizes = learned()
    for name, loss in sizes.losses.items():
        assert sizes.predicted_loss(sizes.widths[name]) == pytest.approx(loss)
    for width in sizes.candidates():
        assert 0 <= sizes.predicted_loss(width) <= 0.6
    cost = Cost("total")
    config = sizes.router.config
    low, high = (cost.of(config, sizes.widths[name]) for name in ("S", "M"))
    middle = width_for_budget(sizes, (low + high) / 2, cost)
    want = 0.6 + (0.2 - 0.6) * (middle.value - low) / (high - low)
    assert middle.predicted_loss == pytest.approx(want)


def test_learned_sizes_are_kept_exactly(tmp_path):
    sizes = learned()
    sizes.save(tmp_path)
    again = LearnedSizes.load(tmp_path, sizes.router.config)
    for name, tensor in sizes.router.state_dict().items():
        assert torch.equal(again.router.state_dict()[name], tensor)
    assert again.losses == sizes.losses and again.cost == sizes.cost
    assert all(again.widths[name].same_sizes(width) for name, width in sizes.widths.items())
    assert len(again.candidates()) == len(sizes.candidates())


def test_a_budget_becomes_a_width_of_the_checkpoint(tmp_path, capsys):
    model = random_model(3)
    model.save(tmp_path)
    sizes = learned()
    sizes.save(tmp_path)
    answer_budget(str(tmp_path), "0.8", name="middle", write=False)
    assert not (tmp_path / "elastic_widths.json").exists()
    answer_budget(str(tmp_path), "0.8", name="middle")
    printed = capsys.readouterr().out
    assert "predicted KL from the parent" in printed and "width middle" in printed
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.widths) == {"full", "middle"} and checkpoint.default_width == "full"
    result = CliRunner().invoke(app, ["widths", str(tmp_path), "--budget", "0.6", "--name", "low"])
    assert result.exit_code == 0 and "width low: written to" in result.output
    assert set(Checkpoint.open(tmp_path).widths) == {"full", "middle", "low"}
    result = CliRunner().invoke(app, ["widths", str(tmp_path), "--memory", "1 byte", "--dry-run"])
    assert result.exit_code == 2 and "memory: must be a size such as 16GB" in result.output
    result = CliRunner().invoke(app, ["widths", str(tmp_path), "--budget", "1", "--slice", "a=b"])
    assert result.exit_code == 2 and "must not be given together with slices" in result.output
    want = width_for_text(checkpoint, "80%").width
    assert checkpoint.widths["middle"].same_sizes(want)
    assert add_width(checkpoint, want) == ("middle", None)
    with pytest.raises(WidthError, match="name must be a new one, got 'middle'"):
        add_width(checkpoint, width_for_text(checkpoint, "0.5", name="middle").width)
    assert width_for_text(checkpoint, memory="1GB", context=10).width.same_sizes(
        full_width(checkpoint.config)
    )
    for options, match in (
        ({}, "exactly one of budget and memory"),
        ({"budget": "1", "memory": "1GB"}, "exactly one"),
        ({"memory": "1GB", "active": True}, "active must go with budget"),
        ({"budget": "many"}, "must be a number of parameters"),
        ({"budget": "0.01"}, "the smallest learnt width"),
    ):
        with pytest.raises(InvalidRequest, match=match):
            width_for_text(checkpoint, **options)


def test_a_checkpoint_without_a_router_or_with_another_ones_is_refused(tmp_path):
    write_tiny(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match=r"must hold elastic_router\.json.*got none"):
        width_for_text(checkpoint, "0.5")
    learned().save(tmp_path)
    with pytest.raises(CheckpointError, match="must be the router of this checkpoint"):
        width_for_text(checkpoint, "0.5")
    (tmp_path / "elastic_router.json").write_text('{"version": 2}')
    with pytest.raises(CheckpointError, match="must be of version 1, got 2"):
        width_for_text(checkpoint, "0.5")


@torch.no_grad()
def test_tied_and_mixed_dtypes_survive_the_export(tmp_path):
    config = tiny_config(5, tie_word_embeddings=True)
    write_tiny(tmp_path / "parent", config, dtype=torch.bfloat16, seed=5)
    parent = Checkpoint.open(tmp_path / "parent")
    model = ElasticNemotronH.load(tmp_path / "parent")
    full = full_width(parent.config, "all")
    result = Result({"all": full}, {"all": 1.0}, {}, False, model.state_dict())
    (tmp_path / "out").mkdir()
    pipeline.export_elastic(parent, result, tmp_path / "out", shard_bytes=100_000)
    out = Checkpoint.open(tmp_path / "out")
    assert list(out.widths) == ["all"] and "lm_head.weight" not in out.names
    for name in parent.names:
        assert out.dtype_of(name) == parent.dtype_of(name)
        assert torch.equal(out.tensor(name), parent.tensor(name)), name


def test_calibration_reads_every_sequence_once():
    data = Corpus(np.arange(1000, dtype=np.int32), 10)
    settings = Settings(stages=(Stage(1, 10, 7),))
    few = list(pipeline.calibration_batches(data, settings, 10))
    assert [len(ids) for ids in few] == [7, 3]
    every = torch.cat(list(pipeline.calibration_batches(data, settings, 5000)))
    assert sorted(every[:, 0].tolist()) == list(range(0, 980, 10))
    with pytest.raises(InvalidRequest, match="calibration: must be at least 1 sequence, got 0"):
        next(pipeline.calibration_batches(data, settings, 0))
