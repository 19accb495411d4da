"""Reasoning and answer: the phases of tokens, the texts of an Output, its counts and the stream say
the same, whatever the model says, the plan forces and the caller stops at."""

from __future__ import annotations

import re

import pytest
import tokenizers
from hypothesis import given, settings, strategies as st
from tokenizers import decoders, models

from elastic_infer import InvalidRequest, Plan, SamplingParams
from elastic_infer.text.stream import TextStream
from elastic_infer.text.tokenizer import Tokenizer
from support.engines import END_THINK, EOS, THINK, script, text_engine

TURN = EOS + 1  # a second special token
TAGS = (THINK, END_THINK)
EURO = list("€".encode())
PROMPTS = ["x", "x<think>", "x<think>y</think>", "x<think>y</think>z"]
SAID = st.lists(
    st.sampled_from([*b"abE \n", *EURO, THINK, END_THINK, TURN]) | st.sampled_from([*b"ab", *TAGS]),
    max_size=14,
)
STOPS = st.lists(st.sampled_from(["ab", "a b", "E", "\n\n", "b</think>", "aEa"]), max_size=2)
CLOSINGS = st.sampled_from([None, "ab</think>", " </think>\n\nab: ", "</think>E"])


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    added = {str(TURN): {"content": "<|turn|>", "special": True}}
    config = {
        "eos_token": "<|end|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": added,
        "chat_template": CHAT,
    }
    files = {"tokenizer_config": config}
    with text_engine(tmp_path_factory.mktemp("model"), files, max_model_len=128) as made:
        assert made.tokenizer.token_id("<|turn|>") == TURN
        yield made


CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{{ opening | default('') }}{% endif %}"
)


def say(engine, tokens, prompt="x<think>", plan=None, **values):
    params = SamplingParams(logits_processors=[script(tokens)], **values)
    return engine.generate(prompt, params, plan=plan)


def labelled(tokenizer, prompt: str, ids: list[int], skip: bool):
    """The oracle: (phase or "tag", text) of every run of tokens between two tags or phases, and
    whether there is a thinking block."""
    last = max(prompt.rfind(tag) for tag in ("<think>", "</think>"))
    phase = None
    if last >= 0:
        phase = "thinking" if prompt.startswith("<think>", last) else None
        phase = "answer" if prompt.endswith("</think>") else phase
    thinks = phase == "thinking"
    runs: list[tuple[str | None, list[int]]] = []
    for token in ids:
        label = phase
        if token in TAGS:
            label = "tag"
            if phase == "thinking":
                phase = "answer" if token == END_THINK else phase
            elif phase is None:
                thinks = token == THINK
                phase = "thinking" if thinks else "answer"
        elif phase is None and tokenizer.decode([token], False).strip():
            label = phase = "answer"
        if not runs or runs[-1][0] != label or label == "tag":
            runs.append((label, []))
        runs[-1][1].append(token)
    return [(label, tokenizer.decode(run, skip, TAGS)) for label, run in runs], thinks


@settings(max_examples=250, deadline=None)
@given(
    prompt=st.sampled_from(PROMPTS),
    said=SAID,
    stop=STOPS,
    inside=st.booleans(),
    skip=st.booleans(),
    by_id=st.booleans(),
    budget=st.none() | st.integers(0, 3),
    closing=CLOSINGS,
    least=st.integers(0, 3),
    most=st.integers(3, 20),
)
def test_everything_agrees(
    engine, prompt, said, stop, inside, skip, by_id, budget, closing, least, most
):
    """Random token streams with tags in odd places, half characters, special tokens, forced text,
    stop strings and limits; think tags as text and as ids."""
    tags = {"start_tag": THINK, "end_tag": END_THINK} if by_id else {}
    plan = Plan.think_answer("S", "L", budget, grace=0, closing_text=closing, **tags)
    params = SamplingParams(
        logits_processors=[script(said)],
        stop=stop,
        stop_in_thinking=inside,
        min_tokens=least,
        skip_special_tokens=skip,
        max_tokens=most,
        logprobs=0,
    )
    request = engine.submit(prompt, params, plan)
    tokens, out = list(request), request.result()
    assert "".join(t.text for t in tokens) == out.text
    assert [t.id for t in tokens] == out.token_ids
    assert out.usage.reasoning_tokens == sum(t.phase == "thinking" for t in tokens)
    for token, top in zip(tokens, out.logprobs, strict=True):
        assert token.top_logprobs == top
        assert (token.logprob is None) == (top is None) == token.forced

    spoken = out.token_ids[:-1] if out.token_ids[-1:] == [EOS] else out.token_ids
    runs, thinks = labelled(engine.tokenizer, prompt, spoken, skip)
    whole = "".join(text for _, text in runs)
    if isinstance(out.stop_reason, str):
        assert whole.startswith(out.text + out.stop_reason)
        assert inside or tokens[-1].phase != "thinking"
    else:
        assert out.text == whole
    parts: dict[str | None, str] = {None: "", "thinking": "", "answer": "", "tag": ""}
    left = len(out.text)
    for label, text in runs:
        parts[label] += text[:left]
        left -= min(left, len(text))
    if thinks:
        assert out.reasoning == parts["thinking"].strip()
        assert out.answer == parts["answer"].lstrip()
    else:
        assert (out.reasoning, out.answer) == (None, parts[None] + parts["answer"])
    assert "<think>" not in out.answer and "</think>" not in out.answer
    alone = ("<think>", "</think>", "")
    if all(t.id not in TAGS or t.text in alone for t in tokens):  # or it has text held back
        shown = "".join(t.text for t in tokens if t.phase == "answer")
        assert out.answer == (shown.lstrip() if thinks else parts[None] + shown)


def test_every_choice_and_every_width_agrees(engine):
    """n > 1, and plans that change the width in the middle of either phase."""
    said = [*b"so", END_THINK, *b"12", END_THINK, *b"34"]
    plans = (
        None,
        Plan.schedule([(0, "S"), (2, "L"), (5, "M")], "exact"),
        Plan.custom(lambda view: "SL"[len(view.token_ids) % 2]),
    )
    for plan in plans:
        out = say(engine, said, plan=plan, n=3, seed=1, temperature=1.0)
        assert {(c.reasoning, c.answer) for c in out.choices} == {("so", "1234")}
        assert out.usage.reasoning_tokens == 3 * 3


# -- stop strings -----------------------------------------------------------------------------


def test_stop_strings_end_the_answer_only(engine):
    """A stop string in thinking, and one that begins in thinking and ends in the answer."""
    out = say(engine, [*b"a stop b", END_THINK, *b"12 stop 3"], stop=["stop"])
    assert (out.reasoning, out.answer, out.stop_reason) == ("a stop b", "12 ", "stop")
    out = say(engine, [*b"a sto", END_THINK, *b"p 12"], stop=["stop"])
    assert (out.reasoning, out.answer) == ("a sto", "p 12")
    out = say(engine, [*b"a stop b", END_THINK], stop=["stop"], stop_in_thinking=True)
    assert (out.reasoning, out.answer, out.stop_reason) == ("a", "", "stop")
    with pytest.raises(InvalidRequest, match="stop_in_thinking must be True or False, got 1"):
        SamplingParams(stop_in_thinking=1)


BLANK = st.sampled_from(["\n", " ", "\n\n", " \n", "\nU", "U", "a"])


@settings(max_examples=150, deadline=None)
@given(
    lead=st.text("\n ", max_size=4),
    answer=st.text("aU\n ", max_size=6),
    stop=st.lists(BLANK, min_size=1, max_size=3),
    spelled=st.booleans(),
    cut=st.integers(1, 5),
)
def test_white_space_between_thinking_and_answer_stops_nothing(lead, answer, stop, spelled, cut):
    r"""Stands for "\n\n" and the like as stop strings of models that end their thinking with it:
    it is looked for in the answer, which begins behind the white space; other stop strings may
    begin in it. The oracle looks at the whole text."""
    said = lead + answer
    pieces = [said[i : i + cut] for i in range(0, len(said), cut)]
    words = {w: i for i, w in enumerate(dict.fromkeys(["<think>", "</think>", "t", *pieces]))}
    made = tokenizers.Tokenizer(models.WordLevel(words, "t"))
    made.decoder = decoders.Fuse()
    tags = (0, 1)
    how = {"tags": (), "spelled": ("<think>", "</think>")} if spelled else {"tags": tags}
    stream, shown, hit = TextStream(Tokenizer(made), stop, **how), "", None
    for piece in ["<think>", "t", "</think>", *pieces]:
        phase = "answer" if piece in pieces else "thinking"
        text, hit = stream.push(words[piece], None if spelled else phase, True)
        shown += text
        if hit:
            break
    else:
        shown += stream.finish(True)[0]
    begin = len(said) - len(said.lstrip())
    found = [
        (at + len(s), at, s) for s in stop if (at := said.find(s, begin if s.isspace() else 0)) >= 0
    ]
    wanted = (said, None) if not found else (said[: min(found)[1]], min(found)[2])
    assert (shown, hit) == ("<think>t</think>" + wanted[0], wanted[1])


@pytest.mark.parametrize("skip", [True, False])
def test_a_stop_string_that_is_a_token_stops_at_the_token(engine, skip):
    """Special tokens and think tags as stop strings, in any phase; min_tokens bars them."""
    turn = {"stop": ["<|turn|>"], "skip_special_tokens": skip}
    out = say(engine, [*b"ab", TURN, *b"c"], prompt="x", **turn)
    assert (out.text, out.finish_reason, out.stop_reason) == ("ab", "stop", "<|turn|>")
    assert say(engine, [*b"ab", TURN, *b"c"], **turn).reasoning == "ab"
    end = say(engine, [*b"ab", END_THINK, *b"c"], stop=["</think>"], skip_special_tokens=skip)
    assert (end.reasoning, end.answer, end.stop_reason) == ("ab", "", "</think>")
    free = SamplingParams(min_tokens=6, max_tokens=8, logit_bias={TURN: 100}, **turn)
    assert TURN not in engine.generate("x", free).token_ids[:6]


def test_a_stop_string_around_a_special_token_is_refused(engine):
    """The text of an output leaves the token out, so that the string could never be found."""
    with pytest.raises(InvalidRequest, match=r"stop must hold no special token beside other text"):
        engine.generate("x", SamplingParams(stop=["\n<|turn|>"]))
    out = say(engine, [*b"a\n", TURN], "x", stop=["\n<|turn|>"], skip_special_tokens=False)
    assert (out.text, out.stop_reason) == ("a", "\n<|turn|>")


@settings(max_examples=200, deadline=None)
@given(
    lead=st.sampled_from(["", "\n ", "x"]),
    thought=st.text("aE<>/", max_size=8),
    answer=st.text("aE ", max_size=8),
    cuts=st.lists(st.integers(1, 9), max_size=9),
    inside=st.booleans(),
)
def test_tags_that_no_token_stands_for(lead, thought, answer, cuts, inside):
    """A vocabulary without think tags: the text is split by the text of the tags, however tokens
    cut it, and stop strings are looked for after the block."""
    whole = f"{lead}<think>{thought}</think>{answer}"
    pieces, at = [], 0
    for cut in [*cuts, len(whole)]:
        pieces.append(whole[at : at + cut])
        at += cut
    # The first token after a tag may hold a part of it: here none does.
    pieces = [p for piece in pieces for p in re.split(r"(?<=>)", piece) if p]
    words = {"[U]": 0, "w": 1}
    for piece in pieces:
        words.setdefault(piece, len(words))
    made = tokenizers.Tokenizer(models.WordLevel(words, "[U]"))
    made.decoder = decoders.Fuse()
    stream = TextStream(Tokenizer(made), ["E"], (), spelled=("<think>", "</think>"))
    shown, hit = "", None
    for piece in pieces:
        text, hit = stream.push(words[piece], None, True, inside)
        shown += text
        if hit:
            break
    end = whole.index("</think>") + len("</think>")
    first = whole.find("E", 0 if inside or lead == "x" else end)
    assert (shown, hit) == ((whole, None) if first < 0 else (whole[:first], "E"))
    assert stream.text == shown


# -- where the phase begins -------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", ["What does <think> mean?", "a</think>b", "<think>", "</think>"]
)
@pytest.mark.parametrize("budget", [None, 0, 3])
def test_a_chat_may_quote_tags(engine, content, budget):
    """Tags in messages say nothing about the phase; those that the template appends do."""
    plan = Plan.think_answer("S", "L", think_tokens=budget, grace=0)
    talk = [{"role": "user", "content": content}]
    params = SamplingParams(logits_processors=[script("It opens thinking.")])
    out = engine.chat(talk, params, plan=plan)
    assert (out.reasoning, out.answer) == (None, "It opens thinking.")
    ids = engine.chat_prompt(talk)
    assert engine.generate(ids, params, plan=plan).answer == out.answer
    assert next(iter(engine.stream(ids, params, plan=plan))).phase == "answer"
    opened = engine.chat_prompt(talk, None, {"opening": "<think>\n"})
    plan = Plan.think_answer("S", "L")
    out = engine.generate(opened, SamplingParams(logits_processors=[script("so")]), plan=plan)
    assert (out.reasoning, out.answer) == ("so", "")
    closed = engine.chat_prompt(talk, None, {"opening": "<think></think>"})
    assert engine.submit(closed, params, plan).branches[0].run.phase == "answer"


def test_a_prompt_that_quotes_a_tag_can_say_so(engine):
    """In `generate` a start tag without an end counts; prompt_phase overrides every prompt."""
    quoting = "What does <think> mean?"
    assert say(engine, "It", quoting).reasoning == "It"
    for prompt in (*PROMPTS, quoting):
        for phase, split in {
            "undecided": (None, "It"),
            "answer": (None, "It"),
            "thinking": ("It", ""),
        }.items():
            plan = Plan.think_answer("S", "L", prompt_phase=phase)
            out = say(engine, "It", prompt, plan)
            assert (out.reasoning, out.answer) == split, (prompt, phase)
    own = say(
        engine,
        [THINK, *b"so", END_THINK, *b"12"],
        quoting,
        Plan.think_answer("S", "L", prompt_phase="undecided"),
    )
    assert (own.reasoning, own.answer) == ("so", "12")
    with pytest.raises(InvalidRequest, match=r'prompt_phase must be None, "thinking".* got \[3\]'):
        Plan.think_answer("S", "L", prompt_phase=[3])
