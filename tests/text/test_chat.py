"""Chats: the arguments of templates and the forms of messages, held against transformers; templates
that are no templates, that do too much, or that reach for what is not theirs."""

from __future__ import annotations

import json
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings, strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from test_tokenizer import CALL, CHATS, NAMED, TEMPLATE, TOOLS, backend, write

from elastic_infer.errors import InvalidRequest
from elastic_infer.text.sandbox import Sandbox
from elastic_infer.text.tokenizer import Tokenizer

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
HELLO = [{"role": "user", "content": "hello"}]


def render(template: str, messages: Any = HELLO, **given: Any) -> str:
    return Tokenizer(backend(), chat_template=template).apply_chat_template(messages, **given)


@pytest.fixture(scope="module", params=[TEMPLATE, PLAIN], ids=["long", "short"])
def pair(request, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = write(tmp_path_factory.mktemp("model"), NAMED, chat_template=request.param, bos="<s>")
    ours = Tokenizer.from_folder(folder)
    return ours, transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))


# -- arguments --------------------------------------------------------------------------------

ENDS = {
    "text": {"role": "assistant", "content": "The answer is"},
    "spaces": {"role": "assistant", "content": " The answer is \n"},
    "thinking": {"role": "assistant", "content": "so", "reasoning_content": "because "},
    "user": {"role": "user", "content": "and"},
    "calls": {"role": "assistant", "tool_calls": [CALL]},
    "empty": {"role": "assistant", "content": ""},
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("field", [False, True, "content", "reasoning_content", "name"])
def test_arguments_mean_what_they_do_in_transformers(pair, end, generate, field) -> None:
    """add_generation_prompt and continue_final_message, together and apart; what transformers
    refuses is refused."""
    ours, theirs = pair
    talk = [*CHATS["system"], ENDS[end]]
    given = {"add_generation_prompt": generate, "continue_final_message": field}
    try:
        expected = theirs.apply_chat_template(talk, tokenize=False, **given)
    except ValueError as error:
        with pytest.raises(InvalidRequest):
            ours.apply_chat_template(talk, **given)
        assert "contin" in str(error)
        return
    assert ours.apply_chat_template(talk, **given) == expected


def test_a_continued_message_opens_no_other() -> None:
    """Without a word on it, the prompt for a new turn is added unless the last one is continued."""
    template = PLAIN + "{% if add_generation_prompt %}<assistant>{% endif %}"
    talk = [*HELLO, {"role": "assistant", "content": "well"}]
    assert render(template, talk).endswith("well</><assistant>")
    assert render(template, talk, continue_final_message=True).endswith("<assistant>well")
    parts = [*HELLO, {"role": "assistant", "content": [{"text": "a"}, {"text": "b"}]}]
    assert render(template, parts, continue_final_message=True).endswith("<assistant>a\nb")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"add_generation_prompt": 1}, "add_generation_prompt must be True or False, got 1"),
        ({"continue_final_message": 0}, "continue_final_message must be True, False or the name"),
        (
            {"add_generation_prompt": True, "continue_final_message": True},
            "add_generation_prompt must be False where continue_final_message",
        ),
        ({"continue_final_message": "x" * 9000}, r"^.{,300}$"),
        ({"continue_final_message": "name"}, "'name' must find \"name\" in the last message"),
        ({"tokenize": False}, "tokenize must not be given"),
        ({"return_dict": True}, "return_dict must not be given"),
        ({"chat_template": 3}, "chat_template must be a template or a name, got 3"),
        ({"tools": 3}, "tools must be a list of dicts, got 3"),
        ({"documents": ["x"]}, "documents must be a list of dicts"),
        ({"x": "\ud800"}, "x must be text that UTF-8 can hold"),
    ],
    ids=str,
)
def test_arguments_are_refused_by_name(given, message) -> None:
    """Values that they do not have, and transformers' arguments that have no meaning here."""
    with pytest.raises(InvalidRequest, match=message):
        render(PLAIN, **given)


# -- messages as OpenAI's clients send them ---------------------------------------------------

PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
TAKES_TEXT = [
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ m['content'] | trim }}{% endfor %}",
    "{% for m in messages %}{{ '' + m.content }}{% endfor %}",
    "{% for m in messages %}{% set c = m.content %}{{ c.strip() }}{% endfor %}",
    "{% for m in messages %}{% for s in m.content.split('x') %}{{ s }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for c in m.calls or [] %}{% endfor %}{{ m.content }}{% endfor %}",
]
TAKES_PARTS = [
    "{% for m in messages %}{% for p in m.content %}{{ p.text }}|{% endfor %}{% endfor %}",
    "{% for m in messages %}{% set c = m['content'] %}{% if c is not string %}{% for p in c %}"
    "{{ p.text }}|{% endfor %}{% endif %}{% endfor %}",
    "{% macro show(what) %}{% for p in what %}{{ p.text }}|{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ show(m.content) }}{% endfor %}",
    "{% for m in messages %}{{ m.content | map(attribute='text') | join('|') }}|{% endfor %}",
    "{% for m in messages %}{% for p in m.content | selectattr('type', 'equalto', 'text') %}"
    "{{ p.text }}|{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for p in m.content[0:] %}{{ p.text }}|{% endfor %}{% endfor %}",
]


@pytest.mark.parametrize("template", TAKES_TEXT)
def test_parts_are_joined_for_a_template_that_takes_text(template) -> None:
    """Templates that read content in any way but by its parts."""
    assert render(template, [{"role": "user", "content": PARTS}]) == "one\ntwo"


@pytest.mark.parametrize("template", TAKES_PARTS)
def test_a_template_that_looks_into_parts_gets_them(template) -> None:
    """Loops and filters over content, by way of variables, macros and slices."""
    assert render(template, [{"role": "user", "content": PARTS}]) == "one|two|"
    said = [{"role": "user", "content": [{"type": "input_text", "text": "one"}, PARTS[1]]}]
    assert render(template, said) == "one|two|"


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "image", "file", "refusal", 3, None])
@pytest.mark.parametrize("template", [TAKES_TEXT[0], TAKES_PARTS[0]])
def test_parts_that_are_no_text_are_refused_by_name(kind, template) -> None:
    """A model that reads text must not answer as if it had seen the rest."""
    talk = [{"role": "user", "content": [PARTS[0], {"type": kind, "text": "x", "image_url": {}}]}]
    with pytest.raises(InvalidRequest, match=r'messages\[0\]\["content"\]\[1\]\["type"\] must be'):
        render(template, talk)
    with pytest.raises(InvalidRequest, match=r'\["content"\]\[0\]\["text"\] must be a str, got'):
        render(template, [{"role": "user", "content": [{"type": "text", "image": "x"}]}])


@pytest.mark.parametrize("flat", [True, False])
def test_arguments_of_tools_may_be_text(flat) -> None:
    """JSON in a string, with "function" around it or without; the messages stay as they were."""
    template = (
        "{% for c in messages[0].tool_calls %}{% set f = c.function or c %}{{ f.name }}:"
        "{% for k, v in f.arguments | items %}{{ k }}={{ v }};{% endfor %}{% endfor %}"
    )

    def said(arguments: Any) -> list[dict[str, Any]]:
        call = {"name": "f", "arguments": arguments}
        calls = [call if flat else {"type": "function", "function": call}]
        return [{"role": "assistant", "tool_calls": calls}]

    value = {"city": "Köln", "days": 2}
    talk = said(json.dumps(value))
    kept = json.dumps(talk)
    assert render(template, talk) == render(template, said(value)) == "f:city=Köln;days=2;"
    assert json.dumps(talk) == kept and render(template, said(" ")) == "f:"
    for wrong in ("[1]", "{", "x", "3", "[" * 5000, '{"a": ' * 5000, '{"a": "\\ud800"}'):
        with pytest.raises(InvalidRequest, match=r"tool_calls"):
            render(template, said(wrong))


# -- templates that go too far ----------------------------------------------------------------

BOMBS = {
    "nested range": "{% for i in range(99999) %}{% for j in range(i) %}{% endfor %}{% endfor %}",
    "loops of filters": "{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "recursive loop": "{% for x in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "times": "{{ 'a' * 3000000000 }}",
    "times list": "{{ [0] * 3000000000 }}",
    "list of lists": "{% set a = [range(99999) | list] * 99999 %}{{ a }}",
    "sums of lists": "{{ ([range(99999) | list] * 99999) | map('sum') | list }}",
    "power": "{{ 9 ** 99999999 }}",
    "format": "{{ '%2000000000d' % 1 }}",
    "format by value": "{{ '%*d' % (2000000000, 1) }}",
    "format method": "{{ '{:2000000000}'.format(1) }}",
    "format method by value": "{{ '{:{}}'.format(1, 2000000000) }}",
    "format filter": "{{ '%2000000000d' | format(1) }}",
    "format again": "{% set a = 'a' * 9999999 %}{{ ('%(a)s' * 999) % {'a': a} }}",
    "plus": "{% set n = namespace(s='a') %}{% for i in range(40) %}{% set n.s = n.s + n.s %}"
    "{% endfor %}{{ n.s }}",
    "tilde": "{% set n = namespace(s='a') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}"
    "{% endfor %}{{ n.s }}",
    "block": "{% set n = namespace(s='a') %}{% for i in range(40) %}{% set x %}{{ n.s }}{{ n.s }}"
    "{% endset %}{% set n.s = x %}{% endfor %}",
    "join": "{% set n = namespace(s='a') %}{% for i in range(40) %}"
    "{% set n.s = [n.s, n.s] | join %}{% endfor %}",
    "join method": "{% set a = 'a' * 9999999 %}{{ a.join([a, a, a, a]) }}",
    "join characters": "{% set a = 'a' * 99999 %}{{ a | join(a) }}",
    "replace": "{% set a = 'a' * 99999 %}{{ a.replace('a', a) }}",
    "replace nothing": "{% set a = 'a' * 99999 %}{{ a | replace('', a) }}",
    "translate": "{% set a = 'a' * 99999 %}{{ a.translate({97: a}) }}",
    "pad": "{{ 'a'.ljust(3000000000) }}",
    "center": "{{ 'a' | center(3000000000) }}",
    "indent": "{{ ('\\n' * 999999) | indent(999) }}",
    "json": "{{ (range(99999) | list) | tojson(indent=3000000000) }}",
    "json of text": "{{ (range(99999) | list) | tojson(indent='a' * 999999) }}",
    "bytes": "{{ (1).to_bytes(3000000000, 'big') }}",
    "slices": "{{ [1] | slice(3000000000) | list }}",
    "round": "{{ 1.5 | round(999999999, 'ceil') }}",
    "output": "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    "printed list": "{{ ['a' * 999999] * 9999 }}",
    "time": "{{ strftime_now('%2000000000d') }}",
    "lipsum": "{{ lipsum(n=10000000) }}",
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}
BROKEN = {
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "25 loops": "{% for a in [1] %}" * 25 + "{% endfor %}" * 25,
    "break": "{% break %}",
    "codec": "{{ 'a'.encode('nope') }}",
    "infinity": "{{ 1e999 | int }}",
    "digits": "{{ 1" + "0" * 6000 + " }}",
    "include": "{% include 'x' %}",
    "extends": "{% extends 'x' %}",
    "unknown": "{{ nothing.there }}",
    "filter": "{{ 1 | nothing }}",
    "surrogate": "{{ '\ud800' }}",
    "made surrogate": "{{ '\\ud800' }}",
    "self": "{{ self.x() }}",
    "division": "{{ 1 // 0 }}",
    "long": "a" * ((1 << 20) + 1),
}


@pytest.mark.parametrize("name", [*BOMBS, *BROKEN])
def test_a_template_ends_with_an_error_of_ours(name) -> None:
    """Whatever a template of a checkpoint or a client does: too much of anything, or Python's
    and Jinja's own errors while it is read, compiled and run."""
    with pytest.raises(InvalidRequest, match=r"^chat: (the chat template|chat_template)"):
        render({**BOMBS, **BROKEN}[name])


def test_what_went_too_far_is_said() -> None:
    """Each limit by name, and nothing is used up by it for the next chat."""
    template = "{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}x"
    with pytest.raises(InvalidRequest, match=r"went too far: it must do at most 500000 steps"):
        render(template, n=99999)
    assert render(template, n=20) == "x"
    with pytest.raises(InvalidRequest, match=r"make no text or list longer than 16777216"):
        render("{{ 'a' * 3000000000 }}")


EXPRESSIONS = [
    "a ~ 1 ~ none ~ ['x']",
    "a + a",
    "a * 3",
    "[1, 2] * 2 + [3]",
    "7 % 4",
    "'%s-%05d' % (a, 3)",
    "2 ** 10",
    "a | join('-')",
    "[1, 2] | join(',')",
    "ms | join('|', attribute='role')",
    "ms | map(attribute='role') | list",
    "ms | selectattr('role', 'eq', 'user') | list | count",
    "ms | map('length') | sum",
    "ms | groupby('role') | length",
    "[3, 1, 2] | sort | first",
    "a | replace('b', 'xy') | upper",
    "'{:>5}'.format(a)",
    "a.center(9)",
    "'-'.join(['x', 'y'])",
    "[1, [2]] | string",
    "ms | tojson(indent=2)",
    "a | indent(2)",
    "a | center(12)",
    "1.5 | round",
    "[1, 2, 3] | batch(2) | list",
    "[1, 2, 3] | slice(2) | list",
    "a | default('z')",
    "zz | default('z')",
    "zz is defined",
    "a is string",
    "4 is divisibleby 2",
    "a | truncate(3)",
    "{'k': 1} | items | list",
    "{'k': 1} | dictsort",
    "a | trim | list",
    "range(3) | list",
    "dict(k=1).k",
    "a[1:] if a else ''",
    "ms[0].role in ['user']",
    "'a,b'.split(',')",
    "a | urlencode",
    "a | e",
    "cycler('x', 'y').next()",
    "a.translate({97: 'zz'})",
    "(1, 2) ~ a",
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_the_sandbox_changes_no_result(expression) -> None:
    """Everything that is counted or checked gives what Jinja gives."""
    values = {"a": "abc", "ms": [{"role": "user", "content": "x"}, {"role": "assistant"}]}
    template = "{{ " + expression + " }}"
    usual = ImmutableSandboxedEnvironment()
    usual.filters["tojson"] = Sandbox().filters["tojson"]
    sandbox = Sandbox()
    ours = sandbox.run(sandbox.from_string(template), values)
    if "tojson" not in expression:
        assert ours == usual.from_string(template).render(values)
    else:
        assert ours == json.dumps(values["ms"], indent=2)


def test_loops_know_their_length() -> None:
    """Counting steps takes nothing from `loop`, from macros, or from what a loop runs over."""
    template = (
        "{% for x in 'abc' %}{{ loop.index }}{{ x }}{{ loop.last }}{{ loop.length }},"
        "{% else %}none{% endfor %}{% for x in [] %}{% else %}none{% endfor %}"
        "{% macro m(a, b=2) %}{{ a }}{{ b }}{{ caller() if caller }}{% endmacro %}{{ m(1) }}"
        "{% call m(3) %}!{% endcall %}{% for x in [1, [2]] recursive %}"
        "{{ loop(x) if x is iterable else x }}{% endfor %}{% filter upper %}q{% endfilter %}"
    )
    environment = jinja2.Environment()
    assert render(template) == environment.from_string(template).render()


# -- values -----------------------------------------------------------------------------------


def _nested(depth: int) -> Any:
    value: Any = "x"
    for i in range(depth):
        value = [value] if i % 2 else {"k": value}
    return value


@pytest.mark.parametrize("depth", [65, 900, 20_000])
@pytest.mark.parametrize("where", ["content", "extra", "tools", "variable"])
def test_deep_values_are_refused(depth, where) -> None:
    """Lists and dicts in one another, and a list in itself, wherever values come in."""
    for deep in (_nested(depth), [endless := [1], endless.append(endless)][:1]):
        given: dict[str, Any] = {}
        talk: list[dict[str, Any]] = [{"role": "user", "content": "x"}]
        if where in ("content", "extra"):
            talk[0][where] = [{"type": "text", "text": "x", "more": deep}]
        else:
            given["tools" if where == "tools" else "x"] = [{"k": deep}]
        with pytest.raises(InvalidRequest, match=r"at most 64 lists and dicts in one another"):
            render(PLAIN, talk, **given)
    assert render(PLAIN, [{"role": "user", "content": "x", "more": _nested(60)}])


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(categories=["Cs"]) | st.just("a"), min_size=1, max_size=4))
def test_lone_surrogates_are_refused_wherever_text_comes_in(text: str) -> None:
    """Roles, contents, parts, names, keys, tools, and what is encoded."""
    if text.isascii():
        return
    user = {"role": "user", "content": "x"}
    for talk, more in (
        ([{**user, "content": text}], {}),
        ([{**user, "role": text}], {}),
        ([{**user, "content": [{"text": text}]}], {}),
        ([{**user, "name": text}], {}),
        ([{**user, text: "x"}], {}),
        ([user], {"tools": [{"k": [text]}]}),
        ([user], {"x": text}),
        ([user], {"chat_template": text}),
        ([user], {"documents": [{text: 1}]}),
    ):
        with pytest.raises(InvalidRequest) as refused:
            render(PLAIN, talk, **more)
        assert str(refused.value).isprintable()
    with pytest.raises(InvalidRequest, match="lone surrogate"):
        Tokenizer(backend()).encode(text)


def test_tools_may_come_as_any_list() -> None:
    """A tuple of tools is a list of them."""
    assert render("{{ tools | length }}", tools=tuple(TOOLS)) == "1"
