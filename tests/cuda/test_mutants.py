"""The laws notice when a kernel is broken: every mutant below is compiled and must be caught.

A mutant is one textual change to a source file; it is run in a process of its own, because some
write where they must not.
"""

from pathlib import Path
from shutil import copytree

import pytest

from support.emulated import ROOT, built, run_alone, variant
from support.mutants import MUTANTS

CHECK = """
import sys
import torch
torch.use_deterministic_algorithms(True)  # new tensors are NaN, so what is left unwritten shows
from pathlib import Path
from support.emulated import check_orders, check_overlap, check_poisons, installed, load
from elastic_infer.ops.testing.laws import small_cases
from elastic_infer.ops.testing.shapes import SHAPES
from elastic_infer.ops import registry

if sys.argv[2].endswith("w4a4"):
    from support import w4a4
    with installed(load(Path(sys.argv[1]))) as emu:
        w4a4.check_all(emu, w4a4.EXPERTS if sys.argv[2].startswith("moe") else w4a4.CASES)
    sys.exit()
if sys.argv[2] == "matmul_wgmma":
    from elastic_infer.ops.testing.shapes import NATIVE
    spec = registry()["matmul"]
    with installed(load(Path(sys.argv[1]))) as emu:
        emu.device(compute_capability=90)
        for case in NATIVE["wgmma"].cases:
            check_orders(emu, spec, case, torch.bfloat16)
            check_poisons(spec, case, torch.bfloat16)
    sys.exit()
spec = registry()[sys.argv[2]]
with installed(load(Path(sys.argv[1]))) as emu:
    emu.device(multiprocessors=132)  # so that sequences are cut into segments
    for case in small_cases(spec):
        check_overlap(emu, spec, case)
        for dtype in reversed(spec.dtypes):
            check_orders(emu, spec, case, dtype)
            if spec.poison:
                check_poisons(spec, case, dtype)
    for sizes in SHAPES.get(spec.name, []):
        check_orders(emu, spec, sizes, torch.bfloat16)
        check_poisons(spec, sizes, torch.bfloat16)
"""


def compile_mutant(folder: Path, file: str, old: str, new: str, op: str) -> Path:
    """A `_emu` module in which `old` in `file` reads `new`, for the kernels of `op`."""
    copytree(ROOT / "csrc", folder / "csrc")
    text = (folder / file).read_text()
    assert text.count(old) == 1, f"{file} must hold the text of the mutant once: {old}"
    (folder / file).write_text(text.replace(old, new))
    [source] = (folder / "csrc" / "ops").glob(f"*/{op}.cu")
    return variant(folder, source)


def check(module: Path, op: str):
    """Runs the laws of `op` on `module`."""
    return run_alone(CHECK, str(module), op)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, tmp_path):
    op, file, old, new = MUTANTS[name]
    done = check(compile_mutant(tmp_path, file, old, new, op), op)
    signs = ("LawBroken", "AssertionError", "RuntimeError: emulated kernel")
    crashed = done.returncode < 0
    assert crashed or (done.returncode == 1 and any(s in done.stderr for s in signs)), (
        f"{name}: not noticed\n{done.stderr[-2000:]}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("op", sorted({m[0] for m in MUTANTS.values()}))
def test_unchanged_kernels_pass_the_same_check(op):
    done = check(built(), op)
    assert done.returncode == 0, done.stderr[-2000:]
