"""The laws of the ops, for their CUDA kernels on an emulated GPU.

Bits may depend on how many rows share a launch (each count has its own best split), so a slice and
a row alone are held to equal bits where the number of rows is the same, and to law 1 otherwise.
"""

import pytest
import torch
from emulated import built, check_orders, installed, kernels, load
from emulated import cells as cells_of
from test_ops import assert_close, check_poison, copy, make, run, same_bits, wide

from elastic_infer.ops import registry

emu = load(built())


def cells(*needs):
    return cells_of(emu, *needs)


@pytest.fixture(autouse=True)
def emulated():
    with installed(emu):
        yield


def test_every_op_has_kernels():
    assert set(kernels(emu)) == set(registry())


@pytest.mark.parametrize("spec, case, dtype", cells())
def test_reference(spec, case, dtype):
    """Law 1; and equal bits in three orders of threads and blocks (law 7)."""
    check_orders(emu, spec, case, dtype)


@pytest.mark.parametrize("spec, case, dtype", cells("poison"))
def test_poison(spec, case, dtype):
    """Law 2."""
    check_poison(spec, make(spec, case, dtype), None)


def one_width(spec, case, dtype):
    """The case's arguments with all rows at one width, for each width."""
    base = make(spec, case, dtype)
    picker = "row_width" if "row_width" in base else "seq_width"
    if base.get(picker) is None:
        return [base]
    found = []
    for w in range(max(base[picker].tolist()) + 1):
        arguments = copy(base)
        arguments[picker].fill_(w)
        found.append(arguments)
    return found


@pytest.mark.parametrize("spec, case, dtype", cells("sliced"))
def test_slice(spec, case, dtype):
    """Law 3: with all rows at one width, a prefix equals the contiguous copy of it, bit for bit."""
    for arguments in one_width(spec, case, dtype):
        got = run(spec, arguments)
        for cut, indices in spec.sliced(copy(arguments)):
            alone = run(spec, cut)
            for name, (here, there) in indices.items():
                a, b = got[name][here], alone[name][there]
                if len(next(iter(cut.values()))) == len(next(iter(arguments.values()))):
                    assert same_bits(a, b), f"{spec.name}: {name}"


@pytest.mark.parametrize("spec, case, dtype", cells("row"))
def test_batch(spec, case, dtype):
    """Law 5 within law 1: a row of a mixed batch, and the same row alone, against float64."""
    arguments = make(spec, case, dtype)
    count = spec.rows(arguments)
    for r in sorted({0, count // 2, count - 1}):
        one, _ = spec.row(copy(arguments), r)
        exact = spec.reference(wide(spec, copy(one)))
        plain = spec.reference(copy(one))
        alone = run(spec, one)
        for name in spec.outputs:
            assert_close(f"{spec.name}: {name} row {r}", alone[name], exact[name], plain[name])


@pytest.mark.parametrize("spec, case, dtype", cells())
def test_inputs_unchanged(spec, case, dtype):
    """Law 8: what is not declared as an output keeps its bits."""
    arguments = make(spec, case, dtype)
    given = copy(arguments)
    spec.call(given, None)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and name not in spec.outputs:
            assert same_bits(given[name], value), name
