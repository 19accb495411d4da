"""The differentiable model against transformers, at full width and on exported slices."""

from __future__ import annotations

import pytest
import torch

from elastic_infer.checkpoint.config import ModelConfig
from elastic_infer.checkpoint.slicing import slice_state_dict
from elastic_infer.checkpoint.width_table import parse_widths, slice_config
from elastic_infer.elastify.torch_model import ElasticNemotronH
from elastic_infer.elastify.torch_ops import ssd_scan
from elastic_infer.errors import CheckpointError, InvalidRequest
from support.torch_models import BASE, TABLE, assert_close, random_model

transformers = pytest.importorskip("transformers")


def oracle(config: ModelConfig, state: dict[str, torch.Tensor], folder):
    """transformers' model on the given checkpoint tensors, loaded from a folder."""
    model = ElasticNemotronH(config)
    model.load_checkpoint_state(state)
    model.save(folder)
    loaded = transformers.NemotronHForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return loaded.eval()


@pytest.mark.parametrize("name", list(TABLE))
def test_logits_equal_transformers_on_the_slice(name, tmp_path):
    model = random_model(3)
    config = model.config
    width = parse_widths(config, TABLE)[name]
    ids = torch.randint(0, 48, (2, 37), generator=torch.Generator().manual_seed(7))
    state = slice_state_dict(config, model.checkpoint_state(), width)
    sliced = ModelConfig.from_dict(slice_config(config, width))
    with torch.no_grad():
        want = oracle(sliced, state, tmp_path)(ids).logits
        assert_close(model(ids, width), want)


def test_width_changes_logits():
    model = random_model(3)
    widths = parse_widths(model.config, TABLE)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        outputs = [model(ids, width) for width in widths.values()]
    for i, one in enumerate(outputs):
        for other in outputs[i + 1 :]:
            assert (one - other).abs().max() > 1e-2


def test_gradients_reach_exactly_the_slice():
    """The gradient at a narrow width is that of the sliced model, zero everywhere else."""
    model = random_model(5)
    config = model.config
    width = parse_widths(config, TABLE)["narrow"]
    small = ElasticNemotronH(ModelConfig.from_dict(slice_config(config, width)))
    small.load_checkpoint_state(slice_state_dict(config, model.checkpoint_state(), width))
    ids = torch.randint(0, 48, (2, 21), generator=torch.Generator().manual_seed(8))
    weight = torch.randn(2, 21, 48, generator=torch.Generator().manual_seed(9))
    (model(ids, width) * weight).sum().backward()
    (small(ids) * weight).sum().backward()

    def gradients(owner):
        grads = ElasticNemotronH(owner.config)
        with torch.no_grad():
            for target, source in zip(grads.parameters(), owner.parameters()):
                target.copy_(source.grad)
        return grads.checkpoint_state()

    large_grads, small_grads = gradients(model), gradients(small)
    kept = slice_state_dict(config, large_grads, width)
    for name, want in small_grads.items():
        scale = want.abs().max() + 1e-6
        assert (kept[name] - want).abs().max() <= 1e-4 * scale, name
    for name, grad in large_grads.items():
        inside = kept[name].pow(2).sum() if name in kept else torch.tensor(0.0)
        assert torch.allclose(grad.pow(2).sum(), inside, rtol=1e-4, atol=1e-8), name


@pytest.mark.parametrize("chunk", [1, 5, 16, 64])
def test_scan_does_not_depend_on_the_chunk(chunk):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, dt = draw(2, 33, 2, 3, 4), draw(2, 33, 2, 3).abs()
    a, b, c = -draw(2, 3).abs(), draw(2, 33, 2, 5), draw(2, 33, 2, 5)
    state = torch.zeros(2, 2, 3, 4, 5, dtype=torch.float64)
    want = []
    for t in range(33):
        write = (dt[:, t, ..., None] * x[:, t])[..., None] * b[:, t, :, None, None]
        state = state * (dt[:, t] * a).exp()[..., None, None] + write
        want.append((state * c[:, t, :, None, None]).sum(-1))
    got = ssd_scan(x, dt, a, b, c, chunk)
    torch.testing.assert_close(got, torch.stack(want, 1))


def test_save_and_load_round_trip(tmp_path):
    model = random_model(6)
    model.save(tmp_path)
    again = ElasticNemotronH.load(tmp_path)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(model(ids), again(ids))
    assert again.config == model.config


def test_wrong_tensors_are_refused_by_name():
    model = random_model(6)
    state = model.checkpoint_state()
    missing = {k: v for k, v in state.items() if k != "backbone.norm_f.weight"}
    with pytest.raises(CheckpointError, match=r"backbone\.norm_f\.weight must be present"):
        model.load_checkpoint_state(missing)
    wrong = {**state, "lm_head.weight": torch.zeros(3, 4)}
    with pytest.raises(CheckpointError, match=r"lm_head\.weight must be \[48, 64\], got \[3, 4\]"):
        model.load_checkpoint_state(wrong)
    with pytest.raises(CheckpointError, match="must be known, got extra"):
        model.load_checkpoint_state({**state, "extra": torch.zeros(1)})


def test_a_larger_width_is_refused():
    model = random_model(6)
    larger = ModelConfig.from_dict({**BASE, "hidden_size": 128})
    with pytest.raises(InvalidRequest, match="must fit in the model"):
        model(torch.zeros(1, 4, dtype=torch.long), parse_widths(larger)["full"])


@pytest.mark.parametrize("at", [3, 20, 40])
def test_engine_carries_the_cache_as_the_two_streams_do(tmp_path, at):
    """A narrow width's cache, tracked, under a wider one: the engine against the plain model."""
    from elastic_infer import Engine

    model = random_model(4)
    model.config.raw["elastic"] = {"version": 1, "default_width": "full", "widths": TABLE}
    model.save(tmp_path)
    del model.config.raw["elastic"]
    widths = parse_widths(model.config, TABLE)
    ids = torch.randint(0, 48, (1, 57), generator=torch.Generator().manual_seed(at))
    with Engine.from_pretrained(tmp_path, threads=1, kv_cache_memory_bytes=1 << 24) as engine:
        for writer, reader in (("narrow", "full"), ("full", "narrow"), ("mamba", "experts")):
            with torch.no_grad():
                place = torch.tensor([at])
                want = model.switched(ids, widths[writer], widths[reader], place)[0]
                alone = model(ids, widths[reader])[0]
            with engine.open(ids[0, :at].tolist(), width=writer, track=True) as sequence:
                sequence.logits()
                sequence.switch(reader, "carry")
                for t in range(at, ids.shape[1]):
                    sequence.append([int(ids[0, t])])
                    assert_close(sequence.logits(), want[t])
            assert (want[at:] - alone[at:]).abs().max() > 1e-2, "the switch must matter"
