"""Over 4,000 steps a float16 state stays near a float32 one; rounded to nearest it would not."""

from bench.cpu import drift


def test_stochastic_rounding_bounds_the_drift():
    """Heads that forget a tenth to a hundred-thousandth of their state per token."""
    found = drift.head_drift(size=16, state=32)
    stochastic, nearest, coarse = (found[name] for name in ("float16, stochastic", *drift.NEAREST))
    assert len(stochastic["over_time"]) == 40 and max(found["float32"]["over_time"]) < 1e-5
    assert max(stochastic["over_time"]) < 0.01 and max(stochastic["by_fade"]) < 0.015
    assert nearest["over_time"][-1] > 5 * stochastic["over_time"][-1]
    assert coarse["over_time"][-1] > 5 * nearest["over_time"][-1]
    # Fast heads forget their roundings, of which a stochastic one is the larger.
    assert nearest["by_fade"][0] < stochastic["by_fade"][0] < 2 * nearest["by_fade"][0]


def test_the_reasoner_reads_on_alike():
    """Logits of the shipped model over some hundred tokens, for every kind of cache."""
    found = drift.reasoner_drift("S", tokens=300)
    assert list(found) == [*list(drift.SMALL)[1:], *drift.NEAREST]
    for name, limit in (("float16, stochastic", 0.1), ("FP8 keys and values", 0.3), ("both", 0.3)):
        assert 0 < max(found[name]["error"]) < limit, (name, found[name])
        assert found[name]["agree"] > 0.9
