"""Losses of distillation, and the places where a sequence switches widths."""

from __future__ import annotations

import torch
from torch import Tensor

from .corpus import Batch

__all__ = ["divergence", "switch_places"]

PIECE = 1024  # rows of logits whose probabilities exist at once


def divergence(teacher: Tensor, student: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum over positions of sum_v p_v (log p_v - log q_v): KL(teacher | student).

    Args:
        teacher: logits [B, T, V].
        student: logits [B, T, V].
        weights: [B, T]; positions of weight 0 do not count, None: all do.

    Returns:
        0-d float32 tensor, not divided by the number of positions.
    """
    if weights is None:
        weights = torch.ones(teacher.shape[:2], device=teacher.device)
    keep = (weights > 0).flatten()
    return _Divergence.apply(teacher.flatten(0, 1), student.flatten(0, 1), keep)


class _Divergence(torch.autograd.Function):
    """KL over rows of logits, a piece at a time: probabilities of all rows never exist at once.

    Gradient of a student row: softmax(student) - softmax(teacher) where the row counts.
    """

    @staticmethod
    def forward(ctx, teacher: Tensor, student: Tensor, keep: Tensor) -> Tensor:
        ctx.save_for_backward(teacher, student, keep)
        total = torch.zeros((), device=student.device)
        for t, s, k in zip(*(x.split(PIECE) for x in (teacher, student, keep))):
            p, q = t.float().log_softmax(-1), s.float().log_softmax(-1)
            total += ((p.exp() * (p - q)).sum(-1) * k).sum()
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        teacher, student, keep = ctx.saved_tensors
        out = torch.empty_like(student)
        pieces = (x.split(PIECE) for x in (teacher, student, keep, out))
        for t, s, k, piece in zip(*pieces):
            change = s.float().softmax(-1) - t.float().softmax(-1)
            piece.copy_(change * (k[:, None] * grad))
        return None, out, None


def switch_places(batch: Batch, seed: int) -> tuple[Tensor, Batch]:
    """Draws where each row switches, evenly among the positions that count, and leaves only those
    from there on: (at [B], batch with weights)."""
    ids, weights = batch
    learnt = torch.ones(ids.shape) if weights is None else (weights > 0).float().cpu()
    generator = torch.Generator().manual_seed(seed)
    at = ((torch.rand(ids.shape, generator=generator) + 1) * learnt).argmax(1)
    kept = learnt * (torch.arange(ids.shape[1])[None] >= at[:, None])
    return at, Batch(ids, kept.to(ids.device))
