"""Accuracy with int8 and NVFP4 activations: the shipped reasoner with NVFP4 matrices.

    python -m bench.cpu.activations                  # bench/results/activations.json
    python -m bench.cpu.activations --problems 50    # fewer problems

int8 is the CPU's own (`activation_quantization="int8"`). The kernels for NVFP4 activations need a
GPU of compute capability 12.x: here torch computes the same around the CPU's products. Every row
that meets an NVFP4 weight is quantized with the scale of its own prefix, within experts too. Passes
are not recorded then, so that it happens in each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from elastic_infer import Engine, demo_model
from elastic_infer.checkpoint.checkpoint import Checkpoint
from elastic_infer.codes import BLOCK, E2M1_MAX, E4M3_MAX, decode_e4m3, encode_e2m1, unpack_e2m1
from elastic_infer.device.machine import machine, today
from elastic_infer.model.model import Model
from elastic_infer.ops.matmul import matmul
from elastic_infer.ops.moe_matmul import moe_matmul
from elastic_infer.ops.tiles import NVFP4, ExpertWeights, Segment, TiledWeight
from elastic_infer.quantize.write import DEFAULT_GROUPS, GROUPS
from elastic_infer.reasoner.evaluate import SEED, evaluate
from elastic_infer.reasoner.quantized import quantized_folder
from elastic_infer.reasoner.task import MAX_OPERATIONS, held_out_problems

OUT = Path(__file__).resolve().parents[1] / "results" / "activations.json"
WAYS = {"nvfp4": DEFAULT_GROUPS, "nvfp4, every matrix": GROUPS}


def quantize(x: torch.Tensor) -> torch.Tensor:
    """Rows [R, K] as NVFP4 has them, in float32; each with a scale of its own."""
    blocks = x.float().unflatten(1, (-1, BLOCK))
    g = blocks.abs().amax((1, 2)) / (E2M1_MAX * E4M3_MAX)
    g = torch.where(g > 0, g, 1.0)[:, None, None]
    wanted = (blocks.abs().amax(-1, keepdim=True) / (E2M1_MAX * g)).clamp(max=E4M3_MAX)
    scales = decode_e4m3(wanted.to(torch.float8_e4m3fn).view(torch.uint8))
    step = scales * g
    codes = unpack_e2m1(encode_e2m1(torch.where(step > 0, blocks / step, 0.0)))
    return (codes * scales * g).flatten(1)


def quantized_rows(x: torch.Tensor, modes: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """float32 rows of x, each quantized over the size of its mode, and zero beyond."""
    rows = torch.zeros(x.shape)
    for mode, k in enumerate(sizes.tolist()):
        chosen = (modes == mode).nonzero().flatten()
        rows[chosen, :k] = quantize(x[chosen, :k])
    return rows


def quantizing(x: torch.Tensor, weight, out: torch.Tensor, **given: Any) -> torch.Tensor:
    """`matmul` on the CPU, with x quantized first where it would be on a GPU."""
    if weight.dtype == NVFP4:
        x = quantized_rows(x, given["row_width"], given["k_sizes"])
    return matmul(x, weight, out, **given)


def quantizing_experts(
    x: torch.Tensor,
    up: ExpertWeights,
    down: ExpertWeights,
    ids: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    *,
    shared: torch.Tensor,
    row_width: torch.Tensor,
    k_sizes: torch.Tensor,
    f_sizes: torch.Tensor,
    run: Any,
    **given: Any,
) -> torch.Tensor:
    """`moe_matmul` on the CPU; where its rows would be quantized on a GPU, expert by expert with x
    and the rows between the two products quantized."""
    if up.dtype != NVFP4:
        return moe_matmul(
            x,
            up,
            down,
            ids,
            weights,
            out,
            shared=shared,
            row_width=row_width,
            k_sizes=k_sizes,
            f_sizes=f_sizes,
            run=run,
            **given,
        )

    def product(rows, modes, expert, e, k, n):
        matrix = TiledWeight(
            expert.image[e], expert.columns, (Segment(0, 0, expert.rows),), expert.scale[e : e + 1]
        )
        y = torch.empty(len(rows), expert.rows, dtype=x.dtype)
        return matmul(
            quantized_rows(rows, modes, k),
            matrix,
            y,
            row_width=modes,
            k_sizes=k,
            n_sizes=n[:, None].contiguous(),
            run=run,
        )

    total = shared.float()
    for e in ids.unique().tolist():
        rows, choice = (ids == e).nonzero(as_tuple=True)
        modes = row_width[rows]
        middle = torch.relu(product(x[rows], modes, up, e, k_sizes, f_sizes)).square()
        y = product(middle, modes, down, e, f_sizes, k_sizes).float()
        total.index_add_(0, rows, y * weights[rows, choice, None])
    return out.copy_(total)


def unrecorded(model: Model, steps: int) -> None:
    """A pass of steps, run op by op."""
    model.run_steps(model.pool, steps)


@contextmanager
def nvfp4_activations() -> Iterator[None]:
    """Inside, engines on the CPU quantize activations to NVFP4."""
    products = mock.patch.multiple(
        "elastic_infer.model.layers", matmul=quantizing, moe_matmul=quantizing_experts
    )
    with mock.patch.object(Model, "_replay", unrecorded), products:
        yield


def measure(folder: Path, count: int) -> dict[str, Any]:
    """{"bf16", "int8" or "nvfp4", of activations: {width: what it solved}}."""
    problems, found = held_out_problems(SEED, count), {}
    for form in ("bf16", "int8", "nvfp4"):
        within = nvfp4_activations() if form == "nvfp4" else nullcontext()
        requested = "int8" if form == "int8" else "none"
        engine = Engine.from_pretrained(folder, device="cpu", activation_quantization=requested)
        with within, engine:
            found[form] = {
                w: evaluate(engine, problems, width=w).score.to_dict() for w in engine.widths
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=40 * MAX_OPERATIONS)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    checkpoint = Checkpoint.open(demo_model())
    figures = {"date": today(), "machine": machine(), "problems": given.problems, "ways": {}}
    for name, groups in WAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            quantized_folder(checkpoint, Path(folder) / "m", "nvfp4", groups, None)
            figures["ways"][name] = measure(Path(folder) / "m", given.problems)
        print(name, json.dumps(figures["ways"][name]), flush=True)
    given.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
