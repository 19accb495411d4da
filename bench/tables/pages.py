"""Fills the tables of the documentation and of the model card from committed measurements.

    python -m bench.tables.pages            # writes them
    python -m bench.tables.pages --check    # fails if a page holds other ones

A block of a page between ``<!-- table: NAME -->`` and ``<!-- /table -->`` is made from the file
that `TABLES` names; without that file the block says that it was not measured yet. Tables are never
typed by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.elastify.tables import TABLES as ELASTIFY
from bench.tables.gpu import gpu_table
from bench.tables.markdown import grid

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "bench/results"
CARD = "elastic_infer/models/reasoner"
REASONER = f"{CARD}/evaluation.json"
PAGES = ("docs/measured.md", "docs/gpu.md", "docs/elastify.md", f"{CARD}/README.md")
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- /table -->)", re.S)
Figures = dict[str, Any]


def share(row: Figures) -> str:
    """An accuracy with its interval."""
    return f"{row['accuracy']:.1%} ({100 * row['low']:.1f}–{100 * row['high']:.1f})"


def measured(figures: Figures) -> str:
    """Where and when."""
    machine = figures["machine"]
    return f"{machine['processor']}, load {machine['load']} beforehand, {figures['date']}"


def demo_table(figures: Figures) -> str:
    """The table that `elastic-infer demo` prints."""
    rows = []
    for row in figures["rows"]:
        large = "-" if row["ms_620m"] is None else f"{row['ms_620m']:.1f}"
        if "->" in row["name"] and row["ms_620m"] is not None:
            large = f"~{large}"
        rows.append(
            [
                f"`{row['name']}`",
                share(row),
                f"{row['tokens_per_second_1']:.0f}",
                f"{row['tokens_per_second_64']:.0f}",
                f"{row['weight_bytes_per_token'] / 1e3:.0f} kB",
                f"{row['rebuilt_tokens_per_problem']:.0f}",
                large,
            ]
        )
    head = (
        "width or plan",
        "solved, % (95 % interval)",
        "tokens/s, one sequence",
        "tokens/s, 64 at once",
        "weights read per token",
        "tokens read again",
        "620M: ms per token",
    )
    bench = figures["bench"]
    large = (
        "The last column was not measured yet."
        if bench is None
        else (
            f"Last column: `{bench['file']}`, {bench['machine']['processor']}, {bench['threads']} "
            f"threads, {bench['date']}; "
            "~ is mixed from it by the plan's tokens, rebuilding left out."
        )
    )
    note = (
        f"{figures['problems']} problems that training never saw, greedy decoding, "
        f"{figures['threads']} threads of {measured(figures)}. {large}"
    )
    return f"{grid(head, rows)}\n\n{note}"


def accuracy_table(figures: Figures) -> str:
    """Widths and plans by number of operations."""
    rows = []
    for name, row in {**figures["widths"], **figures["plans"]}.items():
        by = row["by_operations"]
        five = figures["five_operations"].get(name)
        rows.append(
            [
                f"`{name}`",
                share(row),
                *(f"{by[n]['accuracy']:.0%}" for n in "12345"),
                share(five) if five else "-",
            ]
        )
    count = next(iter(figures["widths"].values()))["count"]
    hard = next(iter(figures["five_operations"].values()))["count"]
    head = (
        "width or plan",
        f"all {count} problems, %",
        *(f"{n} op." for n in "12345"),
        f"five operations, n = {hard}, %",
    )
    return f"{grid(head, rows)}\n\n{measured(figures)}."


def budget_table(figures: Figures) -> str:
    """Accuracy by thinking budget."""
    budgets = figures["budgets"]
    columns = list(next(iter(budgets.values())))
    rows = [[f"`{name}`", *(share(row[b]) for b in columns)] for name, row in budgets.items()]
    head = ("thinking tokens allowed", *(b if b == "none" else f"{b}" for b in columns))
    return grid(head, rows)


def decode_table(figures: Figures) -> str:
    """The 620 M model by width, one sequence."""
    wide = max(row["ms_per_token"] for row in figures["rows"])
    rows = [
        [
            f"`{row['width']}`",
            f"{row['ms_per_token']:.2f}",
            f"{1e3 / row['ms_per_token']:.0f}",
            f"{wide / row['ms_per_token']:.2f}x",
        ]
        for row in figures["rows"]
    ]
    note = f"{figures['threads']} threads of {measured(figures)}."
    return f"{grid(('width', 'ms per token', 'tokens/s', 'against the widest'), rows)}\n\n{note}"


def peer_table(figures: Figures) -> str:
    """Us beside llama.cpp on the same weights and threads: medians of interleaved pairs."""
    rows = [
        [case, f"{row['tokens_s']:.0f}", f"{row['peer_tokens_s']:.0f}", f"{row['ratio']:.2f}"]
        for case, row in figures["with_peer"].items()
    ]
    widths = ", ".join(
        f"{row['width']} {row['tokens_s']:.0f} tokens/s, {row['share_of_roof']:.0%}"
        for row in figures["widths"]
    )
    switch = max(row["ratio"] for row in figures["switches"].values())
    batches = ", ".join(f"{row['sequences']}: {row['tokens_s']:.0f}" for row in figures["batches"])
    note = (
        f"{figures['threads']} threads of {measured(figures)}; medians of interleaved pairs.\n\n"
        "In the same run, decode by width as a share of the streaming-read rate measured in turn "
        f"with it: {widths}. A batch of mixed widths took {figures['mixed']['ratio']:.2f} of the "
        "time of the same batch all at the widest; the step after a `carry` switch at most "
        f"{switch:.2f} of a steady one. Tokens/s by sequences at once: {batches}."
    )
    return f"{grid((figures['peer'], 'tokens/s', 'theirs', 'ratio'), rows)}\n\n{note}"


def sizes_table(config: Figures) -> str:
    """The widths of an elastic checkpoint, from its config.json."""
    rows = []
    for name, width in config["elastic"]["widths"].items():
        size = {**config, **width}
        rows.append(
            [
                f"`{name}`",
                *(
                    str(size[key])
                    for key in (
                        "hidden_size",
                        "mamba_num_heads",
                        "num_attention_heads",
                        "n_routed_experts",
                        "moe_intermediate_size",
                        "moe_shared_expert_intermediate_size",
                    )
                ),
            ]
        )
    head = (
        "width",
        "hidden",
        "Mamba heads",
        "query heads",
        "experts",
        "expert width",
        "shared expert width",
    )
    return grid(head, rows)


def training_table(figures: Figures) -> str:
    """Time and tokens spent on the shipped reasoner."""
    head = ("parameters", "training", "steps", "tokens")
    row = (
        f"{figures['parameters']:,}",
        f"{figures['minutes']:.0f} minutes of one CPU core",
        f"{figures['steps']:,}",
        f"{figures['tokens'] / 1e6:.1f} million",
    )
    return grid(head, [row])


def quantized_table(figures: Figures) -> str:
    """Accuracy of each width with quantized weights."""
    widths = list(figures["ways"]["bf16"]["widths"])
    rows = []
    for name, way in figures["ways"].items():
        read = way["widths"][widths[-1]]["weight_bytes_per_token"]
        lines = way.get("error", {}).values()  # of the scales' search; none for bf16
        error = ", ".join(f"{line['relative_error'][widths[-1]]:.1%}" for line in lines)
        rows.append(
            [
                name,
                *(share(way["widths"][w]) for w in widths),
                f"{way['size'] / 1e6:.2f} MB",
                f"{read / 1e3:.0f} kB",
                error or "-",
            ]
        )
    count = figures["ways"]["bf16"]["widths"][widths[0]]["count"]
    head = (
        "weights",
        *(f"`{w}` solves, %" for w in widths),
        "file",
        f"read per token, `{widths[-1]}`",
        "error of the weights",
    )
    told = next((way["distilled"] for way in figures["ways"].values() if "distilled" in way), None)
    where = f"{figures['machine']['processor']}, {figures['date']}"
    note = f"{count} problems, greedy, 95 % intervals; {where}."
    if told is not None:
        before, after = (
            ", ".join(f"{w} {told[key][w]:.4f}" for w in widths)
            for key in ("loss_before", "loss_after")
        )
        note += (
            f" Distillation: {told['steps']} steps, {told['minutes']} minutes; held-out divergence "
            f"from the bf16 model at the same width before: {before}; after: {after}."
        )
    return f"{grid(head, rows)}\n\n{note}"


def activations_table(figures: Figures) -> str:
    """Accuracy of each width with activations of every form."""
    rows = [
        [way, form, *(share(row) for row in widths.values())]
        for way, told in figures["ways"].items()
        for form, widths in told.items()
    ]
    widths = next(iter(next(iter(figures["ways"].values())).values()))
    how = f"{figures['problems']} problems, greedy; nvfp4 activations by torch."
    head = ("weights", "activations", *(f"`{w}` solves, %" for w in widths))
    return f"{grid(head, rows)}\n\n{how} {measured(figures)}."


def ops_table(figures: Figures) -> str:
    """Every op beside torch: {"rows": [{"op", "case", "us", ...}]} of `ops.py`."""
    rows = [
        [
            f"`{row['op']}`",
            row["case"],
            f"{row['us']:.1f}",
            f"{row['gb_s']:.1f}",
            f"{row['gflop_s']:.1f}",
            f"{row['percent_of_roof']:.0f} % of {row['roof']}",
            f"{row['ratio']:.2f}",
        ]
        for row in figures["rows"]
    ]
    roof = figures["roof"]
    note = (
        f"{figures['threads']} threads ({figures['kernels']}) of {measured(figures)}. Roof of the "
        f"same run: reading {roof['read_bytes_s'] / 1e9:.1f} GB/s, products "
        f"{roof['fp32_flops_s'] / 1e9:.0f} GFLOP/s in float32 and "
        f"{roof['bf16_flops_s'] / 1e9:.0f} in bfloat16. Above 100 %: found in a cache."
    )
    head = ("op", "case", "us", "GB/s", "GFLOP/s", "roof", "torch's time / ours")
    return f"{grid(head, rows)}\n\n{note}"


def fullsize_table(figures: Figures) -> str:
    """`bench/cpu/quantized.py full`."""
    rows = [
        [
            row["width"],
            row["kernels"],
            form,
            f"{1e3 * taken['step_seconds']:.1f}",
            f"{row['step_bytes'] / 1e9:.2f}",
            f"{taken['share_of_streaming_reads']:.0%}",
            f"{row['read_bytes_s'] / 1e9:.0f}",
            f"{1 / taken['prefill_seconds_per_token']:.0f}",
            f"{row['peak_bytes'] / 1e9:.1f}",
        ]
        for row in figures["rows"]
        for form, taken in (("bf16", row), ("int8", row["int8"]))
    ]
    head = [
        "shapes",
        "kernels",
        "activations",
        "ms per step",
        "GB per step",
        "of streaming reads",
        "those, GB/s",
        "prefill, tokens/s",
        "peak memory, GB",
    ]
    return f"{grid(head, rows)}\n\n{measured(figures)}, {figures['threads']} threads."


def nvfp4_table(figures: Figures) -> str:
    """`bench/cpu/quantized.py peer`."""
    rows = [
        [kind, case, f"{row['tokens_s']:.0f}", f"{row['peer_tokens_s']:.0f}", f"{row['ratio']:.2f}"]
        for kind, cases in figures["types"].items()
        for case, row in cases.items()
    ]
    head = ["llama.cpp's type", "case", "NVFP4, tokens/s", "llama.cpp, tokens/s", "ratio"]
    return f"{grid(head, rows)}\n\n{measured(figures)}, {figures['threads']} threads."


def drift_table(figures: Figures) -> str:
    """Cost of a smaller cache: heads at the end, logits and choices, problems solved."""
    rows = []
    names = list(dict.fromkeys([*figures["heads"], *figures["reasoner"]]))
    widths = list(next(iter(figures["accuracy"].values())))
    for name in names:
        heads, read = figures["heads"].get(name), figures["reasoner"].get(name)
        solved = figures["accuracy"].get(name)
        rows.append(
            [
                name,
                f"{heads['over_time'][-1]:.1e}" if heads else "-",
                f"{max(heads['by_fade']):.1e}" if heads else "-",
                f"{sorted(read['error'])[len(read['error']) // 2]:.1e}" if read else "-",
                f"{read['agree']:.2%}" if read else "-",
                *(f"{solved[w]['accuracy']:.1%}" if solved else "-" for w in widths),
            ]
        )
    head = [
        "cache",
        "heads' output, rms",
        "worst head",
        "logits",
        "same choice",
        *(f"`{w}` solves" for w in widths),
    ]
    about = (
        f"Relative errors (2-norm) after {figures['tokens']:,} tokens: of the output of Mamba "
        f"heads that forget {figures['fades'][0]:.0%} to {figures['fades'][-1]:.3%} of their state "
        "per token, against float64; of the reasoner's logits at width "
        f"`{figures['width']}` against its float32 cache, median over the tokens, and how often "
        f"the likeliest token is the same. {figures['problems']} problems. {measured(figures)}."
    )
    return f"{grid(head, rows)}\n\n{about}"


TABLES: dict[str, tuple[str, Callable[[Figures], str]]] = {
    "demo": (f"{RESULTS}/demo.json", demo_table),
    "accuracy": (REASONER, accuracy_table),
    "budgets": (REASONER, budget_table),
    "reasoner-sizes": (f"{CARD}/config.json", sizes_table),
    "reasoner-training": (f"{CARD}/training.json", training_table),
    "decode-620m": (f"{RESULTS}/decode-620m.json", decode_table),
    "peer-620m": (f"{RESULTS}/compare-620m.json", peer_table),
    "fullsize": (f"{RESULTS}/fullsize-cpu.json", fullsize_table),
    "fullsize-avx2": (f"{RESULTS}/fullsize-avx2.json", fullsize_table),
    "nvfp4-620m": (f"{RESULTS}/nvfp4-620m.json", nvfp4_table),
    "quantized": (f"{CARD}/quantized.json", quantized_table),
    "activations": (f"{RESULTS}/activations.json", activations_table),
    "ops": (f"{RESULTS}/ops-cpu.json", ops_table),
    "drift": (f"{RESULTS}/drift.json", drift_table),
    **{name: (f"{RESULTS}/elastify/results.json", make) for name, make in ELASTIFY.items()},
}

# Tables of several files, or of files that need not be there.
FREE_TABLES: dict[str, Callable[[Path], str]] = {"gpu": gpu_table}


def unclean(figures: Any) -> set[str]:
    """The commits in a result that were measured with uncommitted changes."""
    if isinstance(figures, dict):
        own = figures.get("commit")
        found = {own} if isinstance(own, str) and own.endswith("-dirty") else set()
        return found.union(*map(unclean, figures.values()))
    if isinstance(figures, list):
        return set().union(*map(unclean, figures))
    return set()


def table(name: str, root: Path = ROOT) -> str:
    """One table, or the statement that there is none yet.

    Raises: ValueError for a block that no measurement belongs to, or a file that lacks a figure or
        was measured in a tree with uncommitted changes.
    """
    if name in FREE_TABLES:
        return FREE_TABLES[name](root)
    if name not in TABLES:
        known = ", ".join([*TABLES, *FREE_TABLES])
        raise ValueError(f"readme: a table must be one of {known}, got {name!r}")
    file, make = TABLES[name]
    path = root / file
    if not path.is_file():
        return f"*Not measured yet: `{file}` does not exist.*"
    figures = json.loads(path.read_text(encoding="utf-8"))
    if dirty := sorted(unclean(figures)):
        raise ValueError(
            f"readme: {file} must come from a clean tree, got commit {', '.join(dirty)}; commit, "
            "then measure again"
        )
    try:
        return make(figures)
    except KeyError as error:
        raise ValueError(f"readme: {file} must hold {error} for the table {name!r}") from error


def fill(text: str, root: Path = ROOT) -> str:
    """A document with every block made anew."""
    return BLOCK.sub(lambda m: f"{m[1]}{table(m[2], root)}\n{m[3]}", text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, do not write")
    check = parser.parse_args().check
    for page in PAGES:
        path = ROOT / page
        old = path.read_text(encoding="utf-8")
        new = fill(old)
        if check and new != old:
            sys.exit(
                f"{page}: tables must be those of the committed measurements; run "
                "`python -m bench.tables.pages`"
            )
        path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
