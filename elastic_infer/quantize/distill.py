"""Nested quantization-aware distillation: weights learn to stand on the grid that they will have.

Scales are those of the search and stay fixed. In every step the weights are rounded to their codes,
gradients pass the rounding unchanged, and every width is taught by the frozen parent at the same
width through KL(parent | student). One set of weights learns for all widths at once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.widths import Width
from ..codes import BLOCK, E4M3_MAX, Packed, decode_e4m3, round_e2m1
from ..elastify.corpus import Batch
from ..elastify.losses import divergence
from ..elastify.torch_model import ElasticNemotronH
from ..errors import InvalidRequest, NonFiniteLoss
from ..value_checks import MOST, check_count, check_real
from .search import quantize_with

__all__ = ["DistillSettings", "distill_quantized"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DistillSettings:
    """steps: updates of the weights. batch_size, sequence_length: of text data. lr: of AdamW,
    rising over the first twentieth, then falling to a tenth by a cosine. clip: largest norm of the
    gradient. seed: of the order of the data. validation_batches: held-out batches."""

    steps: int = 200
    batch_size: int = 8
    sequence_length: int = 512
    lr: float = 1e-4
    clip: float = 1.0
    seed: int = 0
    validation_batches: int = 8

    def __post_init__(self):
        for name in ("steps", "batch_size", "sequence_length"):
            check_count(f"distill: {name}", getattr(self, name))
        for name in ("lr", "clip"):
            check_real(f"distill: {name}", getattr(self, name), 0, open_=True)
            # Anything smaller moves no float32 weight, and its schedule rounds to zero.
            check_real(f"distill: {name}", getattr(self, name), 1e-30)
        check_count("distill: seed", self.seed, -MOST, MOST)  # generators take 64 bits
        check_count("distill: validation_batches", self.validation_batches, 0)

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        rise = min(1.0, (step + 1) / max(1, self.steps // 20))
        return self.lr * rise * (0.1 + 0.45 * (1 + math.cos(math.pi * step / self.steps)))


class _Rounded(nn.Module):
    """Weights as their codes will hold them; the gradient passes as if nothing was rounded.

    Args:
        packed: one matrix [N, K], or one per expert, whose scales are taken.
    """

    def __init__(self, packed: list[Packed]):
        super().__init__()
        fp8 = packed[0].block_scales is None
        steps = []
        for p in packed:
            scale = torch.tensor(p.scale, dtype=torch.float32)
            steps.append(scale.view(1, 1) if fp8 else decode_e4m3(p.block_scales) * scale)
        self.fp8 = fp8
        self.register_buffer("step", torch.stack(steps) if len(steps) > 1 else steps[0])

    def rounded(self, weight: Tensor) -> Tensor:
        """The nearest values that codes have."""
        step = self.step.clamp(min=2.0**-126)
        if self.fp8:
            ratio = (weight / step).clamp(-E4M3_MAX, E4M3_MAX)
            return ratio.to(torch.float8_e4m3fn).float() * self.step
        blocks = weight.unflatten(-1, (-1, BLOCK)) / step[..., None]
        values = torch.copysign(round_e2m1(blocks.abs()), blocks) * self.step[..., None]
        return values.flatten(-2)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.rounded(weight.detach()) - weight.detach())


def _attach(model: ElasticNemotronH, packed: Mapping[str, Packed]) -> list[tuple[nn.Module, str]]:
    """Lets the model see its quantized matrices rounded; gives (module, parameter) of each."""
    stacked: dict[tuple[str, str], list[Packed]] = {}
    for name, found in packed.items():
        module, expert, rest = name.removesuffix(".weight").partition(".mixer.experts.")
        if expert:  # the experts of a layer are one parameter, in ascending order
            key = (f"{module}.mixer.experts", rest.split(".")[1])
        else:
            key = (module, "weight")
        stacked.setdefault(key, []).append(found)
    done = []
    for (module, parameter), parts in stacked.items():
        owner = model.get_submodule(module)
        parametrize.register_parametrization(owner, parameter, _Rounded(parts), unsafe=True)
        done.append((owner, parameter))
    return done


def _loss(model: ElasticNemotronH, teacher: ElasticNemotronH, batch: Batch, width: Width) -> Tensor:
    """Mean KL(teacher | student) per counted position, both at `width`."""
    with torch.no_grad():
        wanted = teacher(batch.ids, width)
    count = batch.ids.numel() if batch.weights is None else int((batch.weights > 0).sum())
    return divergence(wanted, model(batch.ids, width), batch.weights) / count


@torch.no_grad()
def _validate(model, teacher, widths: Mapping[str, Width], batches: list[Batch]) -> dict:
    return {
        name: sum(float(_loss(model, teacher, b, w)) for b in batches) / max(1, len(batches))
        for name, w in widths.items()
    }


def distill_quantized(
    checkpoint: Checkpoint,
    packed: Mapping[str, Packed],
    data: Any,
    settings: DistillSettings | None = None,
    progress: Callable[[int, int, Mapping[str, float]], None] | None = None,
) -> tuple[dict[str, Packed], dict[str, Tensor], dict[str, Any]]:
    """Trains the weights of a checkpoint for the codes that they will be written as.

    Args:
        checkpoint: the parent; its weights are where training begins and what it is taught by.
        packed: {name: codes} of the matrices to quantize, whose scales are kept.
        data: a Corpus, or batches of token ids [B, T] or (ids, weights), as `corpus` describes.
        settings: of the run.
        progress: called with (step, steps, {width: loss}) after every update.

    Returns:
        ({name: codes after training}, {name: float32 tensor} of the whole model,
        {"steps", "loss_before", "loss_after": {width: held-out KL}}).

    Raises:
        InvalidRequest: a tied head among the matrices, or data that cannot be used.
        NonFiniteLoss: training diverged.
    """
    from ..elastify.corpus import as_data

    settings = settings or DistillSettings()
    if checkpoint.config.tie_word_embeddings and "lm_head.weight" in packed:
        raise InvalidRequest(
            "distill: a tied head must stay as it is, got lm_head among the matrices to quantize"
        )
    teacher = ElasticNemotronH.load(checkpoint.folder).requires_grad_(False).eval()
    model = ElasticNemotronH.load(checkpoint.folder)
    hooked = _attach(model, packed)
    data = as_data(data)
    size, length = settings.batch_size, settings.sequence_length
    held_out = data.validation(size, length, settings.validation_batches)
    before = _validate(model, teacher, checkpoint.widths, held_out)
    batches = data.batches(size, length, settings.seed)
    _train(model, teacher, checkpoint.widths, batches, settings, progress)
    after = _validate(model, teacher, checkpoint.widths, held_out)
    for owner, parameter in hooked:
        parametrize.remove_parametrizations(owner, parameter, leave_parametrized=False)
    state = {name: tensor.clone() for name, tensor in model.checkpoint_state().items()}
    codes = {name: quantize_with(state[name], like) for name, like in packed.items()}
    told = {"steps": settings.steps, "lr": settings.lr, "loss_before": before, "loss_after": after}
    return codes, state, told


def _train(
    model: ElasticNemotronH,
    teacher: ElasticNemotronH,
    widths: Mapping[str, Width],
    batches: Iterator[Batch],
    settings: DistillSettings,
    progress: Callable[[int, int, Mapping[str, float]], None] | None,
) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    for step in range(settings.steps):
        batch, losses = next(batches), {}
        for name, width in widths.items():
            loss = _loss(model, teacher, batch, width)
            losses[name] = float(loss.detach())
            if not math.isfinite(losses[name]):
                raise NonFiniteLoss(
                    f"distill: the loss must stay finite, got {losses[name]} at width {name} in "
                    f"step {step}; nothing was written"
                )
            (loss / len(widths)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step)
        optimizer.step()
        optimizer.zero_grad()
        if progress is not None:
            progress(step + 1, settings.steps, losses)
