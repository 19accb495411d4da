"""From a folder or Hub id to an engine: shards, tables, what is read, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch

from elastic_infer import CheckpointError, InvalidRequest, SamplingParams, WidthError
from elastic_infer.checkpoint.checkpoint import Checkpoint
from elastic_infer.checkpoint.derive import derive_widths
from elastic_infer.checkpoint.layout import tensor_selections
from elastic_infer.checkpoint.slicing import slice_checkpoint
from support import tiny
from support.engines import (
    HANG,
    base_config,
    base_engine,
    base_widths,
    draw,
    open_engine,
    text_engine,
)

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_tiny(tmp_path_factory.mktemp("model"), base_config(), base_widths(), seed=7)


@pytest.fixture(scope="module")
def expected(folder):
    """Scores of every width."""
    with open_engine(folder) as engine:
        return {name: engine.score(draw(70), width=name) for name in engine.widths}


# -- what is read -----------------------------------------------------------------------------


def test_shards_change_no_bit(tmp_path, expected):
    tiny.write_tiny(tmp_path, base_config(), base_widths(), seed=7, shards=5)
    with open_engine(tmp_path) as engine:
        for name, want in expected.items():
            assert torch.equal(engine.score(draw(70), width=name), want)


@pytest.mark.parametrize("tagged", [True, False], ids=["tagged infinity", "plain Infinity"])
def test_both_spellings_of_infinity(tmp_path, expected, tagged):
    tiny.write_tiny(tmp_path, base_config(), base_widths(), seed=7, tagged_infinity=tagged)
    assert ('"__float__"' in (tmp_path / "config.json").read_text()) == tagged
    with open_engine(tmp_path) as engine:
        assert torch.equal(engine.score(draw(70)), expected["L"])


def test_max_width_reads_and_keeps_nothing_outside(folder, expected):
    read = {}
    whole_bytes, kept_bytes = 0, {}
    with open_engine(folder) as engine:
        whole_bytes = engine.core.model.weights.nbytes
    with open_engine(
        folder, max_width="M", progress=lambda n, b: read.__setitem__(n, read.get(n, 0) + b)
    ) as engine:
        assert list(engine.widths) == ["S", "M"] and engine.default_width == "M"
        for name in ("S", "M"):
            assert torch.equal(engine.score(draw(70), width=name), expected[name])
        with pytest.raises(WidthError, match="must be one of S, M, got 'L'"):
            engine.score(draw(5), width="L")
        assert engine.core.model.weights.nbytes < whole_bytes
        width, checkpoint = engine.widths["M"], engine.core.checkpoint
        for name, selection in tensor_selections(checkpoint.config, width).items():
            kept_bytes[name] = checkpoint.selected(name, selection).numel() * 4
    assert read == kept_bytes, "exactly the tensors, rows and columns of the width, once"


def test_max_width_of_the_file_reads_little(folder, monkeypatch):
    """Seen at the file itself: no row, expert or column outside the width is touched."""
    from elastic_infer.checkpoint.tensor_files import TensorFiles

    touched = {}
    plain = TensorFiles.tensor

    def watch(self, name, rows=None, cols=None):
        out = plain(self, name, rows, cols)
        touched[name] = touched.get(name, 0) + out.numel()
        return out

    monkeypatch.setattr(TensorFiles, "tensor", watch)
    with open_engine(folder, max_width="S") as engine:
        engine.score(draw(5))
    assert not any(".experts.4." in name or ".experts.5." in name for name in touched)
    assert touched["backbone.embeddings.weight"] == 130 * 48


def test_hub_ids_offline(tmp_path, folder):
    """A cache laid out as the Hub client does serves an id without a network, in a process of its
    own, and is only read."""
    root = tmp_path / "hub" / "models--some--model"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    (root / "refs" / "v1").write_text(commit)
    (root / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        (root / "blobs" / f"b{number}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/b{number}")
    before = sorted((p, p.stat().st_mtime_ns) for p in root.rglob("*"))
    code = (
        "from elastic_infer import CheckpointError, Engine\n"
        "for revision in (None, 'v1'):\n"
        "    with Engine.from_pretrained('some/model', revision=revision, max_model_len=64) as e:\n"
        "        print(','.join(e.widths), e.fingerprint)\n"
        "try:\n"
        "    Engine.from_pretrained('some/other')\n"
        "except CheckpointError as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=HANG
    )
    assert done.returncode == 0, done.stderr
    first, second, refused = done.stdout.splitlines()
    assert first == second == f"S,M,L {Checkpoint.open(folder).fingerprint}"
    assert "some/other must be a folder" in refused
    assert sorted((p, p.stat().st_mtime_ns) for p in root.rglob("*")) == before


def test_slices_give_the_table_back_and_serve_alike(tmp_path, folder, expected):
    """Extract widths, forget the table, derive it from the slices: the engine serves the same
    bits, from the slice itself too."""
    checkpoint = Checkpoint.open(folder)
    for name in ("S", "M"):
        slice_checkpoint(checkpoint, name, tmp_path / name)
    bare = tiny.write_tiny(tmp_path / "bare", base_config(), None, seed=7)
    table = derive_widths(
        bare, {"S": tmp_path / "S"}, {"M": tmp_path / "M" / "config.json"}, full_name="L"
    )
    with open_engine(bare, widths=table) as engine:
        for name, want in expected.items():
            assert torch.equal(engine.score(draw(70), width=name), want)
    for name in ("S", "M"):
        with open_engine(tmp_path / name) as engine:
            assert list(engine.widths) == ["full"]
            got = engine.score(draw(70))
            assert torch.equal(got, expected[name]), "law 3, for the whole model"


def test_width_tables_from_dict_and_file(tmp_path, folder, expected):
    bare = tiny.write_tiny(tmp_path / "bare", base_config(), None, seed=7)
    path = tmp_path / "table.json"
    path.write_text(json.dumps(base_widths()))
    for widths in (base_widths(), path, base_widths()["widths"]):
        with open_engine(bare, widths=widths) as engine:
            assert torch.equal(engine.score(draw(70), width="M"), expected["M"])
    with open_engine(bare) as engine:
        assert list(engine.widths) == ["full"]
    (bare / "elastic_widths.json").write_text(json.dumps(base_widths()))
    with open_engine(bare) as engine:
        assert list(engine.widths) == ["S", "M", "L"]


def test_bfloat16_storage_chooses_bfloat16(tmp_path):
    tiny.write_tiny(tmp_path, base_config(), base_widths(), torch.bfloat16, 7)
    for dtype, kind in (("auto", torch.bfloat16), ("float32", torch.float32)):
        with open_engine(tmp_path, dtype=dtype) as engine:
            assert engine.core.model.weights.dtype == kind
            out = engine.generate(draw(5), GREEDY, width="S")
            assert len(out.token_ids) == 6


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 128}, "width 'X': hidden_size must be at most 112"),
        ({"hidden_size": 50}, r"hidden_size must be a multiple of 16"),
        ({"mamba_num_heads": 5}, r"mamba_num_heads must be a multiple of 2 \(n_groups\)"),
        ({"num_attention_heads": 3}, r"must be a multiple of 2 \(num_key_value_heads\)"),
        ({"n_routed_experts": 1}, r"must be at least num_experts_per_tok \(2\)"),
        ({"moe_intermediate_size": [32, 96]}, "must be at most 80"),
        ({"moe_intermediate_size": [32, 32, 32]}, "must hold 6 values .* got 3"),
        ({"num_hidden_layers": 3}, "layer skipping is not a width"),
        ({"hidden": 16}, "hidden must be one of"),
        ({"hidden_size": -16}, "must be positive"),
    ],
    ids=str,
)
def test_wrong_sizes(folder, sizes, message):
    with pytest.raises(WidthError, match=message):
        open_engine(folder, widths={"X": sizes})


def damaged(folder, target, edit):
    """A copy of a folder after `edit(state)` of its tensors."""
    shutil.copytree(folder, target)
    state = tiny.tiny_state_dict(base_config(), seed=7)
    edit(state)
    tiny.write_state_dict(target, state)
    return target


def test_missing_and_misshapen_tensors(tmp_path, folder):
    name = "backbone.layers.1.mixer.experts.3.up_proj.weight"
    with pytest.raises(CheckpointError, match=rf"must hold {name} of shape \[80, 112\], got none"):
        open_engine(damaged(folder, tmp_path / "a", lambda s: s.pop(name)))

    def cut(state):
        state[name] = state[name][:64].clone()

    with pytest.raises(CheckpointError, match=rf"{name} must have shape \[80, 112\] .* got \[64"):
        open_engine(damaged(folder, tmp_path / "b", cut))


def test_truncated_and_missing_files(tmp_path, folder):
    broken = tmp_path / "cut"
    shutil.copytree(folder, broken)
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) - 100])
    with pytest.raises(CheckpointError, match=r"model.safetensors must be a complete safetensors"):
        open_engine(broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"must hold model.safetensors or .* got neither"):
        open_engine(broken)
    with pytest.raises(CheckpointError, match="no such folder"):
        open_engine(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"folder must hold config.json"):
        open_engine(tmp_path / "empty")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_generation_config(tmp_path, folder, text):
    broken = tmp_path / "model"
    shutil.copytree(folder, broken)
    (broken / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config.json: must be"):
        open_engine(broken)


def test_unknown_max_width(folder):
    with pytest.raises(WidthError, match="max_width: must be one of S, M, L, got 'XL'"):
        open_engine(folder, max_width="XL")


# -- bad requests: each a clear error, and the engine goes on ---------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with text_engine(tmp_path_factory.mktemp("text")) as engine:
        yield engine


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], r"non-empty list of these, got \[\]"),
        ("", "prompt: must hold at least one token"),
        ([[]], "prompt: must hold at least one token"),
        (["a", ""], "prompt: must hold at least one token"),
        (None, "prompt must be text, a list of token ids, .* got NoneType"),
        (7, "got int"),
        ({"prompt": "x"}, "got dict"),
        (torch.tensor([1, 2]), "got Tensor"),
        ([5, 272], r"token ids must be ints in \[0, 272\), got 272 at position 1"),
        ([5, -1], "got -1 at position 1"),
        ([5, True], "got True at position 1"),
        ([5, 1.5], "must be text or a list of token ids, got int"),
        ([[5, 1.5]], "got 1.5 at position 1"),
        ([5, "a"], "must be text or a list of token ids, got int"),
    ],
    ids=repr,
)
def test_wrong_prompts(engine, prompt, message):
    before = engine.generate("ok", GREEDY).token_ids
    with pytest.raises(InvalidRequest, match=message):
        engine.generate(prompt, GREEDY)
    assert engine.generate("ok", GREEDY).token_ids == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"params": {"temperature": 0}}, "params: must be SamplingParams, got dict"),
        ({"params": [GREEDY]}, r"params: must have one entry per prompt \(2\), got 1"),
        ({"width": ["S"]}, r"width: must have one entry per prompt \(2\), got 1"),
        ({"plan": []}, r"plan: must have one entry per prompt \(2\), got 0"),
        ({"params": SamplingParams(allowed_token_ids=[272])}, "allowed_token_ids must hold ids"),
        ({"params": SamplingParams(logit_bias={300: 1.0})}, "logit_bias must hold ids below"),
        ({"params": SamplingParams(stop_token_ids=[999])}, "stop_token_ids must hold ids below"),
    ],
    ids=str,
)
def test_wrong_arguments_start_nothing(engine, arguments, message):
    before = engine.stats()["requests"]
    with pytest.raises(InvalidRequest, match=message):
        engine.generate(["a", "b"], **arguments)
    assert engine.stats()["requests"] == before


def test_what_needs_a_tokenizer_says_so(folder):
    with open_engine(folder) as bare:
        for call, message in (
            (lambda: bare.generate("text"), "prompt: must be token ids because .* got text"),
            (lambda: bare.chat([{"role": "user", "content": "x"}]), "must have a tokenizer.json"),
            (lambda: bare.generate([5], SamplingParams(stop="x")), "stop: must be empty because"),
            (lambda: bare.generate([5], SamplingParams(bad_words="x")), "bad_words must be empty"),
        ):
            with pytest.raises(InvalidRequest, match=message):
                call()
        assert len(bare.generate([5], GREEDY).token_ids) == 6


def test_wrong_arguments_of_open_load_and_chat_are_refused_by_name(engine):
    """Stands for values of another type, and for such as are too deep."""
    deep: dict = {}
    for _ in range(100_000):
        deep = {"a": deep}
    hello = [{"role": "user", "content": "x"}]
    opening = [
        (
            partial(engine.open, "a", track=v),
            InvalidRequest,
            "open: track must be True or False, got",
        )
        for v in (1, 0, None, "x", [True])
    ]
    loading = [
        (partial(engine.load, v), CheckpointError, "sequence file: path must")
        for v in (None, 5, "", b"\0", [])
    ]
    tools = [
        (partial(engine.chat, hello, tools=v), InvalidRequest, rf"chat: tools.* must {rule}")
        for v, rule in (
            (5, "be a list of dicts"),
            ("x", "be a list of dicts"),
            ([5], "be a list of dicts"),
            ({}, "be a list of dicts"),
            ([deep], ""),
            ([{"a": object()}], "be made of JSON"),
        )
    ]
    for call, error, message in (*opening, *loading, *tools):
        with pytest.raises(error, match=message) as caught:
            call()
        assert len(str(caught.value)) < 2000
    assert engine.stats()["slots_used"] == 0


def test_wrong_calls_on_a_sequence_change_nothing(engine):
    with engine.open("abc", width="S") as sequence:
        sequence.step()
        tokens, runs = sequence.token_ids, sequence.runs
        for call, error, message in (
            (lambda: sequence.append([272]), InvalidRequest, "token_ids: token ids must be"),
            (lambda: sequence.append([]), InvalidRequest, "must hold at least one token"),
            (lambda: sequence.append("x"), InvalidRequest, "got str"),
            (lambda: sequence.step(width="XL"), WidthError, "must be one of S, M, L, got 'XL'"),
            (lambda: sequence.switch("L", "later"), InvalidRequest, "policy: must be 'carry'"),
            (lambda: sequence.switch("L", "window(0)"), InvalidRequest, "must be an int >= 1"),
            (lambda: sequence.rollback(0), InvalidRequest, "length must be an int >= 1, got 0"),
            (lambda: sequence.rollback(99), InvalidRequest, "length must be at most 4, got 99"),
        ):
            with pytest.raises(error, match=message):
                call()
        assert sequence.token_ids == tokens and sequence.runs == runs and sequence.width == "S"
        sequence.step()
    with engine.open() as empty, pytest.raises(InvalidRequest, match="must be appended before"):
        empty.step()


# -- files of sequences -----------------------------------------------------------------------


def rewritten(path, target, change):
    """A sequence file after `change(tensors, metadata)`."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(str(path), "pt") as f:
        metadata = f.metadata()
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, str(target), metadata)
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.update(format="other"), "must be an elastic_infer sequence of version"),
        (lambda t, m: m.update(version="9"), "version '9'"),
        (lambda t, m: m.update(fingerprint="0" * 64), "must belong to these weights"),
        (lambda t, m: m.pop("runs"), "as `save` writes it, got KeyError"),
        (lambda t, m: m.update(runs="[["), "as `save` writes it"),
        (lambda t, m: m.update(runs='[["S", "prefill", 2, true]]'), "width runs of 2 tokens"),
        (lambda t, m: t.pop("mamba.0.ssm"), "must hold mamba.0.ssm as torch.float32"),
        (
            lambda t, m: t.update({"mamba.1.conv": t["mamba.1.conv"][:8].clone()}),
            "must hold mamba.1.conv",
        ),
        (
            lambda t, m: t.update({"attention.0.k": t["attention.0.k"].bfloat16()}),
            "must hold attention.0.k",
        ),
        (lambda t, m: t.update(tokens=t["tokens"] + 500), "token ids must be ints in"),
        (lambda t, m: m.update(widths=m["widths"].replace("48", "64")), "widths of these sizes"),
    ],
)
def test_damaged_sequence_files(engine, tmp_path, change, message):
    path = tmp_path / "s.safetensors"
    with engine.open("abcdef", width="S") as sequence:
        sequence.step(), sequence.step()
        sequence.save(path)
        used = engine.stats()["slots_used"], engine.stats()["pages_used"]
        with pytest.raises(CheckpointError, match=message):
            engine.load(rewritten(path, tmp_path / "changed.safetensors", change))
        assert (engine.stats()["slots_used"], engine.stats()["pages_used"]) == used
        with engine.load(path) as loaded:
            assert torch.equal(loaded.logits(), sequence.logits())


def test_saving_is_whole_or_not_at_all(engine, tmp_path, monkeypatch):
    path = tmp_path / "s.safetensors"
    with engine.open("abc") as sequence:
        sequence.logits()
        sequence.save(path)
        before = path.read_bytes()
        with pytest.raises(CheckpointError, match="must be writable"):
            sequence.save(tmp_path / "nowhere" / "s.safetensors")

        def fails(descriptor, data):
            raise OSError(errno.ENOSPC, "disk full")

        monkeypatch.setattr("os.write", fails)
        with pytest.raises(CheckpointError, match="must be writable, got: disk full; free space"):
            sequence.save(path)
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_file_needs_the_width_it_was_read_by(tmp_path, folder):
    with open_engine(folder) as engine, engine.open(draw(9), width="L") as sequence:
        sequence.logits()
        sequence.save(tmp_path / "s.safetensors")
    path = tmp_path / "s.safetensors"
    with open_engine(folder, max_width="S") as narrow, pytest.raises(WidthError, match="got 'L'"):
        narrow.load(path)
    with base_engine(tmp_path / "again") as engine, engine.load(path) as sequence:
        assert sequence.width == "L"


# Options of an engine, and values of other kinds than theirs.
_ODD = (3, 0.5, None, "x", [], {}, b"auto", torch.float16, torch.ones(2))
_OPTIONS = {
    "dtype": (),
    "isa": (),
    "kv_cache_dtype": (),
    "mamba_ssm_cache_dtype": (),
    "mixing": (),
    "activation_quantization": (),
    "batch_invariant": (),
    "enforce_eager": (),
    "async_scheduling": (),
    "device": (),
    "progress": (None,),
    "threads": (3, None),
    "max_num_batched_tokens": (3,),
    "gpu_memory_utilization": (0.5,),
    "max_waiting": (3, None),
    "max_width": (None,),
}


@pytest.mark.parametrize("name", _OPTIONS)
def test_an_option_of_another_kind_is_refused_by_name(folder, name):
    """Family: any value of any type where `from_pretrained` wants one of a few words, a number, a
    switch or a function."""
    for value in _ODD:
        if not any(value is fine for fine in _OPTIONS[name]):
            with pytest.raises((InvalidRequest, WidthError), match=name):
                open_engine(folder, **{name: value})
