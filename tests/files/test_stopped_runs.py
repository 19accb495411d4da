"""`elastify` that is stopped goes on, at every point, to the same bits.

Family: every call that changes a file fails, meets a full disk, or is the last before the process
is killed; the last calls of a run (its export, after which nothing is left to do) above all.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from elastic_infer import CheckpointError
from elastic_infer.checkpoint.checkpoint import Checkpoint
from elastic_infer.elastify.pipeline import elastify
from elastic_infer.elastify.settings import Settings, Stage
from support import tiny
from support.faulty import Disk, Killed, content

SETTINGS = Settings(
    stages=(Stage(2, 12, 2),),
    budgets=(1.0, 0.7),
    save_every=1,
    validation_batches=1,
    router_inner=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A parent and its data."""
    folder = tmp_path_factory.mktemp("runs")
    config = tiny.tiny_config(7, hybrid_override_pattern="M*", max_position_embeddings=64)
    tiny.write_tiny(folder / "parent", config, None, seed=1)
    (folder / "parent" / "generation_config.json").write_text("{}")
    draw = random.Random(1)
    lines = [{"input_ids": [draw.randrange(3, 97) for _ in range(300)]} for _ in range(20)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def disk(monkeypatch) -> Disk:
    # The picture of the run is an extra that takes longer than all the rest.
    monkeypatch.setattr("elastic_infer.elastify.pipeline._draw", lambda run: None)
    return Disk(monkeypatch)


def run(folder: Path, out: Path, progress=None) -> Path:
    return elastify(
        folder / "parent",
        folder / "data.jsonl",
        out,
        SETTINGS,
        calibration=4,
        device="cpu",
        progress=progress,
    )


def plain(value):
    """Tensors inside a state as lists: pickle's own bytes depend on which of them were shared."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def result(out: Path) -> dict:
    """Files of a finished run, without its measured times."""
    found = content(out)
    found["run/state.pt"] = plain(torch.load(out / "run" / "state.pt", weights_only=True))
    steps = [json.loads(line)["step"] for line in found.pop("run/metrics.jsonl").splitlines()]
    assert steps == [1, 2]
    return found


def stop_and_go_on(disk: Disk, folder: Path, out: Path, n: int, way: str, want) -> None:
    try:
        with disk.broken(n, way):
            run(folder, out)
    except (CheckpointError, Killed):
        try:
            Checkpoint.open(out)
        except CheckpointError:
            pass
        else:  # killed after the last file
            assert (out / "config.json").read_bytes() == want["config.json"]
    assert run(folder, out) == out
    assert result(out) == want


def test_a_run_goes_on_from_every_point_of_its_export(disk, folder, tmp_path):
    run(folder, tmp_path / "whole")
    want, trained = result(tmp_path / "whole"), tmp_path / "trained"
    shutil.copytree(tmp_path / "whole", trained)
    for path in trained.iterdir():
        if path.is_file():
            path.unlink()

    def restart() -> Path:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return Path(shutil.copytree(trained, tmp_path / "out"))

    with disk.broken(None):
        run(folder, restart())
    assert result(tmp_path / "out") == want
    calls = list(disk.calls)
    ends = [n for n, name in enumerate(calls) if name == "replace"]
    assert len(ends) >= 4  # the router, the weights, the side file, the config
    for n in ends:
        stop_and_go_on(disk, folder, restart(), n, "killed", want)
    last = ends[-1]  # config.json: killed inside it, when it is whole, on a full disk
    for n, way in ((last - 2, "killed"), (last + 1, "killed"), (last - 2, "full")):
        stop_and_go_on(disk, folder, restart(), n, way, want)


@pytest.mark.slow
def test_a_run_goes_on_from_every_point(disk, folder, tmp_path):
    run(folder, tmp_path / "whole")
    want, out = result(tmp_path / "whole"), tmp_path / "out"
    with disk.broken(None):
        run(folder, out)
    calls = list(disk.calls)
    assert result(out) == want
    for n, name in enumerate(calls):
        # torch writes a state in hundreds of pieces: the first and last of a row stand for all.
        if name == "write" and calls[n - 1] == "write" and calls[n + 1 : n + 2] == ["write"]:
            continue
        for way in ("killed", "full", "fails"):
            shutil.rmtree(out)
            stop_and_go_on(disk, folder, out, n, way, want)


def test_a_finished_run_called_again_does_nothing(folder, tmp_path):
    out = run(folder, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run(folder, out) == out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_second_run_at_the_same_time_is_refused(folder, tmp_path):
    refused = []

    def progress(stage, done, total, line) -> None:
        with pytest.raises(CheckpointError, match="must have one writer at a time") as caught:
            run(folder, tmp_path / "out")
        refused.append(caught.value)

    run(folder, tmp_path / "out", progress)
    run(folder, tmp_path / "alone")
    assert refused and result(tmp_path / "out") == result(tmp_path / "alone")


def test_metrics_of_a_run_that_kept_no_state_are_forgotten(folder, tmp_path):
    """Killed before its first state.pt, a run begins again: so do its metrics."""
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "out" / "run" / "metrics.jsonl").write_text('{"step": 1}\n{"ste')
    run(folder, tmp_path / "out")
    result(tmp_path / "out")


def test_a_damaged_state_is_refused_by_name(folder, tmp_path):
    run(folder, tmp_path / "out")
    os.unlink(tmp_path / "out" / "config.json")
    for damage in (b"", b"no archive", (tmp_path / "out/run/state.pt").read_bytes()[:-100]):
        (tmp_path / "out/run/state.pt").write_bytes(damage)
        with pytest.raises(CheckpointError, match=r"state\.pt must be the .*begin again"):
            run(folder, tmp_path / "out")
