"""The demo, and the evaluation of the shipped model behind it."""

from __future__ import annotations

import json
import os
import pty
import re
import sys

import pytest

from elastic_infer import Engine, InvalidRequest, demo_model
from elastic_infer.cli import demo, demo_table
from elastic_infer.reasoner import evaluate as evaluation
from elastic_infer.reasoner.task import held_out_problems, read_answer
from support.commands import run

# evaluation --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solved, count, low, high",
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (190, 200, 0.9104, 0.9726),
    ],
)
def test_wilson_interval(solved, count, low, high):
    assert evaluation.wilson(solved, count) == pytest.approx((low, high), abs=1e-4)


def test_wilson_without_trials_says_nothing():
    assert evaluation.wilson(0, 0) == (0.0, 1.0)


def test_evaluate_counts_what_the_engine_answers():
    problems = held_out_problems(5, 15)
    with Engine.from_pretrained(demo_model(), max_num_seqs=64) as engine:
        done = []
        found = evaluation.evaluate(engine, problems, width="M", done=lambda: done.append(1))
        outputs = engine.generate([p.prompt for p in problems], width="M")
        right = [read_answer(o.text) == p.answer for o, p in zip(outputs, problems)]
        assert (found.score.solved, found.score.count) == (sum(right), 15) and len(done) == 15
        assert {n: s.count for n, s in found.by_operations.items()} == dict.fromkeys(range(1, 6), 3)
        assert found.tokens == {"M": sum(len(o.token_ids) for o in outputs)}
        plan = evaluation.think_answer("S", "L", "exact")
        exact = evaluation.evaluate(engine, problems, plan=plan)
        assert set(exact.tokens) == {"S", "L"} and exact.rebuilt_tokens > 0
        plan = evaluation.think_answer("L", "L", budget=0)
        none = evaluation.evaluate(engine, problems, plan=plan)
        # The start tag, the forced end tag, up to three digits and the end token.
        assert sum(none.tokens.values()) <= 6 * len(problems)


def test_evaluation_as_a_program(tmp_path, capsys):
    path = tmp_path / "figures.json"
    given = [str(demo_model()), "--out", str(path), "--per-operation", "2", "--hard", "3"]
    evaluation.main(given)
    figures = json.loads(path.read_text())
    assert list(figures["widths"]) == list(figures["five_operations"]) == ["S", "M", "L"]
    assert list(figures["plans"]) == ["S->L carry", "S->L exact", "S->L window(16)"]
    assert list(figures["budgets"]) == ["S", "L", "S->L"]
    for budgets in figures["budgets"].values():
        assert list(budgets) == ["0", "8", "16", "32", "none"]
    assert figures["budgets"]["L"]["none"] == figures["widths"]["L"]
    assert figures["widths"]["S"]["count"] == 10 and figures["five_operations"]["S"]["count"] == 3
    assert "S->L exact: " in capsys.readouterr().out


# demo --------------------------------------------------------------------------------------------


def test_demo_without_a_terminal(tmp_path):
    text = run("demo", "--problems", 5, "--out", tmp_path / "demo.json").stdout
    assert re.search(r"^L alone   \(48\+17\)\*3-29=\[L\]<think>", text, re.M)
    assert re.search(r"^S then L  \(48\+17\)\*3-29=\[S\]<think>.*</think>\[L\]", text, re.M)
    figures = json.loads((tmp_path / "demo.json").read_text())
    names = ["S", "M", "L", "S->L carry", "S->L exact", "S->L window(16)"]
    assert [row["name"] for row in figures["rows"]] == names
    by_name = {row["name"]: row for row in figures["rows"]}
    for name, row in by_name.items():
        assert row["count"] == 5 and row["tokens_per_second_1"] > 0 and f"\n{name} " in text
        assert row["low"] <= row["accuracy"] <= row["high"]
    sizes = [by_name[n]["weight_bytes_per_token"] for n in ("S", "M", "L")]
    assert sizes == sorted(sizes)
    assert sizes[0] < by_name["S->L exact"]["weight_bytes_per_token"] < sizes[2]
    assert (
        by_name["S->L exact"]["weight_bytes_per_token"]
        < by_name["S->L carry"]["weight_bytes_per_token"]
    )  # which keeps the state of all heads complete
    assert by_name["S->L carry"]["rebuilt_tokens_per_problem"] == 0
    assert by_name["S->L exact"]["rebuilt_tokens_per_problem"] > 0


def test_demo_asks_one_question():
    text = run("demo", "--ask", " 12 * 9 ", "--plain").stdout
    assert "12*9=[L]<think>12*9=" in text and "It is 108." in text and "solved" not in text


@pytest.mark.parametrize("text, value", [("(48+17)*3-29", 166), ("7", 7), ("((9-4)*6+1)*2", 62)])
def test_chains_are_solved(text, value):
    assert demo.solve(text) == value
    assert demo.read_question(f" {text} =") == f"{text}="


@pytest.mark.parametrize(
    "text", ["", "=", "2**3", "1/2", "-3+4", "a+1", "1+", "__import__('os')", "(1,2)", "007+1"]
)
def test_what_is_no_chain_is_refused(text):
    with pytest.raises(InvalidRequest, match="--ask: must be a chain"):
        demo.read_question(text)


def test_figures_of_the_large_model_come_from_their_file(tmp_path):
    path = tmp_path / "decode-620m.json"
    assert demo_table.read_bench(path) is None
    rows = [{"width": "S", "ms_per_token": 4.0}, {"width": "L", "ms_per_token": 10.0}]
    about = {"date": "2026-01-02", "machine": {"processor": "P"}, "threads": 2}
    path.write_text(json.dumps({**about, "rows": rows}))
    bench = demo_table.read_bench(path)
    assert bench["ms_per_token"] == {"S": 4.0, "L": 10.0} and bench["date"] == "2026-01-02"
    assert demo_table.mixed({"S": 30, "L": 10}, 40, bench) == pytest.approx(5.5)
    assert demo_table.mixed({"S": 30, "M": 10}, 40, bench) is None
    assert demo_table.mixed({"S": 1}, 1, None) is None


@pytest.mark.slow
def test_demo_on_a_terminal_shows_colour_in_5_and_ends_in_90_seconds():
    """In seconds of processor time, all threads together: on a quiet machine that is no less than
    the time one waits, and a busy one does not change it much."""
    first, text = None, b""
    child, screen = pty.fork()
    if child == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS="100")
        os.execv(sys.executable, [sys.executable, "-m", "elastic_infer.cli", "demo"])
    while True:
        try:
            text += os.read(screen, 1 << 16)
        except OSError:  # the child has closed its side
            break
        if first is None and re.search(rb"\x1b\[3[0-9;]*m<think>", text):
            with open(f"/proc/{child}/stat", encoding="utf-8") as file:
                ticks = file.read().rpartition(")")[2].split()[11:13]  # user, system
            first = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    _, status, used = os.wait4(child, 0)
    assert status == 0 and b"S->L window(16)" in text
    assert first is not None and 0 < first < 5
    assert used.ru_utime + used.ru_stime < 2 * 90  # two threads for 90 seconds
