"""The command line `elastic-infer`; each group of commands has a module of its own."""

from __future__ import annotations

import typer

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

from . import chatting, demo, elastify, generation, inspection, quantizing, slices  # noqa: E402

demo.add_to(app)
generation.add_to(app)
chatting.add_to(app)
inspection.add_to(app)
slices.add_to(app)
elastify.add_to(app)
quantizing.add_to(app)


def main() -> None:
    """Entry point of the `elastic-infer` script and of `python -m elastic_infer.cli`."""
    app()


__all__ = ["app", "main"]
