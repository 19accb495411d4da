"""GPUs in the documentation: figures of every committed run, kernels that never ran on one.

Sources: `bench/results/gpu-*.json` (bench.gpu.run), `bench/results/ptxas.json` (bench.gpu.ptxas).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.tables.markdown import grid

RESULTS = "bench/results"
Figures = dict[str, Any]


def results(root: Path) -> dict[str, Figures]:
    """{file name: figures} of the runs on GPUs.

    Raises: ValueError for the file of a rehearsal, which measured nothing.
    """
    found = {}
    for path in sorted((root / RESULTS).glob("gpu-*.json")):
        figures = json.loads(path.read_text(encoding="utf-8"))
        if figures["emulated"]:
            raise ValueError(f"readme: {path.name} must come from a GPU, got a rehearsal")
        found[path.name] = figures
    return found


def all_kernels(root: Path) -> dict[str, list[str]]:
    """{op: its CUDA kernels, every instantiation by name}."""
    path = root / RESULTS / "ptxas.json"
    kernels: dict[str, set[str]] = {}
    for row in json.loads(path.read_text(encoding="utf-8"))["kernels"]:
        kernels.setdefault(row["op"], set()).add(row["kernel"])
    return {op: sorted(names) for op, names in sorted(kernels.items())}


def kernels_that_ran(runs: dict[str, Figures]) -> dict[str, set[str]]:
    """{op: kernels that were seen to run on some GPU while the op's laws held}."""
    ran: dict[str, set[str]] = {}
    for figures in runs.values():
        laws = figures["parts"].get("laws", {"rows": {}})
        for op, row in laws["rows"].items():
            if not row["broken"]:
                ran.setdefault(op, set()).update(row["kernels"])
    return ran


def never_ran(root: Path, runs: dict[str, Figures]) -> tuple[dict[str, list[str]], int]:
    """({op: kernels that no GPU has run}, how many kernels there are)."""
    known, ran = all_kernels(root), kernels_that_ran(runs)
    left = {op: [k for k in names if k not in ran.get(op, ())] for op, names in known.items()}
    return {op: names for op, names in left.items() if names}, sum(map(len, known.values()))


def _op_row(name: str, row: Figures) -> list[str]:
    peer = f"{row['ratio']:.2f} {row['peer'].split(',')[0].rstrip('.')}" if "ratio" in row else "-"
    return [
        f"`{name}`",
        f"{row['us']:.1f}",
        f"{row['gb_s']:.0f}",
        f"{row['tflop_s']:.1f}",
        f"{row['percent_of_roof']:.0f} % of {row['roof']}",
        peer,
    ]


def _model_row(name: str, row: Figures) -> list[str]:
    return [
        f"`{name}`",
        f"{row['ms']:.3f}",
        f"{row['tokens_s']:.0f}" if "tokens_s" in row else "-",
        f"{row['percent_of_roof']:.0f} %" if "percent_of_roof" in row else "-",
        f"{row['ratio']:.2f}" if "ratio" in row else "-",
    ]


def _laws(laws: Figures | None) -> str:
    if laws is None:
        return "The laws of the ops were not run."
    broken = [op for op, row in laws["rows"].items() if row["broken"]]
    count = sum(row["checks"] for row in laws["rows"].values())
    wrong = sorted({*broken, *laws["failed"]})
    end = f"; broken by {', '.join(f'`{op}`' for op in wrong)}" if wrong else ", none broken"
    left = f"; not reached: {', '.join(laws['left_out'])}" if laws["left_out"] else ""
    return f"Laws of the ops: {count} checks of {len(laws['rows'])} ops{end}{left}."


def one_run(name: str, figures: Figures) -> str:
    """One card's figures."""
    parts = figures["parts"]
    about = (
        f"**{figures['card']}**, driver {figures['driver']}, {figures['date']}, commit "
        f"`{figures['commit']}` (`{RESULTS}/{name}`). {_laws(parts.get('laws'))}"
    )
    blocks = [about]
    ops = parts.get("ops", {"rows": {}})["rows"]
    if "roof" in ops:
        roof = ops["roof"]
        blocks[0] += (
            f" Roof of the same run: copy {roof['copy_bytes_s'] / 1e9:.0f} GB/s, reading "
            f"{roof['read_bytes_s'] / 1e9:.0f} GB/s, bf16 products "
            f"{roof['bf16_flops_s'] / 1e12:.0f} TFLOP/s."
        )
    rows = [_op_row(item, row) for item, row in ops.items() if item != "roof"]
    if rows:
        head = ["op, rows, width", "us", "GB/s", "TFLOP/s", "roof", "peer's time / ours"]
        blocks.append(grid(head, rows))
    model = [
        _model_row(f"{part}: {item}", row)
        for part in ("decode", "prefill", "graphs")
        for item, row in parts.get(part, {"rows": {}})["rows"].items()
        if "ms" in row
    ]
    if model:
        head = ["whole model", "ms", "tokens/s", "of the floor", "peer's or other's time / ours"]
        blocks.append(grid(head, model))
    return "\n\n".join(blocks)


def named(left: list[str], known: list[str]) -> str:
    """Kernels in words: a template of which no instantiation ran stands once, with their number;
    of any other every one that is left stands by name."""
    families: dict[str, list[str]] = {}
    for kernel in left:
        families.setdefault(kernel.split("<")[0], []).append(kernel)
    words = []
    for family, kernels in families.items():
        whole = [k for k in known if k.split("<")[0] == family]
        if len(kernels) == len(whole) > 1:
            words.append(f"`{family}` x {len(whole)}")
        else:
            words += [f"`{kernel}`" for kernel in kernels]
    return ", ".join(words)


def gpu_table(root: Path) -> str:
    """Every run, then every kernel that has not run on a GPU."""
    runs = results(root)
    left, count = never_ran(root, runs)
    blocks = [one_run(name, figures) for name, figures in runs.items()]
    if not runs:
        blocks.append("*Nothing has been measured on a GPU yet.*")
    missing = sum(map(len, left.values()))
    if missing:
        blocks.append(
            f"**{missing} of {count} CUDA kernels have not run on a GPU**; they were compiled for "
            "four architectures and tested on an emulated one. Numbers count the instantiations of "
            f"a template, which `{RESULTS}/ptxas.json` names:"
        )
        known = all_kernels(root)
        rows = [[f"`{op}`", named(names, known[op])] for op, names in left.items()]
        blocks.append(grid(["op", "kernels that have not run on a GPU"], rows, "---"))
    return "\n\n".join(blocks)
