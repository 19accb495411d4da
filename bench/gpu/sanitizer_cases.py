"""Runs small cases of some ops for compute-sanitizer: python -m bench.gpu.sanitizer_cases OP ...

`planted` instead of an op reads far outside a table on purpose.
"""

from __future__ import annotations

import sys

import torch

from bench.gpu.setting import Setting, native
from elastic_infer.ops import registry
from elastic_infer.ops.testing import laws
from elastic_infer.ops.testing.shapes import SHAPES

AT_MOST = 12  # cases of one op


def planted(device: str) -> None:
    """embed with an id that no table has."""
    spec = registry()["embed"]
    arguments = laws.copy(laws.make(spec, laws.small_cases(spec)[0], torch.float32), device)
    arguments["ids"].fill_(1 << 24)
    spec.call(arguments, None)


def main() -> None:
    """Every case must also give the right result."""
    names = [a for a in sys.argv[1:] if a != "--emulate"]
    setting = Setting(emulate="--emulate" in sys.argv)
    with native(setting):
        for name in names:
            if name == "planted":
                planted(setting.device)
                torch.cuda.synchronize()
                continue
            spec = registry()[name]
            cases = [(c, d) for c in laws.small_cases(spec) for d in spec.dtypes]
            cases += [
                (c, torch.bfloat16) for c in SHAPES.get(name, []) if torch.bfloat16 in spec.dtypes
            ]
            for case, dtype in cases[:AT_MOST]:
                laws.check_reference(spec, laws.make(spec, case, dtype), None, setting.device)


if __name__ == "__main__":
    main()
