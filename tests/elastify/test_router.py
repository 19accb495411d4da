"""The router, its masks and costs: against slices, exact counts and the published schedules."""

from __future__ import annotations

import pytest
import torch

from elastic_infer.checkpoint.config import ModelConfig
from elastic_infer.checkpoint.counts import count_parameters, kv_bytes_per_token, state_bytes
from elastic_infer.checkpoint.width_table import parse_widths
from elastic_infer.checkpoint.widths import full_width
from elastic_infer.elastify.costs import Cost, parse_bytes, parse_parameters
from elastic_infer.elastify.router import (
    Router,
    budget_loss,
    check_budgets,
    check_choices,
    default_choices,
    logit_scale,
    temperature,
)
from elastic_infer.elastify.torch_model import ElasticNemotronH
from elastic_infer.errors import InvalidRequest, WidthError
from support.tiny import tiny_config, tiny_state_dict, tiny_widths
from support.torch_models import TABLE, assert_close, batches, random_model

CHOICES = {
    "hidden_size": (64, 48, 32),
    "mamba_num_heads": (6, 4, 2),
    "num_attention_heads": (4, 2),
    "n_routed_experts": (6, 4, 3),
    "moe_intermediate_size": (32, 16),
    "moe_shared_expert_intermediate_size": (48, 16),
    "intermediate_size": (48, 32),
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def router(**options) -> Router:
    return Router(random_model(3).config, [1.0, 0.7, 0.4], CHOICES, inner=16, **options)


def one_hot(owner: Router, sizes: dict) -> dict[str, torch.Tensor]:
    """Probabilities that choose exactly the given sizes (others: full)."""
    pi = {}
    for axis, choices in owner.choices.items():
        rows = owner.rows(axis)
        wanted = sizes.get(axis, choices[0])
        wanted = wanted if isinstance(wanted, list) else [wanted] * rows
        pi[axis] = torch.stack([torch.eye(len(choices))[choices.index(size)] for size in wanted])
    return pi


@pytest.mark.parametrize("name", list(TABLE))
@torch.no_grad()
def test_hard_masks_give_the_logits_of_the_slice(name):
    model = random_model(3)
    width = parse_widths(model.config, TABLE)[name]
    ids = batches(1)[0]
    masks = router().masks(one_hot(router(), TABLE[name]))
    assert_close(model(ids, masks=masks), model(ids, width))


@torch.no_grad()
def test_hard_masks_of_per_layer_choices():
    config = {**tiny_config(0), "hybrid_override_pattern": "M*ME-E", "num_hidden_layers": 6}
    config.update(n_groups=2, mamba_num_heads=6, n_routed_experts=6, num_experts_per_tok=2)
    model = ElasticNemotronH(ModelConfig.from_dict(config)).initialize(1)
    table = {"mamba_num_heads": [2, 6], "n_routed_experts": [6, 3]}
    owner = Router(
        model.config,
        [1.0, 0.5],
        {"mamba_num_heads": (6, 4, 2), "n_routed_experts": (6, 3)},
        per_layer=True,
    )
    ids = torch.arange(40).view(2, 20)
    width = parse_widths(model.config, {"x": table})["x"]
    assert_close(model(ids, masks=owner.masks(one_hot(owner, table))), model(ids, width))


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_hard_masks_of_any_width_of_any_model(seed):
    """Random models and tables, some with per-layer sizes."""
    raw = tiny_config(seed)
    config = ModelConfig.from_dict(raw)
    model = ElasticNemotronH(config)
    model.load_checkpoint_state(tiny_state_dict(raw, seed=seed))
    table = tiny_widths(raw, seed, per_layer=bool(seed % 2))["widths"]["S"]
    sizes, choices = {}, {}
    width = parse_widths(config, {"S": table})["S"]
    for axis in table:
        kept = getattr(width, axis)
        kept = [kept] if axis == "hidden_size" else [size for size in kept if size]
        choices[axis] = tuple(sorted({getattr(config, axis), *kept}))
        sizes[axis] = kept
    owner = Router(config, [1.0, 0.5], choices, per_layer=True, inner=8)
    ids = torch.randint(0, raw["vocab_size"], (2, 19), generator=torch.Generator().manual_seed(1))
    masks = owner.masks(one_hot(owner, sizes))
    assert_close(model(ids, masks=masks), model(ids, width))


def test_gradients_reach_every_axis_through_soft_masks():
    model, owner = random_model(3), router(per_layer=True)
    pi = owner.probabilities(0.7, 1.0, 1.0, torch.Generator().manual_seed(1))
    model(batches(1)[0], masks=owner.masks(pi)).square().mean().backward()
    for axis, network in owner.networks.items():
        assert all(p.grad.abs().sum() > 0 for p in network.parameters()), axis


def test_masks_need_the_full_width():
    model = random_model(3)
    width = parse_widths(model.config, TABLE)["narrow"]
    masks = router().masks(one_hot(router(), {}))
    with pytest.raises(InvalidRequest, match="full one where masks are given, got 'narrow'"):
        model(batches(1)[0], width, masks)


def test_budget_input_is_one_hot_and_interpolates():
    owner = router()
    assert owner.budget_input(0.7).tolist() == [0, 1, 0]
    assert owner.budget_input(0.85).tolist() == pytest.approx([0.5, 0.5, 0])
    assert owner.budget_input(0.475).tolist() == pytest.approx([0, 0.25, 0.75])
    with pytest.raises(InvalidRequest, match=r"between the trained 0.4 and 1, got 0.2"):
        owner.budget_input(0.2)
    with pytest.raises(InvalidRequest, match=r"must lie in \(0, 1\], got 1.5"):
        owner.budget_input(1.5)


def test_logits_of_an_interpolated_budget_lie_on_its_networks():
    owner = router()
    network = owner.networks["hidden_size"]
    given = torch.tensor([0.5, 0.5, 0.0])
    hidden = network[0].weight @ given
    want = network[2].weight @ torch.where(hidden > 0, hidden, 0.1 * hidden)
    torch.testing.assert_close(owner.logits(0.85)["hidden_size"][0], want)


def test_probabilities_sharpen_and_are_repeatable():
    owner = router()

    def draw(tau, seed=0, **options):
        generator = torch.Generator().manual_seed(seed)
        return owner.probabilities(0.7, tau, 10.0, generator, **options)["hidden_size"]

    assert torch.equal(draw(1.0), draw(1.0))
    assert not torch.equal(draw(1.0), draw(1.0, seed=1))
    assert draw(0.05).max() > draw(1.0).max()
    hard = draw(1.0, hard=True)
    assert sorted(hard.flatten().tolist()) == pytest.approx([0, 0, 1])
    hard[0, 0].backward()
    assert owner.networks["hidden_size"][0].weight.grad.abs().sum() > 0
    plain = owner.probabilities(0.7, 1.0, 1.0)["hidden_size"]
    torch.testing.assert_close(plain, owner.logits(0.7)["hidden_size"].softmax(-1))


def test_gumbel_noise_draws_choices_with_their_probability():
    owner = router()
    generator = torch.Generator().manual_seed(3)
    counts = torch.zeros(3)
    for _ in range(600):
        pi = owner.probabilities(0.4, 1.0, 5.0, generator, hard=True)["mamba_num_heads"]
        counts += pi.detach()[0]
    want = (owner.logits(0.4)["mamba_num_heads"][0] * 5).softmax(-1).detach()
    assert (counts / 600 - want).abs().max() < 0.06  # 3 standard deviations


def test_schedules_end_where_published():
    assert temperature(0) == pytest.approx(1.0) and temperature(1) == pytest.approx(0.05)
    assert temperature(0.5) == pytest.approx(0.05**0.5)
    assert [logit_scale(p) for p in (0, 0.5, 1, 2)] == [1, 5.5, 10, 10]


def test_width_takes_the_likeliest_sizes():
    owner = router(per_layer=True)
    with torch.no_grad():
        for network in owner.networks.values():
            network[0].weight.fill_(1.0)
            network[2].weight.zero_()
            network[2].weight[-1] = 1.0  # the last choice of the last layer
    width = owner.width(0.4)
    assert width.hidden_size == 32
    assert width.mamba_num_heads == (6, 0, 2, 0, 0, 0)
    assert width.n_routed_experts == (0, 6, 0, 0, 0, 3)
    assert owner.width(1.0, "L").same_sizes(full_width(owner.config))


@pytest.mark.parametrize("seed", range(3))
def test_costs_equal_the_exact_counts(seed):
    config = ModelConfig.from_dict(tiny_config(seed, tie_word_embeddings=bool(seed % 2)))
    choices = default_choices(config)
    owner = Router(config, [1.0, 0.5], choices, per_layer=True, seed=seed)
    width = owner.width(0.5)
    counts = count_parameters(config, width)
    assert Cost("total").of(config, width) == counts.total
    assert Cost("active").of(config, width) == counts.active
    memory = Cost("memory", bits_per_weight=4.5, context=1000, sequences=3)
    full = full_width(config)
    want = count_parameters(config, full).total * 4.5 / 8
    want += 3 * (1000 * kv_bytes_per_token(config) + state_bytes(config))
    assert memory.of(config, full) == pytest.approx(want)
    pi = {}
    for axis, logits in owner.logits(0.5).items():
        pi[axis] = torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    expected = Cost("total").of_sizes(config, *owner.sizes(pi))
    assert float(expected) == pytest.approx(counts.total, rel=1e-6)


def test_budget_loss_has_a_dead_zone_and_a_term_for_the_full_budget():
    owner = router()
    cost = Cost("total")
    config = owner.config
    full = cost.of(config, full_width(config))
    width = parse_widths(config, TABLE)["narrow"]
    share = cost.of(config, width) / full
    pi = one_hot(owner, TABLE["narrow"])
    loss, got = budget_loss(owner, pi, 0.7, cost)
    assert got == pytest.approx(share) and float(loss) == pytest.approx(abs(share / 0.7 - 1))
    assert float(budget_loss(owner, pi, share * 1.03, cost)[0]) == 0
    assert float(budget_loss(owner, one_hot(owner, {}), 1.0, cost)[0]) == pytest.approx(0)
    off = one_hot(owner, {"num_attention_heads": 2})
    want = 1 - budget_loss(owner, off, 1.0, cost)[1] + 10 * 1.0  # MSE of (0, 1) to (1, 0) is 1
    assert float(budget_loss(owner, off, 1.0, cost)[0]) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("kind", ["total", "active", "memory"])
def test_the_budget_loss_alone_learns_the_budget(kind):
    owner = router(seed=2)
    cost = Cost(kind, bits_per_weight=8, context=10)
    optimizer = torch.optim.AdamW(owner.parameters(), lr=1e-2, weight_decay=0)
    generator = torch.Generator().manual_seed(0)
    for step in range(600):
        budget = owner.budgets[step % 3]
        pi = owner.probabilities(
            budget, temperature(step / 600), logit_scale(step / 600), generator
        )
        loss, _ = budget_loss(owner, pi, budget, cost)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    whole = cost.of(owner.config, full_width(owner.config))
    for budget in (0.7, 0.4):
        share = cost.of(owner.config, owner.width(budget)) / whole
        assert share == pytest.approx(budget, rel=0.12)


def test_default_choices_fit_every_model():
    for seed in range(8):
        config = ModelConfig.from_dict(tiny_config(seed))
        choices = default_choices(config)
        assert check_choices(config, choices) == choices
        for axis, sizes in choices.items():
            assert sizes[0] == getattr(config, axis) and 2 <= len(sizes) <= 6


def test_bad_choices_are_refused_by_name():
    config = random_model(3).config

    def refused(choices, match):
        with pytest.raises(WidthError, match=match):
            check_choices(config, choices)

    refused({"hidden_size": (64, 40)}, "hidden_size must be a multiple of 16")
    refused({"mamba_num_heads": (6, 3)}, r"mamba_num_heads must be a multiple of 2 \(n_groups\)")
    refused({"num_attention_heads": (4, 1)}, "multiple of 2 .num_key_value_heads.")
    refused({"n_routed_experts": (6, 1)}, "at least num_experts_per_tok")
    refused({"hidden_size": (48, 32)}, r"must hold the full 64, got \[48, 32\]")
    refused({"hidden_size": (64, 48, 48)}, "must differ")
    refused({"num_layers": (6, 3)}, "axis must be one of hidden_size")
    with pytest.raises(WidthError, match="at least one axis"):
        Router(config, [1.0], {})


def test_bad_budgets_are_refused():
    for budgets, match in (
        ([], "at least one"),
        ([1.0, 0.0], r"in \(0, 1\], got 0"),
        ([1.2], "got 1.2"),
        ([float("nan")], "got nan"),
        ([0.5, 0.5], "given once"),
    ):
        with pytest.raises(InvalidRequest, match=match):
            check_budgets(budgets)
    assert check_budgets([0.4, 1, 0.7]) == (1.0, 0.7, 0.4)


def test_amounts_are_read_with_their_units():
    assert parse_parameters("18B", 30e9) == 18e9
    assert parse_parameters("600m", 30e9) == 600e6
    assert parse_parameters("0.6", 100) == 60 and parse_parameters("60%", 100) == 60
    assert parse_parameters("1", 100) == 100
    assert parse_parameters("123456", 1e6) == 123456
    assert parse_bytes("16GB") == 16e9 and parse_bytes("16GiB") == 16 * 2**30
    assert parse_bytes("1.5 mb") == 1.5e6
    for wrong in ("", "B", "-3B", "0", "1.5", "150%", "18X", "nan"):
        with pytest.raises(InvalidRequest, match=r"budget: must be a number of parameters"):
            parse_parameters(wrong, 100)
    with pytest.raises(InvalidRequest, match="16GB or 16GiB, got '16 parsecs'"):
        parse_bytes("16 parsecs")
    with pytest.raises(InvalidRequest, match="kind must be one of total, active, memory"):
        Cost("price")
    with pytest.raises(InvalidRequest, match="bits_per_weight must be at least"):
        Cost("memory", bits_per_weight=0)
