"""config.json is read or refused by name; what a checkpoint is and what its errors are."""

from __future__ import annotations

import json
import math

import pytest

from elastic_infer import errors
from elastic_infer.checkpoint.config import ModelConfig
from elastic_infer.checkpoint.counts import kv_bytes_per_token, state_bytes
from elastic_infer.checkpoint.widths import full_width
from elastic_infer.errors import CheckpointError
from support import tiny

PATTERN = "MEM*-E"
KINDS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
NEW_KINDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}


def raw_config(**overrides):
    return tiny.tiny_config(3, **{"hybrid_override_pattern": PATTERN, **overrides})


@pytest.mark.parametrize("name", ["InvalidRequest", "CheckpointError", "WidthError"])
def test_argument_errors_are_value_errors(name):
    error = getattr(errors, name)
    assert issubclass(error, errors.ElasticError) and issubclass(error, ValueError)


@pytest.mark.parametrize(
    "name", ["OutOfCapacity", "EngineFull", "RequestCancelled", "NonFiniteLogits"]
)
def test_state_errors_are_runtime_errors(name):
    error = getattr(errors, name)
    assert issubclass(error, errors.ElasticError) and issubclass(error, RuntimeError)


@pytest.mark.parametrize("seed", range(8))
def test_keeps_every_size(seed):
    raw = tiny.tiny_config(seed)
    config = ModelConfig.from_dict(raw)
    assert config.pattern == raw["hybrid_override_pattern"]
    assert config.num_layers == raw["num_hidden_layers"]
    assert config.dtype == raw["torch_dtype"]
    same = set(raw) & set(ModelConfig.__dataclass_fields__)
    assert len(same) >= 22
    assert {key: getattr(config, key) for key in same} == {key: raw[key] for key in same}
    assert config.raw == raw and config.raw is not raw
    assert hash(config) == hash(ModelConfig.from_dict(raw))


def test_layer_lists_equal_the_pattern():
    expected = ModelConfig.from_dict(raw_config()).layers
    assert expected == ("M", "E", "M", "*", "-", "E")
    for kinds in (KINDS, NEW_KINDS):
        for key in ("layers_block_type", "layer_types"):
            raw = raw_config(**{key: [kinds[k] for k in PATTERN]})
            both = ModelConfig.from_dict(raw)
            del raw["hybrid_override_pattern"]
            assert both.layers == ModelConfig.from_dict(raw).layers == expected


def test_layer_indices_and_conv_channels():
    config = ModelConfig.from_dict(
        raw_config(mamba_num_heads=8, mamba_head_dim=32, n_groups=4, ssm_state_size=16)
    )
    assert [config.layers_of(kind) for kind in "M*-E"] == [(0, 2), (3,), (4,), (1, 5)]
    assert config.conv_dim() == 8 * 32 + 2 * 4 * 16
    assert config.conv_dim(4) == 4 * 32 + 2 * 4 * 16


@pytest.mark.parametrize("limit", [[0.0, math.inf], [0.0, {"__float__": "Infinity"}], None])
def test_infinity_in_every_spelling(tmp_path, limit):
    text = json.dumps(raw_config(time_step_limit=limit))
    (tmp_path / "config.json").write_text(text)
    config = ModelConfig.from_folder(tmp_path)
    assert config.raw["time_step_limit"] == (None if limit is None else [0.0, math.inf])
    assert config.pattern == PATTERN


def test_absent_keys_take_the_defaults_of_transformers():
    from transformers import NemotronHConfig

    raw = {"hybrid_override_pattern": "M*", "num_hidden_layers": 2}
    ours, theirs = ModelConfig.from_dict(raw), NemotronHConfig(**raw)
    shared = set(ModelConfig.__dataclass_fields__) - {"layers", "raw", "dtype"}
    assert {key: getattr(ours, key) for key in shared} == {
        key: getattr(theirs, key) for key in shared
    }


def test_older_names():
    raw = raw_config()
    for old, new in (
        ("mamba_n_groups", "n_groups"),
        ("mamba_d_conv", "conv_kernel"),
        ("mamba_chunk_size", "chunk_size"),
        ("num_local_experts", "n_routed_experts"),
    ):
        raw[old] = raw.pop(new)
    assert full_width(ModelConfig.from_dict(raw)) == full_width(ModelConfig.from_dict(raw_config()))
    with pytest.raises(CheckpointError, match=r"num_local_experts must agree with n_routed_exp"):
        ModelConfig.from_dict(raw_config(num_local_experts=99))


@pytest.mark.parametrize("eos, ids", [(2, (2,)), ([2, 11], (2, 11)), (None, ())])
def test_end_of_sequence_ids(eos, ids):
    config = ModelConfig.from_dict(raw_config(eos_token_id=eos))
    assert config.eos_token_id == eos
    assert config.eos_token_ids == ids
    hash(config)


@pytest.mark.parametrize(
    "key, value",
    [
        ("n_group", 2),
        ("norm_topk_prob", False),
        ("moe_latent_size", 64),
        ("mlp_bias", True),
        ("mlp_hidden_act", "silu"),
        ("attention_bias", True),
        ("sliding_window", 512),
        ("mamba_proj_bias", True),
        ("use_bias", True),
        ("use_conv_bias", False),
        ("mamba_conv_bias", False),
        ("mamba_hidden_act", "gelu"),
        ("conv_kernel", 3),
        ("residual_in_fp32", True),
        ("time_step_limit", [0.0, 10.0]),
        ("time_step_limit", [0.001, math.inf]),
        ("time_step_limit", "Infinity"),
        ("model_type", "mamba2"),
        ("layer_norm_epsilon", math.inf),
        ("routed_scaling_factor", "2.5"),
        ("vocab_size", 0),
        ("n_groups", 2.0),
        ("num_experts_per_tok", True),
        ("eos_token_id", "</s>"),
        ("bos_token_id", [1]),
        ("num_hidden_layers", 5),
        ("hybrid_override_pattern", "MX"),
        ("hybrid_override_pattern", ""),
        ("hybrid_override_pattern", 6),
        ("layers_block_type", "mamba"),
        ("head_dim", 24),
        ("mamba_head_dim", 40),
        ("ssm_state_size", 20),
        ("hidden_size", 100),
        ("intermediate_size", 72),
        ("moe_intermediate_size", 24),
        ("moe_shared_expert_intermediate_size", 24),
        ("n_routed_experts", 1),
    ],
)
def test_refuses_by_name(key, value):
    ModelConfig.from_dict(raw_config())
    raw = {**raw_config(), key: value}
    if key == "mamba_conv_bias":
        del raw["use_conv_bias"]
        key = "use_conv_bias"
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict(raw)
    message = str(caught.value)
    assert message.startswith(f"config: {key} must ") and message.endswith(f", got {value!r}")


def test_refuses_heads_that_no_group_divides():
    with pytest.raises(CheckpointError, match=r"mamba_num_heads must be a multiple of 4, got 6"):
        ModelConfig.from_dict(raw_config(mamba_num_heads=6, n_groups=4))
    with pytest.raises(CheckpointError, match=r"num_attention_heads must .* of 2, got 3"):
        ModelConfig.from_dict(raw_config(num_attention_heads=3, num_key_value_heads=2))


def test_refuses_contradicting_and_missing_patterns():
    raw = raw_config(layers_block_type=["mamba"] * len(PATTERN))
    with pytest.raises(CheckpointError, match="hybrid_override_pattern must agree"):
        ModelConfig.from_dict(raw)
    with pytest.raises(CheckpointError, match=r"layers_block_type must hold only .*got 'rwkv'"):
        ModelConfig.from_dict(raw_config(layers_block_type=["mamba", "rwkv"]))
    raw = raw_config()
    del raw["hybrid_override_pattern"]
    with pytest.raises(CheckpointError, match="hybrid_override_pattern or layers_block_type"):
        ModelConfig.from_dict(raw)


@pytest.mark.parametrize(
    "key, value, pattern",
    [
        ("n_group", 2, "M*-"),
        ("moe_intermediate_size", 7688, "M*-"),
        ("sliding_window", 512, "ME-"),
        ("head_dim", 24, "ME-"),
        ("use_conv_bias", False, "*E-"),
        ("time_step_limit", [0.0, 1.0], "*E-"),
        ("mlp_bias", True, "M*"),
    ],
)
def test_ignores_settings_of_layers_that_are_not_there(key, value, pattern):
    raw = tiny.tiny_config(3, **{"hybrid_override_pattern": pattern, key: value})
    assert ModelConfig.from_dict(raw).pattern == pattern


def test_unreadable_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"must hold config\.json"):
        ModelConfig.from_folder(tmp_path)
    file = tmp_path / "config.json"
    for text, message in (
        ("{", "must be readable JSON"),
        ("[]", "must be an object, got list"),
        ('{"time_step_limit": [0, {"__float__": "big"}]}', "__float__ must be a number"),
    ):
        file.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            ModelConfig.from_folder(tmp_path)


def test_cache_bytes_of_a_known_model():
    config = ModelConfig.from_dict(tiny.tiny_config(0, **nano_sizes()))
    assert kv_bytes_per_token(config, 2) == 6 * 1024  # 6 layers, K and V, 2 heads of 128
    assert kv_bytes_per_token(config, 4) == 12 * 1024
    conv = 23 * 3 * (4096 + 2048)
    assert state_bytes(config, 2) == 46 * 2**20 + 2 * conv
    assert state_bytes(config, 4) == 46 * 2**20 + 4 * conv


def nano_sizes():
    """The published sizes of Nemotron 3 Nano 30B-A3B."""
    return {
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        "vocab_size": 131072,
        "hidden_size": 2688,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "mamba_num_heads": 64,
        "mamba_head_dim": 64,
        "ssm_state_size": 128,
        "n_groups": 8,
        "n_routed_experts": 128,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712,
    }
