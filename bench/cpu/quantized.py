"""NVFP4 on the CPU: full-size shapes, and the 620M model beside llama.cpp.

    python -m bench.cpu.quantized full --out bench/results/fullsize-cpu.json
    python -m bench.cpu.quantized full --isa avx2 --out bench/results/fullsize-avx2.json
    python -m bench.cpu.quantized peer --types q4_0 iq4_nl --out bench/results/nvfp4-620m.json

Weights are random, made layer by layer in the form in which the kernels read them, so that memory
never holds more than the model: speed depends on shapes and on which experts a token picks alone.
All matrices but the router are NVFP4; the embedding stays bfloat16. Tokens are random and given.
Every case is taken with activations as they are, in bfloat16, and as int8.
Streaming reads are measured in turns with the steps that are given as a share of them.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.common.commit import ROOT, commit
from bench.common.models import THIRTY, draw_values, model_config
from bench.common.roof import read_rate
from bench.common.tokens import random_tokens
from bench.cpu.beside_llama import Ours, paired, state_bytes, turns
from bench.llama.convert import QUANTIZED, convert
from bench.llama.process import Peer, interleave
from elastic_infer import _C
from elastic_infer.cache.cache import Cache
from elastic_infer.checkpoint.config import ATTENTION, MAMBA, ModelConfig
from elastic_infer.checkpoint.width_table import parse_widths
from elastic_infer.checkpoint.widths import Width
from elastic_infer.device.machine import machine, today
from elastic_infer.device.memory import WeightMemory
from elastic_infer.model.model import Model
from elastic_infer.model.weights import AttentionWeights, MambaWeights, MoeWeights, Weights
from elastic_infer.ops.tiles import NVFP4, ExpertWeights, TiledWeight
from elastic_infer.sizing.capacity import plan_capacity

PROMPT = 16  # tokens read before the timed steps
PREFILL = 256


class Random:
    """Random weights of one served width.

    config: sizes of the checkpoint. served: the width that is kept. generator: of all values.
    """

    def __init__(self, config: ModelConfig, served: Width, generator: torch.Generator):
        self.config, self.served, self.generator = config, served, generator
        self.D, self.memory = served.hidden_size, WeightMemory()

    def _values(self, kind: str, *shape: int, dtype=torch.bfloat16) -> torch.Tensor:
        return draw_values(kind, shape, dtype, self.generator)

    def _codes(self, rows: int, columns: int) -> dict[str, torch.Tensor]:
        draw = partial(torch.randint, generator=self.generator, dtype=torch.uint8)
        return {
            "source": draw(0, 256, (rows, columns // 2)),
            "block_scales": draw(0x30, 0x40, (rows, columns // 16)),
        }

    def matrix(self, columns: int, *segment_rows: int) -> TiledWeight:
        """An NVFP4 matrix of unit gain."""
        tiled = TiledWeight.empty(list(segment_rows), columns, NVFP4, self.memory)
        for i, rows in enumerate(segment_rows):
            tiled.fill(i, **self._codes(rows, columns), scale=0.3 * columns**-0.5, check=False)
        return tiled

    def experts(self, rows: int, columns: int, count: int) -> ExpertWeights:
        """One drawn matrix; the others have its tiles in another order."""
        packed = ExpertWeights.empty(count, rows, columns, NVFP4, self.memory)
        packed.fill(0, **self._codes(rows, columns), scale=0.3 * columns**-0.5, check=False)
        packed.scale[:] = packed.scale[0]
        tiles = packed.image[0].flatten(0, 1)
        whole = columns // 64 * 64 == columns and rows // 64 * 64 == rows
        for e in range(1, count):
            order = torch.randperm(len(tiles), generator=self.generator)
            moved = tiles[order] if whole else tiles
            packed.image[e] = moved.view(packed.image[e].shape)
        return packed

    def mamba(self, layer: int) -> MambaWeights:
        """One Mamba layer."""
        c, H = self.config, self.served.mamba_num_heads[layer]
        inner, bc = H * c.mamba_head_dim, c.n_groups * c.ssm_state_size
        values = partial(self._values, dtype=torch.float32)
        return MambaWeights(
            norm=self._values("norm", self.D),
            in_proj=self.matrix(self.D, inner, inner, bc, bc, H),
            conv_weight=values("conv", inner + 2 * bc, 4),
            conv_bias=values("bias", inner + 2 * bc),
            A_log=values("a_log", H),
            D=values("skip", H),
            dt_bias=values("dt_bias", H),
            gated_norm=self._values("norm", inner),
            out_proj=self.matrix(inner, self.D),
        )

    def attention(self, layer: int) -> AttentionWeights:
        """One attention layer."""
        size = self.config.head_dim
        query = self.served.num_attention_heads[layer] * size
        kv = self.config.num_key_value_heads * size
        qkv = self.matrix(self.D, query, kv, kv)
        return AttentionWeights(self._values("norm", self.D), qkv, self.matrix(query, self.D))

    def moe(self, layer: int) -> MoeWeights:
        """One mixture of experts."""
        E, F = self.served.n_routed_experts[layer], self.served.moe_intermediate_size[layer]
        shared = self.served.moe_shared_expert_intermediate_size[layer]
        return MoeWeights(
            norm=self._values("norm", self.D),
            gate=TiledWeight.pack(self._values("matrix", E, self.D, dtype=torch.float32)),
            correction_bias=self._values("correction", E, dtype=torch.float32),
            up=self.experts(F, self.D, E),
            down=self.experts(self.D, F, E),
            shared_up=self.matrix(self.D, shared),
            shared_down=self.matrix(shared, self.D),
        )

    def all(self) -> Weights:
        """Everything, layer by layer."""
        c = self.config
        makers = {MAMBA: self.mamba, ATTENTION: self.attention}
        return Weights(
            embedding=self._values("embedding", c.vocab_size, self.D),
            layers=[makers.get(kind, self.moe)(i) for i, kind in enumerate(c.layers)],
            final_norm=self._values("norm", self.D),
            head=self.matrix(self.D, c.vocab_size),
            served=self.served,
            dtype=torch.bfloat16,
        )


@dataclass
class Built:
    """A model without an engine, with the parts that `beside_llama.Ours` asks of one."""

    config: ModelConfig
    widths: dict[str, Width]
    model: Model

    @property
    def core(self) -> Built:
        return self


def build(data: dict[str, Any], width: str, threads: int, isa: str = "auto") -> Built:
    """A model that serves one width of random weights."""
    config = ModelConfig.from_dict(data)
    served = parse_widths(config)[width]
    length = PREFILL + 128
    capacity = plan_capacity(
        config,
        served,
        torch.bfloat16,
        max_model_len=length,
        max_num_seqs=1,
        max_num_batched_tokens=length,
        kv_cache_memory_bytes=1 << 30,
    )
    weights = Random(config, served, torch.Generator().manual_seed(0)).all()
    cache = Cache(config, served, torch.bfloat16, capacity.num_pages, capacity.num_slots)
    pool = _C.Pool(threads, isa)
    model = Model(
        config,
        weights,
        [served],
        cache,
        pool,
        max_num_batched_tokens=length,
        max_num_seqs=1,
        max_length=capacity.max_model_len,
    )
    return Built(config, {width: served}, model)


def as_int8(built: Built) -> Built:
    """The same model with its activations as int8."""
    m = built.core.model
    c, served, length = built.config, list(built.widths.values()), PREFILL + 128
    cache = Cache(c, served[0], torch.bfloat16, m.cache.pages.size, m.cache.slots.size)
    model = Model(
        c,
        m.weights,
        served,
        cache,
        m.pool,
        max_num_batched_tokens=length,
        max_num_seqs=1,
        max_length=m.max_length,
        activation_quantization="int8",
    )
    return Built(c, built.widths, model)


def bytes_per_step(built: Built, width: str) -> int:
    """Bytes that a step at batch 1 reads of weights, in whole tiles, and moves of state."""
    c, weights = built.config, built.core.model.weights
    share = c.num_experts_per_tok
    total = weights.head.image.numel() + state_bytes(built, width) + 2 * weights.served.hidden_size
    for layer in weights.layers:
        for value in vars(layer).values():
            if isinstance(value, TiledWeight):
                total += value.image.numel()
            elif isinstance(value, ExpertWeights):
                total += value.image.numel() // value.experts * share
            elif isinstance(value, torch.Tensor):
                total += value.nbytes
    return total


def python_share(built: Built, width: str, prompt: list[int], steps: list[int]) -> float:
    """The share of a step that is not spent in the recorded native calls, the median over turns."""
    ours, model = Ours(built), built.core.model
    taken = turns(
        {
            "whole": lambda: ours.decode([prompt], [width], steps),
            "native": lambda: sum(s for _ in steps for _, s in model.profile_step(1)),
        },
        7,
    )
    return statistics.median(1 - n / w for n, w in zip(taken["native"], taken["whole"]))


def measure(width: str, threads: int, tokens: int, count: int, isa: str) -> dict[str, Any]:
    """One row of the full-size file."""
    built = build({**THIRTY, "max_position_embeddings": 8192}, width, threads, isa)
    ours, coded, vocabulary = Ours(built), Ours(as_int8(built)), built.config.vocab_size
    prompt, steps = random_tokens(PROMPT, vocabulary, 0), random_tokens(tokens, vocabulary, 2)
    long = random_tokens(PREFILL, vocabulary, 3)
    taken = turns(
        {
            "reads": lambda: 1.0 / read_rate(threads, 0.5, 2),
            "step": lambda: ours.decode([prompt], [width], steps) / tokens,
            "step, int8": lambda: coded.decode([prompt], [width], steps) / tokens,
            "prefill": lambda: ours.prefill(long, width) / PREFILL,
            "prefill, int8": lambda: coded.prefill(long, width) / PREFILL,
        },
        count,
    )
    moved = bytes_per_step(built, width)

    def figures(form: str) -> dict[str, float]:
        step = taken["step" + form]
        shares = [moved / s * r for s, r in zip(step, taken["reads"])]
        return {
            "step_seconds": statistics.median(step),
            "prefill_seconds_per_token": statistics.median(taken["prefill" + form]),
            "share_of_streaming_reads": statistics.median(shares),
        }

    return {
        "width": width,
        "kernels": built.core.model.pool.isa,
        **figures(""),
        "int8": figures(", int8"),
        "step_bytes": moved,
        "read_bytes_s": 1.0 / statistics.median(taken["reads"]),
        "python_share_of_step": python_share(built, width, prompt, steps),
        "weight_bytes": built.core.model.weights.nbytes,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "rounds": {n: [round(t, 12 if n == "reads" else 6) for t in v] for n, v in taken.items()},
    }


def beside_peer(folder: Path, types: list[str], threads: int, tokens: int, pairs: int):
    """The 620M shapes in NVFP4 beside llama.cpp's four-bit types: {type: figures}."""
    built, found = build(model_config("620m"), "L", threads), {}
    ways = {"": Ours(built), ", int8 activations": Ours(as_int8(built))}
    for kind in types:
        with Peer(convert(folder, kind), threads, PREFILL) as peer:
            prompt, steps = random_tokens(PROMPT, peer.vocab, 0), random_tokens(tokens, peer.vocab)
            long = random_tokens(PREFILL, peer.vocab, 3)
            cases = {
                "decode": (
                    lambda o, p=prompt, s=steps: o.decode([p], ["L"], s),
                    partial(peer.decode, prompt, steps),
                    tokens,
                ),
                f"prefill {PREFILL}": (
                    lambda o, p=long: o.prefill(p, "L"),
                    partial(peer.prefill, long),
                    PREFILL,
                ),
            }
            found[kind] = {
                case + way: paired(interleave(partial(run, ours), theirs, pairs), count)
                for case, (run, theirs, count) in cases.items()
                for way, ours in ways.items()
            }
    return {"step_bytes": bytes_per_step(built, "L"), "types": found}


def main() -> None:
    """Command line: prints the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["full", "peer"])
    widths = sorted(THIRTY["elastic"]["widths"])
    parser.add_argument("--width", choices=widths, default="12B", help="of `full`")
    parser.add_argument("--isa", default="auto", help="instruction set of `full`'s kernels")
    parser.add_argument("--types", nargs="+", choices=sorted(QUANTIZED), default=["q4_0"])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "models" / "620m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16, help="steps of one timed decode")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="`full` adds its row to the others there")
    given = parser.parse_args()
    about = {
        "date": today(),
        "commit": commit(),
        "machine": machine(),
        "threads": given.threads,
        "weights": "NVFP4, random",
    }
    if given.what == "peer":
        figures = about | beside_peer(
            given.folder, given.types, given.threads, given.tokens, given.rounds
        )
    else:
        row = measure(given.width, given.threads, given.tokens, given.rounds, given.isa)
        print(json.dumps({k: v for k, v in row.items() if k != "rounds"}, indent=1))
        old = json.loads(given.out.read_text()) if given.out and given.out.is_file() else {}
        rows = [r for r in old.get("rows", []) if r["width"] != given.width] + [row]
        figures = about | {"rows": sorted(rows, key=lambda r: r["width"])}
    if given.what == "peer":
        print(json.dumps(figures, indent=1))
    if given.out is not None:
        given.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
