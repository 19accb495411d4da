"""Shared by the commands: errors as one line, colours of widths, progress, opening an engine."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from typer.core import TyperGroup

from ..errors import ElasticError, InvalidRequest, shown
from ..files.reading import is_folder, user_path

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint
    from ..engine.engine import Engine

UsageError = typer.BadParameter.__base__  # typer may bring its own copy of click
BAD_REQUEST = 2  # exit code of everything that the library refuses
# From narrow to wide, readable on dark and light terminals, and apart for most colour-blind eyes.
COLOURS = ("cyan", "dark_orange", "magenta", "green", "blue")


class Commands(TyperGroup):
    """The command group: an error of the library or of the command line becomes one line on stderr
    and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        escape_what_cannot_be_printed()
        try:
            return super().invoke(ctx)
        except ElasticError as error:
            tell(str(error))
        except UsageError as error:
            if not error.format_message():  # a command without arguments: its help is wanted
                raise
            where = error.ctx.command_path if error.ctx else ctx.command_path
            tell(f"{error.format_message().rstrip('.')}; see {where} --help")
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader had enough; click ends this quietly
                raise
            what = "standard output" if error.filename is None else shown(error.filename)
            tell(f"{what}: must be usable, got: {error.strerror or error}")
            discard_output()
        raise typer.Exit(BAD_REQUEST)


def discard_output() -> None:
    """Sends what standard output still holds to nowhere, so that Python's last flush of a full
    disk is no second error."""
    if sys.stdout is sys.__stdout__ and sys.stdout is not None:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def standard_input() -> IO[str]:
    """Standard input. Raises InvalidRequest where the caller has closed it."""
    if sys.stdin is None:
        raise InvalidRequest("standard input: must be open, got a closed one; give it a file")
    return sys.stdin


def escape_what_cannot_be_printed() -> None:
    r"""Lets standard output and error write \x.. where their encoding lacks a character: of a path
    that is no UTF-8, of a table where the locale is C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def tell(message: str) -> None:
    """One line on standard error."""
    errors().print(f"[bold red]error:[/] {escape(' '.join(message.split()))}", soft_wrap=True)


def console() -> Console:
    """Standard output, as it is now (tests replace it)."""
    return Console(highlight=False)


def errors() -> Console:
    """Standard error: messages, progress bars."""
    return Console(stderr=True, highlight=False)


def examples(*lines: str) -> str:
    """Help text under a command: its examples, one per line."""
    return "\n\n".join(["[bold]Examples[/]", *(escape(line) for line in lines)])


def colour_of(names: Sequence[str]) -> dict[str, str]:
    """A colour per width, in the order given (narrow to wide); they repeat after five."""
    names = list(names)
    if len(names) == 2:
        return {names[0]: COLOURS[0], names[1]: COLOURS[2]}
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def legend(colours: dict[str, str]) -> Text:
    """The widths in their colours."""
    return Text("  ").join(Text(f"■ {name}", style=colour) for name, colour in colours.items())


def show_token(screen: Console, token: Any, colours: dict[str, str]) -> None:
    """Writes one token of a stream: in colour and without control characters on a terminal, else
    exactly as it is."""
    if screen.is_terminal:
        screen.print(token_text(token, colours), end="", soft_wrap=True)
    else:
        typer.echo(token_text(token, {}).plain if token.text is None else token.text, nl=False)


def token_text(token: Any, colours: dict[str, str]) -> Text:
    """One token in its width's colour; one that a plan forced is underlined."""
    style = colours.get(token.width, "") + (" underline" if token.forced else "")
    return Text(token.text if token.text is not None else f"{token.id} ", style=style)


@contextlib.contextmanager
def byte_progress(title: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """A bar on stderr, on a terminal only; gives a function that is told of further bytes and,
    once that is known, of all of them."""
    screen = errors()
    if not screen.is_terminal:
        yield lambda count, total=None: None
        return
    columns = (TextColumn(escape(title)), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count, total=total: progress.update(task, advance=count, total=total)


class Written:
    """Bytes written so far: a progress function of (all of them, how many there will be)."""

    def __init__(self, advance: Callable[..., None]):
        self.bytes, self._advance = 0, advance

    def __call__(self, written: int, total: int) -> None:
        self._advance(written - self.bytes, total)
        self.bytes = written


@contextlib.contextmanager
def writing(what: object) -> Iterator[Written]:
    """`byte_progress` for functions that tell how many bytes they have written in all."""
    with byte_progress(f"writing {what}") as advance:
        yield Written(advance)


@contextlib.contextmanager
def working(title: str) -> Iterator[None]:
    """Shows on stderr, on a terminal only, that something is being done."""
    screen = errors()
    with screen.status(escape(title)) if screen.is_terminal else contextlib.nullcontext():
        yield


def open_engine(model: str, *, revision: str | None = None, **options: Any) -> Engine:
    """`Engine.from_pretrained` with a bar while the weights are read."""
    from ..engine.engine import Engine

    folder = user_path(model, "checkpoint: path")
    # The bytes that a narrower max_width reads are only known once they were read.
    whole = options.get("max_width") is None and is_folder(folder)
    files = folder.glob("*.safetensors") if whole else ()
    with byte_progress(f"loading {model}", sum(f.stat().st_size for f in files) or None) as advance:
        return Engine.from_pretrained(
            model, revision=revision, progress=lambda name, count: advance(count), **options
        )


def open_checkpoint(model: str, revision: str | None = None, widths: str | None = None):
    """`Checkpoint.open`; a separate function so that torch is imported only when it is needed."""
    from ..checkpoint.checkpoint import Checkpoint

    checkpoint: Checkpoint = Checkpoint.open(model, revision, widths)
    return checkpoint


def log_to_stderr(verbose: bool) -> None:
    """Warnings of the library always, its notes (INFO) with --verbose."""
    logging.basicConfig(
        format="%(levelname)s %(name)s: %(message)s",
        level=logging.INFO if verbose else logging.WARNING,
        force=True,
    )


# Options that several commands take.
Model = Annotated[str, typer.Argument(help="Checkpoint folder, or owner/name on the Hub.")]
OptionalModel = Annotated[
    str | None, typer.Argument(help="Checkpoint folder, or owner/name on the Hub.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]
WidthTable = Annotated[str | None, typer.Option("--widths", help="JSON file with a width table.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: all.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Tell on stderr which files are loaded.")]
KvCacheDtype = Annotated[
    str, typer.Option(help="Keys and values are kept in: auto (the model's dtype) or fp8.")
]
StateDtype = Annotated[
    str,
    typer.Option(
        "--mamba-ssm-cache-dtype",
        help="The Mamba state is kept in: float32, float16, or auto (as config.json says).",
    ),
]
Activations = Annotated[
    str,
    typer.Option(
        "--activation-quantization",
        help="Activations that meet NVFP4 weights: none (as they are), int8 (CPU) or nvfp4 "
        "(GPUs of compute capability 12.x).",
    ),
]
MaxWidth = Annotated[str | None, typer.Option(help="Widest width to load; the rest is not read.")]
OneWidth = Annotated[str | None, typer.Option(help="One width for every token.")]
PlanText = Annotated[
    str | None,
    typer.Option(
        "--plan",
        help="Which width for which token: think=M,answer=L,budget=64,policy=carry or "
        "schedule=0:S+12:L or narrow=S,wide=L,threshold=1.5",
    ),
]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens to generate.")]
Temperature = Annotated[float | None, typer.Option(help="0 takes the likeliest token.")]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this sum.")]
TopK = Annotated[int | None, typer.Option(help="Keep this many of the likeliest tokens.")]
Seed = Annotated[int | None, typer.Option(help="For repeatable sampling.")]


def sampling_params(engine: Engine, **given: Any) -> Any:
    """The checkpoint's generation_config.json, changed by the options that were given."""
    import dataclasses

    return dataclasses.replace(
        engine.default_params, **{k: v for k, v in given.items() if v is not None}
    )


def read_plan(text: str | None, width: str | None) -> Any:
    """The plan of --plan, None without one; together with --width it is refused."""
    from ..plans.parsing import parse_plan

    if text is not None and width is not None:
        raise InvalidRequest(
            f"--width: must not be given together with --plan, got {shown(width)} and {shown(text)}"
        )
    return None if text is None else parse_plan(text)
