"""Slices of a checkpoint, and width tables derived back from them."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from elastic_infer.checkpoint.checkpoint import Checkpoint
from elastic_infer.checkpoint.derive import derive_widths
from elastic_infer.checkpoint.layout import is_uniform, smallest_uniform_width, tensor_selections
from elastic_infer.checkpoint.slicing import slice_checkpoint, slice_state_dict
from elastic_infer.checkpoint.tensor_files import take
from elastic_infer.errors import CheckpointError, WidthError
from support import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def make(tmp_path, seed, per_layer, dtype=torch.float32, shards=1, **overrides):
    config = tiny.tiny_config(seed, **overrides)
    table = tiny.tiny_widths(config, seed, count=3, per_layer=per_layer)
    folder = tiny.write_tiny(tmp_path / "full", config, table, dtype, seed, shards)
    return config, Checkpoint.open(folder, config_home=tmp_path / "home")


def load_all(folder):
    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        state.update(load_file(path))
    return state


def logits(model, vocab):
    ids = torch.randint(3, vocab, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits


def masked_logits(model, config, width):
    """Logits of the full transformers model with everything outside a uniform width zeroed.

    An independent statement of what a width means: rows that nothing may read are zeroed, and the
    two means (RMSNorm over wD channels, gated norm over the kept heads) are rescaled.
    """
    full, kept = config["hidden_size"], width.hidden_size
    heads, size, groups = (config[k] for k in ("mamba_num_heads", "mamba_head_dim", "n_groups"))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    eps = config["layer_norm_epsilon"]

    def rms(weight):
        def hook(module, inputs, output):
            x = inputs[0].float()[..., :kept]
            y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight[:kept]
            return torch.nn.functional.pad(y, (0, full - kept))

        return hook

    def gated(weight, kept_heads):
        def hook(module, inputs, output):
            y = inputs[0].float() * torch.nn.functional.silu(inputs[1].float())
            y = y.view(*y.shape[:-1], groups, heads // groups, size)[..., : kept_heads // groups, :]
            mean = y.pow(2).mean((-1, -2), keepdim=True)
            y = y * torch.rsqrt(mean + eps)
            y = torch.nn.functional.pad(y, (0, 0, 0, (heads - kept_heads) // groups))
            return y.flatten(-3) * weight

        return hook

    handles = []
    for index, kind in enumerate(config["hybrid_override_pattern"]):
        block = model.model.layers[index]
        handles.append(block.norm.register_forward_hook(rms(block.norm.weight)))
        mixer = block.mixer
        if kind == "M":
            hook = gated(mixer.norm.weight, width.mamba_num_heads[index])
            handles.append(mixer.norm.register_forward_hook(hook))
        elif kind == "*":
            q, kv = config["num_attention_heads"], config["num_key_value_heads"]
            mask = torch.zeros(kv, q // kv, config["head_dim"])
            mask[:, : width.num_attention_heads[index] // kv] = 1
            mixer.o_proj.weight.data *= mask.flatten()
        elif kind == "-":
            mixer.down_proj.weight.data[:, width.intermediate_size[index] :] = 0
        else:
            mixer.gate.e_score_correction_bias[width.n_routed_experts[index] :] = -1e4
            mixer.experts.down_proj.data[:, :, width.moe_intermediate_size[index] :] = 0
            shared = width.moe_shared_expert_intermediate_size[index]
            mixer.shared_experts.down_proj.weight.data[:, shared:] = 0
    handles.append(model.model.norm_f.register_forward_hook(rms(model.model.norm_f.weight)))
    out = logits(model, config["vocab_size"])
    for handle in handles:
        handle.remove()
    model.load_state_dict(state)
    return out


@pytest.mark.parametrize("seed", [1, 3])
def test_transformers_loads_a_slice(tmp_path, seed):
    """transformers on the export == transformers on the full weights under masks, per width."""
    config, checkpoint = make(tmp_path, seed, per_layer=False)
    full = tiny.transformers_model(checkpoint.folder)
    for name, width in checkpoint.widths.items():
        want = masked_logits(full, config, width)
        out = slice_checkpoint(checkpoint, name, tmp_path / name)
        got = logits(tiny.transformers_model(out), config["vocab_size"])
        assert (got - want).abs().max() <= 1e-4 * want.abs().max(), name
        if name != "L":
            assert (got - logits(full, config["vocab_size"])).abs().max() > 1e-2 * want.abs().max()


@pytest.mark.parametrize(("seed", "per_layer"), [(3, False), (2, True), (9, True)])
def test_transformers_with_rebuilt_mixers(tmp_path, seed, per_layer):
    """slice_state_dict in mixers of their own sizes == the full model under masks."""
    config, checkpoint = make(tmp_path, seed, per_layer)
    full = tiny.transformers_model(checkpoint.folder)
    state = tiny.tiny_state_dict(config, seed=seed)
    for name, width in checkpoint.widths.items():
        want = masked_logits(full, config, width)
        small = tiny.transformers_slice(checkpoint.folder, width, state)
        got = logits(small, config["vocab_size"])
        assert (got - want).abs().max() <= 1e-4 * want.abs().max(), name


@pytest.mark.parametrize("seed", [4, 5, 6, 8])
def test_export_equals_slice_state_dict(tmp_path, seed):
    dtype = (torch.bfloat16, torch.float32)[seed % 2]
    config, checkpoint = make(tmp_path, seed, per_layer=False, dtype=dtype)
    state = tiny.tiny_state_dict(config, dtype, seed)
    for name, width in checkpoint.widths.items():
        out = slice_checkpoint(checkpoint, name, tmp_path / name)
        want = slice_state_dict(checkpoint.config, state, width)
        got = load_all(out)
        assert set(got) == set(want)
        for tensor, value in want.items():
            assert got[tensor].dtype == value.dtype
            assert torch.equal(got[tensor], value), tensor
            assert value.untyped_storage().data_ptr() != state[tensor].untyped_storage().data_ptr()
        exported = Checkpoint.open(out, config_home=tmp_path / "home")
        assert list(exported.widths) == ["full"]
        assert exported.config.hidden_size == width.hidden_size
        raw = json.loads((out / "config.json").read_text())
        assert "elastic" not in raw
        assert raw["time_step_min"] == config["time_step_min"]


def test_per_layer_slice_is_an_elastic_folder_with_one_width(tmp_path):
    config, checkpoint = make(
        tmp_path,
        2,
        per_layer=True,
        hybrid_override_pattern="MEM*E-M*-E",
        n_groups=2,
        mamba_num_heads=12,
        n_routed_experts=9,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    width = checkpoint.widths["S"]
    assert not is_uniform(checkpoint.config, width)
    out = slice_checkpoint(checkpoint, "S", tmp_path / "S")
    exported = Checkpoint.open(out, config_home=tmp_path / "home")
    assert list(exported.widths) == ["S"]
    assert exported.default_width == "S"
    assert exported.config.n_routed_experts == max(
        size
        for size, kind in zip(
            width.n_routed_experts, config["hybrid_override_pattern"], strict=True
        )
        if kind == "E"
    )
    state = tiny.tiny_state_dict(config, seed=2)
    want = slice_state_dict(checkpoint.config, state, width)
    kept = tensor_selections(exported.config, exported.widths["S"])
    assert set(kept) == set(want)
    for name, value in want.items():
        assert torch.equal(exported.tensor(name, *kept[name]), value), name
    cut = smallest_uniform_width(checkpoint.config, width)
    assert load_all(out).keys() == tensor_selections(checkpoint.config, cut).keys()
    table = derive_widths(checkpoint, {"S": out})
    assert (
        Checkpoint.open(checkpoint.folder, widths=table, config_home=tmp_path / "home")
        .widths["S"]
        .hidden_size
        == width.hidden_size
    )
    again = Checkpoint.open(checkpoint.folder, widths=table, config_home=tmp_path / "home")
    assert tensor_selections(checkpoint.config, again.widths["S"]) == tensor_selections(
        checkpoint.config, width
    )


def test_heads_of_every_group(tmp_path):
    """The first heads of every group are kept, not the first heads."""
    config, checkpoint = make(
        tmp_path,
        0,
        per_layer=False,
        hybrid_override_pattern="M*E",
        n_groups=2,
        mamba_num_heads=6,
        mamba_head_dim=16,
        num_attention_heads=6,
        num_key_value_heads=2,
    )
    table = {"S": {"mamba_num_heads": 4, "num_attention_heads": 4}, "L": {}}
    widths = {"version": 1, "default_width": "L", "widths": table}
    checkpoint = Checkpoint.open(checkpoint.folder, widths=widths)
    kept = tensor_selections(checkpoint.config, checkpoint.widths["S"])
    assert kept["backbone.layers.0.mixer.A_log"].rows == [0, 1, 3, 4]
    size = config["head_dim"]
    heads = [row // size for row in kept["backbone.layers.1.mixer.q_proj.weight"].rows[::size]]
    assert heads == [0, 1, 3, 4]
    assert kept["backbone.layers.1.mixer.k_proj.weight"].rows is None
    inner, shared = 6 * 16, 2 * 2 * config["ssm_state_size"]
    rows = kept["backbone.layers.0.mixer.in_proj.weight"].rows
    assert len(rows) == 2 * 4 * 16 + shared + 4
    assert rows[-4:] == [2 * inner + shared + head for head in (0, 1, 3, 4)]
    assert rows[64:128:16] == [inner + head * 16 for head in (0, 1, 3, 4)]


def test_sharded_equals_single(tmp_path):
    config, checkpoint = make(tmp_path, 3, per_layer=False)
    sharded = tiny.write_tiny(
        tmp_path / "sharded",
        config,
        tiny.tiny_widths(config, 3, count=3, per_layer=False),
        seed=3,
        shards=4,
    )
    one = slice_checkpoint(checkpoint, "S", tmp_path / "one")
    steps = []
    many = slice_checkpoint(
        Checkpoint.open(sharded, config_home=tmp_path / "home"),
        "S",
        tmp_path / "many",
        progress=lambda done, total: steps.append((done, total)),
        shard_bytes=40_000,
    )
    files = sorted(many.glob("*.safetensors"))
    assert len(files) > 2
    assert len(list(one.glob("*.safetensors"))) == 1
    assert (many / "config.json").read_text() == (one / "config.json").read_text()
    a, b = load_all(one), load_all(many)
    assert set(a) == set(b)
    assert all(torch.equal(a[name], b[name]) for name in a)
    opened = [Checkpoint.open(x, config_home=tmp_path / "home") for x in (one, many)]
    assert opened[0].fingerprint == opened[1].fingerprint
    total = sum(t.numel() * t.element_size() for t in a.values())
    assert steps[-1] == (total, total)
    assert steps == sorted(steps)
    assert len(steps) == len(a)
    got = logits(tiny.transformers_model(many), config["vocab_size"])
    assert torch.equal(got, logits(tiny.transformers_model(one), config["vocab_size"]))


def test_tied_head(tmp_path):
    """A tied model exports with its head written out: transformers has no tied nemotron_h."""
    config, checkpoint = make(tmp_path, 3, per_layer=False, tie_word_embeddings=True)
    assert "lm_head.weight" not in checkpoint.names
    out = slice_checkpoint(checkpoint, "S", tmp_path / "S")
    state = load_all(out)
    assert torch.equal(state["lm_head.weight"], state["backbone.embeddings.weight"])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    untied = tiny.write_tiny(tmp_path / "untied", {**config, "tie_word_embeddings": False}, seed=3)
    tensors = load_file(checkpoint.folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"].clone()
    save_file(tensors, untied / "model.safetensors")
    want = masked_logits(tiny.transformers_model(untied), config, checkpoint.widths["S"])
    got = logits(tiny.transformers_model(out), config["vocab_size"])
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()

    assert list(derive_widths(checkpoint, {"S": out})["widths"]) == ["full", "S"]
    perturb(out, lambda state: state["lm_head.weight"][4, 2].add_(1e-3))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight of S .* at \[4, 2\]"):
        derive_widths(checkpoint, {"S": out})
    perturb(
        checkpoint.folder, lambda state: state.update({"lm_head.weight": tensors["lm_head.weight"]})
    )
    with pytest.raises(CheckpointError, match=r"lm_head\.weight must be absent"):
        Checkpoint.open(checkpoint.folder)


def test_slice_refuses(tmp_path):
    _, checkpoint = make(tmp_path, 0, per_layer=False)
    with pytest.raises(WidthError, match=r"one of .*'XL'"):
        slice_checkpoint(checkpoint, "XL", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(CheckpointError, match="new or empty folder"):
        slice_checkpoint(checkpoint, "S", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]
    with pytest.raises(CheckpointError, match="new or empty folder"):
        slice_checkpoint(checkpoint, "S", tmp_path / "out" / "precious")


def test_slice_takes_side_files_along_and_says_what_it_keeps(tmp_path, caplog):
    _, checkpoint = make(tmp_path, 0, per_layer=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (checkpoint.folder / name).write_text(f'{{"x": "{name}"}}')
    (checkpoint.folder / "training.log").write_text("x")
    with caplog.at_level(logging.INFO, "elastic_infer"):
        out = slice_checkpoint(checkpoint, "S", tmp_path / "out")
    assert "time_step_min = 0.001" in caplog.text
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (out / "tokenizer.json").read_text() == '{"x": "tokenizer.json"}'


def test_take():
    x = torch.arange(24).view(4, 6)
    assert torch.equal(take(x, [3, 0, 1], slice(2, 5)), x[[3, 0, 1], 2:5])
    whole = take(x)
    assert torch.equal(whole, x)
    assert whole.data_ptr() != x.data_ptr()


@pytest.mark.parametrize(("seed", "per_layer"), [(1, False), (2, True), (3, False), (6, True)])
def test_derive_recovers_the_table(tmp_path, seed, per_layer):
    _, checkpoint = make(tmp_path, seed, per_layer, shards=1 + seed % 2)
    slices = {
        name: slice_checkpoint(checkpoint, name, tmp_path / name)
        for name in checkpoint.widths
        if name != "L"
    }
    configs = {name: folder / "config.json" for name, folder in slices.items()}
    table = derive_widths(checkpoint.folder, slices, full_name="L")
    assert table["default_width"] == "L"
    assert derive_widths(checkpoint, slice_configs=configs, full_name="L") == table
    again = Checkpoint.open(checkpoint.folder, widths=json.loads(json.dumps(table)))
    assert list(again.widths) == list(checkpoint.widths)
    for name, width in checkpoint.widths.items():
        assert tensor_selections(checkpoint.config, again.widths[name]) == tensor_selections(
            checkpoint.config, width
        )


def perturb(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def test_derive_names_the_perturbed_tensor(tmp_path, monkeypatch):
    import elastic_infer.checkpoint.derive as derive

    _, checkpoint = make(
        tmp_path,
        0,
        per_layer=False,
        hybrid_override_pattern="M*E",
        n_groups=2,
        mamba_num_heads=6,
        mamba_head_dim=16,
    )
    table = {"version": 1, "default_width": "L", "widths": {"L": {}, "S": {"mamba_num_heads": 4}}}
    checkpoint = Checkpoint.open(checkpoint.folder, widths=table)
    out = slice_checkpoint(checkpoint, "S", tmp_path / "S")
    name = "backbone.layers.0.mixer.A_log"

    def swap(state):
        state[name] = state[name][[0, 1, 3, 2]]

    perturb(out, swap)
    for block in (32 * 2**20, 8):
        monkeypatch.setattr(derive, "_BLOCK_BYTES", block)
        with pytest.raises(CheckpointError) as error:
            derive_widths(checkpoint, {"S": out})
        # Slice head 2 is the first head of group 1: full head 3.
        assert f"{name} of S" in str(error.value)
        assert "at [2] where the full one has" in str(error.value)
        assert "at [3];" in str(error.value)
    perturb(out, swap)
    assert derive_widths(checkpoint, {"S": out})["widths"]["S"] == {"mamba_num_heads": 4}

    matrix = "backbone.layers.0.mixer.out_proj.weight"
    perturb(out, lambda state: state[matrix][7, 40].add_(1e-3))
    with pytest.raises(CheckpointError, match=r"out_proj.* at \[7, 40\] .* at \[7, 56\]"):
        derive_widths(checkpoint, {"S": out})
    perturb(out, lambda state: state.pop(matrix))  # compared where present
    assert derive_widths(checkpoint, {"S": out})["widths"]["S"] == {"mamba_num_heads": 4}
    perturb(out, lambda state: state.update({matrix: torch.zeros(3, 4)}))
    with pytest.raises(CheckpointError, match=r"out_proj\.weight of S must have shape"):
        derive_widths(checkpoint, {"S": out})


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"hidden_size": 112}, WidthError, r"'S': hidden_size must be at most 96"),
        ({"hidden_size": 40}, CheckpointError, "slice S .*hidden_size"),
        ({"mamba_num_heads": 5}, CheckpointError, "slice S .*mamba_num_heads"),
        ({"n_routed_experts": 99}, WidthError, r"'S': n_routed_experts must be at most"),
        ({"vocab_size": 96}, CheckpointError, "vocab_size of S must be"),
        ({"num_key_value_heads": 1}, CheckpointError, "num_key_value_heads of S"),
        (
            {"hybrid_override_pattern": "M*", "num_hidden_layers": 2},
            CheckpointError,
            "skips layers",
        ),
    ],
)
def test_derive_refuses(tmp_path, changes, error, match):
    config, checkpoint = make(
        tmp_path,
        0,
        per_layer=False,
        hybrid_override_pattern="M*E",
        hidden_size=96,
        n_groups=2,
        mamba_num_heads=8,
        num_key_value_heads=2,
        num_attention_heads=4,
    )
    path = tmp_path / "slice.json"
    path.write_text(json.dumps({**config, **changes}))
    with pytest.raises(error, match=match):
        derive_widths(checkpoint, slice_configs={"S": path})


def test_derive_names(tmp_path):
    _, checkpoint = make(tmp_path, 0, per_layer=False)
    with pytest.raises(WidthError, match="full twice"):
        derive_widths(checkpoint, {"full": checkpoint.folder})
    with pytest.raises(WidthError, match="got none"):
        derive_widths(checkpoint)
    with pytest.raises(CheckpointError, match=r"absent\.json"):
        derive_widths(checkpoint, slice_configs={"S": tmp_path / "absent.json"})
