"""Messages of errors: they can always be made and printed, whatever value they speak of.

Family: any value that a caller or a file can bring into a message: long, deep, with lone
surrogates, beyond what Python prints, or with a `repr` of its own that fails.
"""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given, strategies as st

from elastic_infer import errors
from elastic_infer.errors import CheckpointError, ElasticError, InvalidRequest, shown

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, ElasticError)
]

any_text = st.text(st.characters(exclude_categories=()), max_size=300)  # surrogates too
leaves = st.none() | st.booleans() | st.floats() | any_text | st.binary(max_size=300)
leaves |= st.integers() | st.integers(1, 40000).map(lambda n: 7**n)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=40)
        | st.dictionaries(any_text, inner, max_size=20)
        | st.tuples(inner, inner)
    ),
    max_leaves=60,
)


@given(values)
def test_any_value_can_be_shown(value):
    text = shown(value)
    assert 0 < len(text) <= 80
    text.encode("utf-8")


@given(st.integers(-(10**30), 10**30) | st.text(st.characters(codec="ascii"), max_size=30))
def test_a_short_value_is_its_repr(value):
    assert shown(value) == repr(value)


class Surrogate:
    def __repr__(self):
        return "\udfff"


class Unprintable:
    def __init__(self, error):
        self.error = error

    def __repr__(self):
        raise self.error


def _deep(levels: int) -> list:
    out: list = []
    for _ in range(levels):
        out = [out]
    return out


@pytest.mark.parametrize(
    "value",
    [
        10**5000,
        -(10**5000),
        [10**5000],
        {"n": (10**5000,)},
        _deep(10**5),
        b"x" * 10**7,
        "x" * 10**7,
        list(range(10**6)),
        Unprintable(ValueError()),
        Unprintable(MemoryError()),
        [Unprintable(RecursionError())],
        "\ud800",
        Surrogate(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_that_no_format_takes(value):
    assert len(shown(value).encode("utf-8")) <= 3 * 80


@pytest.mark.parametrize("kind", KINDS)
@given(text=any_text)
def test_every_message_can_be_printed(kind, text):
    error = kind(f"engine: prompt must be text, got {text}")
    str(error).encode("utf-8")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == str(copy.copy(error))


def test_a_long_message_keeps_its_beginning_and_its_remedy():
    text = str(CheckpointError(f"checkpoint: names must be known, got {'x' * 10**6}; rename them"))
    assert len(text) <= 4000
    assert text.startswith("checkpoint: names must be known") and text.endswith("; rename them")


def test_other_arguments_stay_as_they_are():
    assert InvalidRequest("a", 5).args == ("a", 5)
