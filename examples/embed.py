"""An elastic model inside a FastAPI application: streamed answers, cancelled when nobody listens.

    pip install 'elastic-infer[server]'
    python examples/embed.py                      # the shipped model on port 8000
    curl -N localhost:8000/generate -d '{"prompt": "(48+17)*3-29=", "think": "S", "answer": "L"}' \
        -H 'content-type: application/json'

One engine serves all requests; they share batches, whatever their widths. The answer is one JSON
object per line: every token with its width, at the end the counts or the error. A client that goes
away ends its request before the next pass of the model. Bodies are bounded, and what takes time (to
tokenize a long prompt) happens in a thread, so that no client stops another.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import suppress

import fastapi
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from elastic_infer import (
    ElasticError,
    Engine,
    EngineFull,
    InvalidRequest,
    Output,
    Plan,
    Request,
    SamplingParams,
    Token,
    demo_model,
)

MOST_BYTES = 1 << 18  # of a body


class Question(BaseModel):
    """A client's question: a prompt, and either one width or a width each for think and answer."""

    prompt: str
    width: str | None = None
    think: str | None = None
    answer: str | None = None
    budget: int | None = None
    max_tokens: int = 128
    temperature: float = 0.0

    def plan(self) -> Plan | None:
        """The plan that the question asks for, None for a fixed width."""
        if self.think is not None and self.answer is not None:
            return Plan.think_answer(self.think, self.answer, think_tokens=self.budget)
        if (self.think, self.answer, self.budget) != (None, None, None):
            raise InvalidRequest("think and answer: must be given together, with or without budget")
        return None


def submit(engine: Engine, body: bytes) -> Request:
    """Hands a question to the engine. Raises ValueError or ElasticError for a wrong one."""
    question = Question.model_validate_json(body)
    params = SamplingParams(temperature=question.temperature, max_tokens=question.max_tokens)
    return engine.submit(question.prompt, params, question.plan(), width=question.width)


async def read_body(http: fastapi.Request) -> bytes:
    """The body of an HTTP request; one that is too long is not read to its end."""
    body = bytearray()
    async for piece in http.stream():
        body += piece
        if len(body) > MOST_BYTES:
            raise fastapi.HTTPException(413, f"body: must have at most {MOST_BYTES} bytes")
    return bytes(body)


async def events_of(request: Request) -> AsyncIterator[Token | Output | BaseException]:
    """The tokens of a request as an async stream, then its output or its error.

    A request is an ordinary iterator that waits for the model, so a thread reads it and hands what
    comes to the event loop. Whatever happens there, something comes last.
    """
    loop, arrived = asyncio.get_running_loop(), asyncio.Queue()

    def hand(item: Token | Output | BaseException) -> None:
        with suppress(RuntimeError):  # the loop may be closed before the request has ended
            loop.call_soon_threadsafe(arrived.put_nowait, item)

    def read() -> None:
        try:
            for token in request:
                hand(token)
            hand(request.result())
        except BaseException as error:
            hand(error)

    threading.Thread(target=read, daemon=True).start()
    while isinstance(item := await arrived.get(), Token):
        yield item
    yield item


class Answer(StreamingResponse):
    """A request's events as lines of JSON. However it ends, even before its first line was asked
    for, the request is cancelled then, which changes nothing once it has ended."""

    def __init__(self, request: Request):
        super().__init__(self._lines(), media_type="application/x-ndjson")
        self._request = request

    async def __call__(self, *arguments) -> None:
        try:
            await super().__call__(*arguments)
        finally:
            self._request.cancel()

    async def _lines(self) -> AsyncIterator[str]:
        async for event in events_of(self._request):
            if isinstance(event, Token):
                line = {"text": event.text, "width": event.width}
            elif isinstance(event, Output):
                names = ("answer", "width_runs", "finish_reason")
                line = {name: getattr(event, name) for name in names}
            else:
                line = {"error": str(event) or type(event).__name__}
            yield json.dumps(line) + "\n"


def create_app(engine: Engine) -> fastapi.FastAPI:
    """The application around an engine, which stays the caller's to close."""
    app = fastapi.FastAPI(title="elastic_infer")

    @app.post("/generate")
    async def generate(http: fastapi.Request) -> StreamingResponse:
        body = await read_body(http)
        try:
            return Answer(await run_in_threadpool(submit, engine, body))
        except EngineFull as error:
            raise fastapi.HTTPException(503, str(error)) from None
        except (ElasticError, ValueError) as error:
            raise fastapi.HTTPException(400, str(error)) from None

    @app.get("/stats")
    async def stats() -> dict[str, int]:
        return engine.stats()

    return app


def main() -> None:
    """Serves until interrupted."""
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(demo_model()))
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    with Engine.from_pretrained(given.model, max_waiting=256) as engine:
        uvicorn.run(create_app(engine), port=given.port)


if __name__ == "__main__":
    main()
