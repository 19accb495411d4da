"""Activations as int8 with NVFP4 weights, on the CPU: rows as numpy quantizes them, products
against float64, the laws of every op, what the engine does with them, and who is refused."""

import numpy as np
import pytest
import torch

from elastic_infer import _C, Plan, SamplingParams, demo_model
from elastic_infer.codes import dtype_name
from elastic_infer.errors import InvalidRequest
from elastic_infer.ops import Pool, Step, registry
from elastic_infer.ops._activations import int8
from elastic_infer.ops._spec import case_id
from elastic_infer.ops.matmul import INT8, matmul
from elastic_infer.ops.testing import laws as _laws
from elastic_infer.ops.tiles import TiledWeight
from support.commands import refused, run
from support.emulated import built, installed, load
from support.engines import base_config, base_widths, open_engine
from support.quantized import identity, write_quantized

BF16 = torch.bfloat16
SPECS = registry()
# A row alone, few, those that share expanded tiles, and more than one panel holds.
CASES = {
    "matmul": [
        {"R": 1, "K": 16, "segments": (16,), "k": (16,), "n": ((16,),), "act": "none"},
        {
            "R": 5,
            "K": 176,
            "segments": (80, 8),
            "k": (48, 176),
            "n": ((40, 4), (80, 8)),
            "act": "none",
        },
        {
            "R": 29,
            "K": 208,
            "segments": (130, 40),
            "k": (64, 144, 208),
            "n": ((32, 8), (96, 40), (130, 1)),
            "act": "relu2",
        },
        {"R": 270, "K": 80, "segments": (72,), "k": (32, 80), "n": ((24,), (72,)), "act": "none"},
    ],
    "moe_matmul": [
        {"R": 1, "D": 16, "E": 1, "J": 1, "F": 16, "k": (16,), "f": (16,), "shared": False},
        {"R": 3, "D": 80, "E": 5, "J": 3, "F": 48, "k": (48, 80), "f": (32, 48), "shared": True},
        {
            "R": 19,
            "D": 144,
            "E": 12,
            "J": 4,
            "F": 96,
            "k": (64, 112, 144),
            "f": (96, 16, 80),
            "shared": True,
        },
        {"R": 270, "D": 80, "E": 3, "J": 2, "F": 80, "k": (48, 80), "f": (80, 64), "shared": False},
    ],
}


def cells():
    return [
        pytest.param(SPECS[op], case | INT8, dtype, id=f"{op}-{case_id(case)}-{dtype_name(dtype)}")
        for op, cases in CASES.items()
        for case in cases
        for dtype in (torch.float32, BF16)
    ]


def make(spec, case, dtype):
    """Seeded arguments; x has outliers, so that the steps of its blocks differ."""
    a = _laws.make(spec, case, dtype)
    g = torch.Generator().manual_seed(len(a["x"]))
    a["x"] *= torch.rand(a["x"].shape, generator=g).mul(3).exp().to(dtype)
    return a


def numpy_int8(x):
    """float32 [R, K] to codes and steps, in numpy alone."""
    blocks = x.reshape(len(x), -1, 16)
    amax = np.abs(blocks).max(-1, keepdims=True)
    some = amax >= np.float32(2.0**-100)
    inverse = np.float32(127) / np.where(some, amax, np.float32(1))
    codes = np.where(some, np.rint(blocks * inverse), 0)
    assert np.abs(codes).max(initial=0) <= 127
    return codes.astype(np.float64), np.where(some, amax, 0).astype(np.float64) / 127


# -- rows of x ---------------------------------------------------------------------------------


def edges():
    g = torch.Generator().manual_seed(3)
    normal = torch.randn(9, 96, generator=g)
    zeros, halves = normal.clone(), torch.arange(9 * 96).reshape(9, 96) % 253 - 126.0
    zeros[2], zeros[:, 16:32] = 0.0, -0.0
    halves[:, ::16] = 127.0
    return {
        "normal": normal,
        "heavy tails": normal**5,
        "small": normal * 1e-20,
        "next to nothing": normal * 1e-30,
        "vanishing": normal * 1e-37,
        "large": normal * 1e30,
        "zeros": zeros,
        "halves": halves / 2,
    }


@pytest.mark.parametrize("isa", _C.usable_isas())
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("name", edges())
def test_rows_are_quantized_as_numpy_does(name, dtype, isa):
    """Weights that are the identity give every quantized value back: codes exactly, steps within
    their rounding to float32."""
    x = edges()[name].to(dtype)
    K = x.shape[1]
    weight = TiledWeight.pack_codes(*identity(K), torch.ones(1))
    q, step = numpy_int8(x.float().numpy())
    for rows in (1, 9):
        got = (
            matmul(
                x[:rows],
                weight,
                torch.empty(rows, K),
                activation_quantization="int8",
                run=Pool(1, isa),
            )
            .double()
            .numpy()
            .reshape(rows, -1, 16)
        )
        want = (q * step)[:rows]
        assert np.array_equal(np.rint(got / np.where(step > 0, step, 1)[:rows]), q[:rows])
        assert np.abs(got - want).max() <= 2e-7 * np.abs(want).max()
    assert np.abs(int8(x.double()).numpy() - (q * step).reshape(x.shape)).max() <= (
        2e-7 * np.abs(q * step).max()
    )


@pytest.mark.parametrize("isa", _C.usable_isas())
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_give_nan_and_others_are_as_before(bad, isa):
    spec, pool = SPECS["matmul"], Pool(1, isa)
    a = make(spec, CASES["matmul"][1] | INT8, BF16)
    want = _laws.run(spec, a, pool)["out"]
    a["x"][3, 5] = bad
    got = _laws.run(spec, a, pool)["out"]
    wanted = torch.ones_like(got[3], dtype=torch.bool)
    n = a["n_sizes"][a["row_width"][3]].tolist()
    wanted[n[0] : 80], wanted[80 + n[1] :] = False, False
    assert torch.isnan(got[3][wanted]).all() and not got[3][~wanted].any()
    rest = torch.arange(len(got)) != 3
    assert _laws.same_bits(got[rest], want[rest])


# -- laws --------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", _C.usable_isas())
@pytest.mark.parametrize("spec, case, dtype", cells())
def test_reference(spec, case, dtype, isa):
    """Law 1. Of experts, what rounding does to the middle moves some of its codes by one, so that
    norms are compared: to the bound of a code in a hundred."""
    a = make(spec, case, dtype)
    if spec.name == "matmul":
        _laws.check_reference(spec, a, Pool(2, isa))
        return
    got = _laws.run(spec, a, Pool(2, isa))["out"].double()
    want = spec.reference(_laws.wide(spec, a))["out"]
    limit = 1e-3 if dtype == torch.float32 else 8e-3
    assert want.norm() > 0 and (got - want).norm() <= limit * want.norm()


@pytest.mark.parametrize("isa", _C.usable_isas())
@pytest.mark.parametrize("spec, case, dtype", cells())
def test_poison(spec, case, dtype, isa):
    """Law 2."""
    _laws.check_poison(spec, make(spec, case, dtype), Pool(2, isa))


@pytest.mark.parametrize("spec, case, dtype", cells())
def test_slice_batch_repeat_and_inputs(spec, case, dtype):
    """Laws 3, 5, 7 and 8, to the bit."""
    a = make(spec, case, dtype)
    assert _laws.check_slice(spec, a)
    _laws.check_batch(spec, a)
    _laws.check_repeat(spec, a, Step(Pool(2)))
    _laws.check_inputs_unchanged(spec, a)


@pytest.mark.parametrize("op", CASES)
def test_what_it_costs(op):
    """Of normal values half a percent, of the same op with activations as they are."""
    spec = SPECS[op]
    a = _laws.make(spec, CASES[op][2] | INT8, torch.float32)
    plain = {n: v for n, v in a.items() if n != "activation_quantization"}
    got, want = (_laws.run(spec, given)["out"].double() for given in (a, plain))
    assert 1e-3 * want.norm() < (got - want).norm() < 1.2e-2 * want.norm()


@pytest.mark.parametrize("isa", _C.usable_isas())
def test_instruction_sets_agree(isa):
    """Sums of integers are exact; what is left is the order of a few additions."""
    spec = SPECS["matmul"]
    a = make(spec, CASES["matmul"][2] | INT8, torch.float32)
    got, plain = (_laws.run(spec, a, Pool(1, i))["out"] for i in (isa, "portable"))
    assert (got - plain).abs().max() <= 1e-5 * plain.abs().max()


# -- who is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize(
    "weights, wish, message",
    [
        ({"weights": "fp8"}, "int8", "be none for a FP8 image, got int8"),
        ({}, "int8", "be none for a bfloat16 image, got int8"),
        ({"weights": "nvfp4"}, "int4", "be none, int8 or nvfp4, got int4"),
        (
            {"weights": "nvfp4"},
            "nvfp4",
            "be none or int8 on the CPU: compute capability 12.x needed",
        ),
    ],
)
def test_other_weights_and_forms_are_refused(op, weights, wish, message):
    spec = SPECS[op]
    a = _laws.make(spec, CASES[op][0] | weights, BF16) | {"activation_quantization": wish}
    with pytest.raises(ValueError, match=f"^{op}: activation_quantization must {message}"):
        spec.call(a, None)


# -- the engine --------------------------------------------------------------------------------

TOKENS = [5, 77, 12, 3, 99, 41, 8, 8, 120, 64, 2, 17]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_quantized(path, base_config(), base_widths(), {"": "nvfp4"}, seed=1)
    return path


def test_engine_multiplies_int8(folder):
    """Logits at every width move by a little; rows of all widths in one batch keep the tokens that
    each has alone."""

    def score(**options):
        with open_engine(folder, threads=1, device="cpu", **options) as engine:
            scores = {w: engine.score(TOKENS, width=w).clone() for w in engine.widths}
            params = SamplingParams(temperature=0.8, seed=3, max_tokens=12, ignore_eos=True)
            alone = [engine.generate(TOKENS, params, width=w).token_ids for w in "SML"]
            jobs = [engine.submit(TOKENS, params, Plan.fixed(w)) for w in "SML"]
            assert [job.result().token_ids for job in jobs] == alone
            return scores

    found, plain = score(activation_quantization="int8"), score()
    for width, logits in plain.items():
        error = (found[width] - logits).norm() / logits.norm()
        assert 1e-4 < error < 0.05, f"{width}: {error}"


def test_engine_refuses_plain_weights_and_gpus(folder):
    with pytest.raises(InvalidRequest, match="be none: the checkpoint has no NVFP4 matrix, got"):
        open_engine(demo_model(), device="cpu", activation_quantization="int8")
    emu = load(built())
    with installed(emu), pytest.raises(InvalidRequest, match="int8 is for the CPU, the device is"):
        open_engine(folder, device="emulated", activation_quantization="int8")
    option = ("--activation-quantization", "int8")
    said = refused("generate", demo_model(), "-p", "1+1=", *option)
    assert "activation_quantization must be none: the checkpoint has no NVFP4 matrix" in said
    assert run("generate", folder, "--prompt-ids", "5,17", "--max-tokens", "3", *option).stdout
    a = _laws.make(SPECS["matmul"], CASES["matmul"][0] | INT8, BF16)
    with installed(emu), pytest.raises(ValueError, match="be none or nvfp4 on a GPU, got int8"):
        SPECS["matmul"].call(a, None)
