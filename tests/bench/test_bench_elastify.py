"""The elastic-training benchmark: its parts against what they must give, and all of it, small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from elastic_infer.checkpoint.config import ModelConfig
from elastic_infer.checkpoint.width_table import parse_widths
from elastic_infer.checkpoint.widths import full_width
from elastic_infer.errors import InvalidRequest
from elastic_infer.reasoner.design import reasoner_config
from elastic_infer.reasoner.task import held_out_problems, is_held_out
from support.torch_models import random_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_problems_are_held_out_in_the_mixture_of_training():
    from bench.elastify.data import Problems

    found = Problems(512, 3).problems(90)
    lengths = [len(problem.steps) for problem in found]
    assert [lengths.count(n) for n in (1, 2, 3)] == [20, 30, 40]
    assert len({p.expression for p in found}) == 90
    assert all(is_held_out(p.expression) for p in found)


def test_more_problems_than_there_are_is_an_error():
    assert len(held_out_problems(3, 288, 1)) == 288  # every one that there is
    with pytest.raises(InvalidRequest, match="got 289 of 1 operations, found 288"):
        held_out_problems(3, 289, 1)


def tiny_training(folder: Path, steps: int = 6):
    from bench.elastify.data import PlainTraining, Problems

    raw = {k: v for k, v in reasoner_config().raw.items() if k != "elastic"}
    raw |= {"hidden_size": 32, "hybrid_override_pattern": "M*E", "num_hidden_layers": 3}
    return PlainTraining(ModelConfig.from_dict(raw), Problems(256, 2), steps, 1, folder)


def test_plain_training_continues_to_the_same_weights(tmp_path, monkeypatch):
    whole, tokens = tiny_training(tmp_path / "whole").run()
    monkeypatch.setattr("bench.elastify.data.PlainTraining.SAVE_EVERY", 4)
    killed = tiny_training(tmp_path / "killed")
    stream = killed.batches()

    class Killed(Exception):
        pass

    def update(batch, real=killed.update):
        if killed.at["step"] == 5:
            raise Killed
        return real(batch)

    killed.update = update
    with pytest.raises(Killed):
        killed.run()
    again = tiny_training(tmp_path / "killed")
    assert again.at["step"] == 4
    model, seen = again.run()
    assert seen == tokens and next(stream) is not None
    for name, tensor in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    with pytest.raises(SystemExit, match="another training"):
        tiny_training(tmp_path / "killed", 7)


TABLE = {"S": {"hidden_size": 48, "mamba_num_heads": 4}, "L": {}}


def checks() -> list:
    from elastic_infer.reasoner.data import Batch

    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 48, (4, 17), generator=generator)
    weights = (torch.arange(16) >= 5).float().repeat(4, 1)
    return [Batch(ids[:, :-1], ids[:, 1:], weights)]


def test_score_counts_whole_problems_and_tokens():
    from bench.elastify.data import score

    (batch,) = checks()
    logits = F.one_hot(batch.targets, 48).float()
    logits[0, 3] = 0  # before what is to be learnt: not counted
    logits[1, 7] = 0
    logits[1, 7, (batch.targets[1, 7] + 1) % 48] = 1
    found = score(lambda _: logits, [batch])
    assert found["solved"] == 0.75 and found["problems"] == 4
    assert found["tokens_right"] == round(43 / 44, 4)


def test_caches_of_a_width_are_like_themselves_and_cost_it_nothing():
    from bench.elastify.caches import caches, compare_caches, transplanted
    from bench.elastify.data import accuracy

    model, batches = random_model(3), checks()
    widths = parse_widths(model.config, TABLE)
    found = compare_caches(model, batches, {"L": widths["L"], "same": full_width(model.config)})
    assert all(v == pytest.approx(1, abs=1e-3) for v in found["cosine"]["L-same"].values())
    assert transplanted(model, batches, widths["S"], widths["S"]) == accuracy(
        model, batches, widths["S"]
    )
    kept = [caches(model, batches[0].inputs, w, widths) for w in widths.values()]
    assert all(kept[0][part].shape == kept[1][part].shape for part in ("K", "V", "state"))
    alike = compare_caches(model, batches, widths)["cosine"]["L-S"]
    assert all(-1 <= value < 0.999 for value in alike.values())


def test_final_states_are_those_of_the_recurrence():
    from bench.elastify.caches import final_states
    from elastic_infer.elastify.torch_model import Mamba
    from elastic_infer.elastify.torch_ops import causal_conv

    model = random_model(3)
    mixer = next(b.mixer for b in model.backbone.layers if isinstance(b.mixer, Mamba))
    cfg = model.config
    x = torch.randn(1, 9, cfg.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = final_states(mixer, x, cfg.hidden_size)[0].flatten(0, 1)
        heads, size, groups = cfg.mamba_num_heads, cfg.mamba_head_dim, cfg.n_groups
        projected = F.linear(x, mixer.in_proj.weight)
        xbc = projected[..., heads * size : -heads]
        xbc = F.silu(causal_conv(xbc, mixer.conv1d.weight[:, 0], mixer.conv1d.bias))[0]
        dt = F.softplus(projected[0, :, -heads:] + mixer.dt_bias)
        state = torch.zeros(heads, size, cfg.ssm_state_size)
        for t in range(9):
            for h in range(heads):
                g = h // (heads // groups)
                start = heads * size + g * cfg.ssm_state_size
                b = xbc[t, start : start + cfg.ssm_state_size]
                decay = torch.exp(-mixer.A_log[h].exp() * dt[t, h])
                value = xbc[t, h * size : (h + 1) * size]
                state[h] = decay * state[h] + dt[t, h] * torch.outer(value, b)
    torch.testing.assert_close(got, state, rtol=1e-4, atol=1e-5)


def point(think, answer, accuracy, latency, **more):
    base = {"think": think, "answer": answer, "policy": "carry", "budget": None}
    return {**base, "accuracy": accuracy, "cpu": latency, "priced": latency, **more}


def test_front_and_gains_by_hand():
    from bench.elastify.pareto import best_gains, near_gain, pareto

    points = [
        point("L", "L", 0.5, 2.0),
        point("L", "L", 0.9, 4.0),
        point("S", "L", 0.8, 2.0),
        point("S", "S", 0.5, 1.0),
        point("M", "L", 0.9, 3.0),
        point("S", "M", 0.4, 1.5),
    ]
    assert [p["accuracy"] for p in pareto(points, "cpu")] == [0.5, 0.8, 0.9]
    gains = best_gains(points, "cpu")
    assert gains["accuracy"]["gain"] == pytest.approx(0.3)  # S->L against L at 2.0
    assert gains["accuracy"]["by"] is points[2] and gains["accuracy"]["plain"] is points[0]
    assert gains["latency"]["gain"] == pytest.approx(2.0)  # S->S against L at 0.5
    assert best_gains([point("L", "L", 0.0, 1.0), points[2]], "cpu") == {}
    ranged = [{**p, "low": p["accuracy"] - 0.15} for p in points]
    near = near_gain(ranged, "cpu")
    assert near["gain"] == 2 and near["by"]["think"] == "S"  # 0.8 lies within 0.75 and above
    unpriced = [{**p, "priced": None} if p["think"] == "M" else p for p in points]
    assert len(pareto(unpriced, "priced")) == 3
    assert pareto(unpriced, "priced")[-1]["think"] == "L"


def test_prices_count_every_pass(tmp_path):
    from bench.elastify.pareto import price_again
    from bench.elastify.price import calculated, from_file, pass_bytes

    file = tmp_path / "steps.json"
    figures = {"30B": (0.010, 0.001), "12B": (0.004, 0.0005)}
    file.write_text(
        json.dumps(
            {
                "rows": [
                    {
                        "width": name,
                        "step_seconds": step,
                        "prefill_seconds_per_token": many,
                        "read_bytes_s": step * 4e12,
                    }
                    for name, (step, many) in figures.items()
                ]
            }
        )
    )
    prices = from_file(file)
    asked = {
        "think": "S",
        "answer": "L",
        "prompt": 20.0,
        "again": 30.0,
        "tokens": {"S": 5.0, "L": 2.0},
    }
    # 20 tokens of the prompt, 30 read again, 5 and 2 steps; a pass takes no less than a step.
    assert prices.seconds(asked) == pytest.approx(0.010 + 0.030 + 0.020 + 0.020)
    assert prices.seconds({**asked, "prompt": 2.0, "again": 0.0}) == pytest.approx(0.044)
    assert prices.seconds({**asked, "tokens": {"M": 1.0}}) is None
    base = {"policy": "carry", "budget": None, "cpu": 1.0, "priced": 9.0, "again": 0.0}
    plain = {**asked, **base, "think": "L", "tokens": {"L": 7.0}, "accuracy": 0.5}
    mixed = {**asked, **base, "accuracy": 0.75}
    control = {"points": [mixed], "again": [plain, mixed], "gains": {"cpu": {}, "priced": {}}}
    control["prices"] = "the floor"
    price_again(control, prices)
    assert [p["priced"] for p in control["again"]] == pytest.approx([0.09, 0.05])
    assert control["gains"]["priced"]["latency"]["gain"] == pytest.approx(1.8)
    assert control["measured_prices"] and control["chosen_by"] == "the floor"
    assert control["prices"].startswith("`steps.json`, measured")
    assert "30B 10.0 and 1.0, 12B 4.0 and 0.5; memory then gave 40, 16 GB/s" in control["prices"]
    price_again(control, prices)
    assert control["chosen_by"] == "the floor"  # prices change, the choice was made once
    floor = calculated()
    assert not floor.measured and "not a measurement" in floor.title
    # The active parameters of the 30B shape at 4.5 bits, and the state beside them.
    assert pass_bytes(2688, 64, 1856, 1) == pytest.approx(3.228e9 * 0.5625, rel=0.08)
    assert floor.read["S"](1) < floor.read["M"](1) < floor.read["L"](1) < floor.read["L"](9)


def test_the_grid_has_every_pair_and_policy_once():
    from bench.elastify.control import grid

    points = list(grid(["S", "M", "L"], (0, None), ("carry", "exact", "window(16)")))
    assert len(points) == (6 * 3 + 3) * 2
    assert len({tuple(p.values()) for p in points}) == len(points)
    assert {p["policy"] for p in points if p["think"] == p["answer"]} == {"carry"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_bench_in_small(tmp_path):
    """Everything with --quick, then once more: nothing is trained twice."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    script = [sys.executable, "-m", "bench.elastify.run", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(script, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = subprocess.run(script, env=env, capture_output=True, text=True)
    assert again.returncode == 0 and "seed 0 …" not in again.stdout
    figures = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    found = {part: seeds["0"] for part, seeds in figures["results"].items()}
    assert set(found) == {
        "parent",
        "order",
        "router",
        "uniform",
        "unswitched",
        "scratch",
        "alone",
        "depth",
        "caches",
        "control",
        "shipped",
    }
    parent = found["parent"]["widths"]["L"]  # untrained: none
    assert parent["tokens_right"] > 0.9 and parent["solved"] > 0.1
    orders = found["order"]["orders"]
    assert orders["importance"]["L"]["divergence"] == pytest.approx(0, abs=1e-4)
    assert orders["importance"]["M"]["divergence"] < orders["random 0"]["M"]["divergence"]
    for part in ("router", "uniform", "unswitched", "alone"):
        for name in ("M", "S"):
            cut = orders["importance"][name]["divergence"]
            assert found[part]["widths"][name]["divergence"] < cut, (part, name)
    control = found["control"]
    assert len(control["points"]) == (6 * 2 + 3) * 2 and control["gains"]["priced"]
    assert all(p["priced"] > 0 and p["cpu"] > 0 for p in control["points"])
    for name in ("results.md", "control.png", "widths.png", "router.png"):
        assert (tmp_path / name).stat().st_size > 1000
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "published: 1.9 times" in text and "published, against pretraining: 360 times" in text
