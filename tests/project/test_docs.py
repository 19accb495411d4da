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
from bench.cpu import decode
from bench.tables import pages
from docs import generate
from docs.pictures import draw, record
from elastic_infer import demo_model
from elastic_infer.cli import app, demo_table

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
    lines = [line for name in PAGES for block in blocks(name, "console")
             for line in block.splitlines()]  # fmt: skip
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


def test_tables_of_the_pages_are_those_of_the_measurements():
    named = set()
    for name in pages.PAGES:
        assert pages.fill(page(name)) == page(name), "run `python -m bench.tables.pages`"
        named |= set(re.findall(r"<!-- table: ([\w-]+) -->", page(name)))
    assert named == {*pages.TABLES, *pages.FREE_TABLES}


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


SCORE = {"accuracy": 0.955, "low": 0.917, "high": 0.976, "solved": 191, "count": 200}
ROW = {
    **SCORE, "name": "S->L carry", "tokens_per_second_1": 1000.4, "tokens_per_second_64": 5000.0,
    "tokens": {"S": 30, "L": 10}, "rebuilt_tokens_per_problem": 0.0,
    "weight_bytes_per_token": 595000, "ms_620m": 5.54,
}  # fmt: skip
MACHINE = {"processor": "P", "cpus": 2, "load": 0.1}
EVALUATED = {**SCORE, "by_operations": {str(n): SCORE for n in range(1, 6)}}
TRAINED = {"solved": 0.5, "interval": [0.4, 0.6], "tokens_right": 0.9, "parameters": 2000,
           "divergence": 0.25}  # fmt: skip
ALL_WIDTHS = {
    "widths": {"L": TRAINED, "M": TRAINED, "S": {**TRAINED, "solved": 0.25}}, "tokens": 1_000_000
}  # fmt: skip
CUT = {**ALL_WIDTHS["widths"], "S": {**TRAINED, "divergence": 4.0}}
CACHES = {"cosine": {"L-S": {"K": 0.9, "V": 0.5, "state": 0.99}}, "alone": ALL_WIDTHS["widths"],
          "transplanted": {"S->L": TRAINED, "L->S": TRAINED}}  # fmt: skip
POINT = {**SCORE, "think": "S", "answer": "L", "policy": "carry", "budget": None, "cpu": 0.002,
         "priced": 0.005}  # fmt: skip
PLAIN = {**POINT, "think": "L", "priced": 0.01}
GAIN = {"accuracy": {"gain": 0.25, "plain": POINT, "by": POINT},
        "latency": {"gain": 1.5, "plain": POINT, "by": POINT}}  # fmt: skip
MADE = {"commit": "c0ffee", "date": "d"}
ELASTIFIED = {
    "commit": "c0ffee", "machine": MACHINE, "date": "d", "threads": 1,
    "scale": {"operations": 3, "parent_steps": 9, "steps": 5, "nested_steps": 7, "switches": 0.3,
              "tokens": 64, "checks": 20},
    "results": {part: {"0": {**values, **MADE}} for part, values in {
        "parent": {**ALL_WIDTHS, "tokens": 5_000_000}, "scratch": ALL_WIDTHS,
        "uniform": ALL_WIDTHS, "alone": {**ALL_WIDTHS, "tokens": 1_500_000},
        "order": {"orders": {"importance": ALL_WIDTHS["widths"], "random 0": CUT}},
        "depth": {"removed": [2, 5], "cut": TRAINED, "distilled": TRAINED},
        "caches": {"router": CACHES, "uniform": CACHES, "unswitched": CACHES, "seconds": 1.0},
        "control": {"points": [POINT], "again": [POINT, PLAIN], "prices": "`p.json`",
                    "gains": {"cpu": {}, "priced": GAIN}},
        "shipped": {"same": {k: {"L": SCORE, "M": SCORE, "S": SCORE} for k in
                             ("router", "uniform", "shipped")},
                    "longest": {"L": SCORE, "M": SCORE, "S": SCORE}},
    }.items()} | {"router": {
        seed: {**ALL_WIDTHS, **MADE, "sizes": {"M": {"hidden_size": 48}, "S": {}}}
        for seed in ("0", "1")
    }},
}  # fmt: skip
FULL_SIZE = ({
        "machine": MACHINE, "date": "d", "threads": 2,
        "rows": [{"width": "12B", "kernels": "avx2", "step_seconds": 0.034, "step_bytes": 11e8,
                  "share_of_streaming_reads": 0.75, "read_bytes_s": 43e9,
                  "prefill_seconds_per_token": 0.0125, "peak_bytes": 83e8,
                  "int8": {"step_seconds": 0.03, "share_of_streaming_reads": 0.85,
                           "prefill_seconds_per_token": 0.01}}],
    }, ["| 12B | avx2 | bf16 | 34.0 | 1.10 | 75% | 43 | 80 | 8.3 |",
        "| 12B | avx2 | int8 | 30.0 | 1.10 | 85% | 43 | 100 | 8.3 |", "2 threads."])
SAMPLES = {
    "fullsize": FULL_SIZE, "fullsize-avx2": FULL_SIZE,
    "nvfp4-620m": ({
        "machine": MACHINE, "date": "d", "threads": 2,
        "types": {"q4_0": {"decode": {"tokens_s": 250.0, "peer_tokens_s": 200.0, "ratio": 1.25}}},
    }, ["| q4_0 | decode | 250 | 200 | 1.25 |"]),
    "elastify-scale": (ELASTIFIED, [
        "Chains of 1 to 3 operations; 9 steps", "Seed 0; seed 1 too for router;",
    ]),
    "elastify-widths": (ELASTIFIED, [
        "| a | nested, learnt sizes | 50.0% (40.0–60.0); other seeds 50.0%; 2k |",
        "took 1.5 times as many", "would take 10.0 times", "S +0.0 against distilled alone",
    ]),
    "elastify-sizes": (ELASTIFIED, ["| 1 | M | hidden_size 48 |"]),
    "elastify-order": (ELASTIFIED, [
        "| random 0 | 0.25; 90.0%; 50.0% | 4.00; 90.0%; 50.0% |", "M: not closer than the best",
        "S: closer to the parent than every random order (0.25, best random 4.00)",
    ]),
    "elastify-depth": (ELASTIFIED, ["| depth: without layers 2, 5 | 50.0%", "| width: M | 50.0%"]),
    "elastify-caches": (ELASTIFIED, [
        "| learnt sizes | L-S | 0.90 | 0.50 | 0.99 | 50.0%, +0.0 | 50.0%, +25.0 |",
        "3 of 9 cosines", "S loses 0.0 points",
    ]),
    "elastify-control": (ELASTIFIED, [
        "| S → L | carry | none | 95.5% (91.7–97.6) | 2.00 | 5.00 |", "prices of `p.json`",
        "On the miniature: the full model alone solved nothing",
        "1.50 times faster (published: 1.9", "at its best 2.00 times faster",
    ]),
    "elastify-shipped": (ELASTIFIED, ["| shipped model | 95.5% (91.7–97.6) |", "It stays the"]),
    "demo": (
        {"rows": [ROW], "bench": {"file": "f.json", "machine": MACHINE, "threads": 2, "date": "d"},
         "problems": 200, "threads": 2, "machine": MACHINE, "date": "2026-01-02"},
        ["| `S->L carry` | 95.5% (91.7–97.6) | 1000 | 5000 | 595 kB | 0 | ~5.5 |", "`f.json`, P"],
    ),
    "accuracy": (
        {"widths": {"S": EVALUATED}, "plans": {"S->L carry": EVALUATED},
         "five_operations": {"S": SCORE}, "machine": MACHINE, "date": "d"},
        ["| `S` | 95.5% (91.7–97.6) | 96% |", "| `S->L carry` |", "n = 200"],
    ),
    "budgets": (
        {"budgets": {"L": {"0": SCORE, "none": SCORE}}},
        ["| thinking tokens allowed | 0 | none |", "| `L` | 95.5%"],
    ),
    "reasoner-sizes": (
        {"hidden_size": 64, "mamba_num_heads": 4, "num_attention_heads": 4, "n_routed_experts": 8,
         "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 48,
         "elastic": {"widths": {"L": {}, "S": {"hidden_size": 32}}}},
        ["| `L` | 64 | 4 | 4 | 8 | 32 | 48 |", "| `S` | 32 | 4 |"],
    ),
    "reasoner-training": (
        {"parameters": 1074888, "minutes": 78.4, "steps": 5000, "tokens": 12_340_000},
        ["| 1,074,888 | 78 minutes of one CPU core | 5,000 | 12.3 million |"],
    ),
    "decode-620m": (
        {"rows": [{"width": "S", "ms_per_token": 4.0}, {"width": "L", "ms_per_token": 10.0}],
         "threads": 2, "machine": MACHINE, "date": "d"},
        ["| `S` | 4.00 | 250 | 2.50x |", "| `L` | 10.00 | 100 | 1.00x |"],
    ),
    "drift": (
        {"heads": {"float32": {"over_time": [1e-7, 2e-7], "by_fade": [3e-7, 1e-7]}},
         "reasoner": {"both": {"error": [0.2, 0.1, 0.3], "agree": 0.98765}},
         "accuracy": {"float32": {"S": SCORE}, "both": {"S": SCORE}}, "fades": [0.1, 1e-5],
         "tokens": 4000, "width": "S", "problems": 200, "machine": MACHINE, "date": "d"},
        ["| float32 | 2.0e-07 | 3.0e-07 | - | - | 95.5% |",
         "| both | - | - | 2.0e-01 | 98.77% | 95.5% |", "forget 10% to 0.001%"],
    ),
    "peer-620m": (
        {"with_peer": {"decode": {"tokens_s": 100.0, "peer_tokens_s": 80.0, "ratio": 1.25}},
         "widths": [{"width": "L", "tokens_s": 99.6, "share_of_roof": 0.9}],
         "mixed": {"ratio": 0.91}, "switches": {"to S": {"ratio": 0.9}, "to L": {"ratio": 1.02}},
         "batches": [{"sequences": 8, "tokens_s": 300.0}],
         "peer": "llama.cpp bf16", "threads": 2, "machine": MACHINE, "date": "d"},
        ["| decode | 100 | 80 | 1.25 |", "L 100 tokens/s, 90%", "took 0.91", "at most 1.02"],
    ),
    "quantized": (
        {"ways": {
            "bf16": {"size": 2_150_000,
                     "widths": {"L": {**SCORE, "weight_bytes_per_token": 1549000}}},
            "nvfp4, distilled": {
                "size": 900_000, "widths": {"L": {**SCORE, "weight_bytes_per_token": 500000}},
                "error": {"nvfp4": {"relative_error": {"L": 0.0812}}},
                "distilled": {"steps": 9, "minutes": 1.5, "loss_before": {"L": 0.5},
                              "loss_after": {"L": 0.25}}},
         }, "machine": MACHINE, "date": "d"},
        ["| bf16 | 95.5% (91.7–97.6) | 2.15 MB | 1549 kB | - |", "| 0.90 MB | 500 kB | 8.1% |",
         "9 steps, 1.5 minutes", "before: L 0.5000; after: L 0.2500"],
    ),
    "activations": (
        {"ways": {"nvfp4": {"bf16": {"S": SCORE}, "int8": {"S": SCORE}}},
         "problems": 200, "machine": MACHINE, "date": "d"},
        ["| nvfp4 | bf16 | 95.5% (91.7–97.6) |", "| nvfp4 | int8 | 95.5%",
         "200 problems"],
    ),
    "ops": (
        {"rows": [{"op": "embed", "case": "R=1 V=2", "us": 1.26, "gb_s": 3.14, "gflop_s": 0.0,
                   "percent_of_roof": 41.8, "roof": "read", "ratio": 2.5}],
         "threads": 2, "kernels": "avx512", "machine": MACHINE, "date": "d",
         "roof": {"read_bytes_s": 2e10, "fp32_flops_s": 1e11, "bf16_flops_s": 2e11}},
        ["| `embed` | R=1 V=2 | 1.3 | 3.1 | 0.0 | 42 % of read | 2.50 |", "reading 20.0 GB/s"],
    ),
}  # fmt: skip


def test_the_decode_benchmark_makes_the_file_that_demo_and_readme_read(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    figures = decode.run("tiny", tmp_path / "tiny", 4, 2, threads=1)
    assert [row["width"] for row in figures["rows"]] == ["S", "M", "L"]
    assert all(len(row["rounds_ms"]) == 2 for row in figures["rows"])
    path = tmp_path / "decode-620m.json"
    path.write_text(json.dumps(figures))
    bench = demo_table.read_bench(path)
    assert bench["ms_per_token"] == {r["width"]: r["ms_per_token"] for r in figures["rows"]}
    assert bench["threads"] == 1
    assert "| `L` | " in pages.decode_table(figures)


def test_every_table_has_a_sample():
    assert set(SAMPLES) == set(pages.TABLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_tables_show_what_the_files_hold(tmp_path, name):
    figures, expected = SAMPLES[name]
    old = f"before\n<!-- table: {name} -->\nold\n<!-- /table -->\nafter\n"
    assert "Not measured yet" in pages.fill(old, tmp_path)
    path = tmp_path / pages.TABLES[name][0]
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(figures))
    text = pages.fill(old, tmp_path)
    assert text.startswith("before\n") and text.endswith("<!-- /table -->\nafter\n")
    assert "old" not in text
    for line in expected:
        assert line in text
    path.write_text("{}")
    with pytest.raises(ValueError, match="must hold"):
        pages.fill(old, tmp_path)


def test_a_table_that_nothing_measures_is_refused():
    with pytest.raises(ValueError, match="a table must be one of demo"):
        pages.fill("<!-- table: nothing -->\n<!-- /table -->")


@pytest.mark.parametrize("where", [lambda c: {"commit": c}, lambda c: {"rows": [{"commit": c}]}])
def test_a_result_of_a_dirty_tree_is_no_table(tmp_path, where):
    """Results whose code nobody can look up: the commit at the head, or of one part."""
    path = tmp_path / pages.TABLES["decode-620m"][0]
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(SAMPLES["decode-620m"][0] | where("c0ffee-dirty")))
    with pytest.raises(ValueError, match="from a clean tree, got commit c0ffee-dirty"):
        pages.fill("<!-- table: decode-620m -->\n<!-- /table -->\n", tmp_path)
