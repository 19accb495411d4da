"""Width tables: what is accepted, what is refused and why, slices, and what a width costs."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings, strategies as st
from test_config import nano_sizes

from elastic_infer.checkpoint.config import LAYER_KEYS, ModelConfig
from elastic_infer.checkpoint.counts import count_parameters
from elastic_infer.checkpoint.width_table import (
    default_width_name,
    parse_widths,
    slice_config,
    width_to_dict,
)
from elastic_infer.checkpoint.widths import Width, full_width, widest
from elastic_infer.errors import WidthError
from support import tiny

SIZES = {
    "hybrid_override_pattern": "MEM*-E",
    "hidden_size": 96,
    "mamba_num_heads": 8,
    "n_groups": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "n_routed_experts": 7,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 80,
    "intermediate_size": 112,
}
CONFIG = ModelConfig.from_dict(tiny.tiny_config(0, **SIZES))
UNIFORM = {
    "hidden_size": 48,
    "mamba_num_heads": 4,
    "num_attention_heads": 2,
    "n_routed_experts": 3,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 32,
    "intermediate_size": 64,
}


def one(sizes, config=CONFIG) -> Width:
    return parse_widths(config, {"w": sizes})["w"]


def test_full_width_has_zeros_at_layers_of_another_kind():
    assert full_width(CONFIG) == Width(
        name="full",
        hidden_size=96,
        mamba_num_heads=(8, 0, 8, 0, 0, 0),
        num_attention_heads=(0, 0, 0, 6, 0, 0),
        n_routed_experts=(0, 7, 0, 0, 0, 7),
        moe_intermediate_size=(0, 64, 0, 0, 0, 64),
        moe_shared_expert_intermediate_size=(0, 80, 0, 0, 0, 80),
        intermediate_size=(0, 0, 0, 0, 112, 0),
    )


def test_an_empty_entry_is_full_and_no_table_is_one_width():
    assert one({}).same_sizes(full_width(CONFIG))
    assert parse_widths(CONFIG) == {"full": full_width(CONFIG)}
    assert default_width_name(parse_widths(CONFIG), None) == "full"


def test_integers_and_both_forms_of_lists():
    width = one(UNIFORM)
    assert width.hidden_size == 48
    assert width.mamba_num_heads == (4, 0, 4, 0, 0, 0)
    assert width.intermediate_size == (0, 0, 0, 0, 64, 0)
    whole = one({"mamba_num_heads": [2, 0, 6, 0, 0, 0], "n_routed_experts": [9, 2, 9, 9, 9, 5]})
    kind = one({"mamba_num_heads": [2, 6], "n_routed_experts": (2, 5)})
    assert whole == kind
    assert kind.mamba_num_heads == (2, 0, 6, 0, 0, 0)
    assert kind.n_routed_experts == (0, 2, 0, 0, 0, 5)


@pytest.mark.parametrize(
    "sizes, rule",
    [
        ({"hidden_size": 40}, "hidden_size must be a multiple of 16 .*got 40"),
        ({"hidden_size": 112}, "hidden_size must be at most 96.*got 112"),
        ({"hidden_size": [48, 48]}, r"hidden_size must be an integer, got \[48, 48\]"),
        ({"hidden_size": -16}, "hidden_size must be positive, got -16"),
        ({"hidden_size": True}, "hidden_size must be an integer, got True"),
        ({"mamba_num_heads": 3}, r"mamba_num_heads must be a multiple of 2 \(n_groups\), got 3"),
        ({"mamba_num_heads": 10}, "mamba_num_heads must be at most 8.*got 10"),
        ({"num_attention_heads": 5}, r"heads must .* of 2 \(num_key_value_heads\), got 5"),
        ({"num_attention_heads": 8}, "num_attention_heads must be at most 6.*got 8"),
        ({"n_routed_experts": 1}, r"must be at least num_experts_per_tok \(2\), got 1"),
        ({"n_routed_experts": 8}, "n_routed_experts must be at most 7.*got 8"),
        ({"moe_intermediate_size": 24}, "moe_intermediate_size must be a multiple of 16.*24"),
        ({"moe_intermediate_size": [16, 72]}, "moe_intermediate_size must be at most 64.*72"),
        ({"moe_shared_expert_intermediate_size": 8}, "expert_inter.* multiple of 16.*got 8"),
        ({"intermediate_size": "64"}, "intermediate_size must be an integer or a list.*'64'"),
        ({"intermediate_size": 64.0}, "intermediate_size must be an integer or a list.*64.0"),
        ({"intermediate_size": 72}, "intermediate_size must be a multiple of 16.*got 72"),
        ({"mamba_num_heads": [4, 4, 4]}, "must hold 6 values .* or 2 .*got 3"),
        ({"mamba_num_heads": [4, "4"]}, "mamba_num_heads must hold integers.*got '4'"),
        ({"mamba_num_heads": [4, -4]}, "mamba_num_heads must hold integers.*got -4"),
        ({"mamba_num_heads": [4, 0]}, "must be positive .*layer skipping.*no cache.*got 0"),
        ({"num_attention_heads": 0}, "must be positive .*layer skipping.*no cache.*got 0"),
        ({"skip_layers": [1]}, "skip_layers must be absent: layer skipping.*no cache"),
        ({"num_hidden_layers": 4}, "num_hidden_layers must be absent: layer skipping"),
        ({"hybrid_override_pattern": "MEM"}, "must be absent: layer skipping"),
        ({"num_key_value_heads": 1}, "num_key_value_heads must be one of"),
        ({"head_dim": 16}, "head_dim must be one of"),
        ({"vocab_size": 16}, "vocab_size must be one of"),
        ({"hiden_size": 48}, "hiden_size must be one of.*'hidden_size'"),
        ([48], r"sizes must be an object, got \[48\]"),
    ],
)
def test_refuses_by_name(sizes, rule):
    with pytest.raises(WidthError, match=rf"width 'w': .*{rule}"):
        one(sizes)


@pytest.mark.parametrize(
    "table, rule",
    [
        ({"version": 2, "widths": {"a": {}}}, "version must be 1, got 2"),
        ({"version": 1, "widths": {"a": {}}, "extra": 0}, "got 'extra'"),
        ({"version": 1}, "widths must be an object of named widths, got None"),
        ({"version": 1, "widths": {}}, "at least one width"),
        ({}, "at least one width"),
        ({"version": 1, "default_width": "b", "widths": {"a": {}}}, r"one of \['a'\], got 'b'"),
        ({"": {}}, "name must be a non-empty string, got ''"),
        ([], "table must be an object, got list"),
    ],
)
def test_refuses_tables(table, rule):
    with pytest.raises(WidthError, match=f"^widths: .*{rule}"):
        parse_widths(CONFIG, table)


def test_a_key_that_sizes_no_layer_is_checked_but_changes_nothing():
    sizes = {**SIZES, "hybrid_override_pattern": "M*", "moe_intermediate_size": 40}
    config = ModelConfig.from_dict(tiny.tiny_config(0, **sizes))
    assert one({"moe_intermediate_size": 40}, config).same_sizes(full_width(config))
    assert one({"moe_intermediate_size": 16}, config).moe_intermediate_size == (0, 0)
    with pytest.raises(WidthError, match="moe_intermediate_size must be a multiple of 16"):
        one({"moe_intermediate_size": 24}, config)


def test_order_and_default():
    widths = {
        "wide": {},
        "few": {**UNIFORM, "n_routed_experts": 2},
        "mid": {"hidden_size": 80},
        "small": UNIFORM,
    }
    table = {"version": 1, "default_width": "mid", "widths": widths}
    parsed = parse_widths(CONFIG, table)
    assert list(parsed) == ["few", "small", "mid", "wide"]
    assert default_width_name(parsed, table) == "mid"
    assert default_width_name(parsed, {"version": 1, "widths": widths}) == "wide"
    config = ModelConfig.from_dict({**CONFIG.raw, "elastic": table})
    assert parse_widths(config) == parsed
    active = [count_parameters(CONFIG, width).active for width in parsed.values()]
    assert active == sorted(active)


def test_widest_is_the_axis_wise_maximum():
    table = {
        "a": {"hidden_size": 48, "mamba_num_heads": [2, 8]},
        "b": {"n_routed_experts": 3, "mamba_num_heads": [4, 4]},
    }
    widths = parse_widths(CONFIG, table)
    union = widest(widths, name="union")
    assert union == dataclasses.replace(one({"mamba_num_heads": [4, 8]}), name="union")
    assert widths["a"].fits_in(union) and widths["b"].fits_in(union)
    assert not widths["a"].fits_in(widths["b"]) and not widths["b"].fits_in(widths["a"])
    assert widest([widths["a"], full_width(CONFIG)]).name == "full"
    with pytest.raises(WidthError, match="widest: widths must hold at least one width"):
        widest([])


def test_entry_is_short():
    assert width_to_dict(CONFIG, full_width(CONFIG)) == {}
    assert width_to_dict(CONFIG, one(UNIFORM)) == UNIFORM
    sizes = {"hidden_size": 48, "n_routed_experts": [2, 7], "mamba_num_heads": [4, 4]}
    assert width_to_dict(CONFIG, one(sizes)) == {**sizes, "mamba_num_heads": 4}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_entry_and_width_are_one_another(data):
    steps = {
        "mamba_num_heads": (2, 8),
        "num_attention_heads": (2, 6),
        "n_routed_experts": (1, 7),
    }
    sizes = {"hidden_size": 16 * data.draw(st.integers(1, 6))}
    for key, kind in LAYER_KEYS.items():
        step, most = steps.get(key, (16, getattr(CONFIG, key)))
        least = 2 if key == "n_routed_experts" else 1
        value = st.integers(least, most // step).map(lambda n, step=step: n * step)
        count = len(CONFIG.layers_of(kind))
        form = st.one_of(value, st.lists(value, min_size=count, max_size=count))
        sizes[key] = data.draw(form, label=key)
    width = one(sizes)
    entry = json.loads(json.dumps(width_to_dict(CONFIG, width)))
    assert one(entry) == width
    assert width.fits_in(full_width(CONFIG))
    assert all(size != getattr(CONFIG, key) for key, size in entry.items())
    cut = ModelConfig.from_dict(json.loads(json.dumps(slice_config(CONFIG, width))))
    (again,) = parse_widths(cut).values()
    assert again.same_sizes(width)
    assert count_parameters(cut, again) == count_parameters(CONFIG, width)


def test_slice_is_an_ordinary_config_or_an_elastic_one():
    raw = dict(CONFIG.raw)
    raw["num_local_experts"] = raw["n_routed_experts"]
    raw["elastic"] = {"version": 1, "widths": {"w": UNIFORM}}
    config = ModelConfig.from_dict(raw)
    data = slice_config(config, one(UNIFORM))
    assert data == {**CONFIG.raw, **UNIFORM}
    assert config.raw == raw  # the source is left alone
    mixed = slice_config(CONFIG, one({"n_routed_experts": [3, 5], "hidden_size": 48}))
    elastic = mixed.pop("elastic")
    assert mixed == {**CONFIG.raw, "hidden_size": 48, "n_routed_experts": 5}
    assert elastic == {
        "version": 1,
        "default_width": "w",
        "widths": {"w": {"n_routed_experts": [3, 5]}},
    }


@pytest.mark.parametrize("seed", range(8))
def test_counts_equal_those_of_transformers(seed):
    from transformers import NemotronHConfig, NemotronHForCausalLM

    raw = tiny.tiny_config(seed)
    config = ModelConfig.from_dict(raw)
    for width in parse_widths(config, tiny.tiny_widths(raw, seed, per_layer=False)).values():
        data = slice_config(config, width)
        with torch.device("meta"):
            model = NemotronHForCausalLM(NemotronHConfig(**data))
        tensors = [*model.parameters(), *model.buffers()]  # buffers: the correction biases
        assert count_parameters(config, width).total == sum(t.numel() for t in tensors)


def test_tied_embeddings_are_counted_once():
    sizes = {**SIZES, "vocab_size": 200}
    apart, tied = (
        ModelConfig.from_dict(tiny.tiny_config(0, **sizes, tie_word_embeddings=flag))
        for flag in (False, True)
    )
    two, once = (count_parameters(c, one({"hidden_size": 48}, c)) for c in (apart, tied))
    assert two.total - once.total == two.active - once.active == 200 * 48
    # The one matrix that is left is also the output head, all of which a token reads.
    assert once.active_without_embedding == once.active == two.active_without_embedding


def test_counts_of_a_known_model():
    config = ModelConfig.from_dict(tiny.tiny_config(0, **nano_sizes()))
    counts = count_parameters(config, full_width(config))
    assert counts.total == 31_577_940_288
    assert counts.active_without_embedding == counts.active - 131072 * 2688
    expert = 2 * 2688 * 1856
    assert counts.total - counts.active == 23 * (128 - 6) * expert
    narrow = count_parameters(
        config, one({"hidden_size": 1920, "moe_intermediate_size": 960}, config)
    )
    assert round(narrow.total / 1e9, 2) == 12.43 and round(narrow.active / 1e9, 2) == 2.08
