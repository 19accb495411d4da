"""The CUDA assembler's report (`nvcc -Xptxas -v`): registers, shared memory, spills.

As a compiler launcher it runs the compiler that follows, and fails where a kernel spills registers,
keeps local memory, or has its asynchronous matrix products made serial:

    python tools/ptxas_report.py nvcc -Xptxas -v ...
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

# Function properties follow the name of their kernel; shared memory is absent where it is zero.
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
SERIAL = re.compile(r"^.*wgmma\S* instructions are serialized.*$", re.MULTILINE)
# Lines that only report, with the indented ones that belong to them.
REPORT = re.compile(r"^ptxas info .*$\n?|^ +\d+ bytes stack frame.*$\n?", re.MULTILINE)


def kernels(text: str) -> list[dict]:
    """One row per kernel and architecture in the assembler's output; names are mangled."""
    rows = []
    for m in KERNEL.finditer(text):
        shared = re.search(r"(\d+) bytes smem", m["rest"])
        rows.append(
            {
                "kernel": m["name"],
                "arch": m["arch"],
                "registers": int(m["registers"]),
                "static_shared_bytes": int(shared[1]) if shared else 0,
                "stack_bytes": int(m["stack"]),
                "spill_bytes": int(m["stores"]) + int(m["loads"]),
            }
        )
    return rows


def spills(rows: list[dict]) -> list[str]:
    """Kernels that touch local memory, one line each. rows: as of `kernels`."""
    return [
        f"{k['kernel']} for {k['arch']}: {k['spill_bytes']} bytes of spills, "
        f"{k['stack_bytes']} bytes of stack"
        for k in rows
        if k["spill_bytes"] or k["stack_bytes"]
    ]


def faults(text: str) -> list[str]:
    """Faults in the assembler's output that a release must not have, one line each."""
    return spills(kernels(text)) + SERIAL.findall(text)


def main(command: list[str]) -> int:
    done = subprocess.run(command, capture_output=True, text=True)
    sys.stdout.write(done.stdout)
    sys.stderr.write(REPORT.sub("", done.stderr))
    wrong = faults(done.stdout + done.stderr)
    for line in wrong:
        sys.stderr.write(f"error: {line}\n")
    if wrong and "-o" in command:
        Path(command[command.index("-o") + 1]).unlink(missing_ok=True)
    return done.returncode or bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
