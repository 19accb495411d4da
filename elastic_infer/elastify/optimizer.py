"""Muon for the matrices, AdamW for everything else, in one small optimizer."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest-to-orthogonal factor of each matrix [..., R, C] by a quintic Newton iteration.

    In float32, since the machines this runs on have no bfloat16 arithmetic.
    """
    a, b, c = _QUINTIC
    x = matrices
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.transpose(-1, -2)
    x = x / (x.flatten(-2).norm(dim=-1)[..., None, None] + 1e-7)
    for _ in range(steps):
        square = x @ x.transpose(-1, -2)
        x = a * x + (b * square + c * (square @ square)) @ x
    return x.transpose(-1, -2) if tall else x


class MuonAdam(torch.optim.Optimizer):
    """Muon on the matrices inside mixers, AdamW on embeddings, head, norms and vectors.

    Args:
        model: whose parameters are trained; matrices of equal shape are stepped together.
        muon_lr: learning rates; both are scaled by `set_scale`.
        adam_lr: learning rates; both are scaled by `set_scale`.
        momentum: of Muon (Nesterov).
        decay: decoupled weight decay of the matrices.
    """

    def __init__(
        self,
        model: nn.Module,
        muon_lr: float = 0.02,
        adam_lr: float = 3e-3,
        momentum: float = 0.95,
        decay: float = 0.01,
    ):
        matrices, others = [], []
        for name, parameter in model.named_parameters():
            inside = ".mixer." in name and "conv1d" not in name and "gate" not in name
            (matrices if inside and parameter.ndim >= 2 else others).append(parameter)
        groups = [
            {"params": matrices, "kind": "muon", "lr": muon_lr, "base_lr": muon_lr},
            {"params": others, "kind": "adam", "lr": adam_lr, "base_lr": adam_lr},
        ]
        super().__init__(groups, {"momentum": momentum, "decay": decay, "steps": 0})

    def set_scale(self, scale: float) -> None:
        """Multiplies both base learning rates by `scale`."""
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * scale

    @torch.no_grad()
    def step(self, closure=None):
        """One update from the gradients; parameters without one are left alone."""
        if closure is not None:
            raise ValueError("optimizer: closure must be None, got one")
        for group in self.param_groups:
            group["steps"] += 1
            (self._muon if group["kind"] == "muon" else self._adam)(group)

    def _muon(self, group: dict) -> None:
        by_shape = defaultdict(list)
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(state["momentum"], group["momentum"])
            stacked = update.flatten(0, -3) if p.ndim > 2 else update[None]
            by_shape[p.shape[-2:]].append((p, stacked))
        for (rows, columns), items in by_shape.items():
            updates = orthogonalise(torch.cat([update for _, update in items]))
            scale = group["lr"] * max(1.0, rows / columns) ** 0.5
            for (p, _), update in zip(items, updates.split([len(u) for _, u in items])):
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(update.view_as(p), alpha=-scale)

    def _adam(self, group: dict) -> None:
        beta1, beta2 = 0.9, 0.98
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
                state["count"] = 0
            state["count"] += 1
            state["mean"].lerp_(p.grad, 1 - beta1)
            state["square"].lerp_(p.grad.square(), 1 - beta2)
            mean = state["mean"] / (1 - beta1 ** state["count"])
            square = state["square"] / (1 - beta2 ** state["count"])
            p.add_(mean / (square.sqrt() + 1e-8), alpha=-group["lr"])
