"""Small engines for tests."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch

from elastic_infer.engine import Engine


def tiny_engine(folder: Path, seed: int = 0, dtype=torch.float32, config=None, widths=None, **limits):
    """An engine on a random tiny checkpoint; limits as of `Engine.from_pretrained`."""
    config = config or tiny.tiny_config(seed)
    widths = tiny.tiny_widths(config, seed) if widths is None else widths
    tiny.write_tiny(folder, config, widths, dtype, seed)
    given = {"max_model_len": 512, "max_num_seqs": 16, "threads": 2,
             "kv_cache_memory_bytes": 64 << 20, **limits}  # fmt: skip
    return Engine.from_pretrained(folder, **given)


def base_config(**overrides):
    """One fixed model with every kind of layer and unaligned sizes."""
    sizes = {
        "hybrid_override_pattern": "ME*M-E", "hidden_size": 112, "vocab_size": 130,
        "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 32, "n_groups": 2,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "n_routed_experts": 6,
        "num_experts_per_tok": 2, "moe_intermediate_size": 80, "intermediate_size": 144,
        "moe_shared_expert_intermediate_size": 96, "max_position_embeddings": 512,
    }  # fmt: skip
    return tiny.tiny_config(7, **{**sizes, **overrides})


def base_widths():
    """Three widths of `base_config` that differ on every axis."""
    return {
        "version": 1,
        "default_width": "L",
        "widths": {
            "L": {},
            "M": {"hidden_size": 80, "mamba_num_heads": 6, "num_attention_heads": 6,
                  "n_routed_experts": 5, "moe_intermediate_size": 48, "intermediate_size": 96,
                  "moe_shared_expert_intermediate_size": 64},
            "S": {"hidden_size": 48, "mamba_num_heads": 4, "num_attention_heads": 4,
                  "n_routed_experts": 4, "moe_intermediate_size": 32, "intermediate_size": 48,
                  "moe_shared_expert_intermediate_size": 32},
        },
    }  # fmt: skip


def base_engine(folder: Path, **limits):
    """An engine on the fixed model."""
    return tiny_engine(folder, 7, config=base_config(), widths=base_widths(), **limits)
