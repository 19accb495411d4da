"""Random elastic models of the training code, and how close two of them are."""

from __future__ import annotations

import math

import torch

from elastic_infer.checkpoint.config import ModelConfig
from elastic_infer.elastify.torch_model import ElasticNemotronH

BASE = {
    "model_type": "nemotron_h",
    "architectures": ["NemotronHForCausalLM"],
    "hybrid_override_pattern": "MEM*-E",
    "vocab_size": 48,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_num_heads": 6,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 16,
    "intermediate_size": 48,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
    "routed_scaling_factor": 2.5,
    "time_step_min": 1e-12,
    "time_step_limit": [0.0, math.inf],
    "dtype": "float32",
}
TABLE = {
    "full": {},
    "narrow": {
        "hidden_size": 32,
        "mamba_num_heads": 2,
        "num_attention_heads": 2,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "intermediate_size": 32,
    },
    "mamba": {"mamba_num_heads": 4},
    "experts": {"n_routed_experts": 3, "hidden_size": 48},
}


def random_model(seed: int) -> ElasticNemotronH:
    """A model whose every part matters: no parameter is at a neutral value."""
    model = ElasticNemotronH(ModelConfig.from_dict(BASE)).initialize(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("norm.weight", "norm_f.weight", ".D", "bias")):
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert torch.isfinite(got).all()
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def batches(count: int = 3, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 48, (2, 17), generator=generator) for _ in range(count)]
