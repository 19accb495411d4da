"""Importance of every component of a trained model, measured on calibration batches.

All scores are sums (or means) over tokens, kept in float64 and added batch by batch: memory does
not grow with the number of samples, and the same batches give the same scores. X is the input of a
mixer: the residual after that layer's RMSNorm, weight included.

Sources: Nemotron Elastic (arXiv 2511.16664), section on importance; REAP (arXiv 2510.13999) for
experts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint.config import ATTENTION, MAMBA, MLP, MOE, ModelConfig
from ..checkpoint.tensor_files import open_safetensors, save_tensors
from ..errors import CheckpointError, InvalidRequest
from .torch_model import Attention, ElasticNemotronH, Mamba, Mlp, Moe

__all__ = ["Importance", "layer_errors", "layer_order", "measure_importance"]

HIDDEN = "hidden_size"
HEAD_CHANNELS = "mamba_head_dim"
LAYER_ERROR = "layer_error"

# Shape of the score of each key, per layer of its kind.
_SHAPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "mamba_num_heads": (MAMBA, ("mamba_num_heads",)),
    HEAD_CHANNELS: (MAMBA, ("mamba_head_dim",)),
    "num_attention_heads": (ATTENTION, ("num_attention_heads",)),
    "intermediate_size": (MLP, ("intermediate_size",)),
    "n_routed_experts": (MOE, ("n_routed_experts",)),
    "moe_intermediate_size": (MOE, ("n_routed_experts", "moe_intermediate_size")),
    "moe_shared_expert_intermediate_size": (MOE, ("moe_shared_expert_intermediate_size",)),
}


def score_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the scores of a model: "hidden_size", then "<key>.<layer>"."""
    shapes: dict[str, tuple[int, ...]] = {HIDDEN: (config.hidden_size,)}
    for layer, kind in enumerate(config.layers):
        for key, (owner, sizes) in _SHAPES.items():
            if owner == kind:
                shapes[f"{key}.{layer}"] = tuple(getattr(config, size) for size in sizes)
    return shapes


@dataclass
class Importance:
    """Scores of all components; larger is more important.

    Attributes:
        scores: {"hidden_size": [D], "<width key>.<layer>": one score per unit, float64 on the CPU}.
            Expert neurons are [E, F], every expert's own; "mamba_head_dim.<layer>" [P] scores the
            channels of a Mamba head, which no width removes.
        layer_errors: [layers] float64, normalized logit error without each layer; None if not
            measured.
        tokens: how many tokens were seen.
    """

    scores: dict[str, Tensor]
    layer_errors: Tensor | None = None
    tokens: int = 0
    meta: dict[str, str] = field(default_factory=dict)

    def of(self, key: str, layer: int | None = None) -> Tensor:
        """Scores of width key `key`, of one layer (None for hidden_size)."""
        return self.scores[key if layer is None else f"{key}.{layer}"]

    def check(self, config: ModelConfig) -> None:
        """Raises CheckpointError unless there is one finite score per component of `config`."""
        for name, shape in score_shapes(config).items():
            scores = self.scores.get(name)
            if scores is None or tuple(scores.shape) != shape:
                got = "none" if scores is None else list(scores.shape)
                raise CheckpointError(f"importance: {name} must be {list(shape)}, got {got}")
            if not bool(torch.isfinite(scores).all()):
                raise CheckpointError(f"importance: {name} must be finite, got NaN or infinity")

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file. Raises: CheckpointError if it cannot."""
        tensors = {name: scores.contiguous() for name, scores in self.scores.items()}
        if self.layer_errors is not None:
            tensors[LAYER_ERROR] = self.layer_errors
        save_tensors(path, tensors, {"tokens": str(self.tokens), **self.meta}, "importance")

    @classmethod
    def load(cls, path: str | Path) -> Importance:
        """Reads what `save` wrote."""
        with open_safetensors(path, "importance") as file:
            scores = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            meta = dict(file.metadata() or {})
        tokens = int(meta.pop("tokens", 0))
        return cls(scores, scores.pop(LAYER_ERROR, None), tokens, meta)


class _Sums:
    """Running sums of one pass; `keep` [B, T] says which positions of the batch count."""

    def __init__(self, config: ModelConfig, device: torch.device):
        self.config = config
        self.sums = {
            name: torch.zeros(shape, dtype=torch.float64, device=device)
            for name, shape in score_shapes(config).items()
        }
        for layer in config.layers_of(MAMBA):
            shape = (config.mamba_num_heads, config.mamba_head_dim)
            self.sums[f"inner.{layer}"] = torch.zeros(shape, dtype=torch.float64, device=device)
        for layer in config.layers_of(MOE):
            self.sums[f"sent.{layer}"] = torch.zeros_like(self.sums[f"n_routed_experts.{layer}"])
        self.keep: Tensor | None = None
        self.counting = True
        self.tokens = 0

    def rows(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [positions that count, ...]."""
        return x.flatten(0, 1) if self.keep is None else x[self.keep]

    def add(self, name: str, values: Tensor) -> None:
        """Adds values [tokens, ...] summed over the tokens."""
        self.sums[name] += values.double().sum(0)

    def hidden(self, x: Tensor) -> None:
        """Hidden channel i: sum over layers and tokens of |RMSNorm(x)_i|.

        Source: Nemotron Elastic, embedding channels: sum over batch and positions of |LN(X)_i|.
        """
        self.add(HIDDEN, x.abs())

    def mamba(self, mixer: Mamba, x: Tensor) -> None:
        """Adds |X W_x| [H, P] of a Mamba mixer; `mamba_scores` makes scores of the sums."""
        inner = self.config.mamba_num_heads * self.config.mamba_head_dim
        inside = F.linear(x, mixer.in_proj.weight[inner : 2 * inner]).abs()
        by_head = inside.unflatten(-1, (-1, self.config.mamba_head_dim))
        self.add(f"inner.{mixer.layer}", by_head)

    def mamba_scores(self, layer: int) -> None:
        """s = sum over tokens of |X W_x| [H, P]: channel d scores the 2-norm of s[:, d] over the
        heads, head h the 2-norm of s[h, :] over the head's channels.

        No width removes head channels, so a head is scored over all of them. Source: Nemotron
        Elastic, Mamba heads and head channels; heads are ranked inside each B/C group
        (`sorting.head_order`).
        """
        inner = self.sums.pop(f"inner.{layer}")
        self.sums[f"{HEAD_CHANNELS}.{layer}"] = inner.pow(2).sum(0).sqrt()
        self.sums[f"mamba_num_heads.{layer}"] = inner.pow(2).sum(1).sqrt()

    def attention(self, heads: Tensor, layer: int) -> None:
        """Query head h: sum over tokens of the 2-norm of its output softmax(q k') v.

        Ranked inside each KV group (`sorting.head_order`), since K and V are never removed.
        Source: Nemotron Elastic, size of the query-side head activation.
        """
        self.add(f"num_attention_heads.{layer}", self.rows(heads.transpose(1, 2)).norm(dim=-1))

    def ffn(self, key: str, layer: int, inside: Tensor) -> None:
        """Neuron i: sum over tokens of its activation relu(X W_up,i)^2.

        Source: Nemotron Elastic, sum of |X W_1,i|, here after the activation: a squared ReLU
        drops negative values, however large.
        """
        self.add(f"{key}.{layer}", inside)

    def experts(self, mixer: Moe, rows: Tensor, width) -> None:
        """Expert e: mean over the tokens sent to it of gate weight times 2-norm of its output.

        Its neurons as in `ffn`, over the same tokens. An expert that got no token scores 0.
        Source: REAP, arXiv 2510.13999, saliency of an expert.
        """
        layer = mixer.layer
        index, weights = mixer.route(rows, width)
        for expert in range(self.config.n_routed_experts):
            tokens, slots = (index == expert).nonzero(as_tuple=True)
            if not len(tokens):
                continue
            inside = F.relu(F.linear(rows[tokens], mixer.experts.up_proj[expert])).square()
            norms = F.linear(inside, mixer.experts.down_proj[expert]).norm(dim=-1)
            gated = weights[tokens, slots].double() * norms.double()
            self.sums[f"n_routed_experts.{layer}"][expert] += gated.sum()
            self.sums[f"moe_intermediate_size.{layer}"][expert] += inside.double().sum(0)
            self.sums[f"sent.{layer}"][expert] += len(tokens)

    def take(self, mixer: torch.nn.Module, x: Tensor, width) -> None:
        """Adds what one mixer's input x [B, T, D] tells."""
        if not self.counting:
            return
        rows = self.rows(x)
        self.hidden(rows)
        if isinstance(mixer, Mamba):
            self.mamba(mixer, rows)
        elif isinstance(mixer, Attention):
            self.attention(mixer.heads(x, width), mixer.layer)
        elif isinstance(mixer, Moe):
            self.experts(mixer, rows, width)
            key = "moe_shared_expert_intermediate_size"
            hidden, inner = width.hidden_size, getattr(width, key)[mixer.layer]
            self.ffn(key, mixer.layer, mixer.shared_experts.inside(rows, hidden, inner))
        elif isinstance(mixer, Mlp):
            hidden, inner = width.hidden_size, width.intermediate_size[mixer.layer]
            self.ffn("intermediate_size", mixer.layer, mixer.inside(rows, hidden, inner))

    def finish(self) -> Importance:
        for layer in self.config.layers_of(MAMBA):
            self.mamba_scores(layer)
        for layer in self.config.layers_of(MOE):
            self.sums[f"n_routed_experts.{layer}"] /= self.sums.pop(f"sent.{layer}").clamp(min=1)
        return Importance({k: v.cpu() for k, v in self.sums.items()}, None, self.tokens)


def _split(batch: Tensor | tuple) -> tuple[Tensor, Tensor | None]:
    """A batch is ids [B, T], or (ids, weights) where positions of weight 0 do not count."""
    if isinstance(batch, Tensor):
        return batch, None
    ids, weights = batch[0], batch[1]
    return ids, None if weights is None else weights > 0


@torch.no_grad()
def measure_importance(
    model: ElasticNemotronH,
    batches: Iterable[Tensor | tuple],
    *,
    layers: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Importance:
    """Scores every component of `model` on calibration batches, in one pass over them.

    Args:
        model: the trained parent, at full width; its device is used.
        batches: token ids [B, T] int64, or (ids, weights [B, T]); read once, one at a time.
        layers: also measure the normalized logit error without each layer (one more forward
            pass per layer and batch).
        progress: called with the number of sequences of a batch after it.

    Returns:
        The scores, on the CPU.

    Raises:
        InvalidRequest: the batches hold no token.
        CheckpointError: a score is NaN or infinite.
    """
    device = model.lm_head.weight.device
    sums = _Sums(model.config, device)
    errors = torch.zeros(model.config.num_layers + 1, dtype=torch.float64)
    handles = [
        block.mixer.register_forward_pre_hook(
            lambda mixer, arguments: sums.take(mixer, arguments[0], arguments[1])
        )
        for block in model.backbone.layers
    ]
    try:
        for batch in batches:
            ids, keep = _split(batch)
            ids = ids.to(device)
            sums.keep = None if keep is None else keep.to(device)
            sums.tokens += int(ids.numel() if keep is None else keep.sum())
            final = model.hidden(ids)
            sums.hidden(sums.rows(final))
            if layers:
                sums.counting = False
                errors += _squared_errors(model, ids, sums.rows, ())
                sums.counting = True
            if progress is not None:
                progress(len(ids))
    finally:
        for handle in handles:
            handle.remove()
    if not sums.tokens:
        raise InvalidRequest("importance: batches must hold at least one token, got none")
    found = sums.finish()
    if layers:
        found.layer_errors = errors[:-1] / errors[-1]
    found.check(model.config)
    return found


def _squared_errors(
    model: ElasticNemotronH, ids: Tensor, rows: Callable[[Tensor], Tensor], removed: Collection[int]
) -> Tensor:
    """Per layer j sum (full - without j)^2, and sum full^2 last; 0 for layers in `removed`."""
    full = rows(model(ids)).double()
    out = torch.zeros(model.config.num_layers + 1, dtype=torch.float64)
    for layer in range(model.config.num_layers):
        if layer not in removed:
            without = rows(model(ids, skip={layer, *removed})).double()
            out[layer] = (full - without).pow(2).sum().cpu()
    out[-1] = full.pow(2).sum().cpu()
    return out


@torch.no_grad()
def layer_errors(
    model: ElasticNemotronH, batches: Iterable[Tensor | tuple], removed: Collection[int] = ()
) -> Tensor:
    """Layer j: sum (logits - logits without j and `removed`)^2 / sum logits^2, over all tokens.

    Source: Nemotron Elastic, normalized error of the logits.

    Args:
        model: at full width.
        batches: as in `measure_importance`.
        removed: layers that are left out already.

    Returns:
        [layers] float64; 0 for layers in `removed`.
    """
    device = model.lm_head.weight.device
    total = torch.zeros(model.config.num_layers + 1, dtype=torch.float64)
    for batch in batches:
        ids, keep = _split(batch)
        ids, keep = ids.to(device), None if keep is None else keep.to(device)
        total += _squared_errors(
            model, ids, lambda x, keep=keep: x.flatten(0, 1) if keep is None else x[keep], removed
        )
    if not total[-1]:
        raise InvalidRequest("layer_errors: batches must hold at least one token, got none")
    return total[:-1] / total[-1]


def layer_order(
    model: ElasticNemotronH, batches: Callable[[], Iterable[Tensor | tuple]], count: int
) -> list[int]:
    """The `count` layers to remove first, found one at a time, least important first.

    After each removal the errors of the others are measured again without it (iterative
    removal, as in Nemotron Elastic). No width removes layers; this serves comparisons.

    Args:
        model: at full width.
        batches: gives the same calibration batches at every call.
        count: how many layers, below the model's number of layers.
    """
    if not 0 <= count < model.config.num_layers:
        raise InvalidRequest(
            f"layer_order: count must be in 0..{model.config.num_layers - 1}, got {count}"
        )
    removed: list[int] = []
    for _ in range(count):
        errors = layer_errors(model, batches(), removed)
        errors[removed] = torch.inf
        removed.append(int(errors.argmin()))
    return removed
