"""Random elastic ``nemotron_h`` checkpoints for benchmarks.

    python -m bench.common.models --model 620m --out build/models/620m
    python -m bench.common.models --model tiny --out build/models/tiny

Speed does not depend on what the weights say, only on their shapes and on which experts a token
picks, so random weights serve; they are drawn so that every part of the model matters (no dead
head, no expert that wins every token) and outputs stay finite. One tensor is drawn, written and
dropped at a time: the memory needed is one tensor's, whatever the model's size.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from elastic_infer.codes import dtype_name
from elastic_infer.files.writing import Stream, write_whole
from elastic_infer.reasoner.design import WIDTHS, reasoner_config


class TensorSpec(NamedTuple):
    """One tensor of a checkpoint: its name, shape, stored dtype and how its values are drawn."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str


SHARED_CONFIG: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "torch_dtype": "bfloat16",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "chunk_size": 128,
    "conv_kernel": 4,
    "eos_token_id": 2,
    "expand": 2,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "mamba_ssm_cache_dtype": "float32",
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "n_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_logits_to_keep": 1,
    "pad_token_id": 0,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "routed_scaling_factor": 2.5,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_limit": [0.0, float("inf")],
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "topk_group": 1,
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "use_mamba_kernels": True,
}

MODELS: dict[str, dict[str, Any]] = {
    "620m": {
        "hidden_size": 1024,
        "hybrid_override_pattern": "MEMEM*EMEMEM*EME",
        "vocab_size": 32768,
        "mamba_num_heads": 32,
        "mamba_head_dim": 64,
        "ssm_state_size": 128,
        "n_groups": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 512,
        "moe_shared_expert_intermediate_size": 1024,
        "intermediate_size": 1024,
    },
    "tiny": {
        "hidden_size": 128,
        "hybrid_override_pattern": "MEM*EMEM*E",
        "vocab_size": 1024,
        "mamba_num_heads": 16,
        "mamba_head_dim": 32,
        "ssm_state_size": 32,
        "n_groups": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "n_routed_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "moe_shared_expert_intermediate_size": 128,
        "intermediate_size": 128,
    },
}

# The 30B model's sizes are its published config. Those of its two nested widths are a working
# assumption: of the sizes that nest, these fit the published parameter counts. They are data, as
# widths are everywhere.
THIRTY: dict[str, Any] = {
    **SHARED_CONFIG,
    "hidden_size": 2688,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "num_hidden_layers": 52,
    "vocab_size": 131072,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "intermediate_size": 1856,
    "max_position_embeddings": 131072,
    "elastic": {
        "version": 1,
        "default_width": "30B",
        "widths": {
            "12B": {"hidden_size": 1920, "mamba_num_heads": 56, "moe_intermediate_size": 960},
            "23B": {"hidden_size": 2240, "mamba_num_heads": 56, "moe_intermediate_size": 1664},
            "30B": {},
        },
    },
}


def narrowed(sizes: dict[str, Any], width: dict[str, int]) -> dict[str, int]:
    """A width of the shipped reasoner as a width of a benchmark model: the same share of every
    axis, rounded down to what the model's groups and the channel step allow."""
    full = reasoner_config()
    step = {
        "mamba_num_heads": sizes["n_groups"],
        "num_attention_heads": sizes["num_key_value_heads"],
        "n_routed_experts": 1,
    }
    return {
        key: sizes[key] * size // (getattr(full, key) * step.get(key, 16)) * step.get(key, 16)
        for key, size in width.items()
    }


def model_config(model: str) -> dict[str, Any]:
    """The config.json of one benchmark model, with its elastic table of widths L, M and S.

    Args:
        model: str, a key of ``MODELS``.

    Returns:
        A dict in the style of released configs (``hybrid_override_pattern`` and
        ``num_hidden_layers``) plus the ``elastic`` key.

    Raises:
        ValueError: no such model.
    """
    if model not in MODELS:
        raise ValueError(f"model: name must be one of {sorted(MODELS)}, got {model!r}")
    sizes = MODELS[model]
    widths = {name: narrowed(sizes, width) for name, width in WIDTHS.items()}
    return {
        **SHARED_CONFIG,
        **sizes,
        "num_hidden_layers": len(sizes["hybrid_override_pattern"]),
        "elastic": {"version": 1, "default_width": "L", "widths": widths},
    }


def _mamba_specs(prefix: str, config: dict[str, Any]) -> list[tuple[str, tuple[int, ...], str]]:
    heads = config["mamba_num_heads"]
    inner = heads * config["mamba_head_dim"]
    conv = inner + 2 * config["n_groups"] * config["ssm_state_size"]
    hidden = config["hidden_size"]
    return [
        (prefix + "A_log", (heads,), "a_log"),
        (prefix + "D", (heads,), "skip"),
        (prefix + "dt_bias", (heads,), "dt_bias"),
        (prefix + "conv1d.weight", (conv, 1, config["conv_kernel"]), "conv"),
        (prefix + "conv1d.bias", (conv,), "bias"),
        (prefix + "in_proj.weight", (inner + conv + heads, hidden), "matrix"),
        (prefix + "norm.weight", (inner,), "norm"),
        (prefix + "out_proj.weight", (hidden, inner), "matrix"),
    ]


def _attention_specs(prefix: str, config: dict[str, Any]) -> list[tuple[str, tuple[int, ...], str]]:
    hidden = config["hidden_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    return [
        (prefix + "q_proj.weight", (query, hidden), "matrix"),
        (prefix + "k_proj.weight", (kv, hidden), "matrix"),
        (prefix + "v_proj.weight", (kv, hidden), "matrix"),
        (prefix + "o_proj.weight", (hidden, query), "matrix"),
    ]


def _moe_specs(prefix: str, config: dict[str, Any]) -> list[tuple[str, tuple[int, ...], str]]:
    hidden = config["hidden_size"]
    width = config["moe_intermediate_size"]
    shared = config["moe_shared_expert_intermediate_size"]
    experts = config["n_routed_experts"]
    specs: list[tuple[str, tuple[int, ...], str]] = [
        (prefix + "gate.weight", (experts, hidden), "matrix"),
        (prefix + "gate.e_score_correction_bias", (experts,), "correction"),
        (prefix + "shared_experts.up_proj.weight", (shared, hidden), "matrix"),
        (prefix + "shared_experts.down_proj.weight", (hidden, shared), "matrix"),
    ]
    for expert in range(experts):
        name = f"{prefix}experts.{expert}."
        specs.append((name + "up_proj.weight", (width, hidden), "matrix"))
        specs.append((name + "down_proj.weight", (hidden, width), "matrix"))
    return specs


def tensor_specs(
    config: dict[str, Any], dtype: torch.dtype = torch.bfloat16
) -> Iterator[TensorSpec]:
    """Every tensor of a checkpoint with this config, in file order.

    Args:
        config: dict, as ``model_config`` returns it.
        dtype: torch dtype of all tensors but the router's correction bias, which is float32.

    Yields:
        TensorSpec, under the released checkpoints' names (``backbone.…``, one per expert).

    Raises:
        ValueError: a layer kind other than M, E and ``*``.
    """
    makers = {"M": _mamba_specs, "*": _attention_specs, "E": _moe_specs}
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield TensorSpec("backbone.embeddings.weight", (vocab, hidden), dtype, "embedding")
    for index, kind in enumerate(config["hybrid_override_pattern"]):
        if kind not in makers:
            raise ValueError(f"model: layer {index} must be one of M, E and *, got {kind!r}")
        prefix = f"backbone.layers.{index}."
        yield TensorSpec(prefix + "norm.weight", (hidden,), dtype, "norm")
        for name, shape, draw in makers[kind](prefix + "mixer.", config):
            stored = torch.float32 if draw == "correction" else dtype
            yield TensorSpec(name, shape, stored, draw)
    yield TensorSpec("backbone.norm_f.weight", (hidden,), dtype, "norm")
    yield TensorSpec("lm_head.weight", (vocab, hidden), dtype, "matrix")


def draw_values(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Values of one kind, where the generator is.

    With n standard normal and u uniform in [0, 1): matrices n / sqrt(fan in), embeddings n,
    norms 1 + 0.1 n, D = 1 + 0.3 n, convolution 0.5 n, biases 0.1 n, A_log = log(1 + 15 u) and
    dt_bias the inverse softplus of a log-uniform 0.002 .. 0.1.
    """
    device = generator.device
    if kind in ("a_log", "dt_bias"):
        uniform = torch.rand(shape, generator=generator, device=device)
        if kind == "a_log":
            return torch.log(1 + 15 * uniform).to(dtype)
        low, high = math.log(0.002), math.log(0.1)
        step = torch.exp(low + (high - low) * uniform)
        return (step + torch.log(-torch.expm1(-step))).to(dtype)
    scale, shift = {
        "matrix": (1 / math.sqrt(shape[-1]), 0.0),
        "embedding": (1.0, 0.0),
        "norm": (0.1, 1.0),
        "skip": (0.3, 1.0),
        "conv": (0.5, 0.0),
        "bias": (0.1, 0.0),
        "correction": (0.1, 0.0),
    }[kind]
    values = torch.empty(shape, device=device).normal_(0.0, 1.0, generator=generator)
    return values.mul_(scale).add_(shift).to(dtype)


def draw_tensor(spec: TensorSpec, seed: int) -> torch.Tensor:
    """The values of one tensor; they depend on its name, shape and the seed alone.

    Args:
        spec: TensorSpec.
        seed: int, the checkpoint's seed.

    Returns:
        Tensor of ``spec.shape`` and ``spec.dtype``.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {spec.name}".encode()))
    return draw_values(spec.kind, spec.shape, spec.dtype, generator)


def _write_safetensors(path: Path, specs: list[TensorSpec], seed: int) -> None:
    """Writes the tensors one by one: all sizes are known, so the header can come first."""
    names = {torch.bfloat16: "BF16", torch.float32: "F32"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        size = math.prod(spec.shape) * spec.dtype.itemsize
        header[spec.name] = {
            "dtype": names[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers expect the data to start on a multiple of 8

    def content(file: Stream) -> None:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for spec in specs:
            file.write(draw_tensor(spec, seed).view(torch.uint8).numpy().tobytes())

    write_whole(path, content)


def write_model(
    model: str, out: str | Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Writes a random checkpoint folder (config.json, model.safetensors).

    Args:
        model: str, a key of ``MODELS``.
        out: folder to write into; made if absent.
        seed: int; the same seed gives the same bytes.
        dtype: torch.bfloat16 or torch.float32.

    Returns:
        The folder.

    Raises:
        ValueError: no such model, or another dtype.
    """
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"model: dtype must be torch.bfloat16 or torch.float32, got {dtype}")
    config = {**model_config(model), "torch_dtype": dtype_name(dtype)}
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    _write_safetensors(folder / "model.safetensors", list(tensor_specs(config, dtype)), seed)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def parameter_counts(config: dict[str, Any]) -> dict[str, int]:
    """Parameters of a model: all of them, and those that one decoded token reads.

    Args:
        config: dict, as ``model_config`` returns it.

    Returns:
        ``{"total": …, "active": …}``; active counts J of E experts and one embedding row.
    """
    share = config["num_experts_per_tok"] / config["n_routed_experts"]
    total = active = 0
    for spec in tensor_specs(config):
        size = math.prod(spec.shape)
        total += size
        if spec.kind == "embedding":
            active += spec.shape[1]
        else:
            active += round(size * share) if ".mixer.experts." in spec.name else size
    return {"total": total, "active": active}


def main() -> None:
    """Command line: writes one model and prints its folder and parameter counts as JSON."""
    parser = argparse.ArgumentParser(description="Write a random elastic checkpoint.")
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    folder = write_model(arguments.model, arguments.out, arguments.seed, dtype)
    print(json.dumps({"folder": str(folder), **parameter_counts(model_config(arguments.model))}))


if __name__ == "__main__":
    main()
