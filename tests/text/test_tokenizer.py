"""The tokenizer of a folder, and chat templates, held against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from elastic_infer.errors import CheckpointError, InvalidRequest
from elastic_infer.text.tokenizer import Tokenizer, eos_ids_from_folder

# Shaped like the template of a Nemotron Nano: a system block that is always there, tools as XML,
# calls and responses, reasoning dropped from earlier turns, thinking switched on and off.
TEMPLATE = """\
{%- macro field(name, value) %}
<{{ name }}>{{ value if value is string else value | tojson }}</{{ name }}>
{%- endmacro -%}
{%- set enable_thinking = enable_thinking if enable_thinking is defined else true -%}
{%- set keep_history = not (truncate_history_thinking | default(true)) -%}
{%- set ns = namespace(last_user = -1, system = "") -%}
{%- for m in messages -%}
    {%- if m.role == "user" %}{% set ns.last_user = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- if messages[0].role == "system" -%}
    {%- set ns.system = messages[0].content -%}
    {%- set turns = messages[1:] -%}
    {%- set ns.last_user = ns.last_user - 1 -%}
{%- else -%}
    {%- set turns = messages -%}
{%- endif -%}
{{ bos_token }}<|im_start|>system
{{ ns.system }}
{%- if tools %}


# Tools
<tools>
    {%- for tool in tools %}
        {%- set f = tool.function %}

<function>
        {{- field("name", f.name) }}
        {%- if f.description is defined %}
            {{- field("description", f.description | trim) }}
        {%- endif %}
        {%- for key, value in f.parameters.properties | items %}
            {{- field("parameter", {"name": key, "schema": value}) }}
        {%- endfor %}

</function>
    {%- endfor %}

</tools>
{%- endif -%}
<|im_end|>
{% for m in turns %}
    {%- if m.role == "assistant" %}
        {%- generation %}
        {{- "<|im_start|>assistant\\n" }}
        {%- set content = m.content | default("", true) %}
        {%- if m.reasoning_content is defined %}
            {%- set content = "<think>\\n" ~ m.reasoning_content ~ "\\n</think>\\n" ~ content %}
        {%- elif "<think>" not in content %}
            {%- set content = "<think></think>" ~ content %}
        {%- endif %}
        {%- if loop.index0 < ns.last_user and not keep_history %}
            {%- set content = "<think></think>" ~ content.split("</think>")[-1] | trim %}
        {%- endif %}
        {{- content | trim }}
        {%- for call in m.tool_calls | default([]) %}

<tool_call>
<function={{ call.function.name }}>
            {%- for key, value in call.function.arguments | items %}

<parameter={{ key }}>
{{ value if value is string else value | tojson }}
</parameter>
            {%- endfor %}

</function>
</tool_call>
        {%- endfor %}
        {{- "<|im_end|>\\n" }}
        {%- endgeneration %}
    {%- elif m.role == "tool" %}
        {%- if loop.first or turns[loop.index0 - 1].role != "tool" %}<|im_start|>user
{% endif %}
        {{- "<tool_response>\\n" ~ m.content ~ "\\n</tool_response>\\n" }}
        {%- if loop.last or turns[loop.index0 + 1].role != "tool" %}<|im_end|>
{% endif %}
    {%- elif m.role == "user" %}
        {%- if m.content is not string %}
            {%- set text = m.content | map(attribute="text") | join("|") %}
        {%- else %}
            {%- set text = m.content %}
        {%- endif %}
        {{- "<|im_start|>user\\n" ~ text ~ "<|im_end|>\\n" }}
    {%- else %}
        {{- raise_exception("unexpected role " ~ m.role) }}
    {%- endif %}
    {%- if m.stop_here %}{% break %}{% endif %}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" ~ ("<think>\\n" if enable_thinking else "<think></think>") -}}
{%- endif -%}
"""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": ' Weather of a <city> & "more" é ',
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Köln", "<b>"]}, "days": {}},
            },
        },
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "d": 2}}}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hi <b>&'\""}],
    "system": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
    "turns": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "<think>\nsum\n</think>\n\n2"},
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "reasoning_content": "again", "content": "4", "name": None},
        {"role": "user", "content": "3+3"},
    ],
    "calls": [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL], "reasoning": "look"},
        {"role": "tool", "content": "sun"},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "both"},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}],
    "cut": [{"role": "user", "content": "a", "stop_here": True}, {"role": "user", "content": "b"}],
}
TEXTS = ["Hello world", " two  spaces", "a<think>\nb</think>c", "日本 😀 é", "", "<s>x<|im_end|>"]


def backend() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<|im_end|>", "<|im_start|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(["hello world the weather is kind", "<think> and then"] * 9, trainer)
    made.add_tokens([AddedToken("<think>", normalized=False), "</think>"])
    return made


def write(folder: Path, config: dict[str, Any], **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    made = backend()
    if "bos" in files:
        bos = files.pop("bos")
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
        )
    made.enable_truncation(4)  # a training setting that must not cut prompts
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, value in files.items():
        path = folder / (
            name.replace("__", "/") + (".json" if isinstance(value, dict) else ".jinja")
        )
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(value) if isinstance(value, dict) else value)
    return folder


END = {"__type": "AddedToken", "content": "<|im_end|>", "special": True}
NAMED = {"bos_token": "<s>", "eos_token": END}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    transformers = pytest.importorskip("transformers")
    folder = write(tmp_path_factory.mktemp("model"), NAMED, chat_template=TEMPLATE, bos="<s>")
    ours = Tokenizer.from_folder(folder)
    assert ours is not None
    return ours, transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"enable_thinking": False},
        {"enable_thinking": True, "truncate_history_thinking": False},
        {"add_generation_prompt": False},
        {"bos_token": "<other>"},
    ],
    ids=str,
)
def test_chats_equal_transformers(
    pair: tuple[Tokenizer, Any], chat: str, tools: Any, variables: dict[str, Any]
) -> None:
    ours, theirs = pair
    variables = {"add_generation_prompt": True, **variables}
    expected = theirs.apply_chat_template(CHATS[chat], tools=tools, tokenize=False, **variables)
    text = ours.apply_chat_template(CHATS[chat], tools=tools, **variables)
    assert text == expected
    ids = theirs.apply_chat_template(
        CHATS[chat], tools=tools, tokenize=True, return_dict=False, **variables
    )
    assert ours.encode(text, add_special_tokens=False) == ids


def test_the_template_does_what_it_is_for(pair: tuple[Tokenizer, Any]) -> None:
    ours, _ = pair
    text = ours.apply_chat_template(CHATS["turns"])
    assert text.endswith("<|im_start|>assistant\n<think>\n")
    assert "again" not in text and "<think></think>4" in text and "sum" not in text
    off = ours.apply_chat_template(CHATS["turns"], enable_thinking=False)
    assert off.endswith("<think></think>")
    assert '"Köln", "<b>"' in ours.apply_chat_template(CHATS["one"], tools=TOOLS)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("special", [True, False])
def test_encode_and_decode_equal_transformers(
    pair: tuple[Tokenizer, Any], text: str, special: bool
) -> None:
    ours, theirs = pair
    ids = ours.encode(text, add_special_tokens=special)
    assert ids == theirs.encode(text, add_special_tokens=special)
    assert (ids[:1] == [ours.token_id("<s>")]) == (special or text.startswith("<s>"))
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": False},
        {"additional_special_tokens": ["<think>"]},
        {"pad_token": "z"},
        {"added_tokens_decoder": {"302": {"content": "<new>", "special": True}}},
    ],
    ids=str,
)
def test_configs_mean_what_transformers_reads(tmp_path: Path, extra: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    folder = write(tmp_path / "m", {**NAMED, **extra})
    size = backend().get_vocab_size()
    if "added_tokens_decoder" in extra:
        extra = {"added_tokens_decoder": {str(size): {"content": "<new>", "special": True}}}
        folder = write(tmp_path / "m", {**NAMED, **extra})
    ours = Tokenizer.from_folder(folder)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    assert ours is not None and ours.vocab_size == len(theirs)
    for text in [*TEXTS, "a<new>b"]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_folders(tmp_path: Path) -> None:
    assert Tokenizer.from_folder(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: must be a tokenizer"):
        Tokenizer.from_folder(tmp_path)
    folder = write(tmp_path / "m", NAMED, generation_config={"eos_token_id": [7, 1]})
    ours = Tokenizer.from_folder(folder)
    assert ours is not None
    assert ours.eos_ids == (ours.token_id("<|im_end|>"), 7) and ours.token_id("<|im_end|>") == 1
    assert ours.token_id("no such token") is None
    assert ours.special_tokens == {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: must be readable JSON"):
        Tokenizer.from_folder(folder)


def test_an_added_token_must_keep_its_id(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {"added_tokens_decoder": {"9999": {"content": "<new>"}}})
    with pytest.raises(CheckpointError, match=r"added token '<new>' must have id .*, got 9999"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("pattern", [{"String": "a"}, {"Regex": "a"}, {"Regex": ""}])
@pytest.mark.parametrize("part", ["normalizer", "decoder"])
@pytest.mark.parametrize("nested", [True, False])
def test_replacements_that_grow_without_bound_are_refused(
    tmp_path: Path, pattern: dict[str, str], part: str, nested: bool
) -> None:
    """Replacements that double a text again and again, before encoding and after decoding; a
    tokenizer would normalize its added tokens as soon as it is loaded."""

    def load(steps: list[dict[str, Any]]) -> Tokenizer | None:
        sequence = {"type": "Sequence", f"{part}s": steps}
        made = json.loads(backend().to_str())
        made[part] = {"type": "Sequence", f"{part}s": [sequence]} if nested else sequence
        (tmp_path / "tokenizer.json").write_text(json.dumps(made))
        return Tokenizer.from_folder(tmp_path)

    one = {"type": "Replace", "pattern": pattern, "content": "aa"}
    with pytest.raises(CheckpointError, match=rf"tokenizer.json: {part} must make at most 1024"):
        load([one] * 40)
    space = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
    assert load([space, {**space, "pattern": {"String": "▁"}, "content": " "}]) is not None


def test_special_map_names_what_the_config_does_not(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {}, special_tokens_map={"eos_token": {"content": "<|im_end|>"}})
    ours = Tokenizer.from_folder(folder)
    assert ours is not None and ours.eos_ids == (1,)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ()),
        ({"config.json": {"eos_token_id": 2}}, (2,)),
        ({"config.json": {"eos_token_id": 2}, "generation_config.json": {}}, (2,)),
        (
            {"config.json": {"eos_token_id": 2}, "generation_config.json": {"eos_token_id": [3]}},
            (3,),
        ),
        ({"generation_config.json": {"eos_token_id": [3, 3, 1]}}, (3, 1)),
    ],
    ids=str,
)
def test_eos_ids(tmp_path: Path, files: dict[str, Any], expected: tuple[int, ...]) -> None:
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    assert eos_ids_from_folder(tmp_path) == expected


def test_wrong_eos_ids(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(CheckpointError, match=r"config.json: eos_token_id must be ids"):
        eos_ids_from_folder(tmp_path)


# -- templates --------------------------------------------------------------------------------


def test_where_templates_come_from(tmp_path: Path) -> None:
    hello = [{"role": "user", "content": "x"}]
    listed = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    ours = Tokenizer.from_folder(write(tmp_path / "a", {"chat_template": listed}))
    assert ours is not None
    assert ours.apply_chat_template(hello) == "D"
    assert ours.apply_chat_template(hello, tools=TOOLS) == "T"
    assert ours.apply_chat_template(hello, chat_template="tool_use") == "T"
    assert ours.apply_chat_template(hello, chat_template="{{ messages[0].role }}") == "user"
    ours = Tokenizer.from_folder(
        write(
            tmp_path / "b",
            {"chat_template": "old"},
            chat_template="new",
            additional_chat_templates__rag="R",
        )
    )
    assert ours is not None
    assert ours.apply_chat_template(hello) == "new"
    assert ours.apply_chat_template(hello, chat_template="rag") == "R"
    only = Tokenizer(backend(), chat_template={"rag": "R"})
    with pytest.raises(InvalidRequest, match=r"chat_template must be one of rag"):
        only.apply_chat_template(hello)


def test_a_missing_template_names_the_remedy() -> None:
    with pytest.raises(InvalidRequest, match=r"must have a chat template, got none; add chat_temp"):
        Tokenizer(backend()).apply_chat_template([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages must be a list of .* got str"),
        ({"role": "user"}, "messages must be a list of .* got dict"),
        ([], "messages must hold at least one"),
        (["hello"], r"messages\[0\] must be a dict, got str"),
        ([{"content": "x"}], r'messages\[0\]\["role"\] must be a str .* got None'),
        ([{"role": "user", "content": "x"}, {"role": 3}], r'messages\[1\]\["role"\] must be'),
        ([{"role": "user"}], r'messages\[0\]\["content"\] must be a str or a list .* nothing'),
        ([{"role": "user", "content": 3}], r'\["content"\] must be .* got int'),
        ([{"role": "user", "content": ["x"]}], r'\["content"\] must be .* got list'),
        ([{"role": "user", "content": object()}], r"messages\[0\]\['content'\] must be made of"),
        ([{"role": "judge", "content": "x"}], "refused this: unexpected role judge"),
    ],
)
def test_malformed_messages_are_named(
    pair: tuple[Tokenizer, Any], messages: Any, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        pair[0].apply_chat_template(messages)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "must be a Jinja template"),
        ("{{ messages.append(1) }}", "refused this"),
        ("{{ ''.__class__.__mro__ }}", "refused this"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "refused this"),
        ("{{ dict.__init__.__globals__ }}", "refused this"),
        ("{{ 1 + 'a' }}", "failed on the messages: TypeError"),
    ],
)
def test_templates_are_sandboxed(template: str, message: str) -> None:
    ours = Tokenizer(backend(), chat_template=template)
    with pytest.raises(InvalidRequest, match=message):
        ours.apply_chat_template([{"role": "user", "content": "x"}])


def test_templates_know_the_date_and_change_no_message() -> None:
    ours = Tokenizer(backend(), chat_template="{{ strftime_now('%Y') }}{{ messages }}")
    messages = [{"role": "user", "content": "x", "reasoning": "r", "name": None}]
    assert ours.apply_chat_template(messages)[:4].isdecimal()
    assert messages == [{"role": "user", "content": "x", "reasoning": "r", "name": None}]
    with pytest.raises(InvalidRequest, match=r"tools must be a list of dicts"):
        ours.apply_chat_template(messages, tools=["weather"])


@pytest.mark.parametrize("length", [2047, 2048, 2049, 9000])
def test_long_texts_are_tokenized_as_short_ones_are(length: int) -> None:
    """Beside other threads or not, the ids are the same: special tokens, bytes, a beginning."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["the cat sat on the mat, é and ü"] * 20, trainer)
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    tokenizer = Tokenizer(backend)
    text = ("the mat é <s> catü " * 600)[:length]
    for special in (True, False):
        expected = backend.encode(text, add_special_tokens=special).ids
        assert tokenizer.encode(text, add_special_tokens=special) == expected
