"""Every file of examples/ does what it says."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from elastic_infer import Engine, demo_model
from support import engines

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name: str):
    """One example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pydantic looks names up in the module
    spec.loader.exec_module(module)
    return module


def run(monkeypatch, capsys, name: str, *arguments: str) -> str:
    """Output of an example that is run as a program."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    load(name).main()
    return capsys.readouterr().out


def test_every_example_has_a_test():
    here = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.stem}"' in here, path.name


def test_budget_prints_a_figure_per_plan_and_budget(monkeypatch, capsys):
    text = run(monkeypatch, capsys, "budget", "--problems", "5", "--budgets", "0", "none")
    head, *lines = text.splitlines()
    assert head.split() == ["think,", "answer", "0", "none"]
    assert [line[:4] for line in lines] == ["S, S", "M, M", "L, L", "S, L"]
    for line in lines:
        figures = re.findall(r"(\d+)% \((\d+)% to (\d+)%\)", line)
        assert len(figures) == 2
        for share, low, high in figures:
            assert int(low) <= int(share) <= int(high)


def test_fork_reads_the_prompt_once_and_agrees(monkeypatch, capsys):
    text = run(monkeypatch, capsys, "fork", "12*9=", "--n", "3")
    *twins, end = text.splitlines()
    assert len(twins) == 3 and all("<think>" in line for line in twins)
    count, most, said = re.fullmatch(r"(\d) of 3 agree on (\d*); L answers (.*)", end).groups()
    votes = [line.removesuffix("</think>").rpartition("=")[2] for line in twins]
    assert votes.count(most) == int(count) == max(map(votes.count, votes))
    assert said.isdigit()


# embed.py ----------------------------------------------------------------------------------------


def ask(app, question):
    """Posts a question (an object, or a body) and reads the whole answer: (status, one object per
    line)."""
    if isinstance(question, (dict, list, str)):
        question = json.dumps(question).encode()

    async def post():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/generate", content=question)

    reply = asyncio.run(post())
    return reply.status_code, [json.loads(line) for line in reply.text.splitlines()]


def test_embed_streams_tokens_with_their_widths():
    with Engine.from_pretrained(demo_model()) as engine:
        app = load("embed").create_app(engine)
        prompt = "(48+17)*3-29="
        status, lines = ask(app, {"prompt": prompt, "think": "S", "answer": "L"})
        assert status == 200
        *tokens, end = lines
        plan = load("embed").Plan.think_answer("S", "L")
        expected = engine.generate(prompt, plan=plan)
        assert "".join(t["text"] for t in tokens) == expected.text
        assert end["width_runs"] == [list(run) for run in expected.width_runs]
        assert {t["width"] for t in tokens} == {"S", "L"}
        assert (end["answer"], end["finish_reason"]) == (expected.answer, "stop")


@pytest.fixture(scope="module")
def reasoner():
    with Engine.from_pretrained(demo_model()) as engine:
        yield engine


@pytest.mark.parametrize(
    "question, problem",
    [
        ({"prompt": "1+1=", "width": "XL"}, "width: must be one of S, M, L, got 'XL'"),
        ({"prompt": ""}, "prompt: must hold at least one token"),
        ({"prompt": "1+1=", "think": "S", "answer": "L", "width": "M"}, "width: must not be given"),
        ({"prompt": "1", "think": "S"}, "think and answer: must be given together"),
        ({"prompt": "1", "answer": "S", "budget": 3}, "think and answer: must be given together"),
        ({"prompt": "1", "budget": 3}, "think and answer: must be given together"),
        ({"prompt": "1", "max_tokens": 0}, "max_tokens must be None or an int >= 1, got 0"),
        ({"prompt": "1", "temperature": -1}, "temperature must be a finite number >= 0, got -1"),
        ({"prompt": "1", "temperature": 1e39}, "temperature must .* float32"),
        ({"prompt": "1", "temperature": float("nan")}, "temperature must"),
        ({"prompt": "\ud800"}, ""),
        ({"prompt": "1", "width": "\ud800"}, ""),
        ({"prompt": "1" * 100_000}, "prompt: must have at most"),
        ({"prompt": ["1"]}, "prompt"),
        ({}, "prompt"),
        ([1] * 50_000, ""),
        ("text", ""),
    ],
    ids=lambda value: str(value)[:40],
)
def test_embed_refuses_by_name(reasoner, question, problem):
    """Stands for all questions that cannot be served: each is a 400 that says why."""
    status, lines = ask(load("embed").create_app(reasoner), question)
    assert status == 400 and re.search(problem, lines[0]["detail"])
    assert len(lines[0]["detail"]) < 2000


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"[" * 200_000, b'{"prompt": 1e999}'], ids=len
)
def test_embed_refuses_bodies_that_are_no_question(reasoner, body):
    status, lines = ask(load("embed").create_app(reasoner), body)
    assert status == 400 and lines[0]["detail"]


def test_embed_reads_no_body_beyond_its_bound(reasoner):
    """Stands for bodies of any length, also with no end: reading stops at the bound."""
    embed, read = load("embed"), []

    async def endless():
        while True:
            read.append(b"x" * 4096)
            yield read[-1]

    status, lines = ask(embed.create_app(reasoner), endless())
    assert status == 413 and "must have at most" in lines[0]["detail"]
    assert sum(map(len, read)) <= embed.MOST_BYTES + 4096


def test_embed_tokenizes_beside_the_event_loop(reasoner, monkeypatch):
    """What takes time in a question is no work of the thread that serves all clients."""
    threads = []
    encode = reasoner.tokenizer.encode

    def watched(*given, **options):
        threads.append(threading.get_ident())
        return encode(*given, **options)

    monkeypatch.setattr(reasoner.tokenizer, "encode", watched)
    app = load("embed").create_app(reasoner)
    assert ask(app, {"prompt": "1+1=", "max_tokens": 1})[0] == 200
    assert threads and threading.get_ident() not in threads


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("zero"), SystemExit(3), KeyError(), Exception()], ids=repr
)
def test_embed_ends_every_stream(reasoner, monkeypatch, error):
    """Stands for errors of any kind while an answer is made: the last line says so."""
    submit = reasoner.submit

    def failing(prompt, params, plan, width=None):
        def fail(token_ids, row, phase):
            if len(token_ids) == 2:
                raise error

        return submit(prompt, replace(params, logits_processors=[fail]), plan, width=width)

    monkeypatch.setattr(reasoner, "submit", failing)
    status, lines = ask(load("embed").create_app(reasoner), {"prompt": "(48+17)*3-29="})
    assert status == 200 and len(lines) == 3
    assert list(lines[-1]) == ["error"] and lines[-1]["error"]


def test_embed_cancels_when_the_client_is_gone_before_the_answer_begins(tmp_path, monkeypatch):
    """Stands for clients that leave before the first line: nothing of it was asked for."""
    with engines.text_engine(tmp_path) as engine:
        submitted, submit = [], engine.submit

        def watched(*given, **options):
            submitted.append(submit(*given, **options))
            return submitted[-1]

        monkeypatch.setattr(engine, "submit", watched)
        app = load("embed").create_app(engine)

        async def receive():
            return {"type": "http.request", "body": b'{"prompt": "a"}', "more_body": False}

        async def send(message):
            raise OSError("connection lost")

        with engines.held(engine):
            with suppress(Exception):  # what the server gets back when it could not send
                asyncio.run(app(scope_of("2.4"), receive, send))
            assert submitted[0].cancelled
        assert submitted[0].wait(60).token_ids == []


@pytest.mark.parametrize("version", ["2.3", "2.4"])
def test_embed_cancels_when_the_client_goes_away(tmp_path, version):
    """Servers tell of it by a message (2.3) or by an error when the next piece is sent (2.4)."""
    others = set(threading.enumerate())
    engine = engines.text_engine(tmp_path)
    submitted, cancelled = [], threading.Event()
    original = engine.submit

    def until_cancelled(token_ids, row, phase):
        if len(token_ids) >= 2:  # a first one that arrives, one that cannot be sent any more
            assert cancelled.wait(60)

    def slowly(prompt, params, plan, width=None):
        slow = replace(params, ignore_eos=True, logits_processors=[until_cancelled])
        request = original(prompt, slow, plan, width=width)
        cancel, request.cancel = request.cancel, lambda: (cancel(), cancelled.set())
        submitted.append(request)
        return request

    engine.submit = slowly
    try:
        app = load("embed").create_app(engine)
        asyncio.run(_leave_after_first_token(app, version))
        output = submitted[0].wait(engines.HANG)
        assert output.finish_reason == "cancelled"
        assert 1 <= len(output.token_ids) <= 3
        engines.assert_all_free(engine)
    finally:
        engine.close()
    left = set(threading.enumerate()) - others
    assert not [t for t in left if t.name == "elastic-infer-worker"]


def scope_of(version: str) -> dict:
    """Answer of a server to a posted question; version: of its ASGI."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": version},
        "http_version": "1.1",
        "method": "POST",
        "path": "/generate",
        "raw_path": b"/generate",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(b"content-type", b"application/json")],
        "server": ("test", 80),
        "client": ("test", 1),
    }


async def _leave_after_first_token(app, version: str) -> None:
    """Posts a question as a server would, and is gone once the first piece of the answer came."""
    body = json.dumps({"prompt": "hello", "max_tokens": 400}).encode()
    asked, gone = False, asyncio.Event()

    async def receive():
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if gone.is_set() and version == "2.4":
            raise OSError("connection lost")
        if message["type"] == "http.response.body" and message.get("body"):
            gone.set()

    try:
        await app(scope_of(version), receive, send)
    except Exception as error:
        assert version == "2.4", error  # what the server gets back when it could not send
