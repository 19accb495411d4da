"""The demo's table: accuracy and cost of every width and plan.

The shipped model is so small that it stays in the processor's cache, where a narrower width saves
little time. What narrowing saves when weights come from memory is told by a second model of 620 M
parameters with the same ratios of width. That one is not measured here: its weights take
longer to make and load than everything else the demo does. Its figures are read from the committed
file of `bench/`, which is named beside them with its machine and date; without that file the column
stays empty. What is not measured is not shown.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

import elastic_infer

from ..files.reading import read_json
from ..showing import size_text
from . import common as c

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..plans.plan import Plan

ALONE = 6  # problems, one at a time, for the speed of a single sequence
BENCH_FILE = "bench/results/decode-620m.json"
Row = dict[str, Any]


def measure_all(engine: Engine, problems: int, screen: Console) -> dict[str, Any]:
    """Measures every line of the table, showing on a terminal the lines that are done.

    Returns:
        {"rows": [one dict per line], and what they were measured with}.
    """
    from ..device.machine import machine, today
    from ..reasoner.evaluate import SEED
    from ..reasoner.task import held_out_problems

    asked = held_out_problems(SEED, problems)
    ways = ways_of(engine)
    figures = {
        "version": elastic_infer.__version__,
        "date": today(),
        "machine": machine(),
        "threads": engine.core.model.pool.threads,
        "kernels": engine.core.model.pool.isa,
        "fingerprint": engine.fingerprint,
        "problems": problems,
        "seed": SEED,
        "widths": list(engine.widths),
        "bench": read_bench(bench_path()),
        "rows": [],
    }
    if not screen.is_terminal:
        for name, how in ways.items():
            figures["rows"].append(measure(engine, name, how, asked, figures["bench"]))
        return figures
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, console=screen)
    task = bar.add_task("measuring", total=len(ways) * problems)
    with Live(console=screen, refresh_per_second=8) as live:
        for name, how in ways.items():
            bar.update(task, description=f"measuring {escape(name)}")
            live.update(_with_bar(table(figures), bar))
            row = measure(engine, name, how, asked, figures["bench"], lambda: bar.advance(task))
            figures["rows"].append(row)
        live.update(table(figures))
    return figures


def _with_bar(above: Table, bar: Progress) -> Table:
    grid = Table.grid()
    grid.add_row(above)
    grid.add_row(bar)
    return grid


def ways_of(engine: Engine) -> dict[str, str | Plan]:
    """The table's lines: {title: a width, or a plan}."""
    from ..reasoner.evaluate import POLICIES, think_answer

    names = list(engine.widths)
    ways: dict[str, str | Plan] = {name: name for name in names}
    for policy in POLICIES if len(names) > 1 else ():
        ways[f"{names[0]}->{names[-1]} {policy}"] = think_answer(names[0], names[-1], policy)
    return ways


def measure(
    engine: Engine,
    name: str,
    how: str | Plan,
    problems: list[Any],
    bench: dict[str, Any] | None,
    done: Any = None,
) -> Row:
    """One line: accuracy with its interval, speed of one sequence and of 64 at once, bytes."""
    from ..reasoner.evaluate import evaluate

    option = {"width": how} if isinstance(how, str) else {"plan": how}
    found = evaluate(engine, problems, **option, done=done)
    total = sum(found.tokens.values())
    return {
        "name": name,
        **found.score.to_dict(),
        "tokens_per_second_1": round(speed_alone(engine, **option), 1),
        "tokens_per_second_64": round(found.tokens_per_second, 1),
        "tokens": found.tokens,
        "rebuilt_tokens_per_problem": round(found.rebuilt_tokens / len(problems), 1),
        "weight_bytes_per_token": round(mean_bytes(engine, found.tokens, how)),
        "ms_620m": mixed(found.tokens, total, bench),
    }


def speed_alone(engine: Engine, **option: Any) -> float:
    """Tokens per second of one sequence from its first token to its last: the median of a few."""
    from ..reasoner.evaluate import MAX_TOKENS, SEED
    from ..reasoner.task import MAX_OPERATIONS, held_out_problems
    from ..sampling.params import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    rates = []
    for problem in held_out_problems(SEED + 2, ALONE, MAX_OPERATIONS):
        output = engine.generate(problem.prompt, params, **option)
        rates.append((output.usage.completion_tokens - 1) / output.times.decode_s)
    return statistics.median(rates)


def mean_bytes(engine: Engine, tokens: dict[str, int], how: str | Plan) -> float:
    """Bytes of weights read per generated token. A plan that can widen by `carry` or `window`
    keeps the state of all heads complete, which narrow tokens pay for."""
    from ..sizing.footprint import bytes_per_token

    model = engine.core.model
    served = model.weights.served
    tracked = None if isinstance(how, str) or how.policy.kind == "exact" else served
    each = {
        name: bytes_per_token(
            engine.config, engine.widths[name], model.weights.dtype, tracked, model.weights.formats
        )
        for name in tokens
    }
    return sum(each[name] * count for name, count in tokens.items()) / sum(tokens.values())


# The 620 M model ---------------------------------------------------------------------------------


def bench_path() -> Path:
    """The figures of the 620 M model in a checkout; a wheel has none."""
    return Path(elastic_infer.__file__).resolve().parent.parent / BENCH_FILE


def read_bench(path: Path) -> dict[str, Any] | None:
    """The 620 M model's milliseconds per token by width, with machine and date; None without the
    file. The file is {"date", "machine", "threads", "rows": [{"width", "ms_per_token"}, …]}."""
    if not path.is_file():
        return None
    data = read_json(path, str(path), dict)
    milliseconds = {row["width"]: row["ms_per_token"] for row in data["rows"]}
    kept = {key: data.get(key) for key in ("date", "machine", "threads")}
    return {"file": BENCH_FILE, **kept, "ms_per_token": milliseconds}


def mixed(tokens: dict[str, int], total: int, bench: dict[str, Any] | None) -> float | None:
    """Milliseconds per token of the 620 M model for this mix of widths; None where one of them
    was not measured."""
    if bench is None or any(name not in bench["ms_per_token"] for name in tokens):
        return None
    return sum(bench["ms_per_token"][name] * count for name, count in tokens.items()) / total


# Showing it --------------------------------------------------------------------------------------


def table(figures: dict[str, Any]) -> Table:
    """The figures as a table."""
    colours = c.colour_of(figures["widths"])
    shown = Table(box=None, pad_edge=False)
    shown.add_column("width or\nplan", no_wrap=True)
    for title in (
        "\nsolved",
        "95 %\ninterval",
        "tokens/s\nalone",
        "tokens/s\n64 at once",
        "weights\nper token",
        "620M\nms/token",
    ):
        shown.add_column(title, justify="right", no_wrap=True)
    for row in figures["rows"]:
        shown.add_row(*cells(row), style=colours.get(row["name"], ""))
    return shown


def cells(row: Row) -> list[str]:
    """One line of the table as texts; a plan's figure for the 620 M model is computed: ~."""
    plan = len(row["tokens"]) > 1 or "->" in row["name"]
    large = "-" if row["ms_620m"] is None else f"{'~' if plan else ''}{row['ms_620m']:.1f}"
    return [
        row["name"],
        f"{row['accuracy']:.1%}",
        f"{100 * row['low']:.1f}–{row['high']:.1%}",
        f"{row['tokens_per_second_1']:.0f}",
        f"{row['tokens_per_second_64']:.0f}",
        size_text(row["weight_bytes_per_token"]),
        large,
    ]


def notes(figures: dict[str, Any]) -> Text:
    """Notes that a reader of the table needs."""
    bench, machine = figures["bench"], figures["machine"]
    again = [r for r in figures["rows"] if r["rebuilt_tokens_per_problem"]]
    lines = [
        f"{figures['problems']} problems that training never saw, greedy; {figures['threads']} "
        f"threads of {machine['processor']}, {figures['kernels']} kernels, load {machine['load']}.",
        f"tokens/s: the median of {ALONE} sequences, one at a time, from first token to last; and "
        "64 at once, prompts included.",
    ]
    if again:
        counts = ", ".join(f"{r['name']} {r['rebuilt_tokens_per_problem']:.0f}" for r in again)
        lines.append(f"Tokens read again per problem at the switch: {counts}; carry reads none.")
    if bench is None:
        lines.append(f"620M: not measured ({BENCH_FILE} is not there; see bench/README.md).")
    else:
        lines.append(
            f"620M: a random model with the same ratios of width, from {bench['file']} "
            f"({bench['machine']['processor']}, {bench['threads']} threads, {bench['date']}), not "
            "measured now; ~ is mixed from it by the plan's tokens, rebuilding left out."
        )
    return Text("\n".join(lines), style="dim")
