"""Random tiny ``nemotron_h`` checkpoints of many shapes: the inputs of the model-level tests.

``tiny_config`` draws a configuration (a plain dict in the style of the released config.json),
``tiny_widths`` an elastic table for it, ``write_tiny`` writes the checkpoint folder, and
``transformers_model`` loads a folder with transformers as the fp32 oracle.
"""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from elastic_infer.codes import dtype_name

# Every key that a width may narrow, beside the layer kind it belongs to (None: the whole model).
WIDTH_KEYS = {
    "hidden_size": None,
    "mamba_num_heads": "M",
    "num_attention_heads": "*",
    "n_routed_experts": "E",
    "moe_intermediate_size": "E",
    "moe_shared_expert_intermediate_size": "E",
    "intermediate_size": "-",
}


def tiny_config(seed: int = 0, **overrides: Any) -> dict[str, Any]:
    """Draws a tiny configuration; the same seed and overrides give the same dict.

    Args:
        seed: int, chooses every size that is not overridden.
        overrides: config.json keys that replace what was drawn (``hybrid_override_pattern``
            also sets ``num_hidden_layers``).

    Returns:
        A dict in the style of the released config.json: ``hybrid_override_pattern``,
        ``num_hidden_layers``, ``time_step_limit`` ending in float infinity.
    """
    rng = random.Random(f"config {seed}")
    pattern = list("M*E") + rng.choices("M*-E", k=rng.randint(1, 5))
    rng.shuffle(pattern)
    groups = rng.choice((1, 2, 4))
    kv_heads = rng.choice((1, 2, 4))
    top_k = rng.choice((2, 3))
    config: dict[str, Any] = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "chunk_size": rng.choice((16, 32, 64, 128)),
        "conv_kernel": 4,
        "eos_token_id": 2,
        "expand": 2,
        "head_dim": rng.choice((16, 32)),
        "hidden_dropout": 0.0,
        "hidden_size": 16 * rng.randint(2, 10),
        "hybrid_override_pattern": "".join(pattern),
        "initializer_range": 0.02,
        "intermediate_size": 16 * rng.randint(2, 12),
        "layer_norm_epsilon": 1e-5,
        "mamba_head_dim": rng.choice((16, 32, 64)),
        "mamba_hidden_act": "silu",
        "mamba_num_heads": groups * rng.randint(max(1, 4 // groups), 16 // groups),
        "mamba_proj_bias": False,
        "mamba_ssm_cache_dtype": "float32",
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "mlp_hidden_act": "relu2",
        "moe_intermediate_size": 16 * rng.randint(1, 6),
        "moe_shared_expert_intermediate_size": 16 * rng.randint(1, 8),
        "n_group": 1,
        "n_groups": groups,
        "n_routed_experts": rng.randint(4, 12),
        "n_shared_experts": 1,
        "norm_eps": 1e-5,
        "norm_topk_prob": True,
        "num_attention_heads": kv_heads * rng.choice((1, 2, 3, 4)),
        "num_experts_per_tok": top_k,
        "num_key_value_heads": kv_heads,
        "num_logits_to_keep": 1,
        "pad_token_id": 0,
        "residual_in_fp32": False,
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "sliding_window": None,
        "ssm_state_size": rng.choice((16, 32)),
        "tie_word_embeddings": False,
        "time_step_floor": 0.0001,
        "time_step_limit": [0.0, math.inf],
        "time_step_max": 0.1,
        "time_step_min": 0.001,
        "topk_group": 1,
        "torch_dtype": "float32",
        "use_bias": False,
        "use_cache": True,
        "use_conv_bias": True,
        "vocab_size": rng.randint(97, 300),
    }
    config.update(overrides)
    config["num_hidden_layers"] = len(config["hybrid_override_pattern"])
    return config


def _grid(config: dict[str, Any], key: str) -> tuple[int, int]:
    """(step, smallest allowed value) of one width key."""
    if key == "mamba_num_heads":
        return config["n_groups"], config["n_groups"]
    if key == "num_attention_heads":
        return config["num_key_value_heads"], config["num_key_value_heads"]
    if key == "n_routed_experts":
        return 1, config["num_experts_per_tok"]
    return 16, 16


def _narrow(rng: random.Random, config: dict[str, Any], key: str) -> int:
    step, least = _grid(config, key)
    return step * rng.randint(max(1, -(-least // step)), config[key] // step)


def tiny_widths(
    config: dict[str, Any],
    seed: int = 0,
    *,
    per_layer: bool | None = None,
    count: int | None = None,
) -> dict[str, Any]:
    """Draws an elastic table: "L" is full; "S", and "M" where there are three, are narrower.

    S and M are drawn independently, so they are often not nested in one another.

    Args:
        config: dict of ``tiny_config``.
        seed: int, chooses the sizes.
        per_layer: True gives some axes of every narrow width as per-layer lists, False none,
            None lets the seed choose (about one table in three).
        count: number of widths, 2 or 3; None lets the seed choose.

    Returns:
        ``{"version": 1, "default_width": "L", "widths": {"L": {}, "S": {...}, ...}}``
    """
    rng = random.Random(f"widths {seed}")
    names = ["S", "M"][: (count or rng.choice((2, 3))) - 1]
    lists = rng.random() < 1 / 3 if per_layer is None else per_layer
    pattern = config["hybrid_override_pattern"]
    widths: dict[str, Any] = {"L": {}}
    for name in names:
        width: dict[str, Any] = {}
        for key, kind in WIDTH_KEYS.items():
            if kind is not None and kind not in pattern:
                continue
            # At least the hidden size or the first drawn axis is always narrowed when it can be.
            if key != "hidden_size" and rng.random() < 0.25:
                continue
            if kind is not None and lists and rng.random() < 0.7:
                width[key] = [
                    _narrow(rng, config, key) if letter == kind else config[key]
                    for letter in pattern
                ]
            else:
                width[key] = _narrow(rng, config, key)
        widths[name] = width
    return {"version": 1, "default_width": "L", "widths": widths}


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Checkpoint name -> shape of every tensor of the checkpoint that ``config`` describes."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    heads, head = config["mamba_num_heads"], config["mamba_head_dim"]
    inner, bc = heads * head, 2 * config["n_groups"] * config["ssm_state_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    experts, ffn = config["n_routed_experts"], config["moe_intermediate_size"]
    shared = config["moe_shared_expert_intermediate_size"]
    mixers: dict[str, dict[str, tuple[int, ...]]] = {
        "M": {
            "A_log": (heads,),
            "D": (heads,),
            "dt_bias": (heads,),
            "conv1d.weight": (inner + bc, 1, config["conv_kernel"]),
            "conv1d.bias": (inner + bc,),
            "in_proj.weight": (2 * inner + bc + heads, hidden),
            "norm.weight": (inner,),
            "out_proj.weight": (hidden, inner),
        },
        "*": {
            "q_proj.weight": (q, hidden),
            "k_proj.weight": (kv, hidden),
            "v_proj.weight": (kv, hidden),
            "o_proj.weight": (hidden, q),
        },
        "-": {
            "up_proj.weight": (config["intermediate_size"], hidden),
            "down_proj.weight": (hidden, config["intermediate_size"]),
        },
        "E": {
            "gate.weight": (experts, hidden),
            "gate.e_score_correction_bias": (experts,),
            **{f"experts.{e}.up_proj.weight": (ffn, hidden) for e in range(experts)},
            **{f"experts.{e}.down_proj.weight": (hidden, ffn) for e in range(experts)},
            "shared_experts.up_proj.weight": (shared, hidden),
            "shared_experts.down_proj.weight": (hidden, shared),
        },
    }
    shapes = {"backbone.embeddings.weight": (vocab, hidden), "backbone.norm_f.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    for index, letter in enumerate(config["hybrid_override_pattern"]):
        shapes[f"backbone.layers.{index}.norm.weight"] = (hidden,)
        for name, shape in mixers[letter].items():
            shapes[f"backbone.layers.{index}.mixer.{name}"] = shape
    return shapes


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """One tensor whose size matters to the logits: no part is near zero or near constant."""
    normal = torch.randn(shape, generator=generator)
    last = name.rsplit(".", 1)[-1]
    if last == "A_log":
        return torch.log1p(15 * torch.rand(shape, generator=generator))
    if last == "dt_bias":
        span = math.log(0.1) - math.log(0.002)
        dt = torch.exp(math.log(0.002) + span * torch.rand(shape, generator=generator))
        return dt + torch.log(-torch.expm1(-dt))  # inverse softplus
    if last == "D":
        return 1 + 0.3 * normal
    if ".norm." in name or "norm_f" in name:
        return 1 + 0.1 * normal
    if name.endswith("conv1d.weight"):
        return 0.5 * normal
    if last in ("bias", "e_score_correction_bias"):
        return 0.1 * normal
    if "embeddings" in name:
        return normal
    return normal / math.sqrt(shape[-1])


def tiny_state_dict(
    config: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Checkpoint name -> random tensor; all in ``dtype`` but e_score_correction_bias (fp32)."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in tensor_shapes(config).items():
        keep = torch.float32 if name.endswith("e_score_correction_bias") else dtype
        state[name] = _draw(name, shape, generator).to(keep)
    return state


def _json_config(
    config: dict[str, Any], widths: dict[str, Any] | None, dtype: torch.dtype, tagged: bool
) -> dict[str, Any]:
    out = dict(config)
    if tagged:  # the form in which transformers writes infinity
        out["time_step_limit"] = [
            {"__float__": "Infinity"} if value == math.inf else value
            for value in config["time_step_limit"]
        ]
    out["torch_dtype"] = dtype_name(dtype)
    if widths is not None:
        out["elastic"] = widths
    return out


def write_state_dict(folder: str | Path, state: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Writes ``state`` as model.safetensors, or as ``shards`` files with an index."""
    folder = Path(folder)
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(state)
    weight_map = {}
    for shard in range(shards):
        part = {name: state[name] for name in names[shard::shards]}
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(t.numel() * t.element_size() for t in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_tiny(
    folder: str | Path,
    config: dict[str, Any] | None = None,
    widths: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shards: int = 1,
    *,
    tagged_infinity: bool | None = None,
) -> Path:
    """Writes a random tiny checkpoint folder.

    Args:
        folder: created when missing.
        config: dict of ``tiny_config`` (None: drawn from ``seed``).
        widths: elastic table written under config.json's ``elastic`` key (None: no table).
        dtype: of all tensors but e_score_correction_bias, which stays float32.
        seed: of the weights.
        shards: 1 writes model.safetensors; more write that many files and the index.
        tagged_infinity: True writes infinity as ``{"__float__": "Infinity"}``, False as plain
            ``Infinity``; None lets the seed choose.

    Returns:
        The folder as a Path.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(seed) if config is None else config
    tagged = bool(seed % 2) if tagged_infinity is None else tagged_infinity
    text = json.dumps(_json_config(config, widths, dtype, tagged), indent=2)
    (folder / "config.json").write_text(text)
    write_state_dict(folder, tiny_state_dict(config, dtype, seed), shards)
    return folder


def transformers_model(folder: str | Path) -> Any:
    """The oracle: NemotronHForCausalLM in fp32, eager attention, eval.

    transformers clamps dt to ``time_step_min`` in prefill but not in a step; 1e-12 switches that
    off, so that both of its paths compute what the model means.
    """
    from transformers import NemotronHConfig, NemotronHForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = NemotronHConfig.from_pretrained(folder)
    config.time_step_min = 1e-12
    model = NemotronHForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def transformers_slice(folder: str | Path, width: Any, state: dict[str, torch.Tensor]) -> Any:
    """The oracle of any width, per-layer sizes included: every mixer rebuilt at its own sizes.

    Args:
        folder: of the full checkpoint (its config.json is read).
        width: a ``Width``; per-layer tuples as in elastic_infer.config.
        state: {checkpoint name: full tensor}; cut here with ``slice_state_dict``.

    Returns:
        NemotronHForCausalLM in fp32, eager attention, eval, with time_step_min 1e-12.
    """
    from transformers import NemotronHConfig, NemotronHForCausalLM

    from elastic_infer.checkpoint.config import LAYER_KEYS, ModelConfig
    from elastic_infer.checkpoint.slicing import slice_state_dict

    full = ModelConfig.from_folder(folder)
    config = NemotronHConfig.from_pretrained(folder)
    config.hidden_size, config.time_step_min = width.hidden_size, 1e-12
    config._attn_implementation = "eager"
    model = NemotronHForCausalLM(config)
    for index, block in enumerate(model.model.layers):
        own = copy.deepcopy(config)
        for key, kind in LAYER_KEYS.items():
            if full.layers[index] == kind:
                setattr(own, key, getattr(width, key)[index])
        block.mixer = type(block.mixer)(own, layer_idx=index)
    tensors: dict[str, torch.Tensor] = {}
    experts: dict[str, list[torch.Tensor]] = {}
    for name, tensor in slice_state_dict(full, state, width).items():
        name = name.replace("backbone.", "model.")
        prefix, found, rest = name.partition(".experts.")
        if found:  # experts come in ascending order; transformers keeps them in one tensor
            experts.setdefault(f"{prefix}.experts.{rest.split('.')[1]}", []).append(tensor.float())
        else:
            tensors[name] = tensor.float()
    tensors.update({name: torch.stack(parts) for name, parts in experts.items()})
    if full.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embeddings.weight"]
    model.load_state_dict(tensors, strict=True)
    return model.float().eval()
