"""Caches of different widths: how alike they are, and what one is worth to another width."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from bench.elastify.data import score
from elastic_infer.checkpoint.widths import Width
from elastic_infer.elastify.torch_model import Attention, ElasticNemotronH, Mamba
from elastic_infer.elastify.torch_ops import causal_conv


@torch.no_grad()
def compare_caches(
    model: ElasticNemotronH, checks: list[Any], widths: dict[str, Width]
) -> dict[str, Any]:
    """Cosine of what widths cache of the same text, and accuracy on a transplanted cache.

    Args:
        model: of all widths. checks: problems with their whole answers. widths: {name: width}.

    Returns:
        {"cosine": {"L-S": {"K", "V", "state"}}, "transplanted": {"S->L": score}}: in the latter the
        first width has read the prompt up to its last token, the second one goes on.
    """
    ids = checks[-1].inputs[:16]
    kept = {name: caches(model, ids, width, widths) for name, width in widths.items()}
    cosine, moved = {}, {}
    for small in widths:
        if small == "L":
            continue
        cosine[f"L-{small}"] = {
            part: round(float(F.cosine_similarity(kept["L"][part], other, dim=-1).mean()), 4)
            for part, other in kept[small].items()
        }
        for writer, reader in ((small, "L"), ("L", small)):
            moved[f"{writer}->{reader}"] = transplanted(
                model, checks, widths[writer], widths[reader]
            )
    return {"cosine": cosine, "transplanted": moved}


def transplanted(
    model: ElasticNemotronH, checks: list[Any], writer: Width, reader: Width
) -> dict[str, Any]:
    """Problems that `reader` solves on the cache of a prompt that `writer` has read."""

    def logits(batch: Any) -> torch.Tensor:
        return model.switched(batch.inputs, writer, reader, batch.weights.argmax(1))

    return score(logits, checks)


def caches(
    model: ElasticNemotronH, ids: torch.Tensor, width: Width, widths: dict[str, Width]
) -> dict[str, torch.Tensor]:
    """K and V [positions, K] and the final Mamba states [heads, P*N] of all layers.

    States only of heads that every width has: others are not there to compare.
    """
    found: dict[str, list[torch.Tensor]] = {"K": [], "V": [], "state": []}
    groups, hidden = model.config.n_groups, width.hidden_size

    def watch(mixer: Any, arguments: tuple[Any, ...]) -> None:
        x = arguments[0]
        if isinstance(mixer, Attention):
            for part, layer in (("K", mixer.k_proj), ("V", mixer.v_proj)):
                out = F.linear(x, layer.weight[:, :hidden])
                found[part].append(out.unflatten(-1, (-1, model.config.head_dim)).flatten(0, 2))
        elif isinstance(mixer, Mamba):
            common = min(w.mamba_num_heads[mixer.layer] for w in widths.values())
            states = final_states(mixer, x, hidden)[:, :, : common // groups]
            found["state"].append(states.flatten(3).flatten(0, 2))

    handles = [b.mixer.register_forward_pre_hook(watch) for b in model.backbone.layers]
    model.hidden(ids, width)
    for handle in handles:
        handle.remove()
    return {part: torch.cat(pieces) for part, pieces in found.items()}


def final_states(mixer: Mamba, x: torch.Tensor, hidden: int) -> torch.Tensor:
    """sum_t exp(A sum_{s>t} dt_s) dt_t x_t B_t': state after the last token [B, G, H/G, P, N]."""
    cfg = mixer.config
    inner, state = cfg.mamba_num_heads * cfg.mamba_head_dim, cfg.n_groups * cfg.ssm_state_size
    sizes = [inner, inner + 2 * state, cfg.mamba_num_heads]
    _, xbc, dt = F.linear(x, mixer.in_proj.weight[:, :hidden]).split(sizes, -1)
    xbc = F.silu(causal_conv(xbc, mixer.conv1d.weight[:, 0], mixer.conv1d.bias))
    xs, b, _ = xbc.split([inner, state, state], -1)
    dt = F.softplus(dt + mixer.dt_bias)
    later = dt.flip(1).cumsum(1).flip(1) - dt
    scale = torch.exp(-mixer.A_log.exp() * later) * dt
    xs = xs.unflatten(-1, (cfg.mamba_num_heads, -1)) * scale[..., None]
    xs = xs.unflatten(2, (cfg.n_groups, -1))
    return torch.einsum("btghp,btgn->bghpn", xs, b.unflatten(-1, (cfg.n_groups, -1)))
