"""Passes of 257 to 1024 rows, which the largest batches of the engine have: every op on the
emulated GPU, the model and the engine on a CPU and on that GPU."""

from itertools import cycle, islice

import pytest
import torch

from elastic_infer import SamplingParams
from elastic_infer.model.batch import Segment
from elastic_infer.ops import registry
from elastic_infer.ops.moe_matmul import moe_matmul, moe_workspace_bytes
from elastic_infer.ops.testing import laws as _laws
from elastic_infer.ops.tiles import ExpertWeights
from support.emulated import built, installed, kernels, load
from support.engines import base_engine, draw

emu = load(built())
WIDTHS = ("S", "M", "L")


def lengths(rows, *some):
    return tuple(islice(cycle(some), rows))


# A small case of every op that has rows or sequences, with so many of them.
HEADS = {"H": 2, "P": 16, "N": 16, "G": 1, "widths": (1, 2)}
ATTENTION = {"Hq": 2, "Hkv": 1, "K": 16, "widths": (1, 2)}
CASES = {
    "attention_decode": lambda n: ATTENTION | {"lengths": lengths(n, 1, 3, 0)},
    "attention_prefill": lambda n: (
        ATTENTION | {"tokens": lengths(n, 1, 0, 0, 2), "context": lengths(n, 0, 3, 1, 2)}
    ),
    "causal_conv": lambda n: {
        "lengths": lengths(n, 1, 2, 0, 5),
        "x": 32,
        "bc": 16,
        "widths": (16, 32),
    },
    "embed": lambda n: {"R": n, "V": 21, "D": 32, "widths": (16, 32)},
    "gated_norm": lambda n: {"R": n, "H": 2, "P": 16, "G": 1, "widths": (1, 2)},
    "kv_append": lambda n: {"R": n, "pages": 17, "Hkv": 1, "K": 16, "skip": 5},
    "mamba_step": lambda n: HEADS | {"S": n},
    "matmul": lambda n: {
        "R": n,
        "K": 80,
        "segments": (40, 8),
        "k": (48, 80),
        "n": ((24, 4), (40, 8)),
        "act": "none",
    },
    "moe_matmul": lambda n: {
        "R": n,
        "E": 6,
        "J": 2,
        "D": 48,
        "F": 32,
        "k": (32, 48),
        "f": (32, 16),
        "shared": True,
    },
    "moe_route": lambda n: {
        "R": n,
        "D": 32,
        "E": 8,
        "J": 2,
        "k": (16, 32),
        "e": (4, 8),
        "ties": False,
    },
    "rms_norm": lambda n: {"R": n, "D": 48, "widths": (16, 48), "delta": True},
    "sample": lambda n: {"R": n, "V": 33},
    "softmax_stats": lambda n: {"R": n, "V": 33},
    "ssm_scan": lambda n: HEADS | {"lengths": lengths(n, 1, 2, 0)},
    "ssm_step": lambda n: HEADS | {"lengths": (1,) * n, "step": True},
}


def test_cases_name_every_op_with_rows():
    assert CASES.keys() == {op for op in registry() if not op.endswith("quantize")}


@pytest.mark.parametrize("rows", [257, 1024])
@pytest.mark.parametrize("op", CASES)
def test_ops_take_a_whole_batch(op, rows):
    """Law 1, in the dtype that models run in."""
    with installed(emu):
        spec = kernels(emu)[op]
        _laws.check_reference(spec, _laws.make(spec, CASES[op](rows), spec.dtypes[-1]))


@pytest.mark.slow
def test_rows_of_float32_products_beyond_one_side_of_a_grid():
    """65,535 blocks along y are all there are: more entries of experts go on along z."""
    rows, J, D, F = 33_000, 2, 16, 16
    g = torch.Generator().manual_seed(1)
    x, ids = torch.randn(rows, D, generator=g), torch.arange(rows * J, dtype=torch.int32) % 3
    ids, weights = ids.view(rows, J), torch.rand(rows, J, generator=g)
    up, down = (torch.randn(3, *shape, generator=g) for shape in ((F, D), (D, F)))
    out = torch.full((rows, D), torch.nan)
    with installed(emu):
        tiles = [ExpertWeights.pack(w) for w in (up, down)]
        room = torch.empty(moe_workspace_bytes(rows, J, 3, D, F, torch.float32), dtype=torch.uint8)
        moe_matmul(x, *tiles, ids, weights, out, workspace=room)
    middle = torch.einsum("rd,efd->ref", x.double(), up.double()).relu().square()
    all_experts = torch.einsum("ref,edf->red", middle, down.double())
    chosen = all_experts.gather(1, ids.long()[:, :, None].expand(-1, -1, D))
    want = (chosen * weights[:, :, None]).sum(1)
    assert (out - want).abs().max() <= 1e-5 * want.abs().max()


def step_all(model, count, alone):
    """Logits of a prefill of one token and of a step of `count` sequences at all widths: of all
    rows in common passes, or of those of `alone`, each in passes of its own."""
    ids, names = draw(2 * count), lengths(count, *WIDTHS)
    opened = {i: model.cache.open(track=True) for i in alone or range(count)}
    found = []
    for at, kind in ((0, "prefill"), (count, "step")):
        segments = [Segment(s, [ids[at + i]], names[i], kind) for i, s in opened.items()]
        with model.device.running():
            if alone:
                found.append(torch.cat([model.forward([s]).of(0).cpu().clone() for s in segments]))
                continue
            result = model.forward(segments)
            found.append(torch.cat([result.of(i) for i in range(count)]).cpu().clone())
    for sequence in opened.values():
        model.cache.close(sequence)
    return found


ROOM = {"max_num_batched_tokens": 1100, "max_model_len": 128, "kv_cache_memory_bytes": 256 << 20}


@pytest.mark.parametrize("count", [257, 640, 1024])
def test_passes_of_a_whole_batch_equal_rows_alone(tmp_path, count):
    """Law 5 on a CPU, with more rows than the head takes at once, and a batch of its own size."""
    some = sorted({0, 1, 2, 255, 256, count - 1})
    with base_engine(tmp_path, max_num_seqs=count, **ROOM) as engine:
        batched = step_all(engine.core.model, count, [])
        alone = step_all(engine.core.model, count, some)
        for a, b in zip(batched, alone):
            assert torch.equal(a[some], b)
        assert list(engine.core.model._recorded) == [count, 1]
        assert engine.core.model.buffers.logits.shape[0] == max(count, 256)


def test_engine_serves_more_than_256_sequences(tmp_path):
    """640 sequences in the cache at once give the tokens that 8 at a time give."""
    prompts = [draw(1 + i % 3, i) for i in range(640)]
    widths = list(lengths(640, *WIDTHS))
    found = []
    for most in (640, 8):
        with base_engine(tmp_path / str(most), max_num_seqs=most, **ROOM) as engine:
            asked = prompts if most == 640 else prompts[::16]
            names = widths if most == 640 else widths[::16]
            outputs = engine.generate(
                asked, SamplingParams(max_tokens=3, temperature=0.0), width=names
            )
            found.append([o.token_ids for o in outputs])
    assert found[0][::16] == found[1]


@pytest.mark.slow
def test_passes_of_a_device_take_as_many_rows(tmp_path):
    """Recorded with padding; tables and logits are as large as was asked, no larger."""
    given = {"device": "emulated", "max_num_seqs": 300, **ROOM}
    with installed(emu), base_engine(tmp_path, **given) as engine:
        model = engine.core.model
        batched, alone = step_all(model, 290, []), step_all(model, 290, [0, 1, 288])
        for a, b in zip(batched, alone):
            assert (a[[0, 1, 288]] - b).abs().max() <= 1e-5 * b.abs().max()
        assert list(model._recorded) == [300, 1] and model.buffers.logits.shape[0] == 300
