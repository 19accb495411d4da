"""The bench of the host path: every case runs whole, with the kernels left out alone."""

import pytest

from bench.cpu import host
from elastic_infer import Engine, demo_model


@pytest.fixture(scope="module")
def engine():
    options = {"max_num_seqs": 4, "max_model_len": host.TOKENS + 64, "threads": 1}
    with (
        Engine.from_pretrained(demo_model(), device="cpu", **options) as opened,
        host.no_kernels(opened),
    ):
        yield opened


@pytest.mark.parametrize("case", host.CASES)
def test_every_case_has_a_figure_and_a_split(engine, case):
    row = host.measure(engine, 3, case, runs=1)
    assert 0 < row["us_least"] <= row["us_per_row"] <= row["us_most"]
    assert sum(row["split"].values()) == pytest.approx(1, abs=0.01)
    assert {"scheduler", "batch former", "tables", "sampling", "text"} <= set(row["split"])


def test_all_rows_run_together_and_say_what_they_are_told(engine):
    """One prefill for all requests, then one pass a token; a budget adds the tag that it forces."""
    _, passes = host.timed(engine, 3, "greedy")
    assert passes == host.TOKENS
    given, plan, _ = host.CASES["budget"]
    output = engine.generate(host.PROMPT, given, plan=plan)
    [choice] = output.choices
    assert set(choice.text.replace("</think>", "")) == {host.WORD}
    assert [width for width, _ in choice.width_runs] == [host.THINK, host.ANSWER]
    assert host.THINK != host.ANSWER and output.usage.forced_tokens == 1
