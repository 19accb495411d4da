"""Everything that can be known of the CUDA kernels on the GPU at hand, in one command.

    python -m bench.gpu.run                      # all parts, under nine minutes; no network is used
    python -m bench.gpu.run --only build,laws,ops  # some parts
    python -m bench.gpu.run --emulate              # a rehearsal on emulated kernels, small sizes
    python -m bench.gpu.run --only build --arch 90a   # compiles for that card where there is none

Parts: build (the native module for this card alone, with the Python that runs this), laws (every
op against its definition), sanitize (compute-sanitizer on small cases), ops (every kernel beside
its peer and the roof), decode, prefill (a whole model of 30B sizes with random weights made on the
device, at three widths, beside transformers'), graphs (graph against eager, switching, mixed
widths). Results are written after every part: bench/results/gpu-<card>.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

from bench.gpu.report import summary, text
from bench.gpu.setting import Setting, about, default_out, missing_gpu, write_json
from bench.gpu.worker import PARTS, supervise, work

TOTAL = 525.0  # seconds for all parts


def limits(parts: list[str], total: float) -> dict[str, float]:
    """Seconds of each part when none leaves any to the next."""
    whole = sum(PARTS[name] for name in parts)
    return {name: total * PARTS[name] / whole for name in parts}


def run(setting: Setting, parts: list[str], total: float, out: Path | None) -> dict[str, Any]:
    """Runs the parts in order; what a part does not use of its time goes to those that follow."""
    start = time.time()
    facts, done = about(setting), {}
    path = out or default_out(facts)
    if path.exists() and set(parts) != set(PARTS):  # a run of some parts keeps the others
        kept = json.loads(path.read_text(encoding="utf-8"))
        same = all(kept.get(k) == facts[k] for k in ("commit", "card", "driver"))
        done = kept["parts"] if same else {}
    for i, name in enumerate(parts):
        rest = limits(parts[i:], total - (time.time() - start))
        print(f"{name}: up to {rest[name]:.0f} s", flush=True)
        done[name] = supervise(name, setting, rest[name])
        print(text(name, done[name]), flush=True)
        write_json(path, {**facts, "parts": done})
        if name == "build" and done[name]["failed"] and set(parts) != {"build"}:
            print("without a build nothing else can run", flush=True)
            break
    figures = {**facts, "parts": done}
    print(summary(figures))
    print(f"{time.time() - start:.0f} s; {path}")
    return figures


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--only", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    made.add_argument("--emulate", action="store_true", help="rehearse on emulated kernels")
    made.add_argument("--quick", action="store_true", help="a few items of every part")
    made.add_argument("--arch", help="compile for this architecture (default: the card's)")
    made.add_argument("--commit", default="", help="of the sources, where git is not at hand")
    made.add_argument("--seconds", type=float, default=TOTAL, help="for all parts together")
    made.add_argument("--out", type=Path, help="default: bench/results/gpu-<card>.json")
    for hidden in ("--worker", "--journal", "--until"):
        made.add_argument(hidden, help=argparse.SUPPRESS)
    return made


def main() -> int:
    """Runs what was asked for. Returns: 0 if nothing failed."""
    given = parser().parse_args()
    setting = Setting(given.emulate, given.arch, given.quick, given.commit)
    if given.worker:
        return work(given.worker, setting, Path(given.journal), float(given.until))
    parts = [p for p in given.only.split(",") if p]
    unknown = [p for p in parts if p not in PARTS]
    if unknown or not parts:
        sys.exit(f"gpu-check: --only must be of {','.join(PARTS)}, got {given.only}")
    if importlib.util.find_spec("torch") is None:
        sys.exit(f"gpu-check: torch must be importable by {sys.executable}, got none")
    reason = "" if setting.emulate or (parts == ["build"] and given.arch) else missing_gpu()
    if reason:
        sys.exit(reason)
    figures = run(setting, parts, given.seconds, given.out)
    done = [figures["parts"][p] for p in parts if p in figures["parts"]]
    broken = any(row.get("broken") for part in done for row in part["rows"].values())
    return int(broken or any(part["failed"] or part["worker"] for part in done))


if __name__ == "__main__":
    sys.exit(main())
