"""Tables of the pages are those of committed results, and come from clean trees alone."""

from __future__ import annotations

import json
import re

import pytest
from test_docs import ROOT, page

from bench.cpu import decode
from bench.tables import pages
from elastic_infer.cli import demo_table


def test_tables_of_the_pages_are_those_of_the_measurements():
    named = set()
    for name in pages.PAGES:
        assert pages.fill(page(name)) == page(name), "run `python -m bench.tables.pages`"
        named |= set(re.findall(r"<!-- table: ([\w-]+) -->", page(name)))
    assert named == {*pages.TABLES, *pages.FREE_TABLES}


SCORE = {"accuracy": 0.955, "low": 0.917, "high": 0.976, "solved": 191, "count": 200}
ROW = {
    **SCORE,
    "name": "S->L carry",
    "tokens_per_second_1": 1000.4,
    "tokens_per_second_64": 5000.0,
    "tokens": {"S": 30, "L": 10},
    "rebuilt_tokens_per_problem": 0.0,
    "weight_bytes_per_token": 595000,
    "ms_620m": 5.54,
}
MACHINE = {"processor": "P", "cpus": 2, "load": 0.1}
EVALUATED = {**SCORE, "by_operations": {str(n): SCORE for n in range(1, 6)}}
TRAINED = {
    "solved": 0.5,
    "interval": [0.4, 0.6],
    "tokens_right": 0.9,
    "parameters": 2000,
    "divergence": 0.25,
}
ALL_WIDTHS = {
    "widths": {"L": TRAINED, "M": TRAINED, "S": {**TRAINED, "solved": 0.25}},
    "tokens": 1_000_000,
}
CUT = {**ALL_WIDTHS["widths"], "S": {**TRAINED, "divergence": 4.0}}
CACHES = {
    "cosine": {"L-S": {"K": 0.9, "V": 0.5, "state": 0.99}},
    "alone": ALL_WIDTHS["widths"],
    "transplanted": {"S->L": TRAINED, "L->S": TRAINED},
}
POINT = {
    **SCORE,
    "think": "S",
    "answer": "L",
    "policy": "carry",
    "budget": None,
    "cpu": 0.002,
    "priced": 0.005,
}
PLAIN = {**POINT, "think": "L", "priced": 0.01}
GAIN = {
    "accuracy": {"gain": 0.25, "plain": POINT, "by": POINT},
    "latency": {"gain": 1.5, "plain": POINT, "by": POINT},
}
MADE = {"commit": "c0ffee", "date": "d"}
ELASTIFIED = {
    "commit": "c0ffee",
    "machine": MACHINE,
    "date": "d",
    "threads": 1,
    "scale": {
        "operations": 3,
        "parent_steps": 9,
        "steps": 5,
        "nested_steps": 7,
        "switches": 0.3,
        "tokens": 64,
        "checks": 20,
    },
    "results": {
        part: {"0": {**values, **MADE}}
        for part, values in {
            "parent": {**ALL_WIDTHS, "tokens": 5_000_000},
            "scratch": ALL_WIDTHS,
            "uniform": ALL_WIDTHS,
            "alone": {**ALL_WIDTHS, "tokens": 1_500_000},
            "order": {"orders": {"importance": ALL_WIDTHS["widths"], "random 0": CUT}},
            "depth": {"removed": [2, 5], "cut": TRAINED, "distilled": TRAINED},
            "caches": {"router": CACHES, "uniform": CACHES, "unswitched": CACHES, "seconds": 1.0},
            "control": {
                "points": [POINT],
                "again": [POINT, PLAIN],
                "prices": "`p.json`",
                "gains": {"cpu": {}, "priced": GAIN},
            },
            "shipped": {
                "same": {
                    k: {"L": SCORE, "M": SCORE, "S": SCORE}
                    for k in ("router", "uniform", "shipped")
                },
                "longest": {"L": SCORE, "M": SCORE, "S": SCORE},
            },
        }.items()
    }
    | {
        "router": {
            seed: {**ALL_WIDTHS, **MADE, "sizes": {"M": {"hidden_size": 48}, "S": {}}}
            for seed in ("0", "1")
        }
    },
}
FULL_SIZE = (
    {
        "machine": MACHINE,
        "date": "d",
        "threads": 2,
        "rows": [
            {
                "width": "12B",
                "kernels": "avx2",
                "step_seconds": 0.034,
                "step_bytes": 11e8,
                "share_of_streaming_reads": 0.75,
                "read_bytes_s": 43e9,
                "prefill_seconds_per_token": 0.0125,
                "peak_bytes": 83e8,
                "int8": {
                    "step_seconds": 0.03,
                    "share_of_streaming_reads": 0.85,
                    "prefill_seconds_per_token": 0.01,
                },
            }
        ],
    },
    [
        "| 12B | avx2 | bf16 | 34.0 | 1.10 | 75% | 43 | 80 | 8.3 |",
        "| 12B | avx2 | int8 | 30.0 | 1.10 | 85% | 43 | 100 | 8.3 |",
        "2 threads.",
    ],
)
SAMPLES = {
    "fullsize": FULL_SIZE,
    "fullsize-avx2": FULL_SIZE,
    "nvfp4-620m": (
        {
            "machine": MACHINE,
            "date": "d",
            "threads": 2,
            "types": {
                "q4_0": {"decode": {"tokens_s": 250.0, "peer_tokens_s": 200.0, "ratio": 1.25}}
            },
        },
        ["| q4_0 | decode | 250 | 200 | 1.25 |"],
    ),
    "elastify-scale": (
        ELASTIFIED,
        [
            "Chains of 1 to 3 operations; 9 steps",
            "Seed 0; seed 1 too for router;",
        ],
    ),
    "elastify-widths": (
        ELASTIFIED,
        [
            "| a | nested, learnt sizes | 50.0% (40.0–60.0); other seeds 50.0%; 2k |",
            "took 1.5 times as many",
            "would take 10.0 times",
            "S +0.0 against distilled alone",
        ],
    ),
    "elastify-sizes": (ELASTIFIED, ["| 1 | M | hidden_size 48 |"]),
    "elastify-order": (
        ELASTIFIED,
        [
            "| random 0 | 0.25; 90.0%; 50.0% | 4.00; 90.0%; 50.0% |",
            "M: not closer than the best",
            "S: closer to the parent than every random order (0.25, best random 4.00)",
        ],
    ),
    "elastify-depth": (ELASTIFIED, ["| depth: without layers 2, 5 | 50.0%", "| width: M | 50.0%"]),
    "elastify-caches": (
        ELASTIFIED,
        [
            "| learnt sizes | L-S | 0.90 | 0.50 | 0.99 | 50.0%, +0.0 | 50.0%, +25.0 |",
            "3 of 9 cosines",
            "S loses 0.0 points",
        ],
    ),
    "elastify-control": (
        ELASTIFIED,
        [
            "| S → L | carry | none | 95.5% (91.7–97.6) | 2.00 | 5.00 |",
            "prices of `p.json`",
            "On the miniature: the full model alone solved nothing",
            "1.50 times faster (published: 1.9",
            "at its best 2.00 times faster",
        ],
    ),
    "elastify-shipped": (ELASTIFIED, ["| shipped model | 95.5% (91.7–97.6) |", "It stays the"]),
    "demo": (
        {
            "rows": [ROW],
            "bench": {"file": "f.json", "machine": MACHINE, "threads": 2, "date": "d"},
            "problems": 200,
            "threads": 2,
            "machine": MACHINE,
            "date": "2026-01-02",
        },
        ["| `S->L carry` | 95.5% (91.7–97.6) | 1000 | 5000 | 595 kB | 0 | ~5.5 |", "`f.json`, P"],
    ),
    "accuracy": (
        {
            "widths": {"S": EVALUATED},
            "plans": {"S->L carry": EVALUATED},
            "five_operations": {"S": SCORE},
            "machine": MACHINE,
            "date": "d",
        },
        ["| `S` | 95.5% (91.7–97.6) | 96% |", "| `S->L carry` |", "n = 200"],
    ),
    "budgets": (
        {"budgets": {"L": {"0": SCORE, "none": SCORE}}},
        ["| thinking tokens allowed | 0 | none |", "| `L` | 95.5%"],
    ),
    "reasoner-sizes": (
        {
            "hidden_size": 64,
            "mamba_num_heads": 4,
            "num_attention_heads": 4,
            "n_routed_experts": 8,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 48,
            "elastic": {"widths": {"L": {}, "S": {"hidden_size": 32}}},
        },
        ["| `L` | 64 | 4 | 4 | 8 | 32 | 48 |", "| `S` | 32 | 4 |"],
    ),
    "reasoner-training": (
        {"parameters": 1074888, "minutes": 78.4, "steps": 5000, "tokens": 12_340_000},
        ["| 1,074,888 | 78 minutes of one CPU core | 5,000 | 12.3 million |"],
    ),
    "decode-620m": (
        {
            "rows": [{"width": "S", "ms_per_token": 4.0}, {"width": "L", "ms_per_token": 10.0}],
            "threads": 2,
            "machine": MACHINE,
            "date": "d",
        },
        ["| `S` | 4.00 | 250 | 2.50x |", "| `L` | 10.00 | 100 | 1.00x |"],
    ),
    "drift": (
        {
            "heads": {"float32": {"over_time": [1e-7, 2e-7], "by_fade": [3e-7, 1e-7]}},
            "reasoner": {"both": {"error": [0.2, 0.1, 0.3], "agree": 0.98765}},
            "accuracy": {"float32": {"S": SCORE}, "both": {"S": SCORE}},
            "fades": [0.1, 1e-5],
            "tokens": 4000,
            "width": "S",
            "problems": 200,
            "machine": MACHINE,
            "date": "d",
        },
        [
            "| float32 | 2.0e-07 | 3.0e-07 | - | - | 95.5% |",
            "| both | - | - | 2.0e-01 | 98.77% | 95.5% |",
            "forget 10% to 0.001%",
        ],
    ),
    "peer-620m": (
        {
            "with_peer": {"decode": {"tokens_s": 100.0, "peer_tokens_s": 80.0, "ratio": 1.25}},
            "widths": [{"width": "L", "tokens_s": 99.6, "share_of_roof": 0.9}],
            "mixed": {"ratio": 0.91},
            "switches": {"to S": {"ratio": 0.9}, "to L": {"ratio": 1.02}},
            "batches": [{"sequences": 8, "tokens_s": 300.0}],
            "peer": "llama.cpp bf16",
            "threads": 2,
            "machine": MACHINE,
            "date": "d",
        },
        ["| decode | 100 | 80 | 1.25 |", "L 100 tokens/s, 90%", "took 0.91", "at most 1.02"],
    ),
    "quantized": (
        {
            "ways": {
                "bf16": {
                    "size": 2_150_000,
                    "widths": {"L": {**SCORE, "weight_bytes_per_token": 1549000}},
                },
                "nvfp4, distilled": {
                    "size": 900_000,
                    "widths": {"L": {**SCORE, "weight_bytes_per_token": 500000}},
                    "error": {"nvfp4": {"relative_error": {"L": 0.0812}}},
                    "distilled": {
                        "steps": 9,
                        "minutes": 1.5,
                        "loss_before": {"L": 0.5},
                        "loss_after": {"L": 0.25},
                    },
                },
            },
            "machine": MACHINE,
            "date": "d",
        },
        [
            "| bf16 | 95.5% (91.7–97.6) | 2.15 MB | 1549 kB | - |",
            "| 0.90 MB | 500 kB | 8.1% |",
            "9 steps, 1.5 minutes",
            "before: L 0.5000; after: L 0.2500",
        ],
    ),
    "activations": (
        {
            "ways": {"nvfp4": {"bf16": {"S": SCORE}, "int8": {"S": SCORE}}},
            "problems": 200,
            "machine": MACHINE,
            "date": "d",
        },
        ["| nvfp4 | bf16 | 95.5% (91.7–97.6) |", "| nvfp4 | int8 | 95.5%", "200 problems"],
    ),
    "ops": (
        {
            "rows": [
                {
                    "op": "embed",
                    "case": "R=1 V=2",
                    "us": 1.26,
                    "gb_s": 3.14,
                    "gflop_s": 0.0,
                    "percent_of_roof": 41.8,
                    "roof": "read",
                    "ratio": 2.5,
                }
            ],
            "threads": 2,
            "kernels": "avx512",
            "machine": MACHINE,
            "date": "d",
            "roof": {"read_bytes_s": 2e10, "fp32_flops_s": 1e11, "bf16_flops_s": 2e11},
        },
        ["| `embed` | R=1 V=2 | 1.3 | 3.1 | 0.0 | 42 % of read | 2.50 |", "reading 20.0 GB/s"],
    ),
}


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
