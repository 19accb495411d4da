"""Recorded steps on a device: the emulated one, where a graph is the list of its launches."""

import pytest
import torch

from elastic_infer.ops import registry
from elastic_infer.ops.causal_conv import causal_conv
from elastic_infer.ops.gated_norm import gated_norm
from elastic_infer.ops.mamba_step import parts
from elastic_infer.ops.matmul import matmul
from elastic_infer.ops.moe_route import moe_route
from elastic_infer.ops.rms_norm import rms_norm
from elastic_infer.ops.ssm_step import ssm_step
from elastic_infer.ops.testing import laws as _laws
from elastic_infer.ops.tiles import TiledWeight
from support.emulated import ORDERS, built, check_overlap, installed, load

emu = load(built())


@pytest.fixture(autouse=True)
def emulated():
    with installed(emu):
        yield


class Routed:
    """A step of two ops: norm, then routing (which has a workspace), at two widths."""

    def __init__(self, **options):
        g = torch.Generator().manual_seed(3)
        self.x, self.normed = torch.randn(3, 64, generator=g), torch.empty(3, 64)
        self.modes = torch.tensor([0, 0, 1], dtype=torch.int32)
        self.ids, self.weights = torch.empty(3, 2, dtype=torch.int32), torch.empty(3, 2)
        self.hidden = torch.tensor([32, 64], dtype=torch.int32)
        self.experts = torch.tensor([4, 6], dtype=torch.int32)
        self.gate = TiledWeight.pack(torch.randn(6, 64, generator=g))
        self.step = emu.Step(emu.Pool(), **options)
        self.record(self.step)

    def record(self, run):
        rms_norm(
            self.x,
            torch.ones(64),
            self.normed,
            eps=1e-5,
            row_width=self.modes,
            sizes=self.hidden,
            run=run,
        )
        moe_route(
            self.normed,
            self.gate,
            torch.zeros(6),
            self.ids,
            self.weights,
            scaling_factor=2.0,
            row_width=self.modes,
            k_sizes=self.hidden,
            e_sizes=self.experts,
            run=run,
        )

    def eager(self):
        """What the ops give when they run at once; the step's outputs are lost."""
        self.record(None)
        return self.ids.clone(), self.weights.clone()

    def replayed(self):
        self.ids.fill_(-7), self.weights.fill_(float("nan")), self.normed.fill_(float("nan"))
        self.step.run()
        return self.ids.clone(), self.weights.clone()


def test_first_run_and_captured_runs_equal_eager():
    routed = Routed()
    expected = routed.eager()
    for _ in range(3):
        assert all(map(torch.equal, routed.replayed(), expected))
    assert routed.step.captures == 1 and routed.step.names() == ["rms_norm", "moe_route"]


def test_replay_reads_what_its_tensors_hold_now():
    """Other rows at other widths: the same graph, since widths are values in memory."""
    routed = Routed()
    before = routed.replayed()
    routed.x.neg_(), routed.modes.copy_(torch.tensor([0, 1, 1], dtype=torch.int32))
    after = routed.replayed()
    assert not torch.equal(before[1], after[1])
    assert all(map(torch.equal, after, routed.eager()))
    assert routed.step.captures == 1


def test_graph_can_be_left_out():
    routed = Routed(graph=False)
    expected = routed.eager()
    for _ in range(2):
        assert all(map(torch.equal, routed.replayed(), expected))
    assert routed.step.captures == 0


@pytest.mark.parametrize("threads, blocks", ORDERS)
def test_launches_that_overlap_equal_eager(threads, blocks):
    """Of each launch some blocks run up to their wait before the one ahead of it begins."""
    emu.configure(threads=threads, blocks=blocks)
    routed = Routed(dependent_launch=True)
    expected = routed.eager()
    for _ in range(3):
        assert all(map(torch.equal, routed.replayed(), expected))


@pytest.mark.parametrize("name", registry())
def test_every_op_may_follow_a_launch_that_still_runs(name):
    for case in _laws.small_cases(registry()[name]):
        check_overlap(emu, registry()[name], case)


@pytest.mark.parametrize("second", [0, 2])
def test_runs_on_different_streams_come_one_after_another(second):
    """A step whose ops hand on buffers and move on a state: launches of two streams that take turns
    would read each other's."""
    case = {"S": 3, "H": 4, "P": 16, "N": 16, "G": 2, "widths": (2, 4)}
    a = _laws.make(registry()["mamba_step"], case, torch.float32)
    want, found = _laws.copy(a), []
    for given in (a, want):
        step = emu.Step(emu.Pool())
        for op, arguments in zip((causal_conv, ssm_step, gated_norm), parts(given)):
            op(run=step, **arguments)
        found.append(step)
    step, alone = found
    for _ in range(3):
        alone.run()
    step.run()
    try:
        for stream in (1, second):
            emu.use_stream(stream)
            step.run()
    finally:
        emu.use_stream(0)
        emu.finish_streams()
    assert all(_laws.same_bits(a[n], want[n]) for n in ("state", "conv_state", "out"))


def test_profile_runs_every_op_once():
    routed = Routed()
    expected = routed.eager()
    routed.ids.fill_(-7)
    times = routed.step.profile()
    assert [name for name, _ in times] == routed.step.names() and all(t > 0 for _, t in times)
    assert torch.equal(routed.ids, expected[0])


def test_appending_to_a_captured_step_captures_anew():
    routed = Routed()
    routed.replayed()
    product, weight = torch.empty(3, 16), TiledWeight.pack(torch.eye(16, 64))
    matmul(routed.normed, weight, product, run=routed.step)
    for captures in (2, 2):
        product.fill_(float("nan"))
        routed.step.run()
        assert torch.equal(product, routed.normed[:, :16]) and routed.step.captures == captures


def test_step_keeps_its_tensors():
    step, out = emu.Step(emu.Pool()), torch.empty(2, 16)
    rms_norm(torch.full((2, 16), 3.0), torch.ones(16), out, eps=1e-12, run=step)
    for _ in range(2):
        step.run()
        assert torch.allclose(out, torch.ones(2, 16))


def test_pool_of_another_module_is_refused():
    from elastic_infer import _C

    with pytest.raises(TypeError, match="run must be None, a Pool or a Step"):
        rms_norm(torch.ones(2, 16), torch.ones(16), torch.ones(2, 16), eps=1e-5, run=_C.Pool())
