"""The laws every registered op holds, applied to all of them alike."""

import re

import pytest
import torch

from elastic_infer import _C
from elastic_infer.codes import dtype_name
from elastic_infer.ops import Pool, Step, registry
from elastic_infer.ops._spec import case_id
from elastic_infer.ops.testing import laws as _laws
from elastic_infer.ops.testing.laws import assert_close, copy, make, small_cases, wide

SPECS = registry()


def cells(*needs):
    """[(spec, case, dtype)] for every op that offers `needs`."""
    found = []
    for spec in SPECS.values():
        if all(getattr(spec, need) is not None for need in needs):
            for case in small_cases(spec):
                for dtype in spec.dtypes:
                    name = f"{spec.name}-{case_id(case)}-{dtype_name(dtype)}"
                    found.append(pytest.param(spec, case, dtype, id=name))
    return found


@pytest.mark.parametrize("isa", _C.usable_isas())
@pytest.mark.parametrize("spec, case, dtype", cells())
def test_reference(spec, case, dtype, isa):
    """Law 1, on every instruction set this processor has."""
    _laws.check_reference(spec, make(spec, case, dtype), Pool(2, isa))


@pytest.mark.parametrize("isa", _C.usable_isas())
@pytest.mark.parametrize("spec, case, dtype", cells("poison"))
def test_poison(spec, case, dtype, isa):
    """Law 2: what must not be read is NaN, what must not be written is a sentinel."""
    _laws.check_poison(spec, make(spec, case, dtype), Pool(2, isa))


@pytest.mark.parametrize("spec, case, dtype", cells("sliced"))
def test_slice(spec, case, dtype):
    """Law 3: a prefix of the full weights equals a contiguous copy of that prefix, bit for bit."""
    assert _laws.check_slice(spec, make(spec, case, dtype))


@pytest.mark.parametrize("spec, case, dtype", cells("row"))
def test_batch(spec, case, dtype):
    """Law 5: a row in a batch of mixed widths equals the same row alone, bit for bit."""
    _laws.check_batch(spec, make(spec, case, dtype))


@pytest.mark.parametrize("spec, case, dtype", cells())
def test_repeat(spec, case, dtype):
    """Law 7: equal bits on any number of threads, on every run, and when replayed from a step."""
    arguments = make(spec, case, dtype)
    want = _laws.run(spec, arguments)
    for threads in (1, 2, 3):
        got = _laws.run(spec, arguments, Pool(threads))
        assert all(_laws.same_bits(got[n], want[n]) for n in spec.outputs), f"{threads} threads"
    _laws.check_repeat(spec, arguments, Step(Pool(2)))


@pytest.mark.parametrize("spec, case, dtype", cells())
def test_inputs_unchanged(spec, case, dtype):
    """Law 8: what is not declared as an output keeps its bits."""
    _laws.check_inputs_unchanged(spec, make(spec, case, dtype))


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


def last_cases():
    """The last small case of every op, and of each kind of weights that it takes."""
    for spec in SPECS.values():
        for kind, case in {c.get("weights"): c for c in small_cases(spec)}.items():
            yield pytest.param(spec, case, id=f"{spec.name} {kind}" if kind else spec.name)


@pytest.mark.parametrize("spec, case", list(last_cases()))
def test_refusal(spec, case):
    """Law 8: every tensor argument of wrong rank, dtype, size or stride is refused, naming the op;
    the only changes accepted are ones that are another valid problem."""
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
        SPECS["rms_norm"].call(
            make(SPECS["rms_norm"], small_cases(SPECS["rms_norm"])[0], torch.float32), "fast"
        )
    with pytest.raises(ValueError, match="isa must be"):
        Pool(1, "sse9")
    with pytest.raises(ValueError, match="threads must be"):
        Pool(0)
