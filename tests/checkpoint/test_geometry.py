"""The table of a model's tensors: what follows from it agrees with itself at every width."""

import math

from hypothesis import given, settings, strategies as st

from elastic_infer.checkpoint.config import ModelConfig
from elastic_infer.checkpoint.counts import count_parameters
from elastic_infer.checkpoint.geometry import each_tensor, layer_sizes, projection, size_of
from elastic_infer.checkpoint.layout import expected_shapes, selection_shape, tensor_selections
from elastic_infer.checkpoint.width_table import parse_widths
from support import tiny

seeds = st.integers(0, 1 << 16)


def model(seed):
    raw = tiny.tiny_config(seed, tie_word_embeddings=seed % 2 == 1)
    config = ModelConfig.from_dict(raw)
    return config, parse_widths(config, tiny.tiny_widths(raw, seed))


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_a_width_holds_as_many_elements_as_are_counted(seed):
    """Stands for every use of the table: indices, shapes and counts are of one geometry."""
    config, widths = model(seed)
    shapes = expected_shapes(config)
    for width in widths.values():
        sizes = layer_sizes(width)
        total = 0
        for name, selection in tensor_selections(config, width).items():
            shape = shapes[name]
            for indices, size in zip(selection, shape):
                if isinstance(indices, list):
                    assert indices == sorted(set(indices)) and indices[-1] < size
            total += math.prod(selection_shape(shape, selection))
        assert total == count_parameters(config, width).total
        for layer, kind in enumerate(config.layers):
            segments, inner = projection(config, kind)
            assert size_of(segments, sizes[layer]) > 0 and size_of(inner, sizes[layer]) > 0


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_a_tracking_row_differs_in_the_state_of_the_heads_alone(seed):
    """Stands for all sizes that a row carries: tracking widens what feeds the state, no more."""
    config, widths = model(seed)
    narrow, served = next(iter(widths.values())), list(widths.values())[-1]
    for own, tracking in zip(layer_sizes(narrow), layer_sizes(narrow, served)):
        assert {key for key in own if own[key] != tracking[key]} <= {"state_heads"}
    names = each_tensor(config, lambda name, _tensor, _layer: name, narrow.n_routed_experts)
    assert [name for name, _, _ in names] == list(tensor_selections(config, narrow))
