"""Writes the parts of the documentation that come from the code: the page of the command line, the
tree of errors, and pieces of sources.

    python -m docs.generate            # writes them
    python -m docs.generate --check    # fails if a page holds others
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- /generated -->)", re.S)
# A piece of a file: from the line that begins with one text to the next that begins with another.
CODE = re.compile(r"(<!-- code: (\S+) from (.+?) to (.+?) -->\n).*?(<!-- /code -->)", re.S)
LANGUAGES = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".cu": "cpp"}
CLI_HEAD = """# Command line

`elastic-infer COMMAND --help` shows the same on your terminal. A mistake is one line on standard
error and exit code 2. [Plans and switches](plans.md) tells how a plan is written.

<!-- This page is made by `python -m docs.generate` from the commands themselves. -->
"""


def plain(text: str | None) -> str:
    """Help text without its markup, on one line."""
    from rich.text import Text

    return " ".join(Text.from_markup(text or "").plain.split())


def cell(text: str) -> str:
    """Text that may stand in a table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def default_of(parameter: Any) -> str:
    """Value of an option that is left out; empty where there is none."""
    value = parameter.default
    if parameter.required:
        return "required"
    # typer marks "no default" by None, False or an empty sentinel, by its version.
    if value is None or value is False or not isinstance(value, (bool, int, float, str)):
        return ""
    if value is True:
        value = parameter.opts[0]
    return f"`{value}`" if value != "" else ""


def name_of(parameter: Any) -> str:
    """An argument's name, or an option with all its spellings."""
    if parameter.param_type_name == "argument":
        return f"`{(parameter.metavar or parameter.name).upper()}`"
    names = [*sorted(parameter.opts, key=len, reverse=True), *parameter.secondary_opts]
    return ", ".join(f"`{name}`" for name in names)


def command_text(name: str, command: Any) -> str:
    """One command: what it does, its options, its examples."""
    _, *examples = (command.epilog or "").split("\n\n")
    rows = [
        f"| {name_of(p)} | {cell(default_of(p))} | {cell(plain(p.help))} |"
        for p in command.params
        if not getattr(p, "hidden", False) and p.name != "help"
    ]
    parts = [f"## {name}", plain(command.help)]
    if examples:
        parts.append("\n".join(["```sh", *(plain(line) for line in examples), "```"]))
    parts.append("\n".join(["| option | default | meaning |", "| --- | --- | --- |", *rows]))
    return "\n\n".join(parts)


def cli_page() -> str:
    """docs/cli.md, whole."""
    import typer.main

    from elastic_infer.cli import app

    group = typer.main.get_command(app)
    table = [
        f"| [`{name}`](#{name}) | {cell(plain(command.help))} |"
        for name, command in group.commands.items()
    ]
    head = "\n".join(["| command | use |", "| --- | --- |", *table])
    commands = [command_text(name, command) for name, command in group.commands.items()]
    return "\n\n".join([CLI_HEAD.rstrip(), head, *commands]) + "\n"


def error_tree() -> str:
    """Every error under its base, with its docstring's first line."""
    from elastic_infer import errors

    classes = [
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, errors.ElasticError)
    ]
    rows = [("error", "also a", "raised for"), ("---", "---", "---")]
    for kind in classes:
        others = ", ".join(
            f"`{base.__name__}`"
            for base in kind.__bases__
            if not issubclass(base, errors.ElasticError)
        )
        depth = sum(issubclass(base, errors.ElasticError) for base in kind.__mro__) - 1
        mark = "&nbsp;&nbsp;" * (depth - 1) + "└ " if depth else ""
        first = inspect.getdoc(kind).split("\n\n")[0]
        rows.append((f"{mark}`{kind.__name__}`", others, cell(" ".join(first.split()))))
    return "\n".join(f"| {a} | {b} | {c} |" for a, b, c in rows) + "\n"


PARTS = {"errors": error_tree}


def piece(file: str, first: str, last: str) -> str:
    """Lines of a file, as a block of code.

    Raises: ValueError if the file has no such lines.
    """
    lines = (DOCS.parent / file).read_text(encoding="utf-8").splitlines()
    begin = next((i for i, line in enumerate(lines) if line.strip().startswith(first)), None)
    if begin is None:
        raise ValueError(f"docs: {file} must have a line that begins with {first!r}")
    end = next(
        (i for i, line in enumerate(lines) if i >= begin and line.strip().startswith(last)), None
    )
    if end is None:
        raise ValueError(f"docs: {file} must have a line that begins with {last!r} after {first!r}")
    language = LANGUAGES[Path(file).suffix]
    return "\n".join([f"```{language}", *lines[begin : end + 1], "```\n"])


def fill(text: str) -> str:
    """A page with every generated block made anew."""
    text = BLOCK.sub(lambda m: f"{m[1]}{PARTS[m[2]]()}{m[3]}", text)
    return CODE.sub(lambda m: f"{m[1]}{piece(m[2], m[3], m[4])}{m[5]}", text)


def pages() -> dict[str, str]:
    """{file: text} of every page that comes from the code, whole or in part."""
    made = {"cli.md": cli_page()}
    for path in sorted(DOCS.rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        if BLOCK.search(text) or CODE.search(text):
            made[str(path.relative_to(DOCS))] = fill(text)
    return made


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, do not write")
    check = parser.parse_args().check
    for name, text in pages().items():
        path = DOCS / name
        if check and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            sys.exit(f"docs/{name} must be what the code says; run `python -m docs.generate`")
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
