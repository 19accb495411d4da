"""Every file of examples/ does what it says."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import engines
import httpx
import pytest

from elastic_infer import Engine, demo_model

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str):
    """One example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pydantic looks names up in the module
    spec.loader.exec_module(module)
    return module


def run(monkeypatch, capsys, name: str, *arguments: str) -> str:
    """What an example prints when it is run as a program."""
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


def ask(app, **question):
    """Posts a question and reads the whole answer: (status, one object per line)."""

    async def post():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/generate", json=question)

    reply = asyncio.run(post())
    return reply.status_code, [json.loads(line) for line in reply.text.splitlines()]


def test_embed_streams_tokens_with_their_widths():
    with Engine.from_pretrained(demo_model()) as engine:
        app = load("embed").create_app(engine)
        prompt = "(48+17)*3-29="
        status, lines = ask(app, prompt=prompt, think="S", answer="L")
        assert status == 200
        *tokens, end = lines
        plan = load("embed").Plan.think_answer("S", "L")
        expected = engine.generate(prompt, plan=plan)
        assert "".join(t["text"] for t in tokens) == expected.text
        assert end["width_runs"] == [list(run) for run in expected.width_runs]
        assert {t["width"] for t in tokens} == {"S", "L"}
        assert (end["answer"], end["finish_reason"]) == (expected.answer, "stop")


@pytest.mark.parametrize(
    "question, problem",
    [
        ({"prompt": "1+1=", "width": "XL"}, "width: must be one of S, M, L, got 'XL'"),
        ({"prompt": ""}, "prompt: must hold at least one token"),
        ({"prompt": "1+1=", "think": "S", "answer": "L", "width": "M"}, "width: must not be given"),
    ],
)
def test_embed_refuses_by_name(question, problem):
    with Engine.from_pretrained(demo_model()) as engine:
        status, lines = ask(load("embed").create_app(engine), **question)
        assert status == 400 and problem in lines[0]["detail"]


@pytest.mark.parametrize("version", ["2.3", "2.4"])
def test_embed_cancels_when_the_client_goes_away(tmp_path, version):
    """Servers tell of it by a message (2.3) or by an error when the next piece is sent (2.4)."""
    engine = engines.text_engine(tmp_path)
    submitted = []
    original = engine.submit

    def slowly(prompt, params, plan, width=None):
        slow = replace(
            params, ignore_eos=True, logits_processors=[lambda *_: time.sleep(0.005)]
        )
        submitted.append(original(prompt, slow, plan, width=width))
        return submitted[-1]

    engine.submit = slowly
    try:
        app = load("embed").create_app(engine)
        asyncio.run(_leave_after_first_token(app, version))
        output = submitted[0].wait(timeout=30)
        assert output.finish_reason == "cancelled"
        assert 1 <= len(output.token_ids) < 400
        engines.assert_all_free(engine)
    finally:
        engine.close()
    assert not [t for t in threading.enumerate() if t.name == "elastic-infer-worker"]


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

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": version},
        "http_version": "1.1", "method": "POST", "path": "/generate", "raw_path": b"/generate",
        "query_string": b"", "root_path": "", "scheme": "http",
        "headers": [(b"content-type", b"application/json")],
        "server": ("test", 80), "client": ("test", 1),
    }  # fmt: skip
    try:
        await app(scope, receive, send)
    except Exception as error:
        assert version == "2.4", error  # what the server gets back when it could not send
