"""The op benchmark: torch computes what we do, and a run writes the figures it promises."""

import json
import sys

import pytest
import torch

from bench.cpu import ops
from elastic_infer.ops import Pool, Step, registry
from elastic_infer.ops.testing.laws import copy

# Every op in the form of its bench cases, small.
CASES = {
    "embed": {"R": 6, "V": 9, "D": 48, "widths": (32, 48)},
    "rms_norm": {"R": 6, "D": 96, "widths": (64, 96), "delta": True},
    "matmul": {"R": 3, "K": 48, "segments": (20, 5), "k": (48,), "n": ((20, 5),), "act": "none"},
    "causal_conv": {"lengths": (5,), "x": 32, "bc": 32, "widths": (32,)},
    "ssm_scan": {"lengths": (150,), "H": 4, "P": 16, "N": 16, "G": 2, "widths": (4,)},
    "ssm_step": {"lengths": (1, 1), "H": 4, "P": 16, "N": 16, "G": 2, "widths": (4,), "step": True},
    "mamba_step": {"S": 3, "H": 4, "P": 16, "N": 16, "G": 2, "widths": (4,)},
    "gated_norm": {"R": 3, "H": 4, "P": 16, "G": 2, "widths": (4,)},
    "kv_append": {"R": 5, "pages": 3, "Hkv": 2, "K": 16, "skip": 0},
    "attention_decode": {"lengths": (70, 70), "Hq": 6, "Hkv": 2, "K": 16, "widths": None},
    "attention_prefill": {
        "tokens": (9,),
        "context": (60,),
        "Hq": 6,
        "Hkv": 2,
        "K": 16,
        "widths": None,
    },
    "moe_route": {"R": 6, "D": 32, "E": 8, "J": 2, "k": (32,), "e": (8,), "ties": False},
    "nvfp4_quantize": {"N": 3, "K": 32, "scale": "own", "kind": "normal"},
    "fp8_quantize": {"N": 3, "K": 32, "scale": "own"},
    "softmax_stats": {"R": 6, "V": 90},
    "moe_matmul": {
        "R": 6,
        "D": 32,
        "E": 4,
        "J": 2,
        "F": 32,
        "k": (32,),
        "f": (32,),
        "shared": True,
    },
}


@pytest.fixture(autouse=True)
def threads_of_torch():
    """The benchmark sets torch's number of threads; it is as before after every test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_op_has_a_peer():
    assert set(ops.PEERS) == set(registry()) == {*CASES, *ops.UNCHECKED}


HALVES = {name: CASES[name] | {"state": "f16"} for name in ("mamba_step", "ssm_scan", "ssm_step")}


@pytest.mark.parametrize(("name", "case"), [*CASES.items(), *HALVES.items()])
def test_peers_compute_the_ops(name, case):
    """`compare`, which the benchmark applies to its own cases, and which notices a wrong peer."""
    spec = registry()[name]
    problem = spec.inputs(case, torch.float32, torch.Generator().manual_seed(1))
    mine, other, step = copy(problem), copy(problem), Step(Pool(1))
    spec.call(mine, step)
    step.run()
    ops.PEERS[name](other)()
    ops.compare(spec, mine, other, problem)
    wrong = other[spec.outputs[-1]]
    wrong += 1
    with pytest.raises(AssertionError, match=name):
        ops.compare(spec, mine, other, problem)


def test_a_quick_run(monkeypatch, capsys, tmp_path):
    """One op through the command line: rows with all figures, which agree with one another."""
    monkeypatch.setattr(
        ops, "roof", lambda *_: {"read_bytes_s": 1e10, "fp32_flops_s": 1e11, "bf16_flops_s": 1e11}
    )
    out = tmp_path / "deep" / "ops.json"
    argv = ["ops.py", "--only", "gated_norm", "--threads", "1", "--quick", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    ops.main()
    assert "gated_norm" in capsys.readouterr().out
    figures = json.loads(out.read_text())
    assert {"date", "commit", "machine", "threads", "kernels", "roof"} < set(figures)
    row = figures["rows"][-1]
    assert row["op"] == "gated_norm" and row["roof"] == "read"
    assert row["gb_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3, rel=0.02)
    assert row["percent_of_roof"] == pytest.approx(row["gb_s"] * 10, rel=0.02)
    with pytest.raises(ValueError, match=r"must be of .*, got nothing"):
        ops.run(["nothing"], 1, "auto", True)
