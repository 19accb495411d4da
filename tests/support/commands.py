"""The command line, run in the tests' own process."""

from __future__ import annotations

from typer.testing import CliRunner

from elastic_infer.cli import app


def run(*arguments, code: int = 0, stdin: str | None = None):
    """Runs the command line in this process."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
    assert result.exit_code == code, (result.output, result.exception)
    assert "\x1b" not in result.output  # nothing here is a terminal
    return result


def refused(*arguments, stdin: str | None = None) -> str:
    """The one line with which a command is refused."""
    result = run(*arguments, code=2, stdin=stdin)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0].removeprefix("error: ")
