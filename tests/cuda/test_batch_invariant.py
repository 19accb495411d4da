"""`batch_invariant` on a device (the emulated one): no bit of a row depends on what shares its
launch, of any op and of the whole engine; without the option some do, so these tests can fail."""

from itertools import chain, cycle, islice

import pytest
import torch

from elastic_infer import Plan, SamplingParams
from elastic_infer.codes import dtype_name
from elastic_infer.ops import registry
from elastic_infer.ops.testing import laws as _laws
from elastic_infer.ops.testing.laws import LawBroken, small_cases
from support import w4a4
from support.emulated import built, installed, load
from support.engines import base_engine, draw

emu = load(built())
BF16 = torch.bfloat16
ROWS = (1, 3, 5, 17, 70)
PRODUCT = {
    "K": 416,
    "segments": (144, 72),
    "k": (160, 416, 256),
    "n": ((40, 8), (144, 72), (130, 72)),
    "act": "none",
}
EXPERTS = {"E": 6, "J": 3, "D": 288, "F": 160, "k": (160, 288), "f": (160, 96), "shared": False}
FORMATS = ({}, {"weights": "nvfp4"}, {"weights": "fp8"})
# Small cases of an op by number, or a case of our own; the last small one where nothing is said.
CASES = {
    "attention_decode": (1, 2, 4),
    "attention_prefill": (1, 2),
    "causal_conv": (1, 2),
    "embed": (2,),
    "fp8_quantize": (1,),
    "gated_norm": (1, 2),
    "kv_append": (3,),
    "mamba_step": (1, 2),
    "matmul": (2, 3, *(PRODUCT | f for f in FORMATS)),
    "moe_matmul": (2, *(EXPERTS | f for f in FORMATS)),
    "moe_route": (2, 3),
    "nvfp4_quantize": (1,),
    "rms_norm": (1,),
    "sample": (2,),
    "ssm_scan": (1, 3),
    "ssm_step": (1, 2),
}
# Lengths of the first sequences: those that attention splits are among them.
LENGTHS = {
    "attention_decode": (1100, 300, 0, 65, 7, 513, 64, 130),
    "attention_prefill": (5, 0, 70, 1, 9),
    "causal_conv": (2, 1, 7, 0, 3, 70),
    "ssm_scan": (3, 1, 0, 70, 2),
}


@pytest.fixture(autouse=True)
def emulated():
    with installed(emu):
        yield


def batch_of(op: str, case: int | dict, n: int) -> dict:
    """A case of an op with `n` rows or sequences."""
    case = small_cases(registry()[op])[case] if isinstance(case, int) else case
    if case.get("step"):
        return case | {"lengths": (1,) * n, "padded": 0}
    if op == "mamba_step":
        return case | {"S": n, "padded": 0}
    lengths = tuple(islice(chain(LENGTHS.get(op, ()), cycle((1, 7))), n))
    if op == "attention_prefill":
        return case | {"tokens": lengths, "context": tuple(i * 41 % 200 for i in range(n))}
    if op in LENGTHS:
        return case | {"lengths": lengths} | ({"padded": n // 2} if "padded" in case else {})
    return case | {"N" if op.endswith("quantize") else "R": n}


def mirror(weights: dict, prefix: str, dim: int, negate: bool = False) -> None:
    """The second half of a weight's rows (dim -2) or columns (-1) becomes the first, or less it."""
    bits = (
        0x80 if weights.get(f"{prefix}block_scales") is None else 0x88
    )  # the signs of a byte of codes
    for name in ("weight", prefix.rstrip("_"), f"{prefix}codes", f"{prefix}block_scales"):
        if not isinstance(weights.get(name), torch.Tensor):
            continue
        first, second = weights[name].chunk(2, dim)
        second.copy_(first)
        if negate and name.endswith("codes"):
            second.bitwise_xor_(bits)
        elif negate and not name.endswith("scales"):
            second.neg_()


def cancel(op: str, a: dict, of_down: bool = False) -> dict:
    """The same arguments, but sums over all columns come out as rounding errors alone (with the
    experts' widths: either those of up or those of down): an order of summation shows as it is."""
    first, second = a["x"].chunk(2, 1)
    second.copy_(first)
    if op == "matmul":
        mirror(a, "", -1, negate=True)
    elif of_down:
        mirror(a, "up_", -2)
        mirror(a, "down_", -1, negate=True)
    else:
        mirror(a, "up_", -1, negate=True)
    return a


def arguments_of(op: str, case: int | dict, n: int, dtype: torch.dtype, of_down=False) -> dict:
    arguments = _laws.make(registry()[op], batch_of(op, case, n), dtype)
    return cancel(op, arguments, of_down) if isinstance(case, dict) else arguments


def check(op: str, arguments: dict, **pool):
    """Law 5, bit for bit."""
    _laws.check_batch(registry()[op], arguments, emu.Pool(**pool))


def cells():
    for op, spec in registry().items():
        for i, case in enumerate(CASES.get(op, (-1,)) if spec.row else ()):
            for dtype in spec.dtypes:
                if op == "moe_matmul" and "weights" in batch_of(op, case, 1) and dtype != BF16:
                    continue  # the kernels of float32 take one row at a time
                yield pytest.param(op, case, dtype, id=f"{op}-{i}-{dtype_name(dtype)}")


@pytest.mark.parametrize("op, case, dtype", list(cells()))
def test_a_row_alone_has_the_bits_of_the_row_in_a_batch(op, case, dtype):
    for n in ROWS if dtype == BF16 else (3, 17):  # float32 has one kernel
        check(op, arguments_of(op, case, n, dtype, of_down=n == 17), batch_invariant=True)


@pytest.mark.parametrize(
    "op, case, n, of_down",
    [
        *(("matmul", PRODUCT | f, n, False) for f in FORMATS for n in (17, 70)),
        *(("moe_matmul", EXPERTS | f, 17, of_down) for f in FORMATS for of_down in (False, True)),
        ("attention_decode", 1, 70, False),
    ],
)
def test_without_the_option_bits_depend_on_the_batch(op, case, n, of_down):
    """Products of both directions, splits of the keys."""
    with pytest.raises(LawBroken, match="alone has other bits"):
        check(op, arguments_of(op, case, n, BF16, of_down))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(
    "op, case, of_down",
    [
        ("matmul", PRODUCT, False),
        ("moe_matmul", EXPERTS, False),
        ("moe_matmul", EXPERTS, True),
    ],
)
def test_nvfp4_activations(op, case, of_down, dtype):
    """Every row has scales of its own, and products leave K whole."""
    emu.device(compute_capability=120)
    for n in ROWS:
        arguments = w4a4.make(batch_of(op, case, n), dtype)
        # Blocks of sizes so far apart that sums of codes, short numbers, are not exact.
        place = torch.arange(arguments["x"].shape[1])
        arguments["x"] *= torch.exp2(place // 16 * 5 % 16 - 8).to(dtype)
        cancel(op, arguments, of_down)
        spec = w4a4.spec_of(arguments)
        _laws.check_batch(spec, arguments, emu.Pool(batch_invariant=True))
    with pytest.raises(LawBroken, match="alone has other bits"):
        _laws.check_batch(spec, arguments, emu.Pool())


def test_a_step_takes_the_option_from_its_pool():
    """Recorded in a step, 6 rows have the bits of the op at once, or other ones."""
    spec = registry()["matmul"]
    arguments = arguments_of("matmul", PRODUCT, 6, BF16)
    want = _laws.run(spec, arguments, emu.Pool(batch_invariant=True))["out"]
    for invariant in (True, False):
        step, given = emu.Step(emu.Pool(batch_invariant=invariant)), _laws.copy(arguments)
        spec.call(given, step)
        step.run(), step.run()
        assert torch.equal(given["out"], want) == invariant


# The engine ---------------------------------------------------------------------------------------

PROMPTS = [draw(n, seed=n) for n in (12, 70, 1, 33, 130, 5)]
PLANS = [
    Plan.fixed("S"),
    Plan.fixed("L"),
    Plan.fixed("M"),
    Plan.schedule([(0, "S"), (2, "L")]),
    Plan.fixed("M"),
    Plan.schedule([(0, "M"), (1, "S")], policy="exact"),
]


def traced(engine, chosen) -> list[tuple[list[int], torch.Tensor]]:
    """Tokens and all logits of the chosen prompts, generated together."""
    rows: list[list[torch.Tensor]] = [[] for _ in chosen]

    def recorder(i):
        return lambda token_ids, row, phase: rows[i].append(row.clone())

    params = [
        SamplingParams(
            temperature=0.0, max_tokens=4, ignore_eos=True, logits_processors=[recorder(i)]
        )
        for i in range(len(chosen))
    ]
    outputs = engine.generate([PROMPTS[c] for c in chosen], params, plan=[PLANS[c] for c in chosen])
    return [(o.token_ids, torch.stack(r)) for o, r in zip(outputs, rows, strict=True)]


def differing(folder, dtype, **limits) -> list[int]:
    """The prompts whose tokens or logits, alone, differ from those in a batch of all."""
    with (
        installed(emu),
        base_engine(
            folder,
            dtype=dtype,
            device="emulated",
            mixing="always",
            max_num_batched_tokens=128,
            **limits,
        ) as engine,
    ):
        together = traced(engine, range(len(PROMPTS)))
        found = []
        for i, (tokens, logits) in enumerate(together):
            ((alone, wanted),) = traced(engine, [i])
            assert logits.shape == wanted.shape and wanted.isfinite().all()
            if tokens != alone or not torch.equal(logits, wanted):
                found.append(i)
        return found


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_engine_gives_a_sequence_the_logits_that_it_has_alone(tmp_path, dtype):
    """Prompts that are cut differently, three widths, switches: tokens and logits, bit for bit."""
    assert differing(tmp_path, dtype, batch_invariant=True) == []


def test_engine_without_the_option_promises_less(tmp_path):
    assert differing(tmp_path, BF16) != []
