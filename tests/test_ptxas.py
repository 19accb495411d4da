"""No kernel spills registers, on any architecture that is built for."""

import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))
import ptxas  # noqa: E402

RECORD = ROOT / "bench" / "results" / "ptxas.json"


def test_record_covers_every_kernel_file_and_shows_no_spills():
    kernels = json.loads(RECORD.read_text())["kernels"]
    wanted = {(s.stem, f"sm_{a}") for s in ptxas.sources() for a in ptxas.ARCHITECTURES}
    assert {(k["op"], k["arch"]) for k in kernels} == wanted
    assert ptxas.faults(kernels) == []


def test_faults_are_seen():
    row = {"op": "x", "kernel": "f", "arch": "sm_80", "spill_bytes": 0, "stack_bytes": 0}
    assert ptxas.faults([row]) == []
    assert len(ptxas.faults([row | {"spill_bytes": 8}, row | {"stack_bytes": 16}])) == 2


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ptxas.ARCHITECTURES)
def test_kernels_assemble_without_spills(arch):
    kernels = ptxas.report([arch])["kernels"]
    assert len({k["op"] for k in kernels}) == len(ptxas.sources())
    assert ptxas.faults(kernels) == []
