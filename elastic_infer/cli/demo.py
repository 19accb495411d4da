"""`elastic-infer demo`: the shipped reasoner changes its width in the middle of an answer."""

from __future__ import annotations

import ast
import itertools
import operator
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from ..errors import InvalidRequest, shown
from ..files.writing import write_json
from . import common as c

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..outputs import Token

HELP = (
    "Watch one checkpoint think at its narrowest width and answer at its widest, over one cache. "
    "Then measure accuracy and speed of every width and plan, on problems that training never saw."
)
EXAMPLES = c.examples(
    "elastic-infer demo",
    "elastic-infer demo --ask '(48+17)*3-29='",
    "elastic-infer demo --plain --problems 50 > demo.txt",
)
QUESTION = "(48+17)*3-29="
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def add_to(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("demo", help=HELP, epilog=EXAMPLES)(demo)


def demo(
    ask: Annotated[
        str | None, typer.Option(help="One chain of +, - and * to solve; leaves the table out.")
    ] = None,
    problems: Annotated[int, typer.Option(help="Held-out problems per line of the table.")] = 200,
    model: Annotated[
        str | None, typer.Option(help="Another checkpoint of the same task; default: the shipped.")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="No colours, nothing that moves.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file for the table's figures.")] = None,
    threads: c.Threads = None,
    verbose: c.Verbose = False,
) -> None:
    """The command; its arguments are its options."""
    c.log_to_stderr(verbose)
    screen = Console(highlight=False, no_color=True, force_terminal=False) if plain else c.console()
    question = read_question(QUESTION if ask is None else ask)
    if problems < 1:
        raise InvalidRequest(f"--problems: must be at least 1, got {problems}")
    from .. import demo_model
    from ..reasoner.evaluate import AT_ONCE

    engine = c.open_engine(model or str(demo_model()), threads=threads, max_num_seqs=AT_ONCE)
    with engine:
        show_lines(engine, question, screen)
        if ask is None:
            from .demo_table import measure_all, notes, table

            figures = measure_all(engine, problems, screen)
            if not screen.is_terminal:
                screen.print(table(figures))
            screen.print(notes(figures), soft_wrap=not screen.is_terminal)
            if out is not None:
                write_json(out, figures, "--out", indent=1)


def read_question(text: str) -> str:
    """A chain of arithmetic as the model was taught it: no blanks, "=" at the end.

    Raises:
        InvalidRequest: anything that is no such chain.
    """
    expression = re.sub(r"\s", "", text).removesuffix("=")
    try:
        solve(expression)
    except (SyntaxError, ValueError, KeyError, AttributeError, RecursionError):
        raise InvalidRequest(
            f"--ask: must be a chain of +, - and * such as {QUESTION!r}, got {shown(text)}"
        ) from None
    return expression + "="


def solve(expression: str) -> int:
    """The value of a chain of +, - and * over whole numbers.

    Raises:
        SyntaxError: anything else.
        ValueError: anything else.
        KeyError: anything else.
    """
    if not re.fullmatch(r"[0-9+*()-]+", expression) or "**" in expression:
        raise ValueError(expression)

    def value(node: Any) -> int:
        if isinstance(node, ast.Constant):
            return node.value
        return _OPERATORS[type(node.op)](value(node.left), value(node.right))

    return value(ast.parse(expression, mode="eval").body)


# Two lines that are written at the same time -----------------------------------------------------


def show_lines(engine: Engine, question: str, screen: Console) -> None:
    """Answers a question at the widest width, and thinking at the narrowest; both at once, in one
    batch. On a terminal the tokens appear as they come."""
    from ..plans.plan import Plan
    from ..sampling.params import SamplingParams

    names = list(engine.widths)
    narrow, wide = names[0], names[-1]
    params = SamplingParams(temperature=0.0, max_tokens=128)
    requests = {
        f"{wide} alone": engine.submit(question, params, width=wide),
        f"{narrow} then {wide}": engine.submit(
            question, params, Plan.think_answer(think=narrow, answer=wide)
        ),
    }
    colours = c.colour_of(names)
    tokens: dict[str, list[Token]] = {title: [] for title in requests}
    screen.print(c.legend(colours), Text("  one checkpoint, one cache", style="dim"))
    live = Live(console=screen, auto_refresh=False) if screen.is_terminal else None
    if live is None:
        _gather(requests, tokens, lambda: None)
    else:
        with live:
            _gather(
                requests,
                tokens,
                lambda: live.update(Group(*_lines(question, tokens, colours, True)), refresh=True),
            )
    if live is None:
        for line in _lines(question, tokens, colours, False):
            screen.print(line, soft_wrap=True)
    right = solve(question.removesuffix("="))
    verdicts = []
    for title, request in requests.items():
        answer = (request.result().answer or "").strip()
        verdicts.append(f"{title}: {answer or 'no answer'}")
    screen.print(Text(f"{'; '.join(verdicts)}. It is {right}.\n", style="dim"), soft_wrap=True)


def _gather(requests: dict[str, Any], tokens: dict[str, list[Token]], changed: Any) -> None:
    """Reads all streams in step, telling `changed` after each round."""
    for row in itertools.zip_longest(*requests.values()):
        for title, token in zip(requests, row):
            if token is not None:
                tokens[title].append(token)
        changed()


def _lines(
    question: str, tokens: dict[str, list[Token]], colours: dict[str, str], coloured: bool
) -> list[Text]:
    """One line per stream; without colours, the width's name in brackets where it changes."""
    pad = max(map(len, tokens))
    lines = []
    for title, stream in tokens.items():
        line, width = Text(f"{title:{pad}}  ") + Text(question, style="dim"), None
        for token in stream:
            if not coloured and token.width != width:
                line.append(f"[{token.width}]")
            width = token.width
            line.append_text(c.token_text(token, colours))
        lines.append(line)
    return lines
