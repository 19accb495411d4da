"""No call of a native op and no replay goes outside its tensors, whatever it is given."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import elastic_infer
from elastic_infer.ops import Step, registry
from elastic_infer.ops.kv_append import kv_append
from elastic_infer.ops.matmul import matmul
from elastic_infer.ops.moe_matmul import moe_matmul, moe_workspace_bytes
from elastic_infer.ops.moe_route import moe_route
from elastic_infer.ops.rms_norm import rms_norm
from elastic_infer.ops.testing.laws import make, small_cases
from elastic_infer.ops.tiles import ExpertWeights, Segment, TiledWeight

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "fuzz_ops.py"
I32, U8 = torch.int32, torch.uint8


def fuzzed(tmp_path, *arguments):
    """Output of a process of its own, which must live to its end."""
    log = tmp_path / "call"
    root = Path(elastic_infer.__file__).parent.parent  # the module under test, sanitized or not
    environment = os.environ | {"FUZZ_LOG": str(log), "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    where = log.read_text() if log.exists() else "the start"
    assert done.returncode == 0, f"ended with {done.returncode} at {where}\n{done.stderr[-3000:]}"
    return done.stdout.splitlines()


def test_recorded_tables_are_bounded(tmp_path):
    """Family: every table of indices or sizes of every recorded op, filled with the largest or
    smallest int32 before a replay: an error that names op and table."""
    assert fuzzed(tmp_path, "indices") == ["done"]


def test_wrong_calls_return_or_raise(tmp_path):
    """Family: calls with sizes of 0, 1, many and below 0, other dtypes, strides, offsets, shared
    memory, no memory and wrong indices: TypeError, ValueError or a return, never a signal."""
    assert fuzzed(tmp_path, "mutants", 0, 3000) == ["done"]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_many_wrong_calls_return_or_raise(tmp_path, part):
    """The same family, 80,000 of them."""
    assert fuzzed(tmp_path, "mutants", 10_000 + 20_000 * part, 20_000) == ["done"]


def empty(*shape):
    """uint8 without elements, with the strides of a dense tensor of that shape."""
    strides, dense = [], 1
    for n in reversed(shape):
        strides.append(dense)
        dense *= n
    return torch.empty(64, dtype=U8).as_strided(shape, strides[::-1])


def test_sizes_given_as_numbers_are_at_least_zero():
    """Family: sizes that come as numbers beside packed weights: columns, widths, segments."""
    narrow = TiledWeight(torch.zeros(1, 0, 16384, dtype=U8), -16, (Segment(0, 0, 64),))
    with pytest.raises(ValueError, match="matmul: K must be at least 0, got -16"):
        matmul(torch.ones(4, 1 << 16), narrow, torch.zeros(4, 64))
    with pytest.raises(ValueError, match="moe_route: D must be at least 0, got -16"):
        moe_route(
            torch.ones(2, 1 << 16),
            narrow,
            torch.zeros(4),
            torch.zeros(2, 2, dtype=I32),
            torch.zeros(2, 2),
            scaling_factor=1.0,
        )
    experts = (
        ExpertWeights(empty(2, 1, 0, 16384), 64, -16),
        ExpertWeights(empty(2, 0, 1, 16384), -16, 64),
    )
    with pytest.raises(ValueError, match="moe_matmul: D must be at least 0, got -16"):
        moe_matmul(
            torch.ones(2, 64),
            *experts,
            torch.zeros(2, 1, dtype=I32),
            torch.ones(2, 1),
            torch.zeros(2, 64),
            workspace=torch.zeros(1 << 16, dtype=U8),
        )
    far = TiledWeight(torch.zeros(1, 1, 16384, dtype=U8), 64, (Segment(0, 2**62, 2**62),))
    with pytest.raises(ValueError, match=r"matmul: segment rows must be in \[1, 2147483647\]"):
        matmul(torch.ones(4, 64), far, torch.zeros(4, 64))


def test_sizes_that_divide_are_positive():
    """Family: a size of 0 where checks or kernels divide by it."""
    with pytest.raises(ValueError, match=r"rms_norm: D must be in \[16"):
        rms_norm(torch.zeros(2, 0), torch.zeros(0), torch.zeros(2, 0), eps=1e-5)
    pages = torch.zeros(1, 1, 64, 0)
    with pytest.raises(ValueError, match=r"kv_append: head size K must be in \[1"):
        kv_append(
            torch.zeros(2, 0),
            torch.zeros(2, 0),
            pages,
            pages,
            slot_mapping=torch.zeros(2, dtype=I32),
        )
    spec = registry()["mamba_step"]
    arguments = make(spec, small_cases(spec)[0], torch.float32)
    arguments["state"] = arguments["state"][..., :0]
    with pytest.raises(ValueError, match=r"mamba_step: N must be in \[16, 256\], got 0"):
        spec.call(arguments, None)


@pytest.mark.parametrize("run", [lambda: None, lambda: Step(elastic_infer.ops.Pool(1))])
def test_memory_that_was_given_back_is_refused(run):
    x = torch.ones(1 << 10, 64)
    x.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match=r"memory, got float32\[1024, 64\] on cpu whose storage"):
        rms_norm(x, torch.ones(64), torch.zeros(1 << 10, 64), eps=1e-5, run=run())


def test_images_start_at_words():
    """Family: images of weights, which are bytes to torch, from an odd byte on."""
    room = torch.zeros(16384 + 16, dtype=U8)
    start = -room.data_ptr() % 16
    for shift in (1, 2, 4, 8):
        odd = room[(start + shift) % 16 :][:16384].view(1, 1, 16384)
        weight = TiledWeight(odd, 64, (Segment(0, 0, 64),))
        with pytest.raises(ValueError, match="matmul: w must start at a multiple of 16 bytes"):
            matmul(torch.ones(2, 64), weight, torch.zeros(2, 64))
        with pytest.raises(ValueError, match="moe_route: gate must start at a multiple of 16"):
            moe_route(
                torch.ones(2, 64),
                weight,
                torch.zeros(64),
                torch.zeros(2, 2, dtype=I32),
                torch.zeros(2, 2),
                scaling_factor=1.0,
            )


def test_tensors_without_elements_are_contiguous():
    """Family: what torch makes with a size of 0; its strides count such a size as 1."""
    state = torch.zeros(3, 0, 5)
    assert state.is_contiguous() and state.stride() == (5, 5, 1)
    pages = torch.zeros(0, 2, 64, 16)
    nothing = torch.zeros(0, 32)
    kv_append(nothing, nothing, pages, pages, slot_mapping=torch.zeros(0, dtype=I32))
    for shape in ((3, 0, 64, 16), (0, 3, 64, 16)):
        pages = torch.zeros(shape)
        none = torch.zeros(2, shape[1] * 16)
        kv_append(none, none, pages, pages, slot_mapping=torch.full((2,), -1, dtype=I32))


def test_a_workspace_shares_no_memory():
    """Family: a workspace that holds one of the op's other arguments."""
    R, J, E, D = 8, 2, 4, 64
    weights = [ExpertWeights.pack(torch.randn(E, D, D)) for _ in range(2)]
    room = torch.zeros(moe_workspace_bytes(R, J, E, D, D, torch.float32), dtype=U8)
    given = {
        "x": torch.randn(R, D),
        "ids": torch.zeros(R, J, dtype=I32),
        "weights": torch.ones(R, J),
        "out": torch.zeros(R, D),
        "shared": torch.zeros(R, D),
    }

    def call(**a):
        moe_matmul(
            a["x"], *weights, a["ids"], a["weights"], a["out"], shared=a["shared"], workspace=room
        )

    call(**given)
    for name, value in given.items():
        start = len(room) - value.nbytes - (len(room) - value.nbytes) % 4
        inside = room[start % len(room) :][: value.nbytes].view(value.dtype).view(value.shape)
        with pytest.raises(ValueError, match=f"workspace must not share memory with {name}"):
            call(**given | {name: inside})


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_outputs_that_no_row_wants_are_zero(dtype):
    """Tiles of a matmul that lie beyond every row's width, with an activation and with none."""
    weight = TiledWeight.pack(torch.randn(192, 64).to(dtype))
    for activation in ("none", "relu2"):
        out = torch.full((3, 192), 7.0, dtype=dtype)
        matmul(
            torch.randn(3, 64).to(dtype),
            weight,
            out,
            activation=activation,
            row_width=torch.zeros(3, dtype=I32),
            k_sizes=torch.tensor([64], dtype=I32),
            n_sizes=torch.tensor([[10]], dtype=I32),
        )
        assert (out[:, 10:] == 0).all()
