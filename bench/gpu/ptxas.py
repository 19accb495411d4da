"""The assembler's report on every CUDA kernel: registers, shared memory, spills, by architecture.

    python -m bench.gpu.ptxas [--jobs 2] [--out FILE] [--arch 80 ...] [--op matmul ...]

Needs nvcc and no GPU. Ends with an error if a kernel spills registers or keeps local memory, or if
the compiler warns or makes asynchronous matrix products serial.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import ptxas_report  # noqa: E402

ARCHITECTURES = ("80", "90a", "100f", "120f")
FLAGS = [
    "-std=c++17",
    "-O3",
    "-DNDEBUG",
    "--fmad=false",
    "-Xptxas",
    "-v",
    "-Xcompiler",
    "-Wall",
    "-cubin",
]


def sources() -> list[Path]:
    """All files of CUDA kernels."""
    return sorted((ROOT / "csrc" / "ops").glob("*/*.cu"))


def readable(names: list[str]) -> list[str]:
    """Kernel names without mangling, namespaces and argument lists."""
    if not shutil.which("c++filt"):
        return names
    plain = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout
    return [short(line) for line in plain.splitlines()]


def short(name: str) -> str:
    """A demangled kernel name without return type, namespaces and argument list."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return name.replace("ei::cuda::", "").replace("ei::", "").split("(")[0]


def assemble(nvcc: str, source: Path, arch: str) -> list[dict]:
    """One row per kernel of `source`. Raises RuntimeError with the compiler's words."""
    command = [nvcc, *FLAGS, "-I", str(ROOT / "csrc"), f"-arch=sm_{arch}"]
    command += ["-o", "/dev/null", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    text = done.stdout + done.stderr
    if done.returncode or "warning" in text or ptxas_report.SERIAL.search(text):
        raise RuntimeError(f"{source.name} for sm_{arch}:\n{text}")
    rows = ptxas_report.kernels(text)
    for name, row in zip(readable([r["kernel"] for r in rows]), rows, strict=True):
        row.update(kernel=name, op=source.stem, arch=f"sm_{arch}")
    return rows


def report(architectures=ARCHITECTURES, jobs: int = 2, ops: list[str] | None = None) -> dict:
    """All rows (of some ops only, if given), with the compiler's version."""
    nvcc = shutil.which("nvcc")
    if not nvcc:
        raise RuntimeError("nvcc was not found")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    work = [(s, a) for s in sources() if not ops or s.stem in ops for a in architectures]
    with ThreadPoolExecutor(jobs) as pool:
        rows = [row for part in pool.map(lambda w: assemble(nvcc, *w), work) for row in part]
    release = re.search(r"release .*", version.stdout)[0]
    return {"nvcc": release, "flags": " ".join(FLAGS), "kernels": rows}


def faults(kernels: list[dict]) -> list[str]:
    """Kernels that touch local memory."""
    return ptxas_report.spills([k | {"kernel": f"{k['op']}: {k['kernel']}"} for k in kernels])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "ptxas.json")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--op", action="append", help="only these; other rows of the file stay")
    parser.add_argument("--arch", action="append", help="80, 90a, 100f, 120f; all by default")
    options = parser.parse_args()
    result = report(options.arch or ARCHITECTURES, options.jobs, options.op)
    if options.op and options.out.exists():
        kept = json.loads(options.out.read_text())["kernels"]
        kept = [k for k in kept if k["op"] not in options.op]
        result["kernels"] = sorted(kept + result["kernels"], key=lambda k: (k["op"], k["arch"]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for k in result["kernels"]:
        print(f"{k['arch']:8} {k['registers']:4} registers  {k['op']}: {k['kernel']}")
    for fault in faults(result["kernels"]):
        print("spills:", fault, file=sys.stderr)
    return bool(faults(result["kernels"]))


if __name__ == "__main__":
    sys.exit(main())
