"""The laws of the ops on the device, op by op, with the kernels that each op really ran."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from bench.gpu.ptxas import readable, short
from bench.gpu.worker import PartBase
from elastic_infer.codes import dtype_name
from elastic_infer.ops import OpSpec, registry
from elastic_infer.ops.testing import laws
from elastic_infer.ops.testing.shapes import NATIVE, SHAPES

Check = tuple[str, Callable[[], Any]]


class Part(PartBase):
    """One item per op; a broken law is in the row, a crash fails the item."""

    def __init__(self, setting, module):
        super().__init__(setting, module)
        self.specs = {name: spec for name, spec in registry().items() if laws.small_cases(spec)}

    def items(self) -> list[str]:
        return list(self.specs)[:2] if self.setting.quick else list(self.specs)

    def run(self, item: str) -> dict[str, Any]:
        spec, broken, count = self.specs[item], [], 0
        with kernels_of(not self.setting.emulate) as ran:
            for name, check in checks(spec, self.module, self.setting.device, self.setting.quick):
                count += 1
                try:
                    check()
                except laws.LawBroken as error:
                    broken.append(f"{name}: {error}"[:300])
        return {"checks": count, "broken": broken, "kernels": sorted(ran)}


def checks(spec: OpSpec, module, device: str, quick: bool) -> list[Check]:
    """(what, function that raises LawBroken) for every law, case and dtype."""
    found: list[Check] = []
    small = laws.small_cases(spec)[: 1 if quick else None]
    large = [] if quick else SHAPES.get(spec.name, [])
    for dtype in spec.dtypes:
        for i, case in enumerate([*small, *(large if dtype == torch.bfloat16 else [])]):
            found += _of_case(spec, case, dtype, module, device, f"{i} {dtype_name(dtype)}")
    for name, native in NATIVE.items():
        if native.op == spec.name and not native.lacks(module, device):
            for i, case in enumerate(native.cases):
                found += _of_case(spec, case, native.dtype, module, device, f"{name} {i}")
    return found


def _of_case(spec: OpSpec, case, dtype, module, device: str, label: str) -> list[Check]:
    arguments = laws.make(spec, case, dtype)
    found: list[Check] = [
        (f"reference {label}", lambda: laws.check_reference(spec, arguments, None, device)),
        (f"inputs {label}", lambda: laws.check_inputs_unchanged(spec, arguments, None, device)),
        (
            f"repeat {label}",
            lambda: laws.check_repeat(spec, arguments, module.Step(module.Pool()), None, device),
        ),
    ]
    alikes = laws.one_width(arguments)
    for given in (arguments, *alikes) if spec.poison else ():
        found.append((f"poison {label}", partial(laws.check_poison, spec, given, None, device)))
    for given in alikes if spec.sliced else ():
        check = partial(laws.check_slice, spec, given, None, device, exact=False)
        found.append((f"slice {label}", check))
    if spec.row:
        found.append((f"rows {label}", lambda: laws.check_rows(spec, arguments, None, device)))
        one_order = module.Pool(batch_invariant=True)
        found.append(
            (f"batch {label}", lambda: laws.check_batch(spec, arguments, one_order, device))
        )
    return found


@contextmanager
def kernels_of(cuda: bool):
    """The set of the library's own kernels that run inside, by their short names; empty where the
    profiler does not work."""
    ran: set[str] = set()
    if not cuda:
        yield ran
        return
    from torch.profiler import ProfilerActivity, profile

    try:
        profiler: Any = profile(activities=[ProfilerActivity.CUDA])
        profiler.__enter__()
    except RuntimeError:
        profiler = nullcontext()
    yield ran
    torch.cuda.synchronize()
    profiler.__exit__(None, None, None)
    events = profiler.events() if hasattr(profiler, "events") else []
    names = {e.name for e in events if "ei::" in e.name or "2ei" in e.name}
    ran.update(own_names(sorted(names)))


def own_names(names: list[str]) -> set[str]:
    """Short names, as in bench/results/ptxas.json, of kernels as a profiler names them."""
    plain = [n for n in names if "ei::cuda::" in n]
    mangled = [n for n in names if n.startswith("_Z")]
    return {short(n) for n in plain} | set(readable(mangled) if mangled else ())
