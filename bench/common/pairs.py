"""Two functions timed in turn, on the same inputs."""

from __future__ import annotations

import torch

from elastic_infer.ops import OpSpec
from elastic_infer.ops._spec import Arguments

UNCHECKED = ("sample",)  # its peer draws from other random numbers


def compare(spec: OpSpec, ours: Arguments, theirs: Arguments, exact: Arguments) -> None:
    """That the peer computes the same op: its distance from ours, norm-wise.

    Raises: AssertionError naming the output that differs.
    """
    for name in spec.outputs:
        a, b = ours[name].double(), theirs[name].double()
        if ours[name].is_floating_point():
            known = torch.isfinite(a) & torch.isfinite(exact[name].double() + b)
            far = ((a - b)[known].norm() / a[known].norm().clamp(min=1e-30)).item()
            assert far < 0.03, f"{spec.name}: {name} of the peer differs by {far:.3g}"
        else:
            same = (a == b).double().mean().item()
            assert same > 0.97, f"{spec.name}: only {same:.1%} of the peer's {name} are equal"
