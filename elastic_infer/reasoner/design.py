"""The reasoner's sizes: its config.json and its three widths."""

from __future__ import annotations

import math
from typing import Any

from ..checkpoint.config import ModelConfig
from .vocabulary import BOS, EOS, PAD, VOCAB_SIZE

PATTERN = "M*EM*EM*E"

WIDTHS: dict[str, dict[str, int]] = {
    "L": {},
    "M": {
        "hidden_size": 96,
        "mamba_num_heads": 6,
        "num_attention_heads": 4,
        "n_routed_experts": 6,
        "moe_intermediate_size": 48,
        "moe_shared_expert_intermediate_size": 96,
    },
    "S": {
        "hidden_size": 48,
        "mamba_num_heads": 4,
        "num_attention_heads": 2,
        "n_routed_experts": 3,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 32,
    },
}


def reasoner_config() -> ModelConfig:
    """The reasoner as a nemotron_h config with its elastic table."""
    raw: dict[str, Any] = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": BOS,
        "chunk_size": 128,
        "conv_kernel": 4,
        "dtype": "bfloat16",
        "eos_token_id": EOS,
        "expand": 2,
        "head_dim": 32,
        "hidden_size": 128,
        "hybrid_override_pattern": PATTERN,
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "layer_norm_epsilon": 1e-5,
        "mamba_head_dim": 32,
        "mamba_hidden_act": "silu",
        "mamba_num_heads": 8,
        "mamba_proj_bias": False,
        "mamba_ssm_cache_dtype": "float32",
        "max_position_embeddings": 512,
        "mlp_bias": False,
        "mlp_hidden_act": "relu2",
        "moe_intermediate_size": 64,
        "moe_shared_expert_intermediate_size": 128,
        "n_group": 1,
        "n_groups": 2,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 6,
        "num_experts_per_tok": 2,
        "num_hidden_layers": len(PATTERN),
        "num_key_value_heads": 2,
        "pad_token_id": PAD,
        "residual_in_fp32": False,
        "routed_scaling_factor": 1.0,
        "ssm_state_size": 32,
        "tie_word_embeddings": False,
        "time_step_floor": 1e-4,
        "time_step_limit": [0.0, math.inf],
        # transformers clamps dt to this in prefill only; small enough to make no difference.
        "time_step_min": 1e-12,
        "time_step_max": 0.1,
        "topk_group": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "vocab_size": VOCAB_SIZE,
        "elastic": {"version": 1, "default_width": "L", "widths": WIDTHS},
    }
    return ModelConfig.from_dict(raw)
