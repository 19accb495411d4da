"""The whole model in differentiable plain torch, in checkpoint order, at any width.

This is what training runs on and what tests compare with. A narrow width slices the parameters
by prefix, so gradients reach exactly what the exported slice would hold.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.config import ModelConfig
from ..checkpoint.tensor_files import save_tensors
from ..checkpoint.widths import Width, full_width
from ..codes import dtype_name
from ..errors import CheckpointError, InvalidRequest, shown
from ..files.writing import make_folder, withdraw, write_json
from .torch_ops import (
    Carried,
    Dispatch,
    Permute,
    causal_conv,
    gated_norm,
    heads_of,
    in_float32,
    rms_norm,
    ssd_scan,
)

# What is learnt through in place of a prefix: width key -> mask over its units (channels, heads,
# experts) in checkpoint order, of one layer.
LayerMasks = Mapping[str, Tensor]


@in_float32
def _router_logits(rows: Tensor, weight: Tensor) -> Tensor:
    return F.linear(rows.float(), weight.float())


class Mamba(nn.Module):
    """Mamba-2 mixer."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        heads, inner = config.mamba_num_heads, config.mamba_num_heads * config.mamba_head_dim
        conv = config.conv_dim()
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.conv1d = nn.Module()
        self.conv1d.weight = nn.Parameter(torch.zeros(conv, 1, config.conv_kernel))
        self.conv1d.bias = nn.Parameter(torch.zeros(conv))
        self.in_proj = nn.Linear(config.hidden_size, inner + conv + heads, bias=False)
        self.norm = nn.Module()
        self.norm.weight = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def cached(self, x: Tensor, width: Width, kept: int) -> tuple[Tensor, Tensor]:
        """Projections of x [B, T, wD] for `kept` heads: inputs of the convolution, time steps."""
        cfg = self.config
        total, size, groups = cfg.mamba_num_heads, cfg.mamba_head_dim, cfg.n_groups
        full, state = total * size, groups * cfg.ssm_state_size
        _, x_rows, bc_rows, dt_rows = self.in_proj.weight[:, : width.hidden_size].split(
            [full, full, 2 * state, total]
        )
        heads = heads_of(x_rows, groups, total, kept, size)
        steps = heads_of(dt_rows, groups, total, kept, 1)
        return F.linear(x, torch.cat([heads, bc_rows])), F.linear(x, steps)

    def forward(
        self,
        x: Tensor,
        width: Width,
        masks: LayerMasks | None = None,
        carried: Carried | None = None,
    ) -> Tensor:
        """x [B, T, wD] -> [B, T, wD]."""
        cfg = self.config
        total, size, groups = cfg.mamba_num_heads, cfg.mamba_head_dim, cfg.n_groups
        kept, hidden = width.mamba_num_heads[self.layer], width.hidden_size
        inner, full, state = kept * size, total * size, groups * cfg.ssm_state_size

        def keep(weight: Tensor, head_size: int = size) -> Tensor:
            return heads_of(weight, groups, total, kept, head_size)

        z_rows, x_rows, bc_rows, dt_rows = self.in_proj.weight[:, :hidden].split(
            [full, full, 2 * state, total]
        )
        rows = torch.cat([keep(z_rows), keep(x_rows), bc_rows, keep(dt_rows, 1)])
        gate, xbc, dt = F.linear(x, rows).split([inner, inner + 2 * state, kept], -1)
        if carried is not None and carried.reading:
            xbc, dt = carried.pass_on(self.layer, (xbc, dt))
        elif carried is not None:
            heads = carried.reader.mamba_num_heads[self.layer]
            carried.layers[self.layer] = self.cached(x, width, heads)
        taps, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        taps = torch.cat([keep(taps[:full]), taps[full:]])
        bias = torch.cat([keep(bias[:full]), bias[full:]])
        xbc = F.silu(causal_conv(xbc, taps, bias))
        xs, b, c = xbc.float().split([inner, state, state], -1)
        xs = xs.unflatten(-1, (groups, kept // groups, size))
        b, c = b.unflatten(-1, (groups, -1)), c.unflatten(-1, (groups, -1))
        dt = F.softplus(dt.float() + keep(self.dt_bias, 1).float())
        a = -torch.exp(keep(self.A_log, 1).float()).view(groups, -1)
        y = ssd_scan(xs, dt.unflatten(-1, (groups, -1)), a, b, c, cfg.chunk_size)
        y = y + xs * keep(self.D, 1).float().view(groups, -1, 1)
        y = y.flatten(2).to(x.dtype)
        mask = None if masks is None else masks["mamba_num_heads"].repeat_interleave(size)
        y = gated_norm(y, gate, keep(self.norm.weight), groups, cfg.layer_norm_epsilon, mask)
        columns = self.out_proj.weight[:hidden]
        if kept != total:
            split = columns.unflatten(1, (groups, total // groups, size))
            columns = split[:, :, : kept // groups].flatten(1)
        return F.linear(y.to(x.dtype), columns)


class Attention(nn.Module):
    """Grouped-query causal attention without positional encoding."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def heads(self, x: Tensor, width: Width, carried: Carried | None = None) -> Tensor:
        """x [B, T, wD] -> outputs of the kept query heads [B, wHq, T, K]."""
        cfg, hidden = self.config, width.hidden_size
        total, groups, size = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        kept = width.num_attention_heads[self.layer]
        q_rows = heads_of(self.q_proj.weight[:, :hidden], groups, total, kept, size)
        q = F.linear(x, q_rows).unflatten(-1, (kept, size)).transpose(1, 2)
        k = F.linear(x, self.k_proj.weight[:, :hidden]).unflatten(-1, (groups, size))
        v = F.linear(x, self.v_proj.weight[:, :hidden]).unflatten(-1, (groups, size))
        if carried is not None and carried.reading:
            k, v = carried.pass_on(self.layer, (k, v))
        elif carried is not None:
            carried.layers[self.layer] = (k, v)
        k = k.transpose(1, 2).repeat_interleave(kept // groups, 1)
        v = v.transpose(1, 2).repeat_interleave(kept // groups, 1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(
        self,
        x: Tensor,
        width: Width,
        masks: LayerMasks | None = None,
        carried: Carried | None = None,
    ) -> Tensor:
        """x [B, T, wD] -> [B, T, wD]."""
        cfg, kept = self.config, width.num_attention_heads[self.layer]
        total, groups, size = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        out = self.heads(x, width, carried)
        if masks is not None:
            out = out * masks["num_attention_heads"].to(out.dtype)[:, None, None]
        columns = self.o_proj.weight[: width.hidden_size]
        if kept != total:
            split = columns.unflatten(1, (groups, total // groups, size))
            columns = split[:, :, : kept // groups].flatten(1)
        return F.linear(out.transpose(1, 2).flatten(2), columns)


class Mlp(nn.Module):
    """down(relu(up(x))^2)."""

    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def inside(self, x: Tensor, hidden: int, inner: int) -> Tensor:
        """relu(up(x))^2: x [..., wD] -> [..., inner]."""
        return F.relu(F.linear(x, self.up_proj.weight[:inner, :hidden])).square()

    def forward(self, x: Tensor, hidden: int, inner: int, mask: Tensor | None = None) -> Tensor:
        """x [..., wD] -> [..., wD] over the first `inner` channels, times their mask."""
        inside = self.inside(x, hidden, inner)
        if mask is not None:
            inside = inside * mask.to(inside.dtype)
        return F.linear(inside, self.down_proj.weight[:hidden, :inner])


class Experts(nn.Module):
    """Routed experts, stored stacked: up [E, F, D], down [E, D, F]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        count, inner = config.n_routed_experts, config.moe_intermediate_size
        self.up_proj = nn.Parameter(torch.zeros(count, inner, config.hidden_size))
        self.down_proj = nn.Parameter(torch.zeros(count, config.hidden_size, inner))


class Gate(nn.Module):
    """Router weights; the correction bias takes part in the selection only."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))


class Moe(nn.Module):
    """Top-J routed experts plus one shared expert."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        self.gate = Gate(config)
        self.experts = Experts(config)
        self.shared_experts = Mlp(config.hidden_size, config.moe_shared_expert_intermediate_size)
        self.last_load: Tensor | None = None

    def route(
        self, rows: Tensor, width: Width, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """rows [T, wD] -> expert indices [T, J] and float32 weights [T, J].

        A mask multiplies the scores, and its logarithm is added where experts are selected: an
        expert of mask 0 is never selected.
        """
        cfg, count = self.config, width.n_routed_experts[self.layer]
        scores = _router_logits(rows, self.gate.weight[:count, : width.hidden_size]).sigmoid()
        choice = scores.detach() + self.gate.e_score_correction_bias[:count]
        if mask is not None:
            choice = choice + mask.detach().log()
            scores = scores * mask
        index = choice.topk(cfg.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(1, index)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return index, weights * cfg.routed_scaling_factor

    def forward(self, x: Tensor, width: Width, masks: LayerMasks | None = None) -> Tensor:
        """x [B, T, wD] -> [B, T, wD]."""
        layer, hidden = self.layer, width.hidden_size
        count, inner = width.n_routed_experts[layer], width.moe_intermediate_size[layer]
        rows = x.flatten(0, -2)
        inside, few, beside = None, None, None
        if masks is not None:
            inside, few = masks["moe_intermediate_size"], masks["n_routed_experts"]
            beside = masks["moe_shared_expert_intermediate_size"]
        index, weights = self.route(rows, width, few)
        per_token = index.shape[1]
        order = index.flatten().argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        load = torch.bincount(index.flatten(), minlength=count)
        self.last_load = load
        parts = Dispatch.apply(rows, order, inverse, per_token).split(load.tolist())
        ups = self.experts.up_proj[:count, :inner, :hidden].unbind()
        downs = self.experts.down_proj[:count, :hidden, :inner].unbind()
        outputs = []
        for part, up, down in zip(parts, ups, downs):
            active = F.relu(F.linear(part, up)).square()
            active = active if inside is None else active * inside.to(active.dtype)
            outputs.append(F.linear(active, down))
        mixed = Permute.apply(torch.cat(outputs), order, inverse).unflatten(0, (-1, per_token))
        routed = (mixed * weights[..., None]).sum(1).to(x.dtype).view_as(x)
        shared = width.moe_shared_expert_intermediate_size[layer]
        return routed + self.shared_experts(x, hidden, shared, beside)


class DenseMlp(Mlp):
    """A layer of kind '-'."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config.hidden_size, config.intermediate_size)
        self.layer = layer

    def forward(  # type: ignore[override]
        self, x: Tensor, width: Width, masks: LayerMasks | None = None
    ) -> Tensor:
        """x [B, T, wD] -> [B, T, wD]."""
        mask = None if masks is None else masks["intermediate_size"]
        return super().forward(x, width.hidden_size, width.intermediate_size[self.layer], mask)


_MIXERS = {"M": Mamba, "*": Attention, "-": DenseMlp, "E": Moe}


class ElasticNemotronH(nn.Module):
    """A `nemotron_h` model that runs at any width of its checkpoint.

    Parameters carry the checkpoint's tensor names, except that the experts of a layer are
    stacked; `checkpoint_state` and `load_checkpoint_state` use one tensor per expert.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.full = full_width(config)
        self.backbone = nn.Module()
        self.backbone.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.backbone.layers = nn.ModuleList()
        for i, kind in enumerate(config.layers):
            block = nn.Module()
            block.norm = nn.Module()
            block.norm.weight = nn.Parameter(torch.ones(config.hidden_size))
            block.mixer = _MIXERS[kind](config, i)
            self.backbone.layers.append(block)
        self.backbone.norm_f = nn.Module()
        self.backbone.norm_f.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight

    def hidden(
        self,
        input_ids: Tensor,
        width: Width | None = None,
        masks: Sequence[LayerMasks] | None = None,
        skip: Collection[int] = (),
        carried: Carried | None = None,
    ) -> Tensor:
        """Token ids [B, T] -> final normalized hidden states [B, T, wD]; see `forward`."""
        width = self.full if width is None else width
        if not width.fits_in(self.full):
            raise InvalidRequest(
                "torch_model: width must fit in the model, got "
                f"{shown(width.name)}, which is larger"
            )
        if masks is not None and not width.same_sizes(self.full):
            raise InvalidRequest(
                "torch_model: width must be the full one where masks are given, got "
                f"{shown(width.name)}"
            )
        size, eps = width.hidden_size, self.config.layer_norm_epsilon
        channels = None if masks is None else masks[0]["hidden_size"]
        x = F.embedding(input_ids, self.backbone.embeddings.weight[:, :size])
        for i, block in enumerate(self.backbone.layers):
            if i in skip:
                continue
            normed = rms_norm(x, block.norm.weight[:size], eps, channels)
            layer_masks = None if masks is None else masks[i]
            if isinstance(block.mixer, (Mamba, Attention)):
                x = x + block.mixer(normed, width, layer_masks, carried)
            else:  # no cache, nothing to carry
                x = x + block.mixer(normed, width, layer_masks)
        return rms_norm(x, self.backbone.norm_f.weight[:size], eps, channels)

    def forward(
        self,
        input_ids: Tensor,
        width: Width | None = None,
        masks: Sequence[LayerMasks] | None = None,
        skip: Collection[int] = (),
    ) -> Tensor:
        """Token ids [B, T] -> float32 logits [B, T, V] at `width` (default: full).

        Args:
            input_ids: [B, T] int64.
            width: the prefix that runs.
            masks: per layer {width key: mask} in place of a prefix, "hidden_size" in every one;
                masks of ones and then zeros give the logits of that width, up to rounding.
            skip: layers that are left out.
        """
        hidden = self.hidden(input_ids, width, masks, skip)
        return F.linear(hidden, self.lm_head.weight[:, : hidden.shape[-1]]).float()

    def switched(self, input_ids: Tensor, writer: Width, reader: Width, at: Tensor) -> Tensor:
        """Float32 logits [B, T, V] of `reader` after a switch by "carry": row b's tokens before
        at[b] were read by `writer`, and the logits count from at[b] on.

        Args:
            input_ids: [B, T] int64.
            writer: widths; the writer tracks the Mamba heads of the reader.
            reader: widths; the writer tracks the Mamba heads of the reader.
            at: [B] int64, first position that the reader reads.
        """
        before = torch.arange(input_ids.shape[1], device=at.device)[None] < at[:, None]
        carried = Carried(reader, before)
        self.hidden(input_ids, writer, carried=carried)
        carried.reading = True
        hidden = self.hidden(input_ids, reader, carried=carried)
        return F.linear(hidden, self.lm_head.weight[:, : hidden.shape[-1]]).float()

    def checkpoint_state(self) -> dict[str, Tensor]:
        """Checkpoint tensor name -> tensor, one per expert, detached."""
        state = {}
        for name, tensor in self.state_dict().items():
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            prefix, found, kind = name.partition(".mixer.experts.")
            if found:
                for j, expert in enumerate(tensor):
                    state[f"{prefix}.mixer.experts.{j}.{kind}.weight"] = expert.detach()
            else:
                state[name] = tensor.detach()
        return state

    def load_checkpoint_state(self, state: Mapping[str, Tensor]) -> None:
        """Copies checkpoint tensors in. Raises CheckpointError on a missing or wrong one."""
        known = set()
        for name, target in self.checkpoint_state().items():
            tensor = state.get(name)
            if tensor is None:
                raise CheckpointError(f"torch_model: tensor {name} must be present, got none")
            if tensor.shape != target.shape:
                raise CheckpointError(
                    f"torch_model: {name} must be {list(target.shape)}, got {list(tensor.shape)}"
                )
            with torch.no_grad():
                target.copy_(tensor)
            known.add(name)
        extra = [name for name in state if name not in known and not name.startswith("mtp.")]
        if extra and extra != ["lm_head.weight"]:
            raise CheckpointError(f"torch_model: tensors must be known, got {sorted(extra)[0]}")

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes model.safetensors and then config.json; correction biases stay float32.

        Raises:
            CheckpointError: if they cannot be written; the folder does not open then.
        """
        folder = make_folder(folder, "torch_model")
        withdraw(folder, "torch_model")
        state = {}
        for name, tensor in self.checkpoint_state().items():
            fixed = name.endswith("e_score_correction_bias")
            kept = torch.float32 if fixed else (dtype or tensor.dtype)
            state[name] = tensor.to(kept)
        save_tensors(folder / "model.safetensors", state, {"format": "pt"}, "torch_model")
        raw = dict(self.config.raw)
        raw["dtype"] = dtype_name(dtype or self.lm_head.weight.dtype)
        write_json(folder / "config.json", encode_floats(raw), "torch_model")

    @classmethod
    def load(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> ElasticNemotronH:
        """Reads a checkpoint folder into a model whose parameters all have `dtype`.

        Raises:
            CheckpointError: one that `Checkpoint.open` refuses, or that is quantized.
        """
        from ..checkpoint.checkpoint import Checkpoint

        checkpoint = Checkpoint.open(folder)
        checkpoint.require_plain("torch_model")
        state = {name: checkpoint.tensor(name) for name in checkpoint.names}
        model = cls(checkpoint.config).to(dtype)
        for module in model.modules():
            if isinstance(module, Gate):
                module.e_score_correction_bias = module.e_score_correction_bias.float()
        model.load_checkpoint_state(state)
        return model

    @torch.no_grad()
    def initialize(self, seed: int) -> ElasticNemotronH:
        """Draws weights to train from; returns self.

        Matrices normal with deviation 1/sqrt(fan_in), those that write into the residual
        divided by sqrt(number of layers); A uniform in 1..16; dt log-uniform in 0.001..0.1.
        """
        random = torch.Generator().manual_seed(seed)
        depth = math.sqrt(self.config.num_layers)
        for name, p in self.named_parameters():
            kind = name.rsplit(".", 2)[-2] if name.endswith(".weight") else name.rsplit(".")[-1]
            if name.endswith("A_log"):
                p.copy_((1 + 15 * torch.rand(p.shape, generator=random)).log())
            elif name.endswith("dt_bias"):
                low, high = math.log(0.001), math.log(0.1)
                dt = (low + (high - low) * torch.rand(p.shape, generator=random)).exp()
                p.copy_(dt + torch.log(-torch.expm1(-dt)))
            elif p.ndim >= 2:
                fan_in = p[0].numel() if "conv1d" in name else p.shape[-1]
                scale = 1 / math.sqrt(fan_in)
                if kind in ("out_proj", "o_proj", "down_proj"):
                    scale /= depth
                elif kind == "embeddings":
                    scale = 0.5
                p.copy_(torch.randn(p.shape, generator=random) * scale)
        return self


def initialize(config: ModelConfig, seed: int) -> ElasticNemotronH:
    """A float32 model with weights to train from."""
    return ElasticNemotronH(config).initialize(seed)


def encode_floats(value):
    """Writes infinities as {"__float__": "Infinity"}, so that the file is strict JSON."""
    if isinstance(value, dict):
        return {key: encode_floats(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode_floats(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return {"__float__": "Infinity" if value > 0 else "-Infinity"}
    return value
