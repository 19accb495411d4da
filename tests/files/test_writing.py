"""Files that the library writes are whole or not there, whatever happens meanwhile.

Families: every call to the file system that fails, meets a full disk, or is the last before the
process is killed; two writers of one place; places where nothing can be written.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from elastic_infer import CheckpointError, WidthError
from elastic_infer.checkpoint.checkpoint import Checkpoint
from elastic_infer.checkpoint.derive import write_widths
from elastic_infer.checkpoint.slicing import slice_checkpoint
from elastic_infer.checkpoint.tensor_files import save_tensors
from elastic_infer.cli import app
from elastic_infer.elastify.sorting import random_order, sort_checkpoint
from elastic_infer.elastify.torch_model import ElasticNemotronH
from elastic_infer.files import writing
from elastic_infer.files.writing import append_line, new_folder, write_json, write_whole
from elastic_infer.quantize.write import choose_formats, quantize_checkpoint
from support import tiny
from support.engines import base_config, base_widths, draw, open_engine
from support.faulty import Disk, Killed, content

WAYS = ("full", "fails", "killed")
PACKAGE = Path(writing.__file__).parent


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Checkpoint:
    """A plain elastic checkpoint with a side file."""
    folder = tmp_path_factory.mktemp("source")
    config = base_config(hybrid_override_pattern="M*")
    tiny.write_tiny(folder, config, base_widths(), torch.float32, seed=7)
    (folder / "generation_config.json").write_text("{}")
    return Checkpoint.open(folder)


@pytest.fixture
def disk(monkeypatch) -> Disk:
    return Disk(monkeypatch)


def opens(folder: Path) -> bool:
    try:
        Checkpoint.open(folder)
    except CheckpointError:
        return False
    return True


# Every call is broken once -----------------------------------------------------------------------


def break_every_call(disk: Disk, act, reset, after) -> None:
    """Does `act` with each of its calls broken in every way, and once more undisturbed.

    reset: puts back what was there. after: told (how it ended: "done", "refused" or "killed", and
    whether the undisturbed run came already).
    """
    reset()
    with disk.broken(None):
        act()
    after("done", True)
    count = len(disk.calls)
    assert count >= 4
    for n in range(count):
        for way in WAYS:
            reset()
            try:
                with disk.broken(n, way):
                    act()
                end = "done"
            except CheckpointError as error:
                end = "refused"
                assert "must be writable, got: " in str(error)
                assert ("; free space there" in str(error)) == (way == "full"), error
            except Killed:
                end = "killed"
            assert (end == "killed") == (way == "killed")
            after(end, False)
            act()
            after("done", True)


def break_a_file(disk: Disk, path: Path, write) -> None:
    """A file is the old or the new one after every broken call, and nothing is left beside it."""
    write()
    new, old = path.read_bytes(), b"old"

    def after(end: str, again: bool) -> None:
        assert path.read_bytes() == new if end == "done" else path.read_bytes() in (old, new)
        if end == "refused":
            assert path.read_bytes() == old
        if end == "done" or again:
            assert [p.name for p in path.parent.iterdir()] == [path.name]

    def reset() -> None:
        shutil.rmtree(path.parent)
        path.parent.mkdir()
        path.write_bytes(old)

    break_every_call(disk, write, reset, after)


def test_a_sequence_file_is_the_old_or_the_new_one(disk, source, tmp_path):
    path = tmp_path / "in" / "s.safetensors"
    path.parent.mkdir()
    with open_engine(source.folder, threads=1) as engine, engine.open(draw(9)) as sequence:
        sequence.step()
        break_a_file(disk, path, lambda: sequence.save(path))
        with engine.load(path) as loaded:
            assert torch.equal(loaded.logits(), sequence.logits())


def test_a_width_table_is_the_old_or_the_new_one(disk, tmp_path):
    path = tmp_path / "in" / "widths.json"
    path.parent.mkdir()
    table = {"version": 1, "widths": {"S": {"hidden_size": 48}}}
    break_a_file(disk, path, lambda: write_widths(table, path))


def _quantize(source: Checkpoint, out: Path) -> None:
    quantize_checkpoint(source, out, choose_formats(source.config, source.names, {"head": "fp8"}))


MAKERS = {
    "slice": lambda source, out: slice_checkpoint(source, "S", out),
    "sharded": lambda source, out: slice_checkpoint(source, "S", out, shard_bytes=60_000),
    "quantize": _quantize,
    "sort": lambda s, out: sort_checkpoint(s, random_order(s.config, 0), out, shard_bytes=150_000),
}


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "empty"),
    [
        ("slice", False),
        ("sharded", True),
        *(
            pytest.param(name, empty, marks=slow)
            for name in MAKERS
            for empty in (False, True)
            if (name, empty) not in (("slice", False), ("sharded", True))
        ),
    ],
)
def test_a_folder_is_complete_or_does_not_open(disk, source, tmp_path, name, empty):
    """Nothing half-written opens, an error leaves what was there, and the next run succeeds."""
    out = tmp_path / "in" / "out"
    MAKERS[name](source, tmp_path / "whole")
    whole = content(tmp_path / "whole")
    assert len(whole) >= 3

    def reset() -> None:
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        if empty:
            out.mkdir()

    def after(end: str, again: bool) -> None:
        if end == "done":
            kept = content(out)  # removing the lock's own folder may have been what failed
            assert {k: v for k, v in kept.items() if again or "/" not in k} == whole
        elif end == "refused":
            assert out.is_dir() == empty or not any(out.iterdir())
            assert not out.is_dir() or not opens(out)
        elif out.is_dir() and opens(out):
            assert {k: v for k, v in content(out).items() if "/" not in k} == whole

    def act() -> None:
        if out.is_dir() and opens(out):  # killed after the last file
            with pytest.raises(CheckpointError, match="must be a new or empty folder"):
                MAKERS[name](source, out)
            shutil.rmtree(out)
        MAKERS[name](source, out)

    break_every_call(disk, act, reset, after)


def test_a_replaced_checkpoint_is_the_old_or_the_new_one_or_does_not_open(disk, tmp_path):
    """`save` of the differentiable model writes over an older one: no mixture of both opens."""
    kept = {}
    for seed in (1, 2):
        config = tiny.tiny_config(3, hybrid_override_pattern="M*")
        tiny.write_tiny(tmp_path / str(seed), config, None, seed=seed)
        model = ElasticNemotronH.load(tmp_path / str(seed))
        model.save(tmp_path / f"saved-{seed}")
        kept[seed] = content(tmp_path / f"saved-{seed}")
    out = tmp_path / "out"

    def reset() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "saved-1", out)

    def after(end: str, again: bool) -> None:
        if end == "done":
            assert content(out) == kept[2]
        elif opens(out):
            found = {k: v for k, v in content(out).items() if not k.endswith(".partial")}
            assert found in (kept[1], kept[2])

    break_every_call(disk, lambda: model.save(out), reset, after)


def test_a_killed_process_leaves_what_the_next_writer_removes(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    child = os.fork()
    if child == 0:
        try:
            write_whole(path, lambda stream: (stream.write(b"half"), os.kill(os.getpid(), 9)))
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    write_whole(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


# Two writers -------------------------------------------------------------------------------------


def test_writers_of_one_file_disturb_each_other_in_nothing(tmp_path):
    """A second writer comes, and is done, while the first one writes; the later rename stays."""
    path = tmp_path / "file"
    seen = []

    def outer(stream) -> None:
        stream.write(b"first, ")
        write_whole(path, "second")
        seen.append(path.read_text())
        stream.write(b"goes on")

    write_whole(path, outer)
    assert seen == ["second"] and path.read_text() == "first, goes on"
    assert list(tmp_path.iterdir()) == [path]


def test_a_second_writer_of_a_folder_is_refused(source, tmp_path):
    out = tmp_path / "out"

    def second(done: int, total: int) -> None:
        with pytest.raises(CheckpointError, match="must have one writer at a time"):
            slice_checkpoint(source, "M", out)

    slice_checkpoint(source, "S", out, second)
    slice_checkpoint(source, "S", tmp_path / "alone")
    assert content(out) == content(tmp_path / "alone")
    with pytest.raises(CheckpointError, match="must be a new or empty folder"):
        slice_checkpoint(source, "M", out)


def test_what_came_into_a_folder_meanwhile_stays(tmp_path):
    out = tmp_path / "out"
    with new_folder(out, "test") as fresh:
        write_json(fresh / "config.json", {})
        (out / "letter.txt").write_text("mine")
    assert content(out) == {"config.json": b"{}\n", "letter.txt": b"mine"}
    with pytest.raises(CheckpointError, match=r"got .* with 'config\.json' in it"):
        new_folder(out, "test").__enter__()
    shutil.rmtree(out)
    with pytest.raises(ZeroDivisionError), new_folder(out, "test"):
        (out / "letter.txt").write_text("mine")
        raise ZeroDivisionError
    assert content(out) == {"letter.txt": b"mine"}


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """One writer at a time all the same; what a killed one left is named, not taken for dead."""

    def flock(descriptor, how):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.flock", flock)
    out = tmp_path / "out"
    write_whole(tmp_path / "file", lambda stream: write_whole(tmp_path / "file", "inner"))
    with new_folder(out, "test") as fresh:
        write_json(fresh / "config.json", {})
        with pytest.raises(CheckpointError, match=r"one writer.*left it: then delete .*\.partial"):
            new_folder(out, "test").__enter__()
    assert content(out) == {"config.json": b"{}\n"}


# Places ------------------------------------------------------------------------------------------

WRITERS = {
    "whole": lambda path: write_whole(path, "x"),
    "json": lambda path: write_json(path, {}),
    "tensors": lambda path: save_tensors(path, {"a": torch.zeros(3)}, {}, "test"),
    "folder": lambda path: new_folder(path, "test").__enter__(),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    "path",
    [
        "x" * 300,
        "file/below",
        "a\0b",
        "bad\ud800",
        5,
        None,
        "~nobody-of-this-name/x",
        "",
        "/proc/new",
    ],
    ids=lambda path: str(path)[:12].encode("ascii", "replace").decode().replace("\0", "0"),
)
def test_places_that_cannot_be_written_are_refused_by_name(tmp_path, monkeypatch, name, path):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    before = content(tmp_path)
    with pytest.raises(CheckpointError, match=r"must be (writable|a |a file's)") as caught:
        WRITERS[name](path)
    assert len(str(caught.value)) < 1000
    assert content(tmp_path) == before


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EMFILE])
@pytest.mark.parametrize("name", WRITERS)
def test_a_refusal_of_the_system_is_one_of_the_library(tmp_path, monkeypatch, name, number):
    def refused(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.open", refused)
    with pytest.raises(CheckpointError, match=f"{os.strerror(number)}; (name|free)"):
        WRITERS[name](tmp_path / "out")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_folders_files_pipes_and_devices(tmp_path):
    """A folder is no file; a pipe and a device are written to, and stay what they are."""
    with pytest.raises(CheckpointError, match="a folder of this name"):
        write_whole(tmp_path, "x")
    with pytest.raises(CheckpointError, match="make its folder first"):
        write_whole(tmp_path / "none" / "file", "x")
    with pytest.raises(CheckpointError, match=r"No space left.*; free space there"):
        write_whole("/dev/full", "x")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(CheckpointError, match="must be writable"):  # nothing reads it
        write_whole(pipe, "x")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, "told")
    assert os.read(reader, 9) == b"told" and pipe.is_fifo()
    os.close(reader)
    (tmp_path / "target").write_text("kept")
    (tmp_path / "link").symlink_to("target")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").read_text() == "new" and (tmp_path / "target").read_text() == "kept"
    with pytest.raises(CheckpointError, match="must be writable"):
        append_line(tmp_path / "none" / "file", "x", "test")


def test_a_folder_that_cannot_be_listed_is_written_to(tmp_path, monkeypatch):
    def refused(folder):
        raise PermissionError(errno.EACCES, "no listing")

    monkeypatch.setattr("os.listdir", refused)
    assert write_whole(tmp_path / "file", "x").read_text() == "x"


@pytest.mark.parametrize("empty", [np.empty(0, np.int32), np.empty((0, 4)), np.empty((3, 0)), b""])
def test_empty_pieces_are_written(tmp_path, empty):
    write_whole(tmp_path / "f", lambda stream: (stream.write(b"a"), stream.write(empty)))
    assert (tmp_path / "f").read_bytes() == b"a"


@pytest.mark.parametrize(
    "table",
    [{1, 2}, {"widths": object()}, [10**5000], {(1, 2): 3}],
    ids=["set", "object", "int", "key"],
)
def test_a_width_table_that_is_no_json_is_refused(tmp_path, table):
    with pytest.raises(WidthError, match="table must be what JSON can hold"):
        write_widths(table, tmp_path / "t.json")
    knot = {}
    knot["again"] = knot
    with pytest.raises(WidthError, match="table must be what JSON can hold"):
        write_widths(knot, tmp_path / "t.json")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_a_library_on_a_full_disk_names_the_disk(disk, tmp_path):
    """torch's own error for a stream that fails says nothing of the disk."""
    state = {"a": torch.zeros(9)}
    with pytest.raises(CheckpointError, match="free space"), disk.broken(2, "full"):
        write_whole(tmp_path / "state.pt", lambda stream: torch.save(state, stream))
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_says_it_in_one_line(source, tmp_path, monkeypatch):
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    model, out = str(source.folder), tmp_path / "out"
    given = ["slice", model, "--width", "S", "--out"]
    (tmp_path / "file").write_text("mine")
    ways = [[*given, str(tmp_path / "file" / "x")], [*given, "x" * 300], [*given, "/proc/x"]]
    for arguments in ways:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.output
    sliced = slice_checkpoint(source, "S", tmp_path / "S")
    monkeypatch.setattr("os.write", full)
    table = tmp_path / "t.json"
    for arguments in (
        [*given, str(out)],
        ["quantize", model, "--out", str(out), "--layers", "head"],
        ["widths", model, "--slice-config", f"S={sliced}/config.json", "--out", str(table)],
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and "free space there" in result.stderr, result.output
        assert len(result.stderr.splitlines()) == 1 and not out.exists() and not table.exists()


@pytest.mark.parametrize("charset", ["utf-8", "ascii"])
def test_the_command_line_prints_any_path(source, tmp_path, charset):
    """A path that is no UTF-8, in a locale with and without UTF-8, in what is told and refused."""
    out = tmp_path / os.fsdecode(b"caf\xe9-\xff")
    given = ["slice", str(source.folder), "--width", "S", "--out", str(out)]
    for code in (0, 2):  # written; then refused, as it is there
        result = CliRunner(charset=charset).invoke(app, given)
        assert result.exit_code == code and "caf\\udce9-\\udcff" in result.output, result.output
    assert (out / "config.json").is_file()


def test_all_of_the_library_writes_in_one_place():
    """No file is made, replaced or filled outside writing.py."""
    pattern = re.compile(
        r"\.write_(text|bytes)\(|\bsave_file\(|\bcopy(file|2|tree)?\((?=.*(folder|path|name|out))"
        r"|\.mkdir\(|os\.(replace|rename|open|mkdir)\(|\bopen\([^)]*[\"'][wax]\+?b?[\"']"
        r"|\.savefig\((?!drawn)|torch\.save\((?!\w+, stream)|tempfile\.mk|json\.dump\("
    )
    found = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        if path.name != "writing.py"
        for line in path.read_text(encoding="utf-8").splitlines()
        if pattern.search(line)
    ]
    assert found == []


def test_a_tensor_file_reads_as_it_was_written(tmp_path):
    """Mixed dtypes, empty tensors and scalars keep their bits, shapes and metadata."""
    from safetensors import safe_open

    tensors = {
        "codes": torch.arange(7, dtype=torch.uint8),
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "wide": torch.randn(3, 5).t(),
        "none": torch.zeros(0, 4),
        "one": torch.tensor(3.5),
        "grad": torch.ones(2, requires_grad=True),
    }
    save_tensors(tmp_path / "f", tensors, {"what": "ever", "ü": "ü"}, "test")
    with safe_open(tmp_path / "f", "pt") as file:
        assert file.metadata() == {"what": "ever", "ü": "ü"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            got = file.get_tensor(name)
            assert torch.equal(got, tensor) and got.dtype == tensor.dtype, name
