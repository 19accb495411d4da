"""Importance scores against their formulas computed by hand, and their bookkeeping."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from elastic_infer.elastify.importance import (
    Importance,
    layer_errors,
    layer_order,
    measure_importance,
    score_shapes,
)
from elastic_infer.elastify.torch_ops import rms_norm
from elastic_infer.errors import CheckpointError, InvalidRequest
from support.torch_models import batches, random_model


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def inputs_of(model, ids):
    """The input of every mixer and the final normalized state, by a loop of its own."""
    x = F.embedding(ids, model.backbone.embeddings.weight)
    found = []
    for block in model.backbone.layers:
        normed = rms_norm(x, block.norm.weight, 1e-5)
        found.append(normed)
        x = x + block.mixer(normed, model.full)
    return found, rms_norm(x, model.backbone.norm_f.weight, 1e-5)


@torch.no_grad()
def test_scores_follow_their_formulas():
    model, (ids,) = random_model(3), batches(1)
    got = measure_importance(model, [ids])
    inputs, final = inputs_of(model, ids)

    def same(want, name):
        torch.testing.assert_close(got.scores[name], want.double(), rtol=1e-4, atol=1e-6)

    same(sum(x.abs().sum((0, 1)) for x in [*inputs, final]), "hidden_size")
    # Layers: M E M * - E, heads 6 of 16 channels, 4 query heads of 16.
    rows = model.backbone.layers[0].mixer.in_proj.weight[96:192]
    s = F.linear(inputs[0], rows).abs().sum((0, 1)).view(6, 16)
    same(s.norm(dim=1), "mamba_num_heads.0")
    same(s.norm(dim=0), "mamba_head_dim.0")
    heads = model.backbone.layers[3].mixer.heads(inputs[3], model.full)
    same(heads.norm(dim=-1).sum((0, 2)), "num_attention_heads.3")
    up = model.backbone.layers[4].mixer.up_proj.weight
    same(F.linear(inputs[4], up).relu().square().sum((0, 1)), "intermediate_size.4")
    mixer, rows = model.backbone.layers[1].mixer, inputs[1].flatten(0, 1)
    shared = F.linear(rows, mixer.shared_experts.up_proj.weight).relu().square().sum(0)
    same(shared, "moe_shared_expert_intermediate_size.1")
    index, weights = mixer.route(rows, model.full)
    for expert in range(6):
        norms = []
        neurons = torch.zeros(32)
        for row, chosen, gate in zip(rows, index, weights, strict=True):
            if expert in chosen:
                inside = F.linear(row, mixer.experts.up_proj[expert]).relu().square()
                out = F.linear(inside, mixer.experts.down_proj[expert])
                norms.append(gate[chosen == expert].item() * out.norm().item())
                neurons += inside
        want = sum(norms) / len(norms) if norms else 0.0
        assert got.of("n_routed_experts", 1)[expert].item() == pytest.approx(want, rel=1e-4)
        torch.testing.assert_close(
            got.of("moe_intermediate_size", 1)[expert], neurons.double(), rtol=1e-4, atol=1e-6
        )


def test_batches_add_up_and_the_order_of_tokens_in_them_does_not_matter():
    model, parts = random_model(4), batches(3)
    one_by_one = measure_importance(model, iter(parts), layers=True)
    together = measure_importance(model, [torch.cat(parts)], layers=True)
    assert one_by_one.tokens == together.tokens == 3 * 2 * 17
    for name, scores in one_by_one.scores.items():
        torch.testing.assert_close(scores, together.scores[name], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(one_by_one.layer_errors, together.layer_errors, rtol=1e-4, atol=0)


def test_repeated_measurements_are_equal_to_the_bit():
    first = measure_importance(random_model(4), batches())
    second = measure_importance(random_model(4), batches())
    assert all(torch.equal(first.scores[name], second.scores[name]) for name in first.scores)


def test_positions_of_weight_zero_do_not_count():
    model, (ids,) = random_model(4), batches(1)
    padded = torch.cat([ids, torch.zeros(2, 5, dtype=torch.long)], 1)
    weights = torch.cat([torch.ones(2, 17), torch.zeros(2, 5)], 1)
    plain = measure_importance(model, [ids])
    masked = measure_importance(model, [(padded, weights)])
    assert masked.tokens == plain.tokens
    for name, scores in plain.scores.items():
        torch.testing.assert_close(masked.scores[name], scores, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_layer_errors_against_the_model_without_the_layer():
    model, parts = random_model(5), batches(2)
    got = layer_errors(model, parts)
    ids = torch.cat(parts)
    full = model(ids).double()
    for layer in range(6):
        block = model.backbone.layers[layer]
        kept, block.mixer.forward = block.mixer.forward, lambda x, *_: torch.zeros_like(x)
        without = model(ids).double()
        block.mixer.forward = kept
        want = ((full - without).square().sum() / full.square().sum()).item()
        assert got[layer].item() == pytest.approx(want, rel=1e-4)
    measured = measure_importance(model, parts, layers=True).layer_errors
    torch.testing.assert_close(measured, got)


def test_layers_are_removed_one_at_a_time():
    model, parts = random_model(5), batches(1)
    order = layer_order(model, lambda: parts, 2)
    first = int(layer_errors(model, parts).argmin())
    after = layer_errors(model, parts, [first])
    after[first] = torch.inf
    assert order == [first, int(after.argmin())]
    with pytest.raises(InvalidRequest, match=r"count must be in 0\.\.5, got 6"):
        layer_order(model, lambda: parts, 6)


def test_progress_is_told_and_hooks_are_gone_afterwards():
    model, told = random_model(5), []
    measure_importance(model, batches(3), progress=told.append)
    assert told == [2, 2, 2]
    assert not any(block.mixer._forward_pre_hooks for block in model.backbone.layers)


def test_save_and_load(tmp_path):
    found = measure_importance(random_model(5), batches(1), layers=True)
    found.save(tmp_path / "importance.safetensors")
    again = Importance.load(tmp_path / "importance.safetensors")
    assert again.tokens == found.tokens
    assert torch.equal(again.layer_errors, found.layer_errors)
    assert set(again.scores) == set(score_shapes(random_model(5).config))
    assert all(torch.equal(again.scores[name], found.scores[name]) for name in found.scores)


def test_bad_input_is_refused():
    model = random_model(5)
    with pytest.raises(InvalidRequest, match="must hold at least one token, got none"):
        measure_importance(model, [])
    found = measure_importance(model, batches(1))
    found.scores["hidden_size"][3] = torch.nan
    with pytest.raises(CheckpointError, match="hidden_size must be finite, got NaN"):
        found.check(model.config)
    del found.scores["hidden_size"]
    with pytest.raises(CheckpointError, match=r"hidden_size must be \[64\], got none"):
        found.check(model.config)
    with pytest.raises(CheckpointError, match="must be readable"):
        Importance.load("nowhere.safetensors")
