"""`elastic-infer slice` and `widths`: a width as a checkpoint of its own, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..errors import InvalidRequest, shown
from . import common as c, elastify as budgets

SLICE_HELP = (
    "Write one width as a checkpoint of its own, which other software loads. A width with "
    "per-layer sizes becomes an elastic checkpoint of this one width."
)
SLICE_EXAMPLES = c.examples(
    "elastic-infer slice MODEL --width S --out model-S",
    "elastic-infer slice owner/name --revision main --width 12B --out model-12B",
)
WIDTHS_HELP = (
    "Derive the width table of a full checkpoint from slices that were extracted from it. Where "
    "a slice has weights, every tensor is compared with the prefix of the full one. The table is "
    "written to elastic_widths.json beside the full checkpoint's config.json; for one in a "
    "download cache, to your own config folder. With --budget or --memory: the width that the "
    "router of an elastified checkpoint gives for it, added to its table."
)
WIDTHS_EXAMPLES = c.examples(
    "elastic-infer widths full-30B --slice 23B=slice-23B --slice 12B=slice-12B --full-name 30B",
    "elastic-infer widths full-30B --slice-config 12B=slice-12B/config.json --out table.json",
    "elastic-infer widths full-30B --slice-config 12B=config.json --out -",
    "elastic-infer widths elastic-30B --budget 18B",
    "elastic-infer widths elastic-30B --memory 16GB --bits 4.5 --context 32768 --name laptop",
)


def add_to(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command("slice", help=SLICE_HELP, epilog=SLICE_EXAMPLES)(slice_width)
    app.command("widths", help=WIDTHS_HELP, epilog=WIDTHS_EXAMPLES)(derive)


def slice_width(
    model: c.Model,
    width: Annotated[str, typer.Option(help="The width to write.")],
    out: Annotated[Path, typer.Option(help="A new or empty folder.")],
    widths: c.WidthTable = None,
    revision: c.Revision = None,
    verbose: c.Verbose = False,
) -> None:
    """The command `slice`; its arguments are its options."""
    c.log_to_stderr(verbose)
    from ..checkpoint.slicing import slice_checkpoint

    checkpoint = c.open_checkpoint(model, revision, widths)
    with c.writing(width) as written:
        folder = slice_checkpoint(checkpoint, width, out, written)
    size = f"{written.bytes / 1e6:.1f} MB"
    c.console().print(f"{escape(str(folder))}: width {escape(width)}, {size}", soft_wrap=True)


def derive(
    full: Annotated[str, typer.Argument(help="The full checkpoint: folder, or Hub owner/name.")],
    slices: Annotated[
        list[str] | None, typer.Option("--slice", help="NAME=FOLDER of a slice; may be repeated.")
    ] = None,
    slice_configs: Annotated[
        list[str] | None,
        typer.Option("--slice-config", help="NAME=FILE, a slice's config.json; may be repeated."),
    ] = None,
    full_name: Annotated[str, typer.Option(help="Name of the full width.")] = "full",
    out: Annotated[str | None, typer.Option(help="File to write instead; - prints it.")] = None,
    budget: budgets.Budget = None,
    memory: budgets.Memory = None,
    active: budgets.Active = False,
    bits: budgets.Bits = None,
    context: budgets.Context = 131072,
    name: budgets.Name = "",
    write: budgets.Write = True,
    revision: c.Revision = None,
    verbose: c.Verbose = False,
) -> None:
    """The command `widths`; its arguments are its options."""
    c.log_to_stderr(verbose)
    if budget is not None or memory is not None:
        if slices or slice_configs or out is not None:
            raise InvalidRequest("--budget, --memory: must not be given together with slices")
        budgets.answer_budget(
            full,
            budget,
            memory,
            active=active,
            bits=bits,
            context=context,
            name=name,
            write=write,
            revision=revision,
        )
        return
    from ..checkpoint.derive import derive_widths, write_widths
    from ..checkpoint.hub import resolve_folder

    folders, configs = named("--slice", slices), named("--slice-config", slice_configs)
    folder = resolve_folder(full, revision)
    with c.working("comparing"):
        table = derive_widths(folder, folders, configs, full_name=full_name)
    if out == "-":
        typer.echo(json.dumps(table, indent=2))
        return
    path = write_widths(table, folder if out is None else out)
    c.console().print(f"{escape(str(path))}: {', '.join(table['widths'])}", soft_wrap=True)


def named(option: str, values: list[str] | None) -> dict[str, str]:
    """NAME=PATH arguments as a dict.

    Raises:
        InvalidRequest: one without a name or path, or a name that occurs twice.
    """
    found: dict[str, str] = {}
    for value in values or []:
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            raise InvalidRequest(f"{option}: must be NAME=PATH, got {shown(value)}")
        if name in found:
            raise InvalidRequest(f"{option}: a name must be given once, got {shown(name)} twice")
        found[name] = path
    return found
