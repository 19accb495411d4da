"""No kernel spills registers, on any architecture that is built for."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import ptxas

ROOT = Path(__file__).resolve().parents[2]

REPORT = """ptxas info    : Compiling entry function 'f' for 'sm_80'
ptxas info    : Function properties for f
    {stack} bytes stack frame, {spill} bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 64 bytes smem
{more}"""
SERIAL = (
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
    "serialized due to a call\n"
)

BLOCK_SCALED = "mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X"
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


@pytest.mark.parametrize(
    "said, wrong",
    [
        (REPORT.format(stack=0, spill=0, more=""), None),
        (REPORT.format(stack=0, spill=8, more=""), "f for sm_80: 8 bytes of spills, 0 bytes of st"),
        (REPORT.format(stack=16, spill=0, more=""), "f for sm_80: 0 bytes of spills, 16 bytes of"),
        (REPORT.format(stack=0, spill=0, more=SERIAL), "instructions are serialized"),
    ],
    ids=["clean", "spill", "stack", "serial"],
)
def test_build_fails_where_the_assembler_complains(tmp_path, said, wrong):
    """The launcher of nvcc, with a compiler that writes its file and says this."""
    made = tmp_path / "made.o"
    compiler = tmp_path / "compiler.py"
    compiler.write_text(
        "import sys\nopen(sys.argv[2], 'w').close()\n"
        f"sys.stderr.write({said!r} + 'note: kept\\n')\n"
    )
    launcher = ROOT / "tools" / "ptxas_report.py"
    command = [sys.executable, launcher, sys.executable, compiler, "-o", made]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert (done.returncode == 0) == (wrong is None) == made.exists()
    assert "note: kept" in done.stderr and (wrong or "") in done.stderr
    assert "Function properties" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ptxas.ARCHITECTURES)
def test_kernels_assemble_without_spills(arch):
    kernels = ptxas.report([arch])["kernels"]
    assert len({k["op"] for k in kernels}) == len(ptxas.sources())
    assert ptxas.faults(kernels) == []


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
@pytest.mark.parametrize(
    "kernel, arch, instruction, elsewhere",
    [
        ("matmul_w4a4", "120f", BLOCK_SCALED, "90a"),
        ("matmul_w4a4", "120a", BLOCK_SCALED, "100f"),
        ("moe_matmul_w4a4", "120f", BLOCK_SCALED, "90a"),
        ("matmul_wgmma", "90a", "wgmma.mma_async.sync.aligned.m64n256k16", "120f"),
    ],
)
def test_native_kernels_hold_their_instruction(tmp_path, kernel, arch, instruction, elsewhere):
    """Where the architecture has it; elsewhere a trap stands in its place."""
    [source] = (ROOT / "csrc" / "ops").glob(f"*/{kernel}.cu")
    texts = []
    for one in (arch, elsewhere):
        made = tmp_path / f"{one}.ptx"
        command = ["nvcc", "-std=c++17", "-O3", "-DNDEBUG", "-ptx", f"-arch=sm_{one}"]
        command.append(f"-I{ROOT / 'csrc'}")
        subprocess.run([*command, "-o", made, source], check=True)
        texts.append(made.read_text())
    assert instruction in texts[0] and "trap;" not in texts[0]
    assert instruction not in texts[1] and "trap;" in texts[1]
