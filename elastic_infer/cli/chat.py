"""`elastic-infer chat`: a conversation in the terminal, or piped line by line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.text import Text

from ..errors import ElasticError, InvalidRequest, shown
from . import common as c
from .generate import figures

HELP = (
    "Chat with a model; every token has the colour of its width. Standard input may be a pipe: "
    "one message or command per line."
)
EXAMPLES = c.examples(
    "elastic-infer chat MODEL",
    "elastic-infer chat MODEL --plan think=S,answer=L,budget=256",
    "printf '12*9\\n/width S\\n12*9\\n' | elastic-infer chat MODEL",
)
COMMANDS = {
    "/width NAME": "one width for every token",
    "/plan TEXT": "for example think=S,answer=L,budget=64,policy=exact",
    "/think on|off": "whether the chat template asks for thinking",
    "/clear": "forget the conversation",
    "/help": "these commands",
    "/exit": "leave (also Ctrl-D)",
}


def add_to(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("chat", help=HELP, epilog=EXAMPLES)(chat)


def chat(
    model: c.Model,
    width: c.OneWidth = None,
    plan: c.PlanText = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    thinking: Annotated[
        bool | None, typer.Option("--thinking/--no-thinking", help="Default: the template's.")
    ] = None,
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
    c.read_plan(plan, width)  # refused before the model is loaded
    lines = c.standard_input()
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
        talk = Conversation(engine, params, system)
        talk.set_width(width) if width is not None else talk.set_plan(plan)
        if thinking is not None:
            talk.template["enable_thinking"] = thinking
        talk.check()
        converse(talk, lines.isatty())


class Conversation:
    """The messages so far, and how the next one will be answered."""

    def __init__(self, engine: Any, params: Any, system: str | None = None):
        self.engine, self.params, self.system = engine, params, system
        self.colours = c.colour_of(list(engine.widths))
        self.width: str | None = None
        self.plan: Any = None
        self.template: dict[str, Any] = {}
        self.messages: list[dict[str, Any]] = []
        self.clear()

    def clear(self) -> None:
        """Forgets everything but the system message."""
        self.messages = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})

    def check(self) -> None:
        """Raises InvalidRequest where the checkpoint has no tokenizer or no chat template."""
        self.engine.chat_prompt([*self.messages, {"role": "user", "content": "1"}])

    def set_width(self, name: str) -> None:
        """One width for every token. Raises WidthError for an unknown one."""
        self.set_plan(f"width={name}")

    def set_plan(self, text: str | None) -> None:
        """A plan as on the command line, None for the default width; checked here and now."""
        plan = c.read_plan(text, None)
        if plan is not None:
            plan.begin([0], self.engine.tokenizer, self.engine.widths)
        self.plan = plan

    def set_thinking(self, word: str) -> None:
        """Turns thinking "on" or "off"."""
        if word not in ("on", "off"):
            raise InvalidRequest(f"/think: must be on or off, got {shown(word)}")
        self.template["enable_thinking"] = word == "on"

    def answer(self, content: str, show: Callable[[Any], None]) -> Any:
        """Generates the reply to a message, handing each token to `show`; both are remembered.
        An interrupt ends the reply; its beginning stays in the history."""
        asked = [*self.messages, {"role": "user", "content": content}]
        prompt = self.engine.chat_prompt(asked, None, self.template)
        request = self.engine.submit(prompt, self.params, self.plan)
        try:
            for token in request:
                show(token)
        except KeyboardInterrupt:
            request.cancel()
        output = request.result()
        reply = {"role": "assistant", "content": output.answer or ""}
        if output.reasoning is not None:
            reply["reasoning_content"] = output.reasoning
        self.messages = [*asked, reply]
        return output


def converse(talk: Conversation, interactive: bool) -> None:
    """Reads lines until /exit or the end of the input. A mistake is told and the conversation
    goes on; in a pipe, where no user would see it, it ends the command."""
    screen = c.console()
    if interactive:
        screen.print(c.legend(talk.colours), Text("  /help tells the commands", style="dim"))
    while True:
        line = read_line(interactive)
        if line is None or line in ("/exit", "/quit"):
            return
        if not line:
            continue
        try:
            if line.startswith("/"):
                command(talk, line, screen)
            else:
                reply(talk, line, screen)
        except ElasticError as error:
            if not interactive:
                raise
            c.tell(str(error))


def read_line(interactive: bool) -> str | None:
    """The next line without its blanks, None at the end of the input or on an interrupt."""
    if not interactive:
        line = c.standard_input().readline()
        return line.strip() if line else None
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        c.console().print()
        return None


def reply(talk: Conversation, line: str, screen: Any) -> None:
    """Answers a message on the screen."""
    output = talk.answer(line, lambda token: c.show_token(screen, token, talk.colours))
    screen.print()
    if screen.is_terminal:
        c.errors().print(Text(figures(output), style="dim"))


def command(talk: Conversation, line: str, screen: Any) -> None:
    """Carries out one /command.

    Raises:
        InvalidRequest: an unknown one, or whatever the new setting is refused with.
    """
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    actions: dict[str, Callable[[], None]] = {
        "/width": lambda: talk.set_width(rest),
        "/plan": lambda: talk.set_plan(rest),
        "/think": lambda: talk.set_thinking(rest),
        "/clear": talk.clear,
        "/help": lambda: [screen.print(f"{k:16}{v}", markup=False) for k, v in COMMANDS.items()],
    }
    if name not in actions:
        raise InvalidRequest(
            f"chat: a command must be one of {', '.join(actions)}, got {shown(name)}"
        )
    if name in ("/width", "/plan") and not rest:
        raise InvalidRequest(f"{name}: must come with what to use, got nothing")
    actions[name]()
    if name in ("/width", "/plan"):
        c.errors().print(Text(f"now {talk.plan!r}", style="dim"))
