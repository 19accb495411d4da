"""`elastic-infer elastify`, and the answer of `widths MODEL --budget` and `--memory`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..errors import InvalidRequest, shown
from . import common as c

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint

HELP = (
    "Make a trained nemotron_h checkpoint elastic: rank all components on calibration data, sort "
    "the weights so that every smaller model is a prefix, learn which sizes each budget gets, and "
    "distil all widths at once from the frozen parent. A run that was stopped continues when the "
    "same command is given again. Several GPUs: "
    "torchrun --nproc-per-node 8 -m elastic_infer.cli elastify and the same arguments."
)
EXAMPLES = c.examples(
    "elastic-infer elastify PARENT --data texts --budgets 1.0,0.7,0.4 --steps 2000 --out DIR",
    "elastic-infer elastify PARENT --data data.jsonl --budgets 1.0,0.7,0.4 --steps 2000,500 "
    "--sequence-length 8192,49152 --probabilities 0.5,0.3,0.2 --out DIR",
    "elastic-infer elastify PARENT --data texts --budgets 1.0,0.5 --cost memory --bits 4.5 "
    "--context 32768 --steps 1000 --out DIR",
)

# Options of `widths`.
Budget = Annotated[
    str | None, typer.Option(help="Parameters of a new width: 18B, or a share such as 60%.")
]
Memory = Annotated[
    str | None, typer.Option(help="Memory of a new width: 16GB or 16GiB, cache included.")
]
Active = Annotated[bool, typer.Option("--active", help="The budget counts active parameters.")]
Bits = Annotated[
    float | None,
    typer.Option(help="Bits per weight, for --memory; default: 16, or those of quantized weights."),
]
Context = Annotated[int, typer.Option(help="Tokens of KV cache, for --memory.")]
Name = Annotated[str, typer.Option(help="Name of the new width; default: its cost.")]
Write = Annotated[bool, typer.Option("--write/--dry-run", help="Add it to the table, or not.")]


def add_to(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("elastify", help=HELP, epilog=EXAMPLES)(make_elastic)


def numbers(option: str, text: str, kind: Callable[[str], Any] = float) -> tuple[Any, ...]:
    """Numbers with commas between them.

    Raises:
        InvalidRequest: anything else.
    """
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise InvalidRequest(
            f"{option}: must be {what} with commas between them, got {shown(text)}"
        ) from None


def stages(steps: str, lengths: str, batches: str, odds: str | None) -> tuple[Any, ...]:
    """The stages of --steps, --sequence-length and --batch-size: one value, or one per stage.

    The probabilities are those of the last stage; earlier ones draw all budgets equally often.
    """
    from ..elastify.settings import Stage

    counts = numbers("--steps", steps, int)
    columns = []
    for option, text in (("--sequence-length", lengths), ("--batch-size", batches)):
        values = numbers(option, text, int)
        values = values * len(counts) if len(values) == 1 else values
        if len(values) != len(counts):
            raise InvalidRequest(
                f"{option}: must be one number, or one for each of {len(counts)} stages of "
                f"--steps, got {len(values)}"
            )
        columns.append(values)
    last = None if odds is None else numbers("--probabilities", odds)
    return tuple(
        Stage(count, length, batch, last if i == len(counts) - 1 else None)
        for i, (count, length, batch) in enumerate(zip(counts, *columns))
    )


@contextlib.contextmanager
def run_progress() -> Iterator[Callable[..., None]]:
    """A bar per stage with the newest losses, on stderr, on a terminal only."""
    screen = c.errors()
    if not screen.is_terminal:
        yield lambda *_: None
        return
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    )
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=screen) as progress:

        def told(stage: str, done: int, total: int, line: Any) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total, losses="")
            losses = line.get("loss", {})
            text = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
            progress.update(tasks[stage], completed=done, losses=escape(text))

        yield told


def make_elastic(
    parent: Annotated[str, typer.Argument(help="The trained checkpoint: folder, or owner/name.")],
    data: Annotated[Path, typer.Option(help="Folder or file: .txt, .md, .jsonl, .json lines.")],
    out: Annotated[Path, typer.Option(help="New folder, or that of a stopped run.")],
    steps: Annotated[str, typer.Option(help="Updates; with commas: one number per stage.")],
    budgets: Annotated[str, typer.Option(help="Shares of the full cost.")] = "1.0,0.7,0.4",
    names: Annotated[str | None, typer.Option(help="Names of the widths, largest first.")] = None,
    cost: Annotated[str, typer.Option(help="The limited cost: total, active or memory.")] = "total",
    bits: Annotated[float, typer.Option(help="Bits per weight, for memory.")] = 16.0,
    context: Annotated[int, typer.Option(help="Tokens of KV cache, for memory.")] = 131072,
    choices: Annotated[
        Path | None, typer.Option(help="JSON file {axis: \\[allowed sizes]}; default: six an axis.")
    ] = None,
    per_layer: Annotated[bool, typer.Option(help="Every layer gets sizes of its own.")] = False,
    sequence_length: Annotated[str, typer.Option(help="Tokens; or one per stage.")] = "1024",
    batch_size: Annotated[str, typer.Option(help="Sequences of a micro-step.")] = "8",
    accumulate: Annotated[int, typer.Option(help="Micro-steps per update.")] = 1,
    probabilities: Annotated[
        str | None, typer.Option(help="Of the budgets in the last stage; default: equal.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, or muon on one process.")] = "adamw",
    lr: Annotated[float, typer.Option(help="AdamW's learning rate of the weights.")] = 1e-4,
    muon_lr: Annotated[float, typer.Option(help="Muon's learning rate.")] = 0.02,
    router_lr: Annotated[float, typer.Option(help="Learning rate of the router.")] = 1e-2,
    router_steps: Annotated[
        int | None, typer.Option(help="Updates after which sizes stay fixed; default: never.")
    ] = None,
    switch_probability: Annotated[
        float, typer.Option(help="Share of micro-steps that go on from another width's cache.")
    ] = 0.0,
    warmup: Annotated[int, typer.Option(help="Updates of rising learning rate.")] = 60,
    calibration: Annotated[int, typer.Option(help="Sequences that importance reads.")] = 1024,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    save_every: Annotated[int, typer.Option(help="Updates between checkpoints.")] = 100,
    threads: c.Threads = None,
    verbose: c.Verbose = False,
) -> None:
    """Checks the options, then runs every stage that is not done yet."""
    c.log_to_stderr(verbose)
    import torch

    from ..elastify.costs import Cost
    from ..elastify.distributed import Group
    from ..elastify.pipeline import elastify
    from ..elastify.settings import Settings
    from ..files.reading import read_json

    if threads is not None:
        if threads < 1:
            raise InvalidRequest(f"--threads: must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    settings = Settings(
        stages=stages(steps, sequence_length, batch_size, probabilities),
        budgets=numbers("--budgets", budgets),
        names=None if names is None else tuple(names.split(",")),
        cost=Cost(cost, bits, context),
        choices=None if choices is None else read_json(choices),
        per_layer=per_layer,
        accumulate=accumulate,
        optimizer=optimizer,
        lr=lr,
        muon_lr=muon_lr,
        router_lr=router_lr,
        router_steps=router_steps,
        switch_probability=switch_probability,
        warmup=warmup,
        precision=precision,
        seed=seed,
        save_every=save_every,
    )
    group = Group.current(device)
    with run_progress() as told:
        folder = elastify(
            parent, data, out, settings, calibration=calibration, device=device, progress=told
        )
    if group.first:
        show_result(folder)
    group.close()


def show_result(folder: Path) -> None:
    """The widths of a new elastic checkpoint: parameters and divergence from the parent."""
    from ..checkpoint.counts import count_parameters
    from ..elastify.budget import LearnedSizes

    checkpoint = c.open_checkpoint(str(folder))
    learned = LearnedSizes.load(folder, checkpoint.config)
    table = Table("width", "parameters", "active", "KL from the parent")
    for name, width in checkpoint.widths.items():
        counts = count_parameters(checkpoint.config, width)
        loss = learned.losses.get(name)
        table.add_row(
            escape(name),
            f"{counts.total:,}",
            f"{counts.active:,}",
            "-" if loss is None else f"{loss:.4f}",
        )
    c.console().print(table)
    c.console().print(escape(str(folder)), soft_wrap=True)


def checkpoint_bits(checkpoint: Checkpoint) -> float:
    """Mean bits per parameter of a quantized checkpoint in memory; 16 for any other."""
    import torch

    from ..checkpoint.widths import full_width
    from ..sizing.footprint import mean_bits

    if not checkpoint.formats:
        return 16.0
    config = checkpoint.config
    return mean_bits(config, full_width(config), torch.bfloat16, checkpoint.formats)


def answer_budget(
    model: str,
    budget: str | None = None,
    memory: str | None = None,
    *,
    active: bool = False,
    bits: float | None = None,
    context: int = 131072,
    name: str = "",
    write: bool = True,
    revision: str | None = None,
    widths: str | None = None,
) -> None:
    """Prints the width that a budget gets and adds it to the checkpoint's table.

    Args:
        model: elastic checkpoint with a router.
        budget: parameters, as text; not together with `memory`.
        memory: bytes, as text; not together with `budget`.
        active: the budget counts the parameters of one token.
        bits: bits per weight in the memory; None: the mean bits of a quantized checkpoint's
            weights, else 16.
        context: tokens of KV cache in the memory.
        name: of the new width.
        write: add the width to the table.
        revision: as of `Checkpoint.open`.
        widths: as of `Checkpoint.open`.
    """
    from ..checkpoint.width_table import width_to_dict
    from ..elastify.budget import add_width, width_for_text

    checkpoint = c.open_checkpoint(model, revision, widths)
    if bits is None:
        bits = checkpoint_bits(checkpoint)
    answer = width_for_text(
        checkpoint,
        budget,
        memory,
        active=active,
        bits_per_weight=bits,
        context=context,
        name=name,
    )
    table = Table("width", "size")
    sizes = width_to_dict(checkpoint.config, answer.width) or {"all sizes": "full"}
    for key, size in sizes.items():
        table.add_row(key, escape(str(size)))
    table.add_row("parameters", f"{answer.counts.total:,}")
    table.add_row("active parameters", f"{answer.counts.active:,}")
    if memory is not None:
        table.add_row("memory", answer.cost.text(answer.value))
    table.add_row("predicted KL from the parent", f"{answer.predicted_loss:.4f}")
    out = c.console()
    out.print(table)
    if not write:
        return
    found, path = add_width(checkpoint, answer.width)
    where = "in the table already" if path is None else f"written to {path}"
    out.print(f"width {escape(found)}: {escape(where)}", soft_wrap=True)
