"""The command line: what it prints and what it refuses."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console

import elastic_infer
from elastic_infer import Checkpoint, InvalidRequest, Plan
from elastic_infer.checkpoint.counts import count_parameters, kv_bytes_per_token, state_bytes
from elastic_infer.cli import (
    chat,
    common,
    generate,
    info,
    slice as slices,
)
from elastic_infer.sizing.fit import fit
from elastic_infer.sizing.footprint import bytes_per_token, weight_bytes
from support import engines, tiny
from support.commands import refused, run

COMMANDS = ("demo", "generate", "chat", "info", "slice", "widths", "elastify", "quantize")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return engines.write_text_model(
        tmp_path_factory.mktemp("model"), generation_config={"max_new_tokens": 12}
    )


@pytest.fixture(scope="module")
def engine(folder):
    with engines.open_engine(folder) as opened:
        yield opened


# Without a model ---------------------------------------------------------------------------------


def test_the_version_is_told_in_every_way():
    """`--version`, `python -m elastic_infer`, and `info` without a model agree."""
    text = f"elastic-infer {elastic_infer.__version__}"
    assert run("--version").output.strip() == text
    for module in ("elastic_infer", "elastic_infer.cli"):
        command = [sys.executable, "-m", module, "--version"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == text
    facts = json.loads(run("info", "--json").output)
    assert facts["version"] == elastic_infer.__version__
    assert facts["packages"]["torch"] and facts["kernels"]["used"] in facts["kernels"]["usable"]
    lines = run("info").output.splitlines()
    assert lines[0].startswith(f"elastic_infer {elastic_infer.__version__} on Python ")
    assert any(line.startswith("CUDA: ") for line in lines)


def test_info_without_a_model_imports_no_torch():
    """Commands that need no tensors answer at once: torch alone takes seconds to import."""
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['elastic-infer', 'info']; "
        "from elastic_infer.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("elastic_infer "), done.stderr


# All commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command):
    text = run(command, "--help").output
    assert "Examples" in text and f"elastic-infer {command}" in text


def test_the_first_help_names_every_command():
    text = run("--help").output
    assert all(f" {command} " in text for command in COMMANDS)


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (("frob",), "No such command 'frob'; see"),
        (("slice",), "Missing argument 'model'; see"),
        (("generate", "x", "--threads", "many"), "Invalid value for '--threads'"),
        (("info", "no/such/folder"), "checkpoint: path must be a checkpoint folder or a Hub id"),
        (("generate", "x"), "--prompt: must be given, or --prompt-ids instead, got neither"),
        (("generate", "x", "-p", "a", "--prompt-ids", "1"), "--prompt: must be given, or"),
        (("generate", "x", "--prompt-ids", "1,b"), "--prompt-ids: must be numbers joined"),
        (("generate", "x", "-p", "a", "--width", "S", "--plan", "width=S"), "--width: must not be"),
        (("generate", "x", "-p", "a", "--plan", "think=S"), "plan: think= must come with answer="),
        (("widths", "x", "--slice", "12B"), "--slice: must be NAME=PATH, got '12B'"),
        (("widths", "x", "--slice", "a=b", "--slice", "a=c"), "--slice: a name must be given once"),
        (("demo", "--ask", "48+"), "--ask: must be a chain of +, - and *"),
        (("demo", "--problems", "0"), "--problems: must be at least 1, got 0"),
        (("generate", "~noone/x", "-p", "a"), "checkpoint: path must be a path, got '~noone/x'"),
        (("generate", "a" * 5000, "-p", "a"), "checkpoint: path must be a checkpoint folder"),
        (("generate", "x\0y", "-p", "a"), "checkpoint: path must be a checkpoint folder"),
        (("info", "x", "--memory", f"{'9' * 400}GB"), "--memory: must be a size of at most"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(arguments, problem):
    assert refused(*arguments).startswith(problem)


@pytest.mark.parametrize(
    "plan",
    [
        "schedule=0:S+{}:L",
        "think=S,answer=L,budget={}",
        "think=S,answer=L,grace={}",
        "narrow=S,wide=L,threshold=x{}",
        "narrow=S,wide=L,threshold=1,hold={}",
        "width=S,{}=1",
        "{}=S",
        "{}",
    ],
)
def test_a_long_word_in_a_plan_is_refused_and_cut(plan):
    """Family: numbers with more digits than Python converts, and long words, anywhere in a plan."""
    for word in ("9" * 5000, "é" * 5000):
        assert len(refused("generate", "x", "-p", "a", "--plan", plan.format(word))) < 400


@pytest.mark.parametrize(
    "command, problem",
    [
        ("generate FOLDER --prompt - <&-", "standard input: must be open"),
        ("chat FOLDER <&-", "standard input: must be open"),
        ("generate FOLDER -p a > /dev/full", "standard output: must be usable, got: No space left"),
        ("info FOLDER > /dev/full", "standard output: must be usable, got: No space left"),
    ],
)
def test_streams_that_cannot_be_used_are_one_line_and_code_2(folder, command, problem):
    """Family: standard input that is closed, standard output that takes nothing."""
    words = f"{sys.executable} -m elastic_infer {command.replace('FOLDER', str(folder))}"
    done = subprocess.run(["sh", "-c", words], capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith(f"error: {problem}")


def test_errors_show_brackets_as_they_are(folder):
    assert "[red]" in refused("generate", folder, "-p", "a", "--width", "[red]")


def test_widths_have_colours_of_their_own():
    for count in range(1, 6):
        colours = common.colour_of([f"w{i}" for i in range(count)])
        assert len(set(colours.values())) == count


# generate ----------------------------------------------------------------------------------------


def test_generate_prints_what_the_engine_generates(folder, engine):
    text = run("generate", folder, "--prompt", "hello", "--width", "S", "--temperature", 0).stdout
    params = common.sampling_params(engine, temperature=0.0)
    assert params.max_tokens == 12  # from generation_config.json
    assert text == engine.generate("hello", params, width="S").text + "\n"


def test_generate_reads_standard_input(folder):
    given = ("--width", "S", "--temperature", 0)
    typed = run("generate", folder, "-p", "hello", *given).stdout
    assert run("generate", folder, "-p", "-", *given, stdin="hello\n").stdout == typed


def test_generate_as_json_tells_every_token(folder, engine):
    options = ("--plan", "schedule=0:S+5:L", "--temperature", 0, "--json")
    report = json.loads(run("generate", folder, "-p", "hello", *options).stdout)
    plan = Plan.schedule([(0, "S"), (5, "L")])
    params = common.sampling_params(engine, temperature=0.0)
    output = engine.generate("hello", params, plan=plan)
    assert report["token_ids"] == output.token_ids == [t["id"] for t in report["tokens"]]
    assert report["width_runs"] == [["S", 5], ["L", 7]] == [list(r) for r in output.width_runs]
    assert "".join(t["text"] for t in report["tokens"]) == report["text"] == output.text
    assert report["usage"]["completion_tokens"] == 12 and report["finish_reason"] == "length"
    assert report["times"]["total_s"] > 0


def test_generate_takes_ids_without_a_tokenizer(tmp_path):
    tiny.write_tiny(tmp_path, engines.base_config(), engines.base_widths(), seed=7)
    options = ("--prompt-ids", "5,17,9", "--max-tokens", 4, "--temperature", 0)
    report = json.loads(run("generate", tmp_path, *options, "--json").stdout)
    assert report["text"] is None and len(report["token_ids"]) == 4
    streamed = run("generate", tmp_path, *options).stdout
    assert streamed.split() == [str(i) for i in report["token_ids"]]
    assert "has no tokenizer.json" in refused("generate", tmp_path, "-p", "hello")


def test_generate_names_unknown_widths(folder):
    assert refused("generate", folder, "-p", "a", "--width", "XL").startswith(
        "width: must be one of S, M, L, got 'XL'"
    )
    assert "max_width: must be one of S, M, L" in refused(
        "generate", folder, "-p", "a", "--max-width", "XL"
    )


def test_tokens_have_the_colour_of_their_width_on_a_terminal(engine, monkeypatch):
    seen = io.StringIO()
    screen = Console(file=seen, force_terminal=True, color_system="standard", highlight=False)
    monkeypatch.setattr(common, "console", lambda: screen)
    monkeypatch.setattr(common, "errors", lambda: screen)
    plan = Plan.schedule([(0, "S"), (2, "L")])
    params = common.sampling_params(engine, temperature=0.0, max_tokens=4)
    generate.stream(engine.submit("hello", params, plan), ["S", "L"])
    cyan, magenta = "\x1b[36m", "\x1b[35m"
    text = seen.getvalue()
    assert 0 <= text.index(cyan) < text.index(magenta)
    assert "4 tokens (S:2 L:2)" in text and "length" in text


# chat --------------------------------------------------------------------------------------------


def test_chat_answers_every_line_of_a_pipe(folder, engine):
    given = "hello\n/width S\n\nhello\n/exit\nnever\n"
    said = run("chat", folder, "--temperature", 0, "--max-tokens", 3, stdin=given)
    params = common.sampling_params(engine, temperature=0.0, max_tokens=3)
    talk = chat.Conversation(engine, params)
    shown = []
    talk.answer("hello", lambda token: shown.append(token.text))
    talk.set_width("S")
    shown.append("\n")
    talk.answer("hello", lambda token: shown.append(token.text))
    assert said.stdout == "".join(shown) + "\n"
    assert "now Plan.fixed('S')" in said.stderr


def test_chat_remembers_what_was_said(engine):
    params = common.sampling_params(engine, temperature=0.0, max_tokens=3)
    talk = chat.Conversation(engine, params, system="be brief")
    talk.template["enable_thinking"] = False
    first = talk.answer("one", lambda token: None)
    asked = engine.chat_prompt(
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": first.answer},
            {"role": "user", "content": "two"},
        ],
        None,
        {"enable_thinking": False},
    )
    assert talk.answer("two", lambda token: None).prompt_token_ids == asked
    talk.clear()
    assert [m["role"] for m in talk.messages] == ["system"]


@pytest.mark.parametrize(
    "line, problem",
    [
        ("/foo", "chat: a command must be one of /width, /plan"),
        ("/width", "/width: must come with what to use"),
        ("/width XL", "plan: width must be one of S, M, L, got 'XL'"),
        ("/plan think=S", "plan: think= must come with answer="),
        ("/think maybe", "/think: must be on or off, got 'maybe'"),
    ],
)
def test_a_mistake_ends_a_pipe(folder, line, problem):
    assert refused("chat", folder, stdin=line + "\n").startswith(problem)


def test_a_mistake_in_a_terminal_is_told_and_the_conversation_goes_on(engine, monkeypatch):
    lines = iter(["/width XL", "/width S", "/help", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    told = []
    monkeypatch.setattr(common, "tell", told.append)
    talk = chat.Conversation(engine, common.sampling_params(engine))
    chat.converse(talk, interactive=True)
    assert len(told) == 1 and "got 'XL'" in told[0] and repr(talk.plan) == "Plan.fixed('S')"
    assert next(lines, None) is None


def test_chat_needs_a_chat_template(tmp_path):
    engines.write_text_model(tmp_path, tokenizer_config={"eos_token": "<|end|>"})
    assert "must have a chat template" in refused("chat", tmp_path, stdin="hello\n")


# info --------------------------------------------------------------------------------------------


def test_info_tells_what_the_library_computes(folder):
    facts = json.loads(run("info", folder, "--json", "--memory", "1GB", "--length", 64).stdout)
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.config
    assert list(facts["widths"]) == ["S", "M", "L"] and facts["tensors_checked"]
    assert facts["kv_bytes_per_token"] == kv_bytes_per_token(config, 4)
    assert facts["widths"]["L"]["state_bytes_per_sequence"] == state_bytes(config, 4)
    for name, row in facts["widths"].items():
        counts = count_parameters(config, checkpoint.widths[name])
        assert row["parameters"] == counts.total
        assert row["active_parameters"] == counts.active_without_embedding
    assert facts["kernels"]["used"] in facts["kernels"]["usable"]


def test_info_as_text(folder):
    text = run("info", folder, "--memory", "1GB").stdout
    for words in (
        "S  ",
        "hidden channels",
        "weights, bfloat16",
        "KV cache",
        "kernels: ",
        "in 1 GB of memory",
    ):
        assert words in text
    assert "none" in run("info", folder, "--memory", "1KB").stdout


def test_info_needs_no_weights(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    small = json.loads(run("info", tmp_path, "--json", "--memory", "1GB").stdout)
    whole = json.loads(run("info", folder, "--json", "--memory", "1GB").stdout)
    assert not small["tensors_checked"] and small["widths"] == whole["widths"]
    (tmp_path / "elastic_widths.json").write_text(json.dumps({"one": {}}))
    assert list(json.loads(run("info", tmp_path, "--json").stdout)["widths"]) == ["one"]


def test_info_of_a_hub_repository_fetches_no_weights(folder, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    facts = json.loads(run("info", "owner/name", "--revision", "v1", "--json").stdout)
    assert list(facts["widths"]) == ["S", "M", "L"] and not facts["tensors_checked"]
    assert (asked["name"], asked["revision"]) == ("owner/name", "v1")
    assert asked["allow_patterns"] == ["config.json", "hf_quant_config.json", "elastic_widths.json"]


def test_info_shows_ranges_of_per_layer_sizes(tmp_path):
    config = engines.base_config()
    widths = {"L": {}, "S": {"mamba_num_heads": [4, 6]}}
    tiny.write_tiny(tmp_path, config, {"version": 1, "widths": widths}, seed=7)
    assert "4–6" in run("info", tmp_path).stdout


@pytest.mark.parametrize(
    "text, size",
    [("16GB", 16e9), ("24 GiB", 24 * 2**30), ("512m", 512e6), ("7", 7), ("1.5T", 1.5e12)],
)
def test_memory_sizes(text, size):
    assert info.parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "16XB", "1e9", "16 GB and more"])
def test_memory_that_is_no_size_is_refused(text):
    with pytest.raises(InvalidRequest, match="--memory: must be a size"):
        info.parse_memory(text)


# footprint ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_weight_bytes_are_those_of_the_loaded_weights(tmp_path, seed):
    config = tiny.tiny_config(seed, tie_word_embeddings=seed % 2 == 1)
    dtype = (torch.float32, torch.bfloat16)[seed % 2]
    tiny.write_tiny(tmp_path, config, tiny.tiny_widths(config, seed), dtype, seed)
    checkpoint = Checkpoint.open(tmp_path)
    for name, width in checkpoint.widths.items():
        counts = count_parameters(checkpoint.config, width)
        read = bytes_per_token(checkpoint.config, width, torch.float32)
        assert read == 4 * (counts.active_without_embedding + width.hidden_size)
        with engines.open_engine(tmp_path, max_width=name) as engine:
            if name in engine.widths and engine.core.model.weights.served.same_sizes(width):
                loaded = engine.core.model.weights.nbytes
                assert loaded == weight_bytes(checkpoint.config, width, dtype)


def test_a_tracked_token_reads_more_and_a_full_one_the_same(folder):
    checkpoint = Checkpoint.open(folder)
    config, widths = checkpoint.config, checkpoint.widths
    for name, width in widths.items():
        alone = bytes_per_token(config, width, torch.bfloat16)
        tracked = bytes_per_token(config, width, torch.bfloat16, widths["L"])
        assert (tracked > alone) == (name != "L")


def test_what_fits_fits(folder):
    checkpoint = Checkpoint.open(folder)
    config, width = checkpoint.config, checkpoint.widths["L"]
    room = fit(config, width, torch.float32, 1 << 30, 512)
    each = state_bytes(config, 4) + 512 * kv_bytes_per_token(config, 4)
    used = room.weights + room.working + room.sequences * each
    assert used <= 1 << 30 < used + each and room.longest == 512
    small = fit(config, width, torch.float32, room.weights, 512)
    assert (small.sequences, small.longest) == (0, 0)


# slice and widths --------------------------------------------------------------------------------


def test_slice_and_back(folder, tmp_path):
    said = run("slice", folder, "--width", "S", "--out", tmp_path / "S").stdout
    assert "width S" in said
    assert list(Checkpoint.open(tmp_path / "S").widths) == ["full"]
    assert "must be a new or empty folder" in refused(
        "slice", folder, "--width", "S", "--out", tmp_path / "S"
    )
    assert "width must be one of S, M, L" in refused(
        "slice", folder, "--width", "X", "--out", tmp_path / "X"
    )
    given = ("--slice", f"S={tmp_path / 'S'}", "--full-name", "L")
    table = json.loads(run("widths", folder, *given, "--out", "-").stdout)
    assert table == {
        "version": 1,
        "default_width": "L",
        "widths": {"L": {}, "S": engines.base_widths()["widths"]["S"]},
    }


def test_widths_are_written_beside_the_checkpoint_or_where_told(folder, tmp_path):
    run("slice", folder, "--width", "S", "--out", tmp_path / "S")
    given = ("widths", tmp_path / "full", "--slice-config", f"S={tmp_path / 'S' / 'config.json'}")
    engines.write_text_model(tmp_path / "full")
    said = run(*given, "--out", tmp_path / "table.json").stdout
    assert said == f"{tmp_path / 'table.json'}: full, S\n"
    assert not (tmp_path / "full" / "elastic_widths.json").exists()
    run(*given)
    opened = Checkpoint.open(tmp_path / "full")
    assert list(opened.widths) == ["S", "full"]
    assert opened.widths_source.endswith("elastic_widths.json")
    assert "slices must name at least one width" in refused("widths", folder)


def test_names_and_paths_may_hold_equal_signs_after_the_first():
    assert slices.named("--slice", ["a=b=c"]) == {"a": "b=c"}
