"""The laws of the ops, for their CUDA kernels on an emulated GPU.

Bits may depend on how many rows share a launch (each count has its own best split), so a slice and
a row alone are held to equal bits where the number of rows is the same, and to law 1 otherwise.
test_batch_invariant.py holds the option under which they may not.
"""

import pytest

from elastic_infer.ops import registry
from elastic_infer.ops.testing import laws as _laws
from support.emulated import (
    built,
    cells as cells_of,
    check_orders,
    check_poisons,
    installed,
    kernels,
    load,
)

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
    for arguments in _laws.one_width(_laws.make(spec, case, dtype)):
        _laws.check_slice(spec, arguments, exact=False)


@pytest.mark.parametrize("spec, case, dtype", cells("row"))
def test_batch(spec, case, dtype):
    """Law 5 within law 1: a row of a mixed batch, and the same row alone, against float64."""
    _laws.check_rows(spec, _laws.make(spec, case, dtype))


@pytest.mark.parametrize("spec, case, dtype", cells())
def test_inputs_unchanged(spec, case, dtype):
    """Law 8: what is not declared as an output keeps its bits."""
    _laws.check_inputs_unchanged(spec, _laws.make(spec, case, dtype))
