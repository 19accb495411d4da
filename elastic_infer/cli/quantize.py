"""`elastic-infer quantize`: NVFP4 or FP8 weights for every width of a checkpoint at once."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..device.machine import available_cpus
from ..errors import InvalidRequest, shown
from . import common as c

HELP = (
    "Write a checkpoint with NVFP4 or FP8 weights in ModelOpt's layout: one file for all widths. "
    "Scales minimize the squared error over all widths. Experts, shared experts, plain MLPs and "
    "the head are quantized unless --layers says otherwise; norms, embedding, router, convolution "
    "and tensors that --keep names stay as they are. With --distill the weights are then trained a "
    "little for their codes, every width taught by the unquantized checkpoint."
)
EXAMPLES = c.examples(
    "elastic-infer quantize MODEL --format nvfp4 --out MODEL-nvfp4",
    "elastic-infer quantize MODEL --format nvfp4 --fp8-layers mamba --out DIR",
    "elastic-infer quantize MODEL --format fp8 --layers experts,shared,mamba,attention "
    "--keep '*.layers.0.*' --out DIR",
    "elastic-infer quantize MODEL --format nvfp4 --distill --data texts --steps 300 --out DIR",
)


def add_to(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("quantize", help=HELP, epilog=EXAMPLES)(quantize)


def quantize(
    model: c.Model,
    out: Annotated[Path, typer.Option(help="A new or empty folder.")],
    format_: Annotated[str, typer.Option("--format", help="nvfp4 or fp8.")] = "nvfp4",
    layers: Annotated[
        str, typer.Option(help="Of experts, shared, mlp, head, mamba, attention.")
    ] = "experts,shared,mlp,head",
    fp8_layers: Annotated[str, typer.Option(help="Of the same; these get FP8 in any case.")] = "",
    keep: Annotated[
        list[str] | None, typer.Option(help="Pattern of names to leave; may be repeated.")
    ] = None,
    width_weights: Annotated[
        str | None, typer.Option(help="How much each width's error counts: S=1,L=2; default: 1.")
    ] = None,
    distill: Annotated[bool, typer.Option("--distill", help="Train the weights as well.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="For --distill: folder or file of text or JSON lines.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Updates, for --distill.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Sequences, for --distill.")] = 8,
    sequence_length: Annotated[int, typer.Option(help="Tokens, for --distill.")] = 512,
    lr: Annotated[float, typer.Option(help="Learning rate, for --distill.")] = 1e-4,
    widths: c.WidthTable = None,
    revision: c.Revision = None,
    threads: c.Threads = None,
    verbose: c.Verbose = False,
) -> None:
    """The command; its arguments are its options."""
    c.log_to_stderr(verbose)
    from ..quantize.distill import DistillSettings
    from ..quantize.write import check_source, choose_formats, quantize_checkpoint

    if distill != (data is not None):
        raise InvalidRequest("--distill, --data: must be given together")
    if threads is not None and threads < 1:
        raise InvalidRequest(f"--threads: must be at least 1, got {threads}")
    groups = {name: format_ for name in parts(layers)} | dict.fromkeys(parts(fp8_layers), "fp8")
    settings = DistillSettings(steps, batch_size, sequence_length, lr)
    checkpoint = c.open_checkpoint(model, revision, widths)
    check_source(checkpoint, out)
    formats = choose_formats(checkpoint.config, checkpoint.names, groups, keep or ())
    options: dict[str, Any] = {"weights": weights_of(width_weights)}
    options["threads"] = threads or available_cpus()
    if distill:
        options |= distilled(checkpoint, formats, data, settings, options)
    with c.writing(out) as written:
        report = quantize_checkpoint(checkpoint, out, formats, progress=written, **options)
    screen = c.console()
    screen.print(error_table(report))
    screen.print(
        f"{escape(str(out))}: {written.bytes / 1e6:.1f} MB, {len(formats)} matrices quantized; "
        "errors in quantization.json",
        soft_wrap=True,
    )


def parts(text: str) -> list[str]:
    """The names of a list with commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def weights_of(text: str | None) -> dict[str, float] | None:
    """{width: weight} of "S=1,L=2".

    Raises:
        InvalidRequest: anything else.
    """
    if text is None:
        return None
    try:
        pairs = (part.split("=") for part in parts(text))
        return {name: float(value) for name, value in pairs}
    except ValueError:
        raise InvalidRequest(f"--width-weights: must be NAME=NUMBER,…, got {shown(text)}") from None


def distilled(
    checkpoint: Any, formats: dict[str, str], data: Path, settings: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """Searches the scales, trains, and gives the weights that `quantize_checkpoint` then writes."""
    from ..elastify.distributed import Group
    from ..elastify.pipeline import open_data
    from ..quantize.distill import distill_quantized
    from ..quantize.write import Quantizer

    quantizer = Quantizer(checkpoint, formats, options["weights"])
    with c.working("searching scales"):
        packed = dict(quantizer.each(options["threads"]))
    with tempfile.TemporaryDirectory() as folder, step_progress() as told:
        corpus = open_data(data, checkpoint, settings.sequence_length, Path(folder), Group())
        packed, state, facts = distill_quantized(checkpoint, packed, corpus, settings, told)
    for name in checkpoint.widths:
        losses = facts["loss_before"][name], facts["loss_after"][name]
        c.errors().print(
            f"{escape(name)}: KL from the unquantized weights {losses[0]:.5f} before, "
            f"{losses[1]:.5f} after {facts['steps']} steps",
            soft_wrap=True,
        )
    quantizer.report.distilled = facts
    return {"packed": packed, "state": state, "report": quantizer.report}


@contextlib.contextmanager
def step_progress() -> Iterator[Callable[..., None] | None]:
    """A bar with the newest losses, on stderr, on a terminal only."""
    screen = c.errors()
    if not screen.is_terminal:
        yield None
        return
    columns = (
        TextColumn("distilling"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    )
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task("distilling", total=None, losses="")

        def told(step: int, steps: int, losses: dict[str, float]) -> None:
            text = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
            bar.update(task, completed=step, total=steps, losses=escape(text))

        yield told


def error_table(report: Any) -> Table:
    """Relative errors of the layers by width, with the search and without."""
    table = Table(box=None, pad_edge=False)
    for title in ("matrix", "format"):
        table.add_column(title, no_wrap=True)
    for name in report.widths:
        table.add_column(f"error {escape(name)}", justify="right")

    def cells(line: dict[str, Any], key: str) -> list[str]:
        found = line[key]
        return [f"{found[name]:.2%}" if name in found else "-" for name in report.widths]

    for name, line in report.lines.items():
        short = name.removeprefix("backbone.layers.")
        table.add_row(escape(short), line["format"], *cells(line, "relative_error"))
    table.add_section()
    for kind, line in report.total.items():
        table.add_row("all", kind, *cells(line, "relative_error"))
        table.add_row("all, plain amax scales", kind, *cells(line, "relative_error_without_search"))
    return table
