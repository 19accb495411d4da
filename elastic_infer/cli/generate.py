"""`elastic-infer generate`: one prompt, streamed or as JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer
from rich.text import Text

from ..errors import InvalidRequest, shown
from . import common as c

HELP = "Generate from one prompt: streamed, each token in the colour of its width, or as JSON."
EXAMPLES = c.examples(
    "elastic-infer generate MODEL --prompt 'Hello' --width S",
    "elastic-infer generate MODEL --prompt '(48+17)*3-29=' --plan think=S,answer=L",
    "elastic-infer generate MODEL --prompt - --plan think=M,answer=L,budget=64,policy=exact < file",
    "elastic-infer generate MODEL --prompt-ids 5,17,9 --plan schedule=0:S+12:L --json",
)


def add_to(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("generate", help=HELP, epilog=EXAMPLES)(generate)


def generate(
    model: c.Model,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text; - reads standard input.")
    ] = None,
    prompt_ids: Annotated[
        str | None, typer.Option(help="Token ids instead, such as 5,17,9.")
    ] = None,
    width: c.OneWidth = None,
    plan: c.PlanText = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object with every token, counts and times.")
    ] = False,
    max_tokens: c.MaxTokens = None,
    temperature: c.Temperature = None,
    top_p: c.TopP = None,
    top_k: c.TopK = None,
    seed: c.Seed = None,
    max_width: c.MaxWidth = None,
    kv_cache_dtype: c.KvCacheDtype = "auto",
    state_dtype: c.StateDtype = "auto",
    activations: c.Activations = "none",
    widths: c.WidthTable = None,
    revision: c.Revision = None,
    threads: c.Threads = None,
    verbose: c.Verbose = False,
) -> None:
    """The command; its arguments are its options."""
    c.log_to_stderr(verbose)
    given = read_prompt(prompt, prompt_ids)
    chosen = c.read_plan(plan, width)
    engine = c.open_engine(
        model,
        revision=revision,
        widths=widths,
        max_width=max_width,
        threads=threads,
        max_num_seqs=1,
        kv_cache_dtype=kv_cache_dtype,
        mamba_ssm_cache_dtype=state_dtype,
        activation_quantization=activations,
    )
    with engine:
        params = c.sampling_params(
            engine,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
        )
        request = engine.submit(given, params, chosen, width=width)
        try:
            if as_json:
                tokens = list(request)
                typer.echo(json.dumps(report(request.result(), tokens), indent=2))
            else:
                stream(request, list(engine.widths))
        finally:
            request.cancel()  # an interrupt ends the request too
            request.wait()


def read_prompt(prompt: str | None, prompt_ids: str | None) -> str | list[int]:
    """The prompt of the command line: text, text from standard input, or token ids.

    Raises:
        InvalidRequest: both, neither, or ids that are none.
    """
    if (prompt is None) == (prompt_ids is None):
        got = "neither" if prompt is None else "both"
        raise InvalidRequest(f"--prompt: must be given, or --prompt-ids instead, got {got}")
    if prompt_ids is not None:
        try:
            return [int(part) for part in prompt_ids.split(",")]
        except ValueError:
            raise InvalidRequest(
                f"--prompt-ids: must be numbers joined by commas, got {shown(prompt_ids)}"
            ) from None
    return c.standard_input().read().rstrip("\n") if prompt == "-" else prompt


def stream(request: Any, names: list[str]) -> None:
    """Prints tokens as they come; on a terminal in colour, with a line of figures at the end."""
    screen, colours = c.console(), c.colour_of(names)
    for token in request:
        c.show_token(screen, token, colours)
    screen.print()
    output = request.result()
    if screen.is_terminal:
        c.errors().print(c.legend(colours), Text("  " + figures(output), style="dim"))


def figures(output: Any) -> str:
    """One line about an output: tokens by width, speed, why it ended."""
    runs = " ".join(f"{width}:{count}" for width, count in output.width_runs)
    count, seconds = output.usage.completion_tokens, output.times.decode_s
    speed = f", {(count - 1) / seconds:.0f} tokens/s" if count > 1 and seconds > 0 else ""
    again = f", {output.rebuilt_tokens} tokens read again" if output.rebuilt_tokens else ""
    return f"{count} tokens ({runs}){speed}{again}, {output.finish_reason}"


def report(output: Any, tokens: list[Any]) -> dict[str, Any]:
    """An output as JSON: its first choice, and its tokens one by one."""
    choice = output.choices[0]
    names = ("id", "text", "width", "phase", "forced")
    return {
        "prompt": output.prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "text": choice.text,
        "reasoning": choice.reasoning,
        "answer": choice.answer,
        "token_ids": choice.token_ids,
        "width_runs": [list(run) for run in choice.width_runs],
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
        "usage": dataclasses.asdict(output.usage),
        "times": dataclasses.asdict(output.times),
        "rebuilt_tokens": output.rebuilt_tokens,
        "tokens": [{name: getattr(token, name) for name in names} for token in tokens],
    }
