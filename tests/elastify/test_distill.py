"""Distillation: what it computes, that it learns, resumes to the bit, and agrees over processes."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_router import CHOICES

from elastic_infer.checkpoint.config import ModelConfig
from elastic_infer.checkpoint.slicing import slice_state_dict
from elastic_infer.checkpoint.width_table import parse_widths, slice_config
from elastic_infer.checkpoint.widths import full_width
from elastic_infer.elastify import distill, losses
from elastic_infer.elastify.corpus import Corpus
from elastic_infer.elastify.distill import Distiller, evaluate
from elastic_infer.elastify.losses import divergence, switch_places
from elastic_infer.elastify.plot import plot_metrics
from elastic_infer.elastify.settings import Settings, Stage
from elastic_infer.elastify.torch_model import ElasticNemotronH
from elastic_infer.errors import CheckpointError, InvalidRequest, NonFiniteLoss
from support.torch_models import random_model

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def settings(**changes) -> Settings:
    values = {
        "stages": (Stage(4, 12, 4), Stage(2, 24, 2, (0.5, 0.3, 0.2))),
        "choices": CHOICES,
        "accumulate": 2,
        "lr": 1e-3,
        "warmup": 2,
        "router_inner": 16,
        "save_every": 2,
    }
    return Settings(**{**values, **changes})


def corpus(length: int = 24) -> Corpus:
    """A long array of ids in which the next token depends on the last two."""
    draw = np.random.default_rng(0)
    ids = [1, 2]
    for _ in range(1200):
        ids.append(int((ids[-1] * 5 + ids[-2] * 3 + draw.integers(0, 3)) % 48))
    return Corpus(np.asarray(ids, np.int32), length)


def weights_of(distiller: Distiller) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in distiller.model.state_dict().items()}


def test_divergence_is_the_sum_over_positions_that_count():
    generator = torch.Generator().manual_seed(1)
    teacher, student = torch.randn(2, 2, 3, 7, generator=generator)
    weights = torch.tensor([[1.0, 0.0, 2.0], [1.0, 1.0, 0.0]])
    want = 0.0
    for row, column in ((0, 0), (0, 2), (1, 0), (1, 1)):
        p, q = teacher[row, column].softmax(0), student[row, column].softmax(0)
        want += float((p * (p / q).log()).sum())
    assert float(divergence(teacher, student, weights)) == pytest.approx(want, rel=1e-5)
    assert float(divergence(teacher, teacher)) == 0


def test_divergence_in_pieces_has_the_gradient_of_the_formula(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    teacher, student = torch.randn(2, 3, 5, 9, generator=generator)
    weights = (torch.rand(3, 5, generator=generator) > 0.3).float()
    student.requires_grad_()
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    want = ((p.exp() * (p - q)).sum(-1) * weights).sum()
    (gradient,) = torch.autograd.grad(2.5 * want, student)
    for piece in (4, 1024):
        monkeypatch.setattr(losses, "PIECE", piece)
        got = divergence(teacher, student, weights)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(2.5 * got, student)[0], gradient)


def test_a_run_learns_and_writes_what_it_promises(tmp_path, caplog):
    run = settings(stages=(Stage(30, 24, 4),), accumulate=1, lr=3e-3, save_every=100)
    parent = random_model(3)
    before = {name: tensor.clone() for name, tensor in parent.state_dict().items()}
    told = []
    distiller = Distiller(parent, corpus(), tmp_path, run)
    start = evaluate(
        distiller.model, distiller.teacher, distiller.widths(), distiller.data.validation(4, 24, 4)
    )
    result = distiller.run(lambda step, steps, line: told.append((step, steps)))
    assert told == [(step, 30) for step in range(1, 31)]
    for name, tensor in distiller.teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert list(result.widths) == ["S", "M", "L"] and result.held_out
    assert result.widths["L"].same_sizes(full_width(parent.config))
    assert result.budgets == {"L": 1.0, "M": 0.7, "S": 0.4}
    assert start["L"] == 0 and result.losses["L"] < 1
    config, cost = parent.config, run.cost
    for name, budget in result.budgets.items():
        share = cost.of(config, result.widths[name]) / cost.of(config, full_width(config))
        told = f"width {name} has {share:.2f} of the full cost" in caplog.text
        assert told == (abs(share / budget - 1) > 0.1)
    # Untrained prefixes of these very sizes, for comparison.
    fresh = evaluate(
        distiller.teacher, distiller.teacher, result.widths, distiller.data.validation(4, 24, 4)
    )
    assert result.losses["S"] < fresh["S"] and result.losses["M"] < fresh["M"]
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert all(len(line["loss"]) == 1 for line in lines)  # one budget per micro-step
    assert set().union(*(line["loss"] for line in lines)) == {"L", "M", "S"}
    assert lines[-1]["tokens"] == 30 * 4 * 24
    assert lines[-1]["sizes"]["L"]["hidden_size"] == 64
    picture = plot_metrics(tmp_path / "metrics.jsonl", tmp_path / "run.png")
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_gradient_accumulation_is_the_mean_of_its_micro_steps(tmp_path):
    """Hand-picked widths of full size only: two micro-steps equal the mean of both gradients."""
    widths = {"full": full_width(random_model(3).config, "full")}
    run = settings(stages=(Stage(1, 12, 2),), budgets=(1.0,), names=("full",), warmup=0)
    ids = torch.randint(0, 48, (4, 12), generator=torch.Generator().manual_seed(3))
    seen = []

    def grads(batches, accumulate):
        changed = Settings(**{**vars(run), "accumulate": accumulate, "clip": 1e9})
        owner = Distiller(
            random_model(3), batches, tmp_path / str(len(seen)), changed, widths=widths
        )
        with torch.no_grad():  # a student that differs from its teacher
            owner.model.lm_head.weight.mul_(1.1)
        update = owner.optimizer.step
        owner.optimizer.step = lambda: (
            seen.append([p.grad.clone() for p in owner.model.parameters()]),
            update(),
        )
        owner.run()

    grads([ids[:2], ids[2:]], 2)
    grads([ids], 1)
    for halves, whole in zip(*seen, strict=True):
        torch.testing.assert_close(halves, whole, rtol=1e-4, atol=1e-7)


def test_budgets_are_drawn_with_the_probabilities_of_the_stage(tmp_path):
    stages = (Stage(40, 4, 1, (0.0, 0.25, 0.75)), Stage(10, 4, 1, (1.0, 0.0, 0.0)))
    run = settings(stages=stages, accumulate=2, save_every=1000)
    Distiller(random_model(3), corpus(), tmp_path, run).run()
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first = [name for line in lines[:40] for name in line["loss"]]
    assert set(first) == {"M", "S"} and first.count("S") > first.count("M")
    assert all(set(line["loss"]) == {"L"} for line in lines[40:])
    assert [line["stage"] for line in lines] == [1] * 40 + [2] * 10


def test_the_router_can_be_fixed_before_the_end(tmp_path):
    run = settings(stages=(Stage(6, 12, 2),), router_steps=3)
    distiller = Distiller(random_model(3), corpus(), tmp_path, run)
    kept = []

    def watch(step, steps, line):
        if step >= 3:
            kept.append([p.clone() for p in distiller.router.parameters()])

    distiller.run(watch)
    assert len(kept) == 4
    assert all(torch.equal(a, b) for later in kept[1:] for a, b in zip(kept[0], later))
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [bool(line["share"]) for line in lines] == [True] * 3 + [False] * 3


def test_switch_training_is_the_divergence_behind_the_switch(tmp_path, monkeypatch):
    """Loss and gradient by their definition: one row at a time, up to the switch by one width."""
    table = {"S": {"hidden_size": 48, "mamba_num_heads": 4}, "L": {}}
    ids = torch.randint(0, 48, (4, 12), generator=torch.Generator().manual_seed(3))
    at = [3, 0, 11, 7]
    monkeypatch.setattr(
        distill,
        "switch_places",
        lambda batch, seed: (
            torch.tensor(at),
            distill.Batch(batch.ids, (torch.arange(12) >= torch.tensor(at)[:, None]).float()),
        ),
    )
    parent = random_model(3)
    widths = parse_widths(parent.config, table)
    run = settings(
        budgets=(1.0, 0.5),
        stages=(Stage(1, 12, 4, (1.0, 0.0)),),
        accumulate=1,
        clip=1e9,
        switch_probability=1.0,
    )
    owner = Distiller(parent, [ids], tmp_path, run, widths=widths)
    with torch.no_grad():  # a student that differs from its teacher
        owner.model.lm_head.weight.mul_(1.1)
    student, seen = copy.deepcopy(owner.model), []
    update = owner.optimizer.step
    owner.optimizer.step = lambda: (
        seen.extend(p.grad.clone() for p in owner.model.parameters()),
        update(),
    )
    owner.run()
    total = 0.0
    for row, place in enumerate(at):
        one = ids[row : row + 1]
        given = student.switched(one, widths["S"], widths["L"], torch.tensor([place]))
        p = owner.teacher(one)[0, place:].log_softmax(-1)
        total = total + (p.exp() * (p - given[0, place:].log_softmax(-1))).sum()
    want = total / sum(12 - place for place in at)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["loss"] == {"S->L": pytest.approx(float(want.detach()), rel=1e-4)}
    assert line["tokens"] == sum(12 - place for place in at)
    gradients = torch.autograd.grad(want, list(student.parameters()), allow_unused=True)
    for found, gradient in zip(seen, gradients, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-7)


def test_switches_lie_evenly_where_positions_count():
    weights = torch.tensor([[0.0, 1, 1, 0, 1, 0]]).repeat(3000, 1)
    batch = distill.Batch(torch.zeros(3000, 6, dtype=torch.long), weights)
    at, kept = switch_places(batch, 1)
    counts = torch.bincount(at, minlength=6).tolist()
    assert counts[0] == counts[3] == counts[5] == 0
    assert all(abs(counts[i] - 1000) < 150 for i in (1, 2, 4))
    assert kept.weights[at == 2].unique(dim=0).tolist() == [[0, 0, 1, 0, 1, 0]]
    every, _ = switch_places(distill.Batch(batch.ids, None), 1)
    assert every.unique().tolist() == [0, 1, 2, 3, 4, 5]


def test_hand_picked_widths_train_only_their_prefix(tmp_path):
    parent = random_model(3)
    table = {"S": {"intermediate_size": 32}, "L": {}}
    widths = parse_widths(parent.config, table)
    run = settings(budgets=(1.0, 0.5), stages=(Stage(3, 12, 2, (0.0, 1.0)),))
    before = parent.backbone.layers[4].mixer.up_proj.weight.detach().clone()
    result = Distiller(parent, corpus(), tmp_path, run, widths=widths).run()
    after = result.weights["backbone.layers.4.mixer.up_proj.weight"]
    assert torch.equal(after[32:], before[32:]) and not torch.equal(after[:32], before[:32])
    assert result.widths["S"].intermediate_size[4] == 32


def test_a_smaller_model_learns_from_a_teacher_of_its_own(tmp_path):
    parent = random_model(3)
    width = parse_widths(parent.config, {"S": {"hidden_size": 48, "mamba_num_heads": 4}})["S"]
    small = ElasticNemotronH(ModelConfig.from_dict(slice_config(parent.config, width)))
    small.load_checkpoint_state(slice_state_dict(parent.config, parent.checkpoint_state(), width))
    widths = {"S": full_width(small.config, "S")}
    held_out = corpus().validation(4, 24, 4)
    before = evaluate(small, parent, widths, held_out)["S"]
    run = settings(budgets=(1.0,), names=("S",), stages=(Stage(20, 24, 4),), lr=3e-3)
    result = Distiller(small, corpus(), tmp_path, run, widths=widths, teacher=parent).run()
    assert result.losses["S"] < 0.9 * before
    with pytest.raises(InvalidRequest, match="widths must be S without a router, got L"):
        Distiller(small, corpus(), tmp_path, run, widths={"L": widths["S"]})


KILLED = """
import os, signal, sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from test_distill import Distiller, corpus, random_model, settings
def progress(step, steps, line):
    if step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
Distiller(random_model(3), corpus(), {out!r}, settings()).run(progress)
"""


def run_script(text: str, **options) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", text], env=env, capture_output=True, **options)


def test_a_killed_run_continues_to_the_same_weights(tmp_path):
    whole = Distiller(random_model(3), corpus(), tmp_path / "whole", settings())
    want = whole.run()
    text = KILLED.format(tests=str(HERE), step=3, out=str(tmp_path / "killed"))
    assert run_script(text).returncode == -signal.SIGKILL
    killed = Distiller(random_model(3), corpus(), tmp_path / "killed", settings())
    assert killed.step == 2  # the last checkpoint
    got = killed.run()
    for name, tensor in want.weights.items():
        assert torch.equal(got.weights[name], tensor), name
    for name, tensor in whole.router.state_dict().items():
        assert torch.equal(killed.router.state_dict()[name], tensor), name
    assert got.losses == want.losses
    lines = [
        [{**json.loads(text), "seconds": 0} for text in path.read_text().splitlines()]
        for path in (tmp_path / "whole/metrics.jsonl", tmp_path / "killed/metrics.jsonl")
    ]
    assert lines[0] == lines[1]


def test_muon_learns_faster_than_adamw_and_continues_to_the_same_weights(tmp_path):
    run = {"stages": (Stage(30, 24, 4),), "accumulate": 1, "lr": 3e-3, "save_every": 7}
    losses = {
        kind: Distiller(random_model(3), corpus(), tmp_path / kind, settings(**run, optimizer=kind))
        .run()
        .losses["S"]
        for kind in ("adamw", "muon")
    }
    assert losses["muon"] < losses["adamw"]

    class Stop(Exception):
        pass

    def stop(step, steps, line):
        if step == 10:
            raise Stop

    given = settings(**run, optimizer="muon")
    with pytest.raises(Stop):
        Distiller(random_model(3), corpus(), tmp_path / "again", given).run(stop)
    again = Distiller(random_model(3), corpus(), tmp_path / "again", given)
    assert again.step == 7
    assert again.run().losses["S"] == losses["muon"]


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = Distiller(random_model(3), corpus(), tmp_path, settings()).run()
    again = Distiller(random_model(3), corpus(), tmp_path, settings())
    second = again.run(lambda *_: pytest.fail("a finished run must not train"))
    assert again.step == 6 and first.losses == second.losses
    with pytest.raises(CheckpointError, match="same settings, got another one"):
        Distiller(random_model(3), corpus(), tmp_path, settings(lr=2e-3))


def test_an_iterator_is_continued_at_its_place(tmp_path):
    generator = torch.Generator().manual_seed(5)
    parts = [torch.randint(0, 48, (2, 24), generator=generator) for _ in range(12)]
    want = Distiller(random_model(3), parts, tmp_path / "a", settings()).run()

    class Stop(Exception):
        pass

    def stop(step, steps, line):
        if step == 5:
            raise Stop

    with pytest.raises(Stop):
        Distiller(random_model(3), iter(parts), tmp_path / "b", settings()).run(stop)
    got = Distiller(random_model(3), iter(parts), tmp_path / "b", settings()).run()
    assert not got.held_out and set(got.losses) <= {"L", "M", "S"}
    assert all(torch.equal(got.weights[name], tensor) for name, tensor in want.weights.items())


# The workers leave without Python's own end: on a busy machine a thread of torch may then still be
# there, and C++ aborts the process (terminate) after all that is tested was done.
TWO = """
import os, sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
import torch.distributed as dist
from test_distill import Distiller, corpus, random_model, settings as all_settings
def settings():
    return all_settings(switch_probability={switch})
dist.init_process_group("gloo", init_method="file://{out}/meet", rank={rank}, world_size=2)
class Stop(Exception): pass
def stop(step, steps, line):
    if step == 3:
        raise Stop
try:
    Distiller(random_model(3), corpus(), {out!r} + "/run", settings()).run(stop)
except Stop:
    pass
again = Distiller(random_model(3), corpus(), {out!r} + "/run", settings())
assert again.step == 2  # the last checkpoint
result = again.run()
assert bool(result.weights) == ({rank} == 0)
if {rank} == 0:
    torch.save({{"weights": result.weights, "losses": result.losses}}, {out!r} + "/two.pt")
dist.destroy_process_group()
os._exit(0)
"""


@pytest.mark.parametrize("switch", [0.0, 0.7])
def test_two_processes_continue_to_what_one_gives(tmp_path, switch):
    """Sharded over two processes, stopped after a checkpoint and continued from it."""
    run = settings(switch_probability=switch)
    want = Distiller(random_model(3), corpus(), tmp_path / "one", run).run()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    texts = [
        TWO.format(tests=str(HERE), out=str(tmp_path), rank=rank, switch=switch) for rank in (0, 1)
    ]
    started = [
        subprocess.Popen([sys.executable, "-c", text], env=env, stderr=subprocess.PIPE)
        for text in texts
    ]
    errors = [process.communicate(timeout=240)[1].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(errors)
    got = torch.load(tmp_path / "two.pt", weights_only=True)
    start = random_model(3).state_dict()
    for name, tensor in want.weights.items():
        moved = (tensor - start[name]).norm()
        assert (got["weights"][name] - tensor).norm() <= 0.01 * moved, name
    for name, loss in want.losses.items():
        assert got["losses"][name] == pytest.approx(loss, rel=1e-2, abs=1e-6)


def test_bfloat16_autocast_trains(tmp_path):
    run = settings(precision="bfloat16")
    distiller = Distiller(random_model(3), corpus(), tmp_path, run)
    result = distiller.run()
    assert all(np.isfinite(loss) for loss in result.losses.values())
    assert all(tensor.dtype == torch.float32 for tensor in result.weights.values())


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path):
    distiller = Distiller(random_model(3), corpus(), tmp_path, settings())

    def poison(step, steps, line):
        if step == 3:
            with torch.no_grad():
                distiller.model.lm_head.weight[0, 0] = torch.nan

    with pytest.raises(NonFiniteLoss, match=r"is nan at step 3; the last good .* of step 2"):
        distiller.run(poison)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 2
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())
    fresh = Distiller(random_model(3), corpus(), tmp_path / "b", settings())
    with torch.no_grad():
        fresh.model.lm_head.weight[0, 0] = torch.inf
    with pytest.raises(NonFiniteLoss, match="at step 0; no checkpoint was written yet"):
        fresh.run()


def test_bad_settings_and_data_are_refused(tmp_path):
    for changes, match in (
        ({"budgets": (1.0, 1.4)}, "in .0, 1., got 1.4"),
        ({"budgets": (1.0, 0.0)}, "got 0"),
        ({"stages": ()}, "at least one stage"),
        ({"stages": (Stage(0, 8),)}, "steps must be a positive int, got 0"),
        ({"stages": (Stage(1, 8, 1, (1.0,)),)}, "must be 3 numbers"),
        ({"names": ("a", "a", "b")}, "3 different ones"),
        ({"precision": "fp8"}, "precision must be"),
        ({"lr": 0}, "lr must be positive"),
        ({"optimizer": "sgd"}, "optimizer must be adamw or muon, got 'sgd'"),
        ({"switch_probability": 1.5}, r"must be in .0, 1. and finite, got 1.5"),
        (
            {"budgets": (1.0,), "switch_probability": 0.5, "stages": (Stage(1, 8),)},
            "must be 0 with one budget",
        ),
    ):
        with pytest.raises(InvalidRequest, match=match):
            settings(**changes)

    def run(data):
        Distiller(random_model(3), data, tmp_path, settings()).run()

    with pytest.raises(InvalidRequest, match="at least one batch, got none"):
        run([])
    with pytest.raises(InvalidRequest, match="more than 1 batches, got no other"):
        run(iter([torch.zeros(2, 12, dtype=torch.long)]))
    with pytest.raises(InvalidRequest, match=r"token ids \[B, T\], got torch.float32\[2, 3\]"):
        run([torch.zeros(2, 3)])
    with pytest.raises(InvalidRequest, match="positive weight, got none"):
        run([(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3))])
    with pytest.raises(InvalidRequest, match="got the path folder"):
        run("folder")
