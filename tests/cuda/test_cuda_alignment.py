"""Direct calls of ops with tensors that begin anywhere: a kernel that reads several bytes at once
refuses what is not aligned to them, by name, or gives the bits that it gives for aligned ones.

On a GPU such a read is an error after which the process can use the device no more.
"""

import pytest
import torch

from elastic_infer.codes import dtype_name
from elastic_infer.ops.testing import laws as _laws
from elastic_infer.ops.testing.laws import small_cases
from support.emulated import built, installed, kernels, load

emu = load(built())


def moved(tensor, by):
    """A copy that begins `by` elements beyond an aligned address, its rows as far apart."""
    size = sum(s * (n - 1) for s, n in zip(tensor.stride(), tensor.shape)) + 1
    room = torch.empty(size + 64, dtype=tensor.dtype)
    first = -(room.data_ptr() // tensor.element_size()) % (64 // tensor.element_size()) + by
    view = room.as_strided(tensor.shape, tensor.stride(), first)
    view.copy_(tensor)
    return view


def cases():
    found = []
    for spec in kernels(emu).values():
        some = [c for c in small_cases(spec)[1:] if c.get("activation_quantization") != "int8"]
        for dtype in spec.dtypes:
            for case in {str(sorted(c)): c for c in some}.values():  # one of each kind
                name = f"{spec.name}-{len(found)}-{dtype_name(dtype)}"
                found.append(pytest.param(spec, case, dtype, id=name))
    return found


@pytest.mark.parametrize("spec, case, dtype", cases())
def test_any_tensor_may_begin_anywhere_or_is_refused(spec, case, dtype):
    """Every tensor argument in turn, by one element and by 8 bytes."""
    with installed(emu):
        arguments = _laws.make(spec, case, dtype)
        want = _laws.run(spec, arguments)
        for name, value in arguments.items():
            if not isinstance(value, torch.Tensor) or value.numel() == 0:
                continue
            for by in {1, max(1, 8 // value.element_size())}:
                given = _laws.copy(arguments)
                given[name] = moved(value, by)
                try:
                    spec.call(given, None)
                except ValueError as error:
                    assert str(error).startswith(f"{spec.name}: ") and "multiple" in str(error)
                    continue
                for output in spec.outputs:
                    assert _laws.same_bits(given[output].contiguous(), want[output].contiguous()), (
                        name,
                        output,
                        by,
                    )
