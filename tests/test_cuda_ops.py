"""The laws of the ops, for their CUDA kernels on an emulated GPU.

Bits may depend on how many rows share a launch (each count has its own best split), so a slice and
a row alone are held to equal bits where the number of rows is the same, and to law 1 otherwise.
"""

import pytest
import torch
from emulated import built, check_orders, check_poisons, installed, kernels, load, one_width
from emulated import cells as cells_of
from test_ops import assert_close, copy, make, run, same_bits, wide

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
    """Law 2, with rows of all widths and with all rows at each one width."""
    check_poisons(spec, case, dtype)


@pytest.mark.parametrize("spec, case, dtype", cells("sliced"))
def test_slice(spec, case, dtype):
    """Law 3, bit for bit where the copy has as many rows, otherwise within rounding."""
    for arguments in one_width(spec, case, dtype):
        got = run(spec, arguments)
        for cut, indices in spec.sliced(copy(arguments)):
            alone = run(spec, cut)
            for name, (here, there) in indices.items():
                a, b = got[name][here], alone[name][there]
                if spec.rows(cut) == spec.rows(arguments):
                    assert same_bits(a, b), f"{spec.name}: {name}"
                elif a.numel():
                    limit = 4 * torch.finfo(a.dtype).eps * b.abs().max()
                    assert (a - b).abs().max() <= limit, f"{spec.name}: {name}"


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
