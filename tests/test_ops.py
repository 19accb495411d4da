"""The laws every registered op holds, applied to all of them alike."""

import re
import zlib

import pytest
import torch

from elastic_infer import _C
from elastic_infer.ops import Pool, Step, registry
from elastic_infer.ops._spec import case_id

SPECS = registry()
SENTINEL = 12345.0


def small_cases(spec):
    return [c for c in spec.cases() if not c.get("bench")]


def cells(*needs):
    """[(spec, case, dtype)] for every op that offers `needs`."""
    found = []
    for spec in SPECS.values():
        if all(getattr(spec, need) is not None for need in needs):
            for case in small_cases(spec):
                for dtype in spec.dtypes:
                    name = f"{spec.name}-{case_id(case)}-{str(dtype)[6:]}"
                    found.append(pytest.param(spec, case, dtype, id=name))
    return found


def make(spec, case, dtype):
    seed = zlib.crc32(f"{spec.name} {case_id(case)}".encode())
    return spec.inputs(case, dtype, torch.Generator().manual_seed(seed))


def copy(arguments):
    """A deep copy that keeps strides."""
    copied = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            fresh = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
            value = fresh.copy_(value)
        copied[name] = value
    return copied


def run(spec, arguments, runner=None):
    given = copy(arguments)
    spec.call(given, runner)
    return {name: given[name] for name in spec.outputs}


def wide(spec, arguments):
    """Arguments in float64, but for those the op defines in float32."""
    return {
        n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for n, v in arguments.items()
    }


def same_bits(a, b):
    return a.shape == b.shape and torch.equal(
        a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)
    )


def assert_close(name, got, exact, plain):
    """Error against float64 at most twice plain torch's, plus one ulp of the largest value."""
    if not got.is_floating_point():
        assert torch.equal(got, exact.to(got.dtype)), name
        return
    known = torch.isfinite(exact)
    assert torch.isfinite(got[known]).all(), f"{name}: not finite"
    exact = exact[known].double()
    if exact.numel() == 0:
        return
    error = (got[known].double() - exact).abs().max().item()
    allowed = 2 * (plain[known].double() - exact).abs().max().item()
    allowed += torch.finfo(got.dtype).eps * exact.abs().max().item() + 1e-30
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("isa", _C.usable_isas())
@pytest.mark.parametrize("spec, case, dtype", cells())
def test_reference(spec, case, dtype, isa):
    """Law 1, on every instruction set this processor has."""
    arguments = make(spec, case, dtype)
    got = run(spec, arguments, Pool(2, isa))
    exact = spec.reference(wide(spec, copy(arguments)))
    plain = spec.reference(copy(arguments))
    for name in spec.outputs:
        assert_close(f"{spec.name}: {name}", got[name], exact[name], plain[name])


@pytest.mark.parametrize("isa", _C.usable_isas())
@pytest.mark.parametrize("spec, case, dtype", cells("poison"))
def test_poison(spec, case, dtype, isa):
    """Law 2: what must not be read is NaN, what must not be written is a sentinel."""
    check_poison(spec, make(spec, case, dtype), Pool(2, isa))


def check_poison(spec, clean, runner):
    """Law 2 for one set of arguments."""
    dirty = copy(clean)
    spec.poison(dirty)
    frames = {}
    for name in spec.outputs:
        value = dirty[name]
        guard = 64
        flat = torch.full((value.numel() + 2 * guard,), 77, dtype=value.dtype)
        if value.is_floating_point():
            flat.fill_(SENTINEL)
        inner = flat[guard : guard + value.numel()].view(value.shape)
        inner.copy_(value)
        dirty[name], frames[name] = inner, (flat, guard)
    spec.call(dirty, runner)
    want = run(spec, clean, runner)
    exact = spec.reference(wide(spec, copy(clean)))
    for name, (flat, guard) in frames.items():
        edges = torch.cat([flat[:guard], flat[-guard:]])
        sentinel = SENTINEL if edges.is_floating_point() else 77
        assert (edges == edges.new_tensor(sentinel)).all(), f"{name}: written outside"
        got = dirty[name]
        if got.is_floating_point():
            defined = torch.isfinite(exact[name]) & torch.isfinite(want[name])
            untouched = ~torch.isfinite(got)
            # Poison may stay where it was put, never reach a value that is defined and written.
            changed = ~torch.isclose(got, want[name], rtol=0, atol=0, equal_nan=True) & defined
            original = clean[name]
            kept = untouched & torch.isclose(want[name], original, rtol=0, atol=0, equal_nan=True)
            assert not (changed & ~kept).any(), f"{spec.name}: poison reached {name}"
        else:
            assert torch.equal(got, want[name]), name


@pytest.mark.parametrize("spec, case, dtype", cells("sliced"))
def test_slice(spec, case, dtype):
    """Law 3: a prefix of the full weights equals a contiguous copy of that prefix, bit for bit."""
    arguments = make(spec, case, dtype)
    got = run(spec, arguments)
    pairs = list(spec.sliced(copy(arguments)))
    assert pairs
    for cut, indices in pairs:
        alone = run(spec, cut)
        for name, (here, there) in indices.items():
            assert same_bits(got[name][here], alone[name][there]), f"{spec.name}: {name}"


@pytest.mark.parametrize("spec, case, dtype", cells("row"))
def test_batch(spec, case, dtype):
    """Law 5: a row in a batch of mixed widths equals the same row alone, bit for bit."""
    arguments = make(spec, case, dtype)
    got = run(spec, arguments)
    count = spec.rows(arguments)
    for r in {0, 1, 5, 6, 7, count // 2, count - 2, count - 1}:
        if not 0 <= r < count:
            continue
        one, indices = spec.row(copy(arguments), r)
        alone = run(spec, one)
        for name, (here, there) in indices.items():
            assert same_bits(got[name][here], alone[name][there]), f"{spec.name}: {name} row {r}"


@pytest.mark.parametrize("spec, case, dtype", cells())
def test_repeat(spec, case, dtype):
    """Law 7: equal bits on any number of threads, on every run, and when replayed from a step."""
    arguments = make(spec, case, dtype)
    want = run(spec, arguments)
    for threads in (1, 2, 3):
        got = run(spec, arguments, Pool(threads))
        assert all(same_bits(got[n], want[n]) for n in spec.outputs), f"{threads} threads"
    recorded, step = copy(arguments), Step(Pool(2))
    spec.call(recorded, step)
    assert len(step) == 1
    assert all(same_bits(recorded[n], arguments[n]) for n in spec.outputs), "recording ran the op"
    step.run()
    assert all(same_bits(recorded[n], want[n]) for n in spec.outputs), "replay"


@pytest.mark.parametrize("spec, case, dtype", cells())
def test_inputs_unchanged(spec, case, dtype):
    """Law 8: what is not declared as an output keeps its bits."""
    arguments = make(spec, case, dtype)
    given = copy(arguments)
    spec.call(given, None)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and name not in spec.outputs:
            assert same_bits(given[name], value), name


def broken(value):
    """A tensor argument made wrong, one way at a time."""
    yield "rank", value[None]
    yield "rank", value.flatten()[0]
    yield "dtype", value.to(torch.float16 if value.is_floating_point() else torch.int16)
    yield "type", value.tolist()
    for d in range(value.ndim):
        yield f"size {d}", torch.cat([value, value.narrow(d, 0, 1)], d)
    if value.shape[-1] > 1:
        yield "stride", value.repeat_interleave(2, -1)[..., ::2]


@pytest.mark.parametrize("spec", [pytest.param(s, id=s.name) for s in SPECS.values()])
def test_refusal(spec):
    """Law 8: every tensor argument of wrong rank, dtype, size or stride is refused, naming the op;
    the only changes accepted are ones that are another valid problem."""
    case = small_cases(spec)[-1]
    arguments = make(spec, case, torch.float32)
    refused = 0
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        for what, wrong in broken(value):
            given = {**copy(arguments), name: wrong}
            untouched = copy(given)
            try:
                spec.call(given, None)
            except (ValueError, TypeError) as error:
                refused += 1
                if isinstance(error, ValueError):
                    grammar = rf"({spec.name}|matmul_pack): \w.* must .+, got .+"
                    assert re.match(grammar, str(error)), str(error)
                continue
            # A change that makes another valid problem: then the op solves that one.
            assert what.startswith("size"), f"{spec.name}: accepted {name} with {what}"
            exact, plain = spec.reference(wide(spec, untouched)), spec.reference(copy(untouched))
            for output in spec.outputs:
                assert_close(f"{spec.name}: {output}", given[output], exact[output], plain[output])
    assert refused >= 4


def test_runner_is_checked():
    with pytest.raises(TypeError, match="run must be"):
        SPECS["rms_norm"].call(make(SPECS["rms_norm"], small_cases(SPECS["rms_norm"])[0],
                                    torch.float32), "fast")  # fmt: skip
    with pytest.raises(ValueError, match="isa must be"):
        Pool(1, "sse9")
    with pytest.raises(ValueError, match="threads must be"):
        Pool(0)
