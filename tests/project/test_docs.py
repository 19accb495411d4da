"""The documentation says what is so: commands run, names exist, tables are those of the files."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer.main
from typer.testing import CliRunner

import elastic_infer
from docs import generate
from docs.pictures import draw, record
from elastic_infer import demo_model
from elastic_infer.cli import app

ROOT = Path(__file__).resolve().parents[2]
SITE = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
PAGES = ("README.md", "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md", *SITE)
GENERATED = re.compile(r"<!-- (code|generated|table): .*?<!-- /\1 -->", re.S)


def page(name: str) -> str:
    """The text of a page."""
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page(name), re.S | re.M)


# Code ---------------------------------------------------------------------------------------------


def examples(name: str) -> list[tuple[str, str]]:
    """A page's Python in order, each block with the output that the page shows below it."""
    text = GENERATED.sub("", page(name))
    return re.findall(r"^```python\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", text, re.S | re.M)


@pytest.mark.parametrize("name", [name for name in ("README.md", *SITE) if examples(name)])
def test_python_of_a_page_prints_what_the_page_shows(name, capsys):
    """The blocks of a page are one program, as somebody would run it who reads from the top."""
    program = {"__name__": "page"}
    for code, shown in examples(name):
        exec(compile(code, name, "exec"), program)
        assert capsys.readouterr().out == shown, code


def test_the_readme_is_a_front_door():
    """Short enough to be read whole: its length, its first program, its tables."""
    assert len(page("README.md").splitlines()) <= 150
    code, shown = examples("README.md")[0]
    assert len([line for line in code.splitlines() if line]) <= 10 and shown
    assert all(line.count("|") <= 5 for line in page("README.md").splitlines())
    assert page("README.md").count("docs/pictures/") == 2


def test_commands_of_the_readme_run(tmp_path, monkeypatch):
    """In a folder that looks like the checkout: the first as a process of its own, the others in
    this one, which saves the seconds that importing torch takes."""
    (tmp_path / "elastic_infer" / "models").mkdir(parents=True)
    (tmp_path / "elastic_infer" / "models" / "reasoner").symlink_to(demo_model())
    monkeypatch.chdir(tmp_path)
    names = ("README.md", "docs/checkpoints.md", "docs/quantization.md")
    every = [line for name in names for block in blocks(name, "sh") for line in block.splitlines()]
    lines = list(dict.fromkeys(every))
    assert len(lines) >= 6
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    alone = [sys.executable, "-m", "elastic_infer.cli", *shlex.split(lines[0])[1:]]
    done = subprocess.run(
        alone, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0 and "It is 166." in done.stdout, done.stderr
    for line in lines[1:]:
        before, _, after = line.rpartition(" | ")
        given = subprocess.run(["bash", "-c", before], capture_output=True, text=True, check=True)
        name, *arguments = shlex.split(after)
        assert name == "elastic-infer"
        result = CliRunner().invoke(app, arguments, input=given.stdout)
        assert result.exit_code == 0 and result.stdout.strip(), (line, result.output)


def console_lines() -> list[str]:
    """Command lines of all pages that need weights which are not here."""
    lines = [
        line for name in PAGES for block in blocks(name, "console") for line in block.splitlines()
    ]
    return [line for line in lines if line.startswith("elastic-infer ")]


@pytest.mark.parametrize("line", console_lines())
def test_commands_that_cannot_run_here_parse(line):
    _, name, *arguments = shlex.split(line)
    group = typer.main.get_command(app)
    context = group.commands[name].make_context(name, arguments)
    assert context.params


def test_examples_in_the_help_parse():
    """Every example that --help shows is one that the command takes."""
    group = typer.main.get_command(app)
    seen = 0
    for name, command in group.commands.items():
        for line in (command.epilog or "").split("\n\n")[1:]:
            line = line.replace("\\[", "[").split("|")[-1]
            words = shlex.split(re.split(r"[<>] ", line)[0])
            assert words[:2] == ["elastic-infer", name], line
            assert command.make_context(name, words[2:]).params
            seen += 1
    assert seen >= 12


def test_make_targets_that_pages_name_exist():
    makefiles = page("Makefile") + page("bench/llama/llama.mk")
    heads = re.findall(r"^([a-z][\w/ -]*):(?!=)", makefiles, re.M)
    targets = {target for head in heads for target in head.split()}
    for name in PAGES:
        for target in re.findall(r"(?:`|^    )make ([a-z][\w-]*)", page(name), re.M):
            assert target in targets, (name, target)


# Names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files(name):
    folder = (ROOT / name).parent
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page(name)):
        assert (folder / target).exists(), target


def test_the_map_of_the_design_is_complete():
    text = page("docs/design/overview.md").split("## Map")[1]
    named = set(re.findall(r"`([\w./]+)`", text))
    package = ROOT / "elastic_infer"
    modules = {p.name for p in package.glob("*.py")}
    modules |= {f"{p.name}/" for p in package.iterdir() if (p / "__init__.py").exists()}
    assert modules - named == set()
    for entry in named:
        found = [package / entry, ROOT / "csrc" / entry, ROOT / entry, *package.glob(f"*/{entry}")]
        assert any(p.exists() for p in found), entry


def test_ops_that_the_design_names_are_those_there_are():
    from elastic_infer.ops import registry

    text = page("docs/design/ops-and-laws.md").split("\nThe ops:")[1].split("\n\n")[0]
    named = {w for w in re.findall(r"\b[a-z_0-9]+\b", text) if "_" in w or w in registry()}
    missing = set(registry()) - named
    assert missing == set()


def test_dependencies_are_those_of_pyproject():
    text = page("pyproject.toml")
    lists = re.findall(
        r"^(?:dependencies|requires|torch|server|test|dev|docs) = \[(.*?)\]$", text, re.S | re.M
    )
    wanted = dict(re.findall(r'"([a-zA-Z][\w\[\]-]*)([<>=][^"]*)?"', " ".join(lists)))
    section = page("CONTRIBUTING.md").split("## Dependencies")[1]
    table = dict(re.findall(r"^\| ([\w\[\]-]+) \| ([^|]+) \|", section, re.M))
    assert table.pop("package").strip() == "range"
    assert {n: r or "any" for n, r in wanted.items()} == {n: r.strip() for n, r in table.items()}


# Tables and picture -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", draw.PICTURES)
def test_a_picture_is_what_its_script_draws(name):
    text = (draw.HERE / name).read_text(encoding="utf-8")
    assert draw.PICTURES[name]() == text, "run `python -m docs.pictures.draw`"
    assert ElementTree.fromstring(text).find("{*}title").text


def test_the_recorded_run_is_what_the_model_says():
    recorded = json.loads(record.FILE.read_text(encoding="utf-8"))
    assert record.record() == recorded, "run `python -m docs.pictures.record`, then draw"


def test_pages_that_come_from_the_code_are_fresh():
    for name, text in generate.pages().items():
        assert page(f"docs/{name}") == text, "run `python -m docs.generate`"


def test_every_help_text_is_shown_whole():
    """Brackets are markup where they are not escaped: such words would vanish from --help."""
    for command in typer.main.get_command(app).commands.values():
        for help_text in [command.help, *(parameter.help for parameter in command.params)]:
            whole = " ".join((help_text or "").replace("\\[", "[").split())
            assert generate.plain(help_text) == whole


def test_a_piece_of_a_file_that_is_not_there_is_refused():
    for first, last in (("no such line", "}"), ("struct RmsNormArgs", "no such line")):
        with pytest.raises(ValueError, match="must have a line"):
            generate.piece("csrc/ops/rms_norm/rms_norm.h", first, last)


def test_the_api_page_has_every_public_name():
    named = re.findall(r"^::: elastic_infer\.(\w+)$", page("docs/api.md"), re.M)
    assert sorted(named) == sorted(set(elastic_infer.__all__) - {"__version__"})


def test_the_site_has_every_page():
    listed = re.findall(r"^ *- (?:\w+: )?([\w/-]+\.md)$", page("mkdocs.yml"), re.M)
    assert sorted(f"docs/{name}" for name in listed) == SITE


def test_make_docs_installs_the_ranges_of_pyproject():
    wanted = re.search(r"^docs = \[(.*)\]$", page("pyproject.toml"), re.M)[1].replace('"', "")
    made = re.search(r"^SITE = (.*)$", page("Makefile"), re.M)[1].replace("'", "")
    assert wanted.split(", ") == made.split(" ")
