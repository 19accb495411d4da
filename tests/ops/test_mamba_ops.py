"""Law 6 for the Mamba ops, that the step in one op is the three ops, and the refusals of their
index arrays."""

import pytest
import torch

from elastic_infer import _C
from elastic_infer.ops import Pool, registry
from elastic_infer.ops._spec import case_id
from elastic_infer.ops.causal_conv import causal_conv
from elastic_infer.ops.gated_norm import gated_norm
from elastic_infer.ops.mamba_step import mamba_step, parts
from elastic_infer.ops.ssm_scan import ssm_scan
from elastic_infer.ops.ssm_step import ssm_step
from elastic_infer.ops.testing import laws as _laws
from elastic_infer.ops.testing.shapes import SHAPES
from support.emulated import ORDERS, built, installed, load

H, P, N, G = 4, 32, 32, 2
CHANNELS = H * P + 2 * G * N
LENGTHS = (1, 3, 4, 63, 64, 65, 127, 128, 129)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


class Mixer:
    """The sequence part of a Mamba layer: weights, and the state of one sequence in slot 1."""

    def __init__(self, dtype, runner):
        g = torch.Generator().manual_seed(3)
        self.runner, self.dtype = runner, dtype
        self.weight = torch.randn(CHANNELS, 4, generator=g).mul(0.4).to(dtype)
        self.bias = torch.randn(CHANNELS, generator=g).mul(0.1).to(dtype)
        heads = [torch.randn(H, generator=g) for _ in range(3)]
        self.A_log, self.D, self.dt_bias = heads[0].abs(), heads[1], heads[2] - 2
        self.conv = torch.zeros(3, CHANNELS, 3, dtype=dtype)
        self.ssm = torch.zeros(3, H, P, N)

    def widths(self, heads):
        if heads is None:
            return {}, {}
        width = {"seq_width": int32(0)}
        return width | {"x_sizes": int32(heads * P)}, width | {"h_sizes": int32(heads)}

    def read(self, x, dt, step=False, heads=None):
        """Conv and recurrence over all tokens of x, in one call or by the step op."""
        conv_width, ssm_width = self.widths(heads)
        T, cu, slots = len(x), int32(0, len(x)), int32(1)
        mixed = torch.zeros(T, CHANNELS, dtype=self.dtype)
        causal_conv(
            x,
            self.weight,
            self.bias,
            self.conv,
            mixed,
            cu_seqlens=cu,
            slots=slots,
            x_channels=H * P,
            run=self.runner,
            **conv_width,
        )
        y = torch.zeros(T, H * P, dtype=self.dtype)
        given = (*mixed.split([H * P, G * N, G * N], 1), dt, self.A_log, self.D, self.dt_bias)
        if step:
            ssm_step(*given, self.ssm, y, slots=slots, run=self.runner, **ssm_width)
        else:
            ssm_scan(*given, self.ssm, y, cu_seqlens=cu, slots=slots, run=self.runner, **ssm_width)
        return y


def tokens(count, dtype):
    g = torch.Generator().manual_seed(count)
    return torch.randn(count, CHANNELS, generator=g).to(dtype), torch.randn(
        count, H, generator=g
    ).to(dtype)


@pytest.mark.parametrize("isa", _C.usable_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", LENGTHS)
def test_prefill_then_step_equals_prefill(n, dtype, isa):
    """Law 6, bit for bit, outputs and both states."""
    x, dt = tokens(n + 1, dtype)
    whole, cut = Mixer(dtype, Pool(2, isa)), Mixer(dtype, Pool(1, isa))
    want = whole.read(x, dt)
    got = torch.cat([cut.read(x[:n], dt[:n]), cut.read(x[n:], dt[n:], step=True)])
    assert same_bits(got, want)
    assert same_bits(cut.conv, whole.conv) and same_bits(cut.ssm, whole.ssm)
    assert want.float().abs().max() > 0.1 and whole.ssm[1].abs().max() > 0.1
    assert not whole.ssm[0].any() and not whole.conv[2].any()


@pytest.mark.parametrize("pieces", [(1, 1, 1, 1, 1), (2, 3, 60), (64, 64, 2), (7, 1, 90)])
def test_any_cut_gives_equal_bits(pieces):
    x, dt = tokens(sum(pieces), torch.bfloat16)
    whole, cut = Mixer(torch.bfloat16, None), Mixer(torch.bfloat16, None)
    want = whole.read(x, dt)
    got = torch.cat([cut.read(*part) for part in zip(x.split(pieces), dt.split(pieces))])
    assert same_bits(got, want)
    assert same_bits(cut.conv, whole.conv) and same_bits(cut.ssm, whole.ssm)


def test_narrow_step_keeps_state_of_other_heads():
    """A step at two of four heads leaves the others' history and state at their bits."""
    x, dt = tokens(9, torch.float32)
    mixer = Mixer(torch.float32, None)
    mixer.read(x[:8], dt[:8])
    conv, ssm = mixer.conv.clone(), mixer.ssm.clone()
    y = mixer.read(x[8:], dt[8:], step=True, heads=2)
    assert not y[:, 2 * P :].any() and y[:, : 2 * P].any()
    assert same_bits(mixer.ssm[1, 2:], ssm[1, 2:])
    assert not torch.equal(mixer.ssm[1, :2], ssm[1, :2])
    assert same_bits(mixer.conv[1, 2 * P : H * P], conv[1, 2 * P : H * P])
    assert not torch.equal(mixer.conv[1, H * P :], conv[1, H * P :])


FUSED = registry()["mamba_step"]


def one_by_one(a, run):
    """The three ops on `a`: writes what mamba_step writes, but for rows without a slot."""
    convolution, recurrence, norm = parts(a)
    causal_conv(run=run, **convolution)
    ssm_step(run=run, **recurrence)
    gated_norm(run=run, **norm)


def check_three_ops(case, dtype, run):
    a = _laws.make(FUSED, case, dtype)
    want = _laws.copy(a)
    one_by_one(want, run)
    got = _laws.run(FUSED, a, run)
    owned = a["slots"] >= 0
    assert same_bits(got["out"][owned], want["out"][owned]) and not got["out"][~owned].any()
    assert same_bits(got["conv_state"], want["conv_state"])
    assert same_bits(got["state"], want["state"]) and not got["arrivals"].any()
    assert torch.isfinite(got["out"]).all() and not same_bits(got["state"], a["state"])


@pytest.mark.parametrize("dtype", FUSED.dtypes)
@pytest.mark.parametrize("case", _laws.small_cases(FUSED) + SHAPES["mamba_step"], ids=case_id)
def test_step_in_one_op_is_three_ops(case, dtype):
    """Bit for bit, on every instruction set and for the CUDA kernels in every order, with rows of
    several widths, some of which track."""
    for isa in _C.usable_isas():
        check_three_ops(case, dtype, Pool(2, isa))
    with installed(load(built())) as emu:
        for threads, blocks in ORDERS:
            emu.configure(threads=threads, blocks=blocks)
            check_three_ops(case, dtype, emu.Pool())


def test_counters_of_a_step_serve_the_next():
    """Steps one after another over the same counters, as a replayed graph does."""
    case = SHAPES["mamba_step"][0]
    with installed(load(built())) as emu:
        a = _laws.make(FUSED, case, torch.float32)
        want, step = _laws.copy(a), emu.Step(emu.Pool())
        FUSED.call(a, step)
        for _ in range(3):
            step.run(), one_by_one(want, None)
            assert same_bits(a["out"], want["out"]) and same_bits(a["state"], want["state"])
        assert step.captures == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"out_sizes": int32(4, 8)}, "out_sizes must be at most h_sizes, got 8 at width 1"),
        ({"out_sizes": None}, "out_sizes must be given with seq_width"),
        ({"out_sizes": int32(4)}, r"out_sizes must have shape"),
        ({"h_sizes": int32(4, 5)}, "h_sizes must hold sizes .* multiples of 4"),
        ({"slots": int32(0, 9)}, "slots must hold -1 or indices"),
        ({"eps": -1.0}, "eps must be at least 0"),
        ({"arrivals": torch.zeros(2, 3, dtype=torch.int32)}, r"arrivals must have shape"),
        ({"xbc": torch.zeros(2, 8 * 16 + 2 * 4 * 16 + 16)}, r"xbc must have 128 \+ 2 \* groups"),
    ],
)
def test_step_in_one_op_is_checked(change, message):
    case = {"S": 2, "H": 8, "P": 16, "N": 16, "G": 4, "widths": (4, 4), "tracked": (8, 4)}
    a = _laws.make(FUSED, case, torch.float32)
    before = _laws.copy(a)
    with pytest.raises(ValueError, match=f"^mamba_step: {message}"):
        mamba_step(**(a | change))
    assert same_bits(a["state"], before["state"]) and same_bits(a["out"], before["out"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"slots": int32(1, 1)}, "slots must differ between sequences, got 1 twice"),
        ({"slots": int32(3, 0)}, r"slots must hold -1 or indices in \[0, 3\), got 3 at sequence 0"),
        ({"slots": int32(0, -2)}, "slots must hold -1 or indices"),
        ({"cu_seqlens": int32(1, 2, 3)}, "cu_seqlens must start at 0, got 1"),
        ({"cu_seqlens": int32(0, 2, 1)}, "cu_seqlens must rise within"),
        ({"cu_seqlens": int32(0, 2, 4)}, r"cu_seqlens must rise within \[0, 3\]"),
        ({"cu_seqlens": int32(0, 3)}, "cu_seqlens must have shape"),
        ({"seq_width": int32(0, 1)}, "seq_width must hold indices"),
        ({"seq_width": None}, "must be absent without seq_width"),
    ],
)
@pytest.mark.parametrize("op", ["causal_conv", "ssm_scan"])
def test_index_arrays_are_checked(op, change, message):
    indices = {"cu_seqlens": int32(0, 2, 3), "slots": int32(0, 2), "seq_width": int32(0, 0)}
    indices |= change
    mixer, (x, dt) = Mixer(torch.float32, None), tokens(3, torch.float32)
    with pytest.raises(ValueError, match=f"^{op}: .*{message}"):
        if op == "causal_conv":
            causal_conv(
                x,
                mixer.weight,
                mixer.bias,
                mixer.conv,
                torch.empty_like(x),
                x_channels=H * P,
                x_sizes=int32(H * P),
                **indices,
            )
        else:
            ssm_scan(
                *x.split([H * P, G * N, G * N], 1),
                dt,
                mixer.A_log,
                mixer.D,
                mixer.dt_bias,
                mixer.ssm,
                torch.empty(3, H * P),
                h_sizes=int32(H),
                **indices,
            )


@pytest.mark.parametrize(
    "sizes, message", [(3, "multiples of 2"), (6, r"in \[0, 4\]"), (-2, r"in \[0, 4\]")]
)
def test_head_prefixes_are_checked(sizes, message):
    y = torch.randn(1, H * P)
    with pytest.raises(ValueError, match=f"^gated_norm: h_sizes must hold sizes .*{message}"):
        gated_norm(
            y,
            y,
            y[0],
            torch.empty_like(y),
            groups=G,
            head_dim=P,
            row_width=int32(0),
            h_sizes=int32(sizes),
        )


def test_conv_refuses_to_overwrite_its_input():
    mixer, (x, _) = Mixer(torch.float32, None), tokens(3, torch.float32)
    with pytest.raises(ValueError, match=r"^causal_conv: out must not share memory with x"):
        causal_conv(
            x,
            mixer.weight,
            mixer.bias,
            mixer.conv,
            x,
            cu_seqlens=int32(0, 3),
            slots=int32(0),
            x_channels=H * P,
        )
