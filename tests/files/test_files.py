"""Files from elsewhere: JSON within bounds, no file outside the folder, and everything that is read
fetched as well."""

from __future__ import annotations

import ast
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import tokenizers
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given, strategies as st

import elastic_infer
from elastic_infer.checkpoint.checkpoint import Checkpoint
from elastic_infer.checkpoint.hub import HUB_FILES, resolve_folder
from elastic_infer.engine.loading import read_generation_config
from elastic_infer.errors import CheckpointError, ElasticError
from elastic_infer.files import reading as files
from elastic_infer.text.tokenizer import Tokenizer
from support import engines, tiny

PACKAGE = Path(elastic_infer.__file__).parent
NUMBERS = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False)
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner) | st.dictionaries(LEAVES.filter(str).map(str), inner),
    max_leaves=20,
)


@given(JSON)
def test_json_is_read_as_python_reads_it(value):
    text = json.dumps(value)
    assert files.parse_json(text, "it") == json.loads(text)


@given(st.text(max_size=60) | st.text("[]{}:,\"'\\u0d8e1-.tfn", max_size=60))
def test_any_text_is_json_or_refused(text):
    try:
        want = json.loads(text)
    except (ValueError, RecursionError):
        with pytest.raises(CheckpointError, match="it must be readable JSON"):
            files.parse_json(text, "it")
        return
    try:
        assert repr(files.parse_json(text, "it")) == repr(want)
    except CheckpointError:
        assert "\\u" in text  # a lone surrogate


BAD_JSON = {
    "a depth that recursion does not reach": ("[" * 101 + "]" * 101, "at most 100 levels"),
    "a depth that parsing does not reach": ("[" * 10**5, "at most 100 levels"),
    "an integer beyond floats": ("1" * 301, "an integer of 301 digits"),
    "an integer that Python refuses": ("1" * 5000, "an integer of 5000 digits"),
    "half a surrogate pair": ('{"a": ["\\ud800"]}', "surrogates not allowed"),
    "nothing": ("", "must be readable JSON"),
    "another type": ("[1]", "must be a JSON object, got list"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json_is_refused(tmp_path, case):
    text, message = BAD_JSON[case]
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        files.read_json(tmp_path / "a.json", "a.json", dict)


def fifo(path):
    os.mkfifo(path)


def sparse(path):
    with open(path, "wb") as stream:
        stream.truncate(2**43)


ODD = {
    "a pipe": fifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "eight terabytes of nothing": sparse,
    "no UTF-8": lambda path: path.write_bytes(b'{"a": "\xff\xfe"}'),
}
EVERY_FILE = (
    "config.json",
    "elastic_widths.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "hf_quant_config.json",
    "model.safetensors.index.json",
    "model.safetensors",
)


def open_all(folder):
    """Reads every file of a folder; what an engine does before it reads weights."""
    found = Checkpoint.open(folder, config_home=folder)
    read_generation_config(folder)
    return found, Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint with every file that the library reads."""
    folder = engines.write_text_model(
        tmp_path_factory.mktemp("whole") / "m",
        generation_config={"temperature": 0.5},
        elastic_widths=engines.base_widths(),
        special_tokens_map={"pad_token": "<|end|>"},
    )
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (folder / "chat_template.jinja").write_text(engines.CHAT_TEMPLATE)
    return folder


@pytest.mark.parametrize("name", EVERY_FILE)
@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_file_is_refused_without_waiting(tmp_path, whole, name, kind):
    """Pipes, devices, folders, links and absurd sizes in the place of every file that is read."""
    folder = shutil.copytree(whole, tmp_path / "m")
    path = folder / name
    path.unlink(missing_ok=True)
    ODD[kind](path)
    with pytest.raises(ElasticError):
        open_all(folder)


@pytest.mark.parametrize(
    "name", ["x" * 5000, "a\0b", "~nobody-of-that-name/x", "", 5, None, "\ud800"]
)
def test_names_that_no_file_can_have(tmp_path, whole, name):
    for read in (Checkpoint.open, lambda n: Checkpoint.open(whole, widths=n or [])):
        with pytest.raises(ElasticError):
            read(name)


# No file outside the folder ----------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    return tiny.write_tiny(tmp_path / "m" / "model", seed=3, shards=2)


def point(folder, file):
    """Moves the second shard and lets the index name it so."""
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    old = sorted(set(data["weight_map"].values()))[1]
    names = {name: file if where == old else where for name, where in data["weight_map"].items()}
    index.write_text(json.dumps({"weight_map": names}))
    return folder / old


@pytest.mark.parametrize(
    "name",
    [
        "../other.safetensors",
        "{}/other.safetensors",
        "..",
        ".",
        "",
        "sub/other.safetensors",
        "sub\\x",
        "x" * 5000,
        "a\0b",
        5,
        None,
        ["a"],
    ],
)
def test_an_index_names_files_of_its_own_folder(tmp_path, sharded, name):
    """Absolute paths, ways up and down, and names that are none: also where the file is there."""
    name = name.format(tmp_path / "m") if isinstance(name, str) else name
    old = point(sharded, name)
    (sharded / "sub").mkdir()
    for place in (tmp_path / "m", sharded / "sub"):
        shutil.copy(old, place / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"its own folder|must hold every file"):
        Checkpoint.open(sharded)


def test_links_of_a_download_cache_are_followed(tmp_path, sharded):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in list(sharded.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    assert Checkpoint.open(sharded).names


def test_one_whole_file_beside_an_index_of_files_that_are_gone(tmp_path, caplog):
    folder = tiny.write_tiny(tmp_path / "m", seed=3)
    want = Checkpoint.open(folder).fingerprint
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Checkpoint.open(folder).fingerprint == want
    assert "is read in their place" in caplog.text


# What is read is fetched -------------------------------------------------------------------------


def test_everything_that_is_read_is_fetched(whole):
    """Python's own record of opened files, beside the Hub client's filter."""
    opened: list[str] = []
    recording = [True]

    def hook(event, arguments):
        if recording and event == "open" and str(arguments[0]).startswith(f"{whole}{os.sep}"):
            opened.append(os.path.relpath(arguments[0], whole))

    sys.addaudithook(hook)
    _, tokenizer = open_all(whole)
    recording.clear()
    opened += ["tokenizer.json", "model.safetensors"]  # opened by Rust
    assert set(EVERY_FILE) - set(opened) <= {"hf_quant_config.json", "model.safetensors.index.json"}
    wanted = [*opened, "hf_quant_config.json", "model.safetensors.index.json"]
    assert set(filter_repo_objects(wanted, allow_patterns=[*HUB_FILES])) == set(wanted)
    assert sorted(tokenizer._templates.templates) == ["default", "tool_use"]


def test_an_incomplete_snapshot_opens_where_nothing_is_missed(tmp_path, whole, monkeypatch):
    """Without a network the Hub client refuses a snapshot that lacks any of the files asked for:
    those that are never read are not asked for."""
    import huggingface_hub
    from huggingface_hub import _snapshot_download as client
    from huggingface_hub.utils import filter_repo_objects

    assert client  # the version whose listing this stands for
    listing = [
        *EVERY_FILE,
        "tokenizer.model",
        "vocab.json",
        "consolidated.safetensors",
        "tokenizer.json.bak",
        "README.md",
    ]
    here = {str(path.relative_to(whole)) for path in whole.rglob("*")}
    here |= {"hf_quant_config.json", "model.safetensors.index.json"}

    def snapshot(repo, allow_patterns, revision=None, local_files_only=False):
        missing = set(filter_repo_objects(listing, allow_patterns=allow_patterns)) - here
        if missing or not local_files_only:
            raise OSError(f"incomplete: {sorted(missing)}")
        return str(whole)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_folder("some/model") == whole
    here.discard("generation_config.json")  # this one is read
    with pytest.raises(CheckpointError, match="incomplete"):
        resolve_folder("some/model")


# One reader, one wrapper -------------------------------------------------------------------------


def test_panics_of_other_libraries_are_refusals(tmp_path, whole):
    folder = shutil.copytree(whole, tmp_path / "m")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(BaseException) as panic:  # the library's own, which is no Exception
        tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert not isinstance(panic.value, Exception)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: must be a tokenizer"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, CheckpointError])
def test_what_is_meant_to_pass_passes(kind):
    with pytest.raises(kind), files.foreign("it must be read"):
        raise kind


def test_json_and_tensors_of_files_have_one_reader():
    """`json.load(s)` and `safe_open` are called where their errors and bounds are dealt with."""
    readers: dict[str, set[str]] = {"json": set(), "safetensors": set()}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node.func)
            if call in ("json.load", "json.loads"):
                readers["json"].add(name)
            if call.rpartition(".")[2] in ("safe_open", "load_file"):
                readers["safetensors"].add(name)
    # In memory: what a decoder of the tokenizer says, and the arguments in a caller's messages.
    in_memory = {"text/stream_rule.py", "text/messages.py"}
    assert readers["json"] == {"files/reading.py"} | in_memory
    assert readers["safetensors"] == {"checkpoint/tensor_files.py"}
