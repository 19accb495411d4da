"""The whole model in differentiable plain torch, in checkpoint order, at any width.

This is what training runs on and what tests compare with. A narrow width slices the parameters
by prefix, so gradients reach exactly what the exported slice would hold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_infer.config import ModelConfig, Width, full_width
from elastic_infer.errors import CheckpointError, InvalidRequest


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, in float32, cast back."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.float() * (wide * scale)).to(x.dtype)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """RMSNorm of x * silu(gate) per group of channels, times weight: gate before norm.

    Args:
        x, gate: [..., C]; weight: [C]; groups: C is cut into this many equal groups.
    """
    wide = x.float() * F.silu(gate.float())
    grouped = wide.unflatten(-1, (groups, -1))
    grouped = grouped * torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + eps)
    return weight * grouped.flatten(-2).to(gate.dtype)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise causal convolution: out[t] = bias + sum_k weight[:, k] * x[t - K + 1 + k].

    Args:
        x: [B, T, C]; weight: [C, K]; bias: [C].
    """
    taps = weight.shape[1]
    length = x.shape[1]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    out = bias + padded[:, :length] * weight[:, 0]
    for k in range(1, taps):
        out = torch.addcmul(out, padded[:, k : k + length], weight[:, k])
    return out


def ssd_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk: int) -> Tensor:
    """Mamba-2 scan in chunked matrix form, from a zero state.

    state_t = exp(a dt_t) state_{t-1} + dt_t b_t x_t;  y_t = c_t state_t  (per head).

    Args:
        x: [B, T, G, R, P] with R heads per group; dt: [B, T, G, R], after softplus;
        a: [G, R], negative; b, c: [B, T, G, N]; chunk: positions handled as one matrix product.

    Returns:
        y [B, T, G, R, P].
    """
    length = x.shape[1]
    state = None
    outputs = []
    for start in range(0, length, chunk):
        part = slice(start, min(start + chunk, length))
        last = part.stop == length
        xp = x[:, part].permute(0, 2, 3, 1, 4)  # B G R T P
        dtp = dt[:, part].permute(0, 2, 3, 1)  # B G R T
        bp, cp = b[:, part].transpose(1, 2), c[:, part].transpose(1, 2)  # B G T N
        decay = torch.cumsum(dtp * a[..., None], -1)
        size = decay.shape[-1]
        future = torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1)
        weights = (decay[..., :, None] - decay[..., None, :]).masked_fill(future, -torch.inf)
        scores = torch.matmul(cp, bp.transpose(-1, -2))[:, :, None]  # B G 1 T S
        inputs = xp * dtp[..., None]
        y = torch.matmul(weights.exp() * scores, inputs)
        if state is not None:
            y = y + torch.matmul(cp[:, :, None], state) * decay.exp()[..., None]
        if not last:
            keep = (decay[..., -1:] - decay).exp()
            new = torch.matmul(bp[:, :, None].transpose(-1, -2), inputs * keep[..., None])
            if state is not None:
                new = new + state * decay[..., -1].exp()[..., None, None]
            state = new  # B G R N P
        outputs.append(y.permute(0, 3, 1, 2, 4))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


class _Dispatch(torch.autograd.Function):
    """rows[i] = x[order[i] // J]; its gradient is a gather instead of a scatter."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor, per_token: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.per_token = per_token
        return x[order // per_token]

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        return grad[inverse].unflatten(0, (-1, ctx.per_token)).sum(1), None, None, None


class _Permute(torch.autograd.Function):
    """rows[inverse]; its gradient is grad[order]."""

    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows[inverse]

    @staticmethod
    def backward(ctx, grad: Tensor):
        (order,) = ctx.saved_tensors
        return grad[order], None, None


def _heads(weight: Tensor, groups: int, total: int, kept: int, size: int) -> Tensor:
    """First kept/groups heads of every group of rows [total*size, ...], or all of them."""
    if kept == total:
        return weight
    split = weight.unflatten(0, (groups, total // groups, size))
    return split[:, : kept // groups].flatten(0, 2)


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

    def forward(self, x: Tensor, width: Width) -> Tensor:
        """x [B, T, wD] -> [B, T, wD]."""
        cfg = self.config
        total, size, groups = cfg.mamba_num_heads, cfg.mamba_head_dim, cfg.n_groups
        kept, hidden = width.mamba_num_heads[self.layer], width.hidden_size
        inner, full, state = kept * size, total * size, groups * cfg.ssm_state_size

        def keep(weight: Tensor, head_size: int = size) -> Tensor:
            return _heads(weight, groups, total, kept, head_size)

        z_rows, x_rows, bc_rows, dt_rows = self.in_proj.weight[:, :hidden].split(
            [full, full, 2 * state, total]
        )
        rows = torch.cat([keep(z_rows), keep(x_rows), bc_rows, keep(dt_rows, 1)])
        gate, xbc, dt = F.linear(x, rows).split([inner, inner + 2 * state, kept], -1)
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
        y = gated_norm(y, gate, keep(self.norm.weight), groups, cfg.layer_norm_epsilon)
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

    def forward(self, x: Tensor, width: Width) -> Tensor:
        """x [B, T, wD] -> [B, T, wD]."""
        cfg, hidden = self.config, width.hidden_size
        total, groups, size = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        kept = width.num_attention_heads[self.layer]
        q_rows = _heads(self.q_proj.weight[:, :hidden], groups, total, kept, size)
        q = F.linear(x, q_rows).unflatten(-1, (kept, size)).transpose(1, 2)
        k = F.linear(x, self.k_proj.weight[:, :hidden]).unflatten(-1, (groups, size))
        v = F.linear(x, self.v_proj.weight[:, :hidden]).unflatten(-1, (groups, size))
        k = k.transpose(1, 2).repeat_interleave(kept // groups, 1)
        v = v.transpose(1, 2).repeat_interleave(kept // groups, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        columns = self.o_proj.weight[:hidden]
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

    def forward(self, x: Tensor, hidden: int, inner: int) -> Tensor:
        """x [..., wD] -> [..., wD] over the first `inner` channels."""
        inside = F.relu(F.linear(x, self.up_proj.weight[:inner, :hidden])).square()
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

    def route(self, rows: Tensor, width: Width) -> tuple[Tensor, Tensor]:
        """rows [T, wD] -> expert indices [T, J] and float32 weights [T, J]."""
        cfg, count = self.config, width.n_routed_experts[self.layer]
        logits = F.linear(rows.float(), self.gate.weight[:count, : width.hidden_size].float())
        scores = logits.sigmoid()
        choice = scores.detach() + self.gate.e_score_correction_bias[:count]
        index = choice.topk(cfg.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(1, index)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return index, weights * cfg.routed_scaling_factor

    def forward(self, x: Tensor, width: Width) -> Tensor:
        """x [B, T, wD] -> [B, T, wD]."""
        layer, hidden = self.layer, width.hidden_size
        count, inner = width.n_routed_experts[layer], width.moe_intermediate_size[layer]
        rows = x.flatten(0, -2)
        index, weights = self.route(rows, width)
        per_token = index.shape[1]
        order = index.flatten().argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        load = torch.bincount(index.flatten(), minlength=count)
        self.last_load = load
        parts = _Dispatch.apply(rows, order, inverse, per_token).split(load.tolist())
        ups = self.experts.up_proj[:count, :inner, :hidden].unbind()
        downs = self.experts.down_proj[:count, :hidden, :inner].unbind()
        outputs = [
            F.linear(F.relu(F.linear(part, up)).square(), down)
            for part, up, down in zip(parts, ups, downs)
        ]
        mixed = _Permute.apply(torch.cat(outputs), order, inverse).unflatten(0, (-1, per_token))
        routed = (mixed * weights[..., None]).sum(1).to(x.dtype).view_as(x)
        shared = width.moe_shared_expert_intermediate_size[layer]
        return routed + self.shared_experts(x, hidden, shared)


class DenseMlp(Mlp):
    """A layer of kind '-'."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config.hidden_size, config.intermediate_size)
        self.layer = layer

    def forward(self, x: Tensor, width: Width) -> Tensor:  # type: ignore[override]
        """x [B, T, wD] -> [B, T, wD]."""
        return super().forward(x, width.hidden_size, width.intermediate_size[self.layer])


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

    def hidden(self, input_ids: Tensor, width: Width | None = None) -> Tensor:
        """Token ids [B, T] -> final normalised hidden states [B, T, wD]."""
        width = self.full if width is None else width
        if not width.fits_in(self.full):
            raise InvalidRequest(
                f"torch_model: width must fit in the model, got {width.name!r}, which is larger"
            )
        size, eps = width.hidden_size, self.config.layer_norm_epsilon
        x = F.embedding(input_ids, self.backbone.embeddings.weight[:, :size])
        for block in self.backbone.layers:
            x = x + block.mixer(rms_norm(x, block.norm.weight[:size], eps), width)
        return rms_norm(x, self.backbone.norm_f.weight[:size], eps)

    def forward(self, input_ids: Tensor, width: Width | None = None) -> Tensor:
        """Token ids [B, T] -> float32 logits [B, T, V] at `width` (default: full)."""
        hidden = self.hidden(input_ids, width)
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
        """Writes config.json and model.safetensors; correction biases stay float32."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {}
        for name, tensor in self.checkpoint_state().items():
            fixed = name.endswith("e_score_correction_bias")
            kept = torch.float32 if fixed else (dtype or tensor.dtype)
            state[name] = tensor.to(kept).contiguous().clone()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        raw = dict(self.config.raw)
        raw["dtype"] = str(dtype or self.lm_head.weight.dtype).removeprefix("torch.")
        text = json.dumps(_encode_floats(raw), indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> ElasticNemotronH:
        """Reads a checkpoint folder into a model whose parameters all have `dtype`."""
        from safetensors.torch import load_file

        folder = Path(folder)
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"torch_model: {folder} must hold safetensors files, got none")
        state: dict[str, Tensor] = {}
        for file in files:
            state.update(load_file(file))
        model = cls(ModelConfig.from_folder(folder)).to(dtype)
        for module in model.modules():
            if isinstance(module, Gate):
                module.e_score_correction_bias = module.e_score_correction_bias.float()
        model.load_checkpoint_state(state)
        return model

    @torch.no_grad()
    def initialise(self, seed: int) -> ElasticNemotronH:
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


def initialise(config: ModelConfig, seed: int) -> ElasticNemotronH:
    """A float32 model with weights to train from."""
    return ElasticNemotronH(config).initialise(seed)


def _encode_floats(value):
    """Writes infinities as {"__float__": "Infinity"}, so that the file is strict JSON."""
    if isinstance(value, dict):
        return {key: _encode_floats(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode_floats(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return {"__float__": "Infinity" if value > 0 else "-Infinity"}
    return value
