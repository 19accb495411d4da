"""Opening checkpoints: what is read, what is refused, and by which name."""

from __future__ import annotations

import json
import logging
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from elastic_infer.checkpoint.checkpoint import Checkpoint
from elastic_infer.checkpoint.derive import write_widths
from elastic_infer.checkpoint.hub import config_folder, is_download_cache, resolve_folder
from elastic_infer.checkpoint.layout import expected_shapes
from elastic_infer.checkpoint.tensor_files import fingerprint
from elastic_infer.errors import CheckpointError, WidthError
from support import tiny


def rewrite(folder, change):
    """Applies ``change`` to the folder's single safetensors file."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


@pytest.fixture
def config():
    return tiny.tiny_config(7)


@pytest.fixture
def table(config):
    return tiny.tiny_widths(config, 7, count=3, per_layer=True)


@pytest.fixture
def folder(tmp_path, config, table):
    return tiny.write_tiny(tmp_path / "model", config, table, seed=7)


def open_quiet(folder, tmp_path, **arguments):
    return Checkpoint.open(folder, config_home=tmp_path / "home", **arguments)


@pytest.mark.parametrize("seed", range(6))
def test_opens_every_shape(tmp_path, seed):
    config = tiny.tiny_config(seed)
    shards, dtype = 1 + seed % 3, (torch.float32, torch.bfloat16)[seed % 2]
    table = tiny.tiny_widths(config, seed)
    folder = tiny.write_tiny(tmp_path / "m", config, table, dtype, seed, shards)
    checkpoint = open_quiet(folder, tmp_path)
    state = tiny.tiny_state_dict(config, dtype, seed)
    assert expected_shapes(checkpoint.config) == tiny.tensor_shapes(config)
    assert set(checkpoint.names) == set(state)
    assert set(checkpoint.widths) == set(table["widths"])
    assert checkpoint.default_width == "L"
    assert checkpoint.folder == folder
    for name, tensor in state.items():
        assert checkpoint.shape_of(name) == tuple(tensor.shape)
        assert checkpoint.dtype_of(name) == tensor.dtype
        assert torch.equal(checkpoint.tensor(name), tensor)


def test_tensor_pieces(folder, config, tmp_path):
    checkpoint = open_quiet(folder, tmp_path)
    state = tiny.tiny_state_dict(config, seed=7)
    layer = config["hybrid_override_pattern"].index("M")
    mixer = f"backbone.layers.{layer}.mixer"
    whole = state[f"{mixer}.in_proj.weight"]
    rows, cols = [5, 6, 7, 2, 9, 0], [1, 2, 3, 8]
    for r, c in [
        (None, None),
        (slice(3, 9), None),
        (None, slice(0, 16)),
        (slice(1, None), slice(2, 20)),
        (rows, None),
        (None, cols),
        (rows, cols),
        (rows, slice(4, 5)),
        (slice(0, 0), None),
    ]:
        got = checkpoint.tensor(f"{mixer}.in_proj.weight", r, c)
        want = whole[slice(None) if r is None else r][:, slice(None) if c is None else c]
        assert torch.equal(got, want), (r, c)
        assert got.is_contiguous()
        assert got.untyped_storage().nbytes() == got.numel() * got.element_size()
    conv = state[f"{mixer}.conv1d.weight"]
    assert torch.equal(checkpoint.tensor(f"{mixer}.conv1d.weight", rows), conv[rows])
    a_log = state[f"{mixer}.A_log"]
    assert torch.equal(checkpoint.tensor(f"{mixer}.A_log", [1, 0]), a_log[[1, 0]])
    with pytest.raises(ValueError, match=r"rows of .*A_log"):
        checkpoint.tensor(f"{mixer}.A_log", [len(a_log)])
    with pytest.raises(ValueError, match="end at or before"):
        checkpoint.tensor(f"{mixer}.in_proj.weight", None, slice(0, whole.shape[1] + 1))
    with pytest.raises(ValueError, match="step 1"):
        checkpoint.tensor(f"{mixer}.in_proj.weight", slice(0, 4, 2))
    with pytest.raises(ValueError, match="cols must be None"):
        checkpoint.tensor(f"{mixer}.A_log", None, slice(0, 1))
    with pytest.raises(CheckpointError, match="no model tensor nothing"):
        checkpoint.tensor("nothing")


def test_missing_tensor(folder, tmp_path):
    rewrite(folder, lambda state: state.pop("backbone.layers.1.norm.weight"))
    with pytest.raises(CheckpointError, match=r"must hold backbone\.layers\.1\.norm\.weight"):
        open_quiet(folder, tmp_path)


def test_misshapen_tensor(folder, config, tmp_path):
    wrong = [config["vocab_size"] + 1, config["hidden_size"]]
    rewrite(folder, lambda state: state.update({"lm_head.weight": torch.zeros(wrong)}))
    with pytest.raises(CheckpointError) as error:
        open_quiet(folder, tmp_path)
    assert "lm_head.weight" in str(error.value)
    assert str(wrong) in str(error.value)


def test_unsupported_dtype(folder, tmp_path):
    def change(state):
        state["lm_head.weight"] = state["lm_head.weight"].to(torch.int16)

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight must be a float, E4M3 or packed"):
        open_quiet(folder, tmp_path)


@pytest.mark.parametrize("keep", [4, 300, -1])
def test_truncated_safetensors(folder, tmp_path, keep):
    path = folder / "model.safetensors"
    os.truncate(path, keep if keep > 0 else path.stat().st_size + keep)
    with pytest.raises(CheckpointError, match=r"model\.safetensors must be a complete"):
        open_quiet(folder, tmp_path)


def test_no_weights_no_config_no_folder(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"must hold model\.safetensors or"):
        open_quiet(folder, tmp_path)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json must be readable JSON"):
        open_quiet(folder, tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"must hold config\.json"):
        open_quiet(folder, tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        open_quiet(tmp_path / "absent", tmp_path)


@pytest.mark.parametrize("damage", ["shard", "map", "twice"])
def test_damaged_index(tmp_path, config, damage):
    folder = tiny.write_tiny(tmp_path / "m", config, seed=1, shards=3)
    first = folder / "model-00001-of-00003.safetensors"
    second = folder / "model-00002-of-00003.safetensors"
    if damage == "shard":
        second.unlink()
        match = second.name
    elif damage == "map":
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["lm_head.weight"] = first.name
        content["weight_map"]["backbone.norm_f.weight"] = first.name
        index.write_text(json.dumps(content))
        match = "must be in model-00001-of-00003"
    else:
        save_file({**load_file(second), **load_file(first)}, second)
        match = "must be in one file"
    with pytest.raises(CheckpointError, match=match):
        open_quiet(folder, tmp_path)


def test_mtp_skipped_and_extras_logged(folder, tmp_path, caplog):
    plain = open_quiet(folder, tmp_path)

    def change(state):
        state["mtp.layers.0.norm.weight"] = torch.ones(4)
        state["mtp.layers.1.norm.weight"] = torch.ones(4)
        state["surplus"] = torch.ones(4)

    rewrite(folder, change)
    with caplog.at_level(logging.INFO, "elastic_infer"):
        checkpoint = open_quiet(folder, tmp_path)
    name = "elastic_infer.checkpoint.checkpoint"
    messages = [r.getMessage() for r in caplog.records if r.name == name]
    assert [m for m in messages if "mtp." in m] == [
        "checkpoint: 2 mtp.* tensors (token look-ahead) are skipped"
    ]
    assert [m for m in messages if "surplus" in m]
    assert checkpoint.names == plain.names
    assert checkpoint.fingerprint == plain.fingerprint
    with pytest.raises(CheckpointError):
        checkpoint.tensor("mtp.layers.0.norm.weight")


def test_fingerprint(tmp_path, config):
    def of(name, seed=3, shards=1, dtype=torch.float32):
        folder = tiny.write_tiny(tmp_path / name, config, None, dtype, seed, shards)
        return open_quiet(folder, tmp_path).fingerprint

    first = of("a")
    assert len(first) == 64
    assert first == of("b", shards=2) == of("c", shards=5)
    assert len({first, of("d", seed=4), of("e", dtype=torch.bfloat16)}) == 3
    folder = tmp_path / "a"
    for name, at in (("lm_head.weight", (0, 0)), ("backbone.norm_f.weight", (5,))):
        before = open_quiet(folder, tmp_path).fingerprint
        rewrite(folder, lambda state, name=name, at=at: state[name][at].add_(1))
        assert open_quiet(folder, tmp_path).fingerprint != before, name


def test_fingerprint_samples_large_tensors(tmp_path):
    class Files:
        def __init__(self, tensor):
            self.data, self.read = tensor, 0

        def shape_of(self, name):
            return tuple(self.data.shape)

        def dtype_of(self, name):
            return self.data.dtype

        def tensor(self, name, rows, cols):
            out = self.data if rows is None else self.data[rows]
            out = (out if cols is None else out[:, cols]).contiguous()
            self.read += out.numel()
            return out

    for shape, at in (((900, 800), (899, 799)), ((70000,), (69999,)), ((5000, 1, 4), (4999, 0, 3))):
        files = Files(torch.zeros(shape))
        before = fingerprint(files, ["x"])
        assert files.read <= 768
        files.data[at] = 1
        assert fingerprint(files, ["x"]) != before


def narrow(config, size):
    return {"version": 1, "default_width": "a", "widths": {"a": {}, "b": {"hidden_size": size}}}


def test_table_order(tmp_path):
    config = tiny.tiny_config(3, hidden_size=96)
    home = tmp_path / "home"

    def size():
        return Checkpoint.open(folder, config_home=home).widths["b"].hidden_size

    folder = tiny.write_tiny(tmp_path / "none", config, seed=3)
    bare = Checkpoint.open(folder, config_home=home)
    assert list(bare.widths) == ["full"]
    assert bare.default_width == "full"
    folder = tiny.write_tiny(tmp_path / "m", config, narrow(config, 16), seed=3)
    assert size() == 16
    users = config_folder(home) / f"{bare.fingerprint}.json"
    users.parent.mkdir(parents=True)
    users.write_text(json.dumps(narrow(config, 32)))
    assert size() == 32
    (folder / "elastic_widths.json").write_text(json.dumps(narrow(config, 48)))
    assert size() == 48
    path = tmp_path / "given.json"
    path.write_text(json.dumps(narrow(config, 64)))
    opened = Checkpoint.open(folder, widths=path, config_home=home)
    assert opened.widths["b"].hidden_size == 64
    assert list(opened.widths) == ["b", "a"]  # ascending active parameters
    given = Checkpoint.open(folder, widths=narrow(config, 80), config_home=home)
    assert given.widths["b"].hidden_size == 80
    with pytest.raises(CheckpointError, match="widths must name a JSON file"):
        Checkpoint.open(folder, widths=tmp_path / "absent.json", config_home=home)


@pytest.mark.parametrize("size", [112, 40])
def test_bad_sizes_name_the_table(tmp_path, size):
    config = tiny.tiny_config(3, hidden_size=96)
    folder = tiny.write_tiny(tmp_path / "m", config, seed=3)
    (folder / "elastic_widths.json").write_text(json.dumps(narrow(config, size)))
    with pytest.raises(WidthError, match=r"hidden_size.*elastic_widths\.json"):
        open_quiet(folder, tmp_path)


def test_resolve(tmp_path, folder, monkeypatch):
    assert resolve_folder(folder) == folder
    with pytest.raises(CheckpointError, match="revision must be None"):
        resolve_folder(folder, "main")
    with pytest.raises(CheckpointError, match="which is a file"):
        resolve_folder(folder / "config.json")

    import huggingface_hub

    calls = []

    def without_network(repo, **arguments):
        calls.append(arguments.get("local_files_only", False))
        if not calls[-1]:
            raise RuntimeError("no route to host")
        if repo == "some/cached":
            return str(folder)
        raise FileNotFoundError("nothing in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", without_network)
    assert resolve_folder("some/cached") == folder
    assert calls == [False, True]
    with pytest.raises(CheckpointError) as error:
        resolve_folder("some/model", "v1")
    for part in ("some/model", "v1", "no route to host", "nothing in the cache"):
        assert part in str(error.value)


def make_cache(tmp_path, folder):
    """A folder laid out as the Hub client's cache: snapshots of links into blobs."""
    root = tmp_path / "hub" / "models--some--model"
    snapshot = root / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = root / "blobs" / f"blob{number}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
    return snapshot


def test_write_widths(tmp_path, folder, config, table):
    home = tmp_path / "home"
    table = {**table, "default_width": "S"}
    assert not is_download_cache(folder)
    path = tmp_path / "mine.json"
    assert write_widths(table, path) == path
    assert json.loads(path.read_text()) == table
    assert write_widths(table, folder, config_home=home) == folder / "elastic_widths.json"
    assert Checkpoint.open(folder, config_home=home).default_width == "S"
    assert not home.exists()
    bad = {"version": 1, "default_width": "S", "widths": {"S": {"hidden_size": 17}}}
    with pytest.raises(WidthError):
        write_widths(bad, folder)
    assert json.loads((folder / "elastic_widths.json").read_text()) == table


def test_write_widths_beside_a_cache(tmp_path, folder, table):
    home = tmp_path / "home"
    snapshot = make_cache(tmp_path, folder)
    assert is_download_cache(snapshot)
    listing = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in snapshot.parents[1].rglob("*")}
    table = {**table, "default_width": "M"}
    written = write_widths(table, snapshot, config_home=home)
    assert written.parent == config_folder(home)
    assert Checkpoint.open(snapshot, config_home=home).default_width == "M"
    with pytest.raises(CheckpointError, match="download cache"):
        write_widths(table, snapshot / "elastic_widths.json", config_home=home)
    after = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in snapshot.parents[1].rglob("*")}
    assert after == listing
