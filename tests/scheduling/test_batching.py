"""The batch former is a pure function; these are its laws."""

import math

import pytest
from hypothesis import given, strategies as st

from elastic_infer.rounding import ceil_div
from elastic_infer.scheduling.batching import Candidate, Limits, StepCosts, chunk_length, form_batch


def flat_cost(width, rows):
    """Memory-bound: a pass costs its weights, whatever the rows."""
    return [1.0, 2.0, 4.0][width]


candidates = st.lists(
    st.builds(
        Candidate,
        key=st.just(0),
        width=st.integers(0, 2),
        tokens=st.integers(1, 300),
        kind=st.sampled_from(["step", "prefill"]),
        position=st.integers(0, 500),
        waited=st.integers(0, 9),
    ),
    max_size=20,
).map(
    lambda cs: [
        Candidate(i, c.width, 1 if c.kind == "step" else c.tokens, c.kind, c.position, c.waited)
        for i, c in enumerate(cs)
    ]
)


MIXINGS = st.sampled_from(["auto", "always", "never"])


@given(candidates, st.integers(1, 20), st.integers(0, 200), MIXINGS)
def test_laws(cs, rows, extra, mixing):
    limits = Limits(max_num_batched_tokens=rows + 64 + extra, max_num_seqs=rows, max_wait=4)
    batch = form_batch(cs, limits, flat_cost, mixing)
    chosen = {key: n for key, n in batch}
    assert len(chosen) == len(batch) <= rows, "each sequence once, no more rows than allowed"
    assert sum(chosen.values()) <= limits.max_num_batched_tokens
    assert bool(batch) == bool(cs), "with something waiting the pass is never empty"
    for key, n in batch:
        c = cs[key]
        assert 1 <= n <= c.tokens
        assert n == c.tokens or (c.position + n) % 64 == 0, "prefill is cut on the grid only"
    if mixing == "never":
        assert len({cs[key].width for key in chosen}) <= 1
    steps = [c for c in cs if c.kind == "step"]
    late = [c for c in steps if c.waited >= limits.max_wait]
    prompt_due = any(c.kind == "prefill" and c.waited >= limits.max_wait for c in cs)
    if mixing == "auto" and len(steps) <= rows - prompt_due:
        assert all(c.key in chosen for c in late), "nobody is left out for more than max_wait"


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 400), st.integers(1, 60), st.integers(0, 30)),
        min_size=1,
        max_size=12,
    ),
    MIXINGS,
    st.integers(12, 100),
    st.integers(64, 200),
    st.integers(0, 6),
)
def test_waiting_is_bounded(jobs, mixing, rows, extra, max_wait):
    """Played as a scheduler does: sequences of (width, prompt, steps, pass of arrival) that fit
    the rows of a pass. Everybody ends in time, and nobody who steps waits beyond a bound."""
    limits = Limits(rows + extra, rows, max_wait)
    state = [
        {"width": w, "prompt": p, "steps": s, "at": at, "read": 0, "waited": 0}
        for w, p, s, at in jobs
    ]
    work = sum(ceil_div(p, 64) + s for _, p, s, _ in jobs)
    bound = {"auto": max_wait + 1, "always": 1, "never": math.inf}[mixing]
    for number in range(31 + 3 * work):
        here = [s for s in state if s["at"] <= number and s["read"] < s["prompt"] + s["steps"]]
        candidates = [
            Candidate(
                i,
                s["width"],
                max(1, s["prompt"] - s["read"]),
                "prefill" if s["read"] < s["prompt"] else "step",
                s["read"],
                s["waited"],
            )
            for i, s in enumerate(here)
        ]
        batch = dict(form_batch(candidates, limits, flat_cost, mixing))
        assert bool(batch) == bool(here)
        for i, s in enumerate(here):
            stepping = s["read"] >= s["prompt"]
            s["waited"] = 0 if i in batch else s["waited"] + 1
            s["read"] += batch.get(i, 0)
            if stepping:
                assert s["waited"] < bound
    assert all(s["read"] == s["prompt"] + s["steps"] for s in state), "somebody starved"


@given(candidates, st.integers(1, 20), MIXINGS)
def test_pure(cs, rows, mixing):
    """The same arguments give the same pass, and none of them is changed."""
    before = list(cs)
    limits = Limits(rows + 64, rows)
    assert form_batch(cs, limits, flat_cost, mixing) == form_batch(cs, limits, flat_cost, mixing)
    assert cs == before


def test_never_gives_prompts_their_turn():
    """A prompt of one width is not put off for ever by the steps of another."""
    limits = Limits(200, 10)
    for waited in range(3):
        cs = [Candidate(0, 0, 1, "step"), Candidate(1, 1, 50, "prefill", waited=waited)]
        batch = dict(form_batch(cs, limits, flat_cost, "never"))
        if 1 in batch:
            break
    assert batch == {1: 50}


@pytest.mark.parametrize("mixing", ["auto", "always", "never"])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_prompt_gets_a_row_of_a_full_pass(mixing, rows):
    """More sequences than rows: everybody has a turn, prompts among them."""
    limits, waited = Limits(rows + 64, rows, 4), [0] * (rows + 2)
    longest = [0] * (rows + 2)
    for _ in range(60):
        cs = [Candidate(i, i % 3, 1, "step", waited=waited[i]) for i in range(rows + 1)]
        cs.append(Candidate(rows + 1, 1, 900, "prefill", waited=waited[rows + 1]))
        batch = dict(form_batch(cs, limits, flat_cost, mixing))
        assert 0 < len(batch) <= rows
        for i in range(rows + 2):
            waited[i] = 0 if i in batch else waited[i] + 1
            longest[i] = max(longest[i], waited[i])
    assert max(longest) <= limits.max_wait + rows + 4, longest


def test_auto_prefers_the_cheaper_group():
    def cs(narrow, wide):
        return [Candidate(i, 0 if i < narrow else 2, 1, "step") for i in range(narrow + wide)]

    limits = Limits(1000, 100)
    few_wide = form_batch(cs(8, 1), limits, flat_cost)
    assert {key for key, _ in few_wide} == set(range(8)), "eight narrow ones pay for no wide one"
    many_wide = form_batch(cs(1, 8), limits, flat_cost)
    assert len(many_wide) == 9, "one narrow row rides along"
    waited = [Candidate(0, 2, 1, "step", waited=4), Candidate(1, 0, 1, "step")]
    assert len(form_batch(waited, limits, flat_cost)) == 2, "the wide row's wait is bounded"


def test_chunks_stay_on_the_grid():
    assert chunk_length(0, 100, 200) == 100
    assert chunk_length(0, 300, 100) == 64
    assert chunk_length(10, 300, 100) == 54
    assert chunk_length(0, 300, 63) == 0


def test_unknown_mixing_is_refused():
    with pytest.raises(ValueError, match="mixing must be"):
        form_batch([], Limits(10, 1), flat_cost, "sometimes")


def test_costs_learn():
    costs = StepCosts([1e9, 2e9])
    assert costs(1, 4) == 2 * costs(0, 4)
    costs.record(1, 4, 0.5)
    assert costs(1, 4) == 0.5 and costs(1, 6) == 0.5
    assert costs(0, 4) == 0.25, "from the other width by bytes"
    costs.record(1, 4, 1.5)
    assert 0.5 < costs(1, 4) < 1.5
