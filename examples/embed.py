"""An elastic model inside a FastAPI application: streamed answers, cancelled when nobody listens.

    pip install 'elastic-infer[server]'
    python examples/embed.py                      # the shipped model on port 8000
    curl -N localhost:8000/generate -d '{"prompt": "(48+17)*3-29=", "think": "S", "answer": "L"}' \
        -H 'content-type: application/json'

One engine serves all requests; they share batches, whatever their widths. The answer is one JSON
object per line: every token with its width, at the end the counts. A client that goes away ends its
request before the next pass of the model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress

from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from elastic_infer import (
    ElasticError,
    Engine,
    EngineFull,
    Plan,
    Request,
    SamplingParams,
    Token,
    demo_model,
)


class Question(BaseModel):
    """What a client sends: a prompt, and either one width or a width each for think and answer."""

    prompt: str
    width: str | None = None
    think: str | None = None
    answer: str | None = None
    budget: int | None = None
    max_tokens: int = 128
    temperature: float = 0.0


def plan_of(question: Question) -> Plan | None:
    """The plan that a question asks for, None for a fixed width."""
    if question.think is None or question.answer is None:
        return None
    return Plan.think_answer(question.think, question.answer, think_tokens=question.budget)


async def tokens_of(request: Request) -> AsyncIterator[Token]:
    """The tokens of a request as an async stream. Leaving it early cancels the request.

    A request is an ordinary iterator that waits for the model, so a thread reads it and hands the
    tokens to the event loop.
    """
    loop, arrived = asyncio.get_running_loop(), asyncio.Queue()

    def read() -> None:
        last: Exception | None = None
        with suppress(RuntimeError):  # the loop may be closed before the request has ended
            try:
                for token in request:
                    loop.call_soon_threadsafe(arrived.put_nowait, token)
            except ElasticError as error:
                last = error
            loop.call_soon_threadsafe(arrived.put_nowait, last)

    threading.Thread(target=read, daemon=True).start()
    try:
        while isinstance(item := await arrived.get(), Token):
            yield item
        if item is not None:
            raise item
    finally:
        request.cancel()  # changes nothing once the request has ended


def create_app(engine: Engine) -> FastAPI:
    """The application around an engine, which stays the caller's to close."""
    app = FastAPI(title="elastic_infer")

    @app.post("/generate")
    async def generate(question: Question) -> StreamingResponse:
        params = SamplingParams(temperature=question.temperature, max_tokens=question.max_tokens)
        try:
            request = engine.submit(
                question.prompt, params, plan_of(question), width=question.width
            )
        except EngineFull as error:
            raise HTTPException(503, str(error)) from None
        except ElasticError as error:
            raise HTTPException(400, str(error)) from None

        async def lines() -> AsyncIterator[str]:
            try:
                async with aclosing(tokens_of(request)) as tokens:
                    async for token in tokens:
                        yield json.dumps({"text": token.text, "width": token.width}) + "\n"
            except ElasticError as error:
                yield json.dumps({"error": str(error)}) + "\n"
                return
            output = request.result()
            yield json.dumps({
                "answer": output.answer,
                "width_runs": output.width_runs,
                "finish_reason": output.finish_reason,
            }) + "\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

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
