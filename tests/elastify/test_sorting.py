"""A sorted checkpoint computes what the parent computes, and its prefixes are what ranked first."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from elastic_infer.checkpoint.checkpoint import Checkpoint
from elastic_infer.checkpoint.config import ModelConfig
from elastic_infer.checkpoint.width_table import parse_widths
from elastic_infer.elastify.importance import measure_importance
from elastic_infer.elastify.sorting import (
    head_order,
    importance_order,
    random_order,
    sort_checkpoint,
    sort_model,
    sort_state_dict,
)
from elastic_infer.errors import CheckpointError
from support.tiny import (
    tiny_config,
    tiny_state_dict,
    tiny_widths,
    transformers_model,
    write_tiny,
)
from support.torch_models import assert_close, batches, random_model


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_sorted_checkpoint_equals_the_parent_in_transformers(seed, tmp_path):
    pytest.importorskip("transformers")
    config = tiny_config(seed)
    write_tiny(tmp_path / "parent", config, seed=seed, shards=1 + seed % 2)
    parent = Checkpoint.open(tmp_path / "parent")
    order = random_order(parent.config, seed)
    sort_checkpoint(parent, order, tmp_path / "sorted", shard_bytes=200_000)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config["vocab_size"], (2, 40), generator=generator)
    want = transformers_model(tmp_path / "parent")(ids).logits
    got = transformers_model(tmp_path / "sorted")(ids).logits
    assert_close(got, want)
    parent_head = parent.tensor("lm_head.weight")
    sorted_head = Checkpoint.open(tmp_path / "sorted").tensor("lm_head.weight")
    assert not torch.equal(parent_head, sorted_head)
    assert torch.equal(parent_head[:, order.of("hidden_size")], sorted_head)


def test_scores_of_the_sorted_model_fall_along_every_axis():
    """Measured again after sorting, every axis (heads: inside every group) is in falling order."""
    model = random_model(7)
    parts = batches(2)
    sort_model(model, importance_order(model.config, measure_importance(model, parts)))
    again = measure_importance(model, parts)
    groups = {"mamba_num_heads": 2, "num_attention_heads": 2}
    for name, scores in again.scores.items():
        key = name.partition(".")[0]
        if key == "mamba_head_dim":
            continue
        shaped = scores.view(groups[key], -1) if key in groups else scores
        steps = shaped.diff(dim=-1)
        assert (steps <= 1e-4 * scores.abs().max()).all(), name


def test_sorting_moves_whole_components():
    """A width of the sorted model equals the parent with the unimportant components removed."""
    model = random_model(7)
    config = model.config
    order = random_order(config, 3)
    mixer = model.backbone.layers[1].mixer
    dropped = order.of("moe_intermediate_size", 1)[:, 16:]
    with torch.no_grad():
        for expert in range(6):
            mixer.experts.down_proj[expert][:, dropped[expert]] = 0
        head = order.of("num_attention_heads", 3).view(2, 2)[:, 1]
        columns = model.backbone.layers[3].mixer.o_proj.weight.view(64, 4, 16)
        columns[:, head] = 0
        ids = batches(1)[0]
        want = model(ids)
        sort_model(model, order)
        sizes = {"moe_intermediate_size": [16, 32], "num_attention_heads": 2}
        assert_close(model(ids, parse_widths(config, {"narrow": sizes})["narrow"]), want)


def test_heads_stay_in_their_groups():
    scores = torch.tensor([1.0, 3.0, 3.0, 9.0, 0.0, 5.0])
    assert head_order(scores, 2).tolist() == [1, 2, 0, 3, 5, 4]
    assert head_order(scores, 3).tolist() == [1, 0, 3, 2, 5, 4]


def test_equal_scores_keep_their_order():
    assert head_order(torch.ones(8), 2).tolist() == list(range(8))


def test_an_old_width_table_is_left_out_and_files_come_along(tmp_path):
    config = tiny_config(2)
    write_tiny(tmp_path / "parent", config, tiny_widths(config, 2), seed=2)
    (tmp_path / "parent" / "generation_config.json").write_text("{}")
    parent = Checkpoint.open(tmp_path / "parent")
    out = sort_checkpoint(parent, random_order(parent.config, 1), tmp_path / "sorted")
    raw = json.loads((out / "config.json").read_text())
    assert "elastic" not in raw
    assert (out / "generation_config.json").is_file()
    assert set(load_file(out / "model.safetensors")) == set(parent.names)
    with pytest.raises(CheckpointError, match="must be a new or empty folder"):
        sort_checkpoint(parent, random_order(parent.config, 1), out)


def test_missing_tensor_is_named():
    config = ModelConfig.from_dict(tiny_config(1))
    state = tiny_state_dict(tiny_config(1))
    del state["backbone.norm_f.weight"]
    with pytest.raises(CheckpointError, match=r"state must hold backbone.norm_f.weight, got none"):
        sort_state_dict(config, state, random_order(config, 0))
