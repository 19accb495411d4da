"""The benchmark checkpoints are what they say: reproducible, loadable, sized as documented."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from bench.common import models
from bench.common.tokens import random_tokens
from bench.llama import process
from elastic_infer.checkpoint.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_model("tiny", tmp_path_factory.mktemp("bench") / "tiny", seed=3)


def test_same_seed_same_bytes_and_other_seed_other_bytes(tiny: Path, tmp_path: Path) -> None:
    name = "model.safetensors"
    again = models.write_model("tiny", tmp_path / "again", seed=3)
    other = models.write_model("tiny", tmp_path / "other", seed=4)
    assert (tiny / name).read_bytes() == (again / name).read_bytes()
    assert (tiny / name).read_bytes() != (other / name).read_bytes()


def test_the_written_folder_is_an_elastic_checkpoint(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    assert [width.hidden_size for width in checkpoint.widths.values()] == [48, 96, 128]
    gate = checkpoint.tensor("backbone.layers.1.mixer.gate.e_score_correction_bias")
    assert gate.dtype == torch.float32


def test_transformers_reads_it_and_no_layer_is_idle(tiny: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.NemotronHForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    tokens = torch.tensor([random_tokens(40, model.config.vocab_size)])
    with torch.no_grad():
        out = model(tokens, use_cache=False, output_hidden_states=True)
    assert torch.isfinite(out.logits).all()
    for before, after in itertools.pairwise(out.hidden_states):
        assert (after - before).norm() > 0.02 * before.norm()


def test_sizes_of_the_620m_model() -> None:
    counts = models.parameter_counts(models.model_config("620m"))
    assert counts == {"total": 620_572_768, "active": 161_297_504}


def test_unknown_model_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"name must be one of \['620m', 'tiny'\], got '1b'"):
        models.model_config("1b")


def test_interleave_pairs_and_ratio() -> None:
    order = []
    clock = {"ours": iter([9.0, 1.0, 2.0, 4.0]), "theirs": iter([9.0, 3.0, 4.0, 4.0])}

    def side(name: str) -> float:
        order.append(name[0])
        return next(clock[name])

    row = process.interleave(lambda: side("ours"), lambda: side("theirs"), pairs=3)
    assert "".join(order) == "ot" + "ot" + "to" + "ot"
    assert row["pairs"] == [[1.0, 3.0], [2.0, 4.0], [4.0, 4.0]]
    assert (row["ours_s"], row["theirs_s"], row["ratio"]) == (2.0, 4.0, 2.0)
    with pytest.raises(ValueError, match="pairs must be at least 1, got 0"):
        process.interleave(lambda: 1.0, lambda: 1.0, pairs=0)
