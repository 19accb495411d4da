"""The command line `elastic-infer`; each group of commands has a module of its own."""

from __future__ import annotations

from typing import Annotated

import typer

import elastic_infer

from .common import Commands

app = typer.Typer(
    name="elastic-infer",
    cls=Commands,
    help="Elastic language models: one checkpoint, many widths, one cache.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(wanted: bool) -> None:
    """Prints the version and ends, when `--version` is given."""
    if wanted:
        typer.echo(f"elastic-infer {elastic_infer.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=show_version, is_eager=True),
    ] = False,
) -> None:
    """Takes the options that stand before a command."""


from . import (  # noqa: E402
    chat,
    demo,
    elastify,
    generate,
    info,
    quantize,
    slice as slices,
)

demo.add_to(app)
generate.add_to(app)
chat.add_to(app)
info.add_to(app)
slices.add_to(app)
elastify.add_to(app)
quantize.add_to(app)


def main() -> None:
    """Entry point of the `elastic-infer` script and of `python -m elastic_infer.cli`."""
    app()


__all__ = ["app", "main"]
