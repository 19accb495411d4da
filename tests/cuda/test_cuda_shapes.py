"""CUDA kernels at the sizes of real models, and wherever another kernel takes over."""

import pytest
import torch

from elastic_infer.ops import registry
from elastic_infer.ops.causal_conv import causal_conv
from elastic_infer.ops.kv_append import kv_append
from elastic_infer.ops.matmul import matmul
from elastic_infer.ops.ssm_scan import ssm_scan
from elastic_infer.ops.ssm_step import ssm_step
from elastic_infer.ops.testing import laws as _laws
from elastic_infer.ops.testing.shapes import SHAPES
from elastic_infer.ops.tiles import TiledWeight
from support.emulated import built, check_orders, check_poisons, installed, load

emu = load(built())
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def emulated():
    with installed(emu):
        yield


@pytest.mark.parametrize(
    "op, sizes",
    [
        pytest.param(op, sizes, id=f"{op}-{i}")
        for op, shapes in SHAPES.items()
        for i, sizes in enumerate(shapes)
    ],
)
def test_laws(op, sizes):
    """As on a device whose size asks for more blocks than most of these shapes have."""
    emu.device(multiprocessors=132)
    check_orders(emu, registry()[op], sizes, BF16)
    check_poisons(registry()[op], sizes, BF16)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_decode_of_one_split_needs_no_join(dtype):
    """Sequences of one page, and a page table of one column."""
    spec = registry()["attention_decode"]
    sizes = {"lengths": (64, 7, 0), "Hq": 6, "Hkv": 2, "K": 48, "widths": (2, 6)}
    short = spec.inputs(sizes, dtype, torch.Generator().manual_seed(1))
    long = dict(short, out=short["out"].clone())
    short["page_table"] = short["page_table"][:, :1].contiguous()
    spec.call(short, None)
    spec.call(long, None)
    error = (short["out"].float() - long["out"].float()).abs().max()
    assert error <= torch.finfo(dtype).eps * long["out"].abs().max()
    assert not short["out"][2].any() and short["out"][0].any()


@pytest.mark.parametrize("out", [torch.float32, BF16])
@pytest.mark.parametrize("rows", [1, 6, 70])
def test_output_dtype_is_the_callers(rows, out):
    """float32 logits from bfloat16 activations."""
    g = torch.Generator().manual_seed(rows)
    x, w = (torch.randn(n, 96, generator=g).to(BF16) for n in (rows, 100))
    got = matmul(x, TiledWeight.pack(w), torch.full((rows, 100), torch.nan, dtype=out))
    want = x.double() @ w.double().T
    limit = 2e-6 if out == torch.float32 else 2**-8
    assert (got.double() - want).abs().max() <= limit * want.abs().max()


@pytest.mark.parametrize("weights", ["nvfp4", "fp8"])
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_quantized_weights_cost_no_accuracy(rows, weights):
    """Against float64 on the dequantized weights, the rounding of the output is all the error."""
    spec = registry()["matmul"]
    sizes = {
        "R": rows,
        "K": 1120,
        "segments": (80, 16),
        "k": (1120,),
        "n": ((80, 16),),
        "act": "none",
        "weights": weights,
    }
    a = _laws.make(spec, sizes, BF16)
    got = _laws.run(spec, a)["out"].double()
    want = spec.reference(_laws.wide(spec, _laws.copy(a)))["out"].double()
    assert (got - want).norm() <= 4e-3 * want.norm() and want.norm() > 0


@pytest.mark.parametrize("n", [1, 3, 4, 63, 64, 65, 127, 128, 129])
def test_prefill_then_step_agrees_with_prefill(n):
    """Law 6, the sequence part of a Mamba layer."""
    H, P, N, G = 2, 64, 128, 1
    channels = H * P + 2 * G * N
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n + 1, channels, generator=g).to(BF16)
    dt = torch.randn(n + 1, H, generator=g).to(BF16)
    weight, bias = torch.randn(channels, 4, generator=g).mul(0.4).to(BF16), torch.zeros(channels)
    heads = [torch.rand(H, generator=g), *torch.randn(2, H, generator=g)]
    heads[2] -= 2
    slots = torch.tensor([1], dtype=torch.int32)

    def read(pieces):
        conv, state = torch.zeros(2, channels, 3, dtype=BF16), torch.zeros(2, H, P, N)
        outs = []
        for first, last in pieces:
            cu = torch.tensor([0, last - first], dtype=torch.int32)
            mixed = torch.empty(last - first, channels, dtype=BF16)
            causal_conv(
                x[first:last],
                weight,
                bias.to(BF16),
                conv,
                mixed,
                cu_seqlens=cu,
                slots=slots,
                x_channels=H * P,
            )
            y = torch.empty(last - first, H * P, dtype=BF16)
            given = (*mixed.split([H * P, G * N, G * N], 1), dt[first:last], *heads, state, y)
            if last - first == 1 and first:
                ssm_step(*given, slots=slots)
            else:
                ssm_scan(*given, cu_seqlens=cu, slots=slots)
            outs.append(y)
        return torch.cat(outs), conv, state

    y, conv, state = read([(0, n), (n, n + 1)])
    want_y, want_conv, want_state = read([(0, n + 1)])
    assert torch.equal(conv, want_conv)
    assert (y - want_y).abs().max() <= 2**-6 * want_y.abs().max()
    assert (state - want_state).abs().max() <= 2e-6 * want_state.abs().max()
    assert want_state[1].abs().max() > 0.1 and not want_state[0].any()


def test_scan_cut_at_chunks_gives_equal_bits():
    """Where a prompt is cut, at multiples of 64, changes no bit."""
    spec = registry()["ssm_scan"]
    sizes = {"lengths": (192,), "H": 2, "P": 64, "N": 128, "G": 1, "widths": (2,)}
    whole = spec.inputs(sizes, BF16, torch.Generator().manual_seed(1))
    cut = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in whole.items()}
    spec.call(whole, None)
    for first, last in ((0, 64), (64, 192)):
        part = dict(cut, cu_seqlens=torch.tensor([0, last - first], dtype=torch.int32))
        part |= {name: cut[name][first:last] for name in ("x", "B", "C", "dt", "y")}
        spec.call(part, None)
    assert torch.equal(cut["y"], whole["y"]) and torch.equal(cut["state"], whole["state"])


def test_rows_that_are_not_aligned_are_refused_or_copied():
    """A kernel that reads 16 bytes at a time says so; one that copies does it value by value."""
    x = torch.randn(3, 40, dtype=torch.float32)
    w = TiledWeight.pack(torch.randn(16, 32))
    with pytest.raises(ValueError, match=r"^matmul: x must have rows that start at mul"):
        matmul(x[:, 1:33], w, torch.empty(3, 16))
    pages = torch.zeros(1, 1, 64, 18)
    k = torch.randn(2, 19)[:, 1:]
    slots = torch.tensor([5, 7], dtype=torch.int32)
    kv_append(k, k, pages, pages.clone(), slot_mapping=slots)
    assert torch.equal(pages[0, 0, [5, 7]], k)
