"""Names that users meet: public classes say whose they are, and their objects show themselves
in one line, whatever state they are in."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from dataclasses import fields, is_dataclass
from typing import get_type_hints

import pytest

import elastic_infer
from elastic_infer import Checkpoint, ElasticError, Engine, Plan, SamplingParams, demo_model

CLASSES = [
    value
    for name in elastic_infer.__all__
    if inspect.isclass(value := getattr(elastic_infer, name))
]


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained(demo_model(), max_num_seqs=4, max_model_len=256) as engine:
        yield engine


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_a_public_class_is_known_by_the_name_that_callers_import(kind):
    """`help()` and tracebacks give that name; pickles and copies find the class by it, and tools
    that ask for the types of its fields get them."""
    assert (kind.__module__, kind.__qualname__) == ("elastic_infer", kind.__name__)
    assert pickle.loads(pickle.dumps(kind)) is kind and copy.copy(kind) is kind
    if is_dataclass(kind):
        assert set(get_type_hints(kind)) >= {field.name for field in fields(kind)}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_an_object_that_was_not_built_shows_itself(kind):
    """A debugger or a log asks for the `repr` of what failed halfway through its construction."""
    assert repr(kind.__new__(kind)).startswith(kind.__name__)


def test_objects_show_themselves_in_one_line(engine):
    assert repr(engine) == "Engine(reasoner, widths S < M < L, 2.3 MB, 4 sequences)"
    assert repr(engine.core.checkpoint).startswith("Checkpoint(reasoner, widths S < M < L, ")
    assert repr(engine.widths["S"]).startswith("Width(S, hidden_size ")
    assert repr(SamplingParams()) == "SamplingParams()"
    assert repr(SamplingParams(stop="a", top_k=3)) == "SamplingParams(top_k=3, stop=('a',))"
    assert repr(Plan.fixed("S").policy) == "Policy(carry)"
    for value in engine.widths.values():
        assert "\n" not in repr(value) and len(repr(value)) < 300


def test_a_sequence_shows_its_tokens_and_widths(engine):
    with engine.open("1+2=", width="S") as sequence:
        assert repr(sequence) == "EngineSequence(4 tokens, at S)"
        sequence.step()
        sequence.step()
        sequence.step("L")
        sequence.logits()
        assert repr(sequence) == "EngineSequence(7 tokens, at L, runs S:5 L:2)"
        for width in "SL" * 10:
            sequence.step(width)
        assert len(repr(sequence)) < 120 and "…" in repr(sequence)
    assert repr(sequence).startswith("EngineSequence(") and "closed" in repr(sequence)


def test_a_request_shows_how_far_it_is(engine):
    """Before the first pass, within it, and after its end, by itself or by an error."""
    seen, inside, go_on = [], threading.Event(), threading.Event()

    def look(token_ids, row, phase):
        if not seen:
            inside.set()
            go_on.wait(60)
            seen.append(True)

    params = SamplingParams(max_tokens=3, ignore_eos=True, logits_processors=[look])
    request = engine.submit("1+2=", params)
    inside.wait(60)
    assert repr(request) == f"Request({request.request_id}, running, 0 tokens)"
    assert repr(engine).startswith("Engine(reasoner, widths")  # it waits for no pass
    go_on.set()
    request.result()
    assert repr(request) == f"Request({request.request_id}, length, 3 tokens)"

    def fail(token_ids, row, phase):
        raise ValueError

    request = engine.submit("1+2=", SamplingParams(logits_processors=[fail]))
    request.wait()
    assert repr(request) == f"Request({request.request_id}, error, 0 tokens)"


def test_what_is_closed_says_so():
    engine = Engine.from_pretrained(demo_model(), max_num_seqs=2, max_model_len=64)
    sequence = engine.open("1+2=")
    engine.close()
    assert repr(engine) == "Engine(reasoner, closed)"
    assert repr(sequence) == "EngineSequence(4 tokens, closed)"


def test_names_that_a_folder_or_file_gives_stay_on_one_line(tmp_path):
    """A folder may have any name that the system takes, its line breaks too;
    a folder that is given as "." has one all the same."""
    for name in ("a\nb", "x" * 200):
        folder = tmp_path / name
        folder.symlink_to(demo_model())
        text = repr(Checkpoint.open(folder))
        text.encode("utf-8")
        assert text.startswith("Checkpoint(") and "\n" not in text and len(text) < 160


def test_the_current_folder_has_a_name(monkeypatch):
    monkeypatch.chdir(demo_model())
    assert repr(Checkpoint.open(".")).startswith("Checkpoint(reasoner, ")


def test_errors_are_told_by_their_public_name():
    with pytest.raises(ElasticError) as caught:
        Engine.from_pretrained(demo_model(), max_width="XL")
    assert "elastic_infer.WidthError: " in "".join(caught.exconly())
