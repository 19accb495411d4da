"""Settings of training, quantization and budgets: any value is taken or refused by name.

Family: values of every type, ints beyond floats and beyond what Python prints, NaN, infinities,
empty and nested containers, lone surrogates, in every field of every settings object.
"""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, strategies as st

from elastic_infer import ElasticError, InvalidRequest, WidthError
from elastic_infer.checkpoint.checkpoint import Checkpoint
from elastic_infer.checkpoint.slicing import slice_checkpoint
from elastic_infer.elastify.costs import Cost, parse_bytes, parse_parameters
from elastic_infer.elastify.distill import _identity
from elastic_infer.elastify.pipeline import calibration_batches
from elastic_infer.elastify.router import check_budgets, check_choices
from elastic_infer.elastify.settings import Settings, Stage
from elastic_infer.quantize.distill import DistillSettings
from elastic_infer.quantize.write import Quantizer, choose_formats
from support import tiny

big = st.tuples(st.sampled_from([1, -1]), st.sampled_from([400, 5000])).map(
    lambda pair: pair[0] * 10 ** pair[1]
)
numbers = st.integers() | st.floats() | big
texts = st.text(st.characters(exclude_categories=()), max_size=9)
leaves = st.none() | st.booleans() | numbers | texts | st.binary(max_size=5) | st.just(object())
any_value = leaves | st.lists(leaves, max_size=3) | st.dictionaries(texts, leaves, max_size=2)
any_value |= st.lists(leaves, max_size=3).map(tuple)

STAGES = (Stage(2, 8, 2),)
MAKE = {
    Stage: lambda **given: Settings(stages=(dataclasses.replace(STAGES[0], **given),)),
    Settings: lambda **given: Settings(**{"stages": STAGES, **given}),
    Cost: Cost,
    DistillSettings: DistillSettings,
}
FIELDS = [(kind, field.name) for kind in MAKE for field in dataclasses.fields(kind)]
# Taken as they are: choices are checked against the model, per_layer by its truth.
FIELDS = [pair for pair in FIELDS if pair[1] not in ("choices", "per_layer")]


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda x: getattr(x, "__name__", x))
@given(value=any_value)
def test_a_field_takes_or_refuses_any_value(kind, name, value):
    try:
        made = MAKE[kind](**{name: value})
    except InvalidRequest as error:
        assert name in str(error) and len(str(error)) < 400
        str(error).encode("utf-8")
        return
    if isinstance(made, Settings):  # what a run does with them first
        assert made.steps >= 1 and made.longest >= 1
        assert 0 <= made.rate(0) <= max(1.0, made.final_lr)
        _identity(made, None, None)
    if isinstance(made, DistillSettings):
        assert made.rate(0) > 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("values")
    tiny.write_tiny(folder, tiny.tiny_config(1, hybrid_override_pattern="M*"), None, seed=1)
    return Checkpoint.open(folder)


@given(value=any_value | st.dictionaries(st.just("hidden_size"), any_value))
def test_choices_and_budgets_of_any_value(checkpoint, value):
    for check in (lambda: check_choices(checkpoint.config, value), lambda: check_budgets(value)):
        try:
            check()
        except (InvalidRequest, WidthError) as error:
            str(error).encode("utf-8")
            assert len(str(error)) < 600


@given(value=any_value)
def test_sizes_as_text_of_any_value(value):
    for parse in (parse_bytes, lambda text: parse_parameters(text, 1e9)):
        try:
            assert 0 < parse(value) < 1e310
        except InvalidRequest as error:
            str(error).encode("utf-8")


@given(value=any_value)
def test_quantization_of_any_groups_patterns_and_weights(checkpoint, value):
    config, names = checkpoint.config, checkpoint.names
    tries = [
        lambda: choose_formats(config, names, {"mamba": value}),
        lambda: choose_formats(config, names, {"mamba": "fp8"}, value),
        lambda: Quantizer(checkpoint, {}, value),
        lambda: Quantizer(checkpoint, {}, {"full": value}),
        lambda: next(calibration_batches(None, None, value)),
    ]
    for attempt in tries:
        try:
            attempt()
        except ElasticError as error:
            str(error).encode("utf-8")
        except AttributeError as error:  # a count that is one: there is no data in this test
            assert "'NoneType'" in str(error) and type(value) is int and value > 0


@given(value=any_value)
def test_the_name_of_a_width_of_any_value(checkpoint, tmp_path_factory, value):
    with pytest.raises(WidthError, match="slice: width must be one of"):
        slice_checkpoint(checkpoint, value, tmp_path_factory.getbasetemp() / "never")


@pytest.mark.parametrize(
    "size", [0, -1, 2.5, None, "big", True, 1 << 20000], ids=lambda size: type(size).__name__
)
def test_a_size_of_shards_is_checked(checkpoint, tmp_path, size):
    with pytest.raises(InvalidRequest, match="shard_bytes must be a positive int"):
        slice_checkpoint(checkpoint, "full", tmp_path / "out", shard_bytes=size)
    assert not (tmp_path / "out").exists()
