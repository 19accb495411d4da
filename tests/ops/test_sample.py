"""Sampling: the distribution, the cuts against an independent implementation, and independence of
the batch."""

import math

import pytest
import torch

from elastic_infer import _C
from elastic_infer.ops import Pool, Step
from elastic_infer.ops.sample import philox, sample


def draw(logits, runner=None, ids=None, **given):
    """Ids of rows of logits [R, V]; parameters are scalars or one per row."""
    R = logits.shape[0]
    kinds = {
        "temperature": (1.0, torch.float32),
        "top_k": (0, torch.int32),
        "top_p": (1.0, torch.float32),
        "min_p": (0.0, torch.float32),
        "seed": (7, torch.int64),
        "position": (0, torch.int64),
    }
    arguments = {
        name: torch.as_tensor(given.get(name, default), dtype=dtype).expand(R).contiguous()
        for name, (default, dtype) in kinds.items()
    }
    ids = torch.full((R,), -7, dtype=torch.int32) if ids is None else ids
    return sample(logits, ids, run=runner, **arguments)


def kept(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The probabilities after vLLM's cuts in vLLM's order, written with sorts of the whole row."""
    probabilities = torch.softmax(logits.double() / temperature, -1)
    probabilities[probabilities < min_p * probabilities.max()] = 0
    if 0 < top_k < len(logits):
        least = probabilities.sort(descending=True).values[top_k - 1]
        probabilities[probabilities < least] = 0
    probabilities /= probabilities.sum()
    if top_p < 1:
        ascending, order = probabilities.flip(0).sort(stable=True)
        dropped = ascending.cumsum(0) <= 1 - top_p
        dropped[-1] = False
        probabilities[len(logits) - 1 - order[dropped]] = 0
    return probabilities / probabilities.sum()


def chi_square_is_likely(counts, probabilities):
    """Whether counts fit: within five standard deviations of the statistic's mean."""
    expected = probabilities * counts.sum()
    used = expected > 0
    assert counts[~used].sum() == 0
    small = used & (expected < 10)  # too rare for the approximation: one class together
    observed = torch.cat([counts[used & ~small], counts[small].sum()[None]]).double()
    expected = torch.cat([expected[used & ~small], expected[small].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic, freedom = ((observed - expected) ** 2 / expected).sum(), len(observed) - 1
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * max(freedom, 1)), (statistic, freedom)


CUTS = [
    {},
    {"temperature": 0.6},
    {"temperature": 3.0, "top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 1.7, "min_p": 0.02, "top_k": 12, "top_p": 0.9},
]


@pytest.mark.parametrize("isa", _C.usable_isas())
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_distribution(cut, isa):
    """100 000 draws over positions fit the softmax that the cuts leave."""
    rows, V = 100_000, 24
    logits = torch.randn(V, generator=torch.Generator().manual_seed(1)) * 1.5
    ids = draw(logits.expand(rows, V), Pool(2, isa), position=torch.arange(rows), **cut)
    chi_square_is_likely(torch.bincount(ids.long(), minlength=V), kept(logits, **cut))


def test_distribution_over_seeds_and_a_large_vocabulary():
    """Neighbouring seeds are independent, and so are the tokens of many random words."""
    rows, V = 100_000, 700
    logits = torch.randn(V, generator=torch.Generator().manual_seed(2))
    ids = draw(logits.expand(rows, V), Pool(2), seed=torch.arange(rows), position=5)
    chi_square_is_likely(torch.bincount(ids.long(), minlength=V), kept(logits))
    pairs = ids.view(-1, 2).long() % 5  # consecutive seeds, in coarse classes
    share = torch.stack([kept(logits)[c::5].sum() for c in range(5)])
    counts = torch.bincount(pairs[:, 0] * 5 + pairs[:, 1], minlength=25)
    chi_square_is_likely(counts, torch.outer(share, share).flatten())


@pytest.mark.parametrize("V", [1, 5, 64, 65, 1000, 40_000])
def test_cuts_keep_what_vllm_keeps(V):
    """Every drawn token is kept by an independent implementation of the cuts, over random
    parameters; with few tokens kept, each of them is drawn."""
    g = torch.Generator().manual_seed(V)
    for trial in range(12):
        logits = torch.randn(V, generator=g) * float(torch.rand((), generator=g) * 5 + 0.1)
        cut = {
            "temperature": float(torch.rand((), generator=g) * 2 + 0.2),
            "top_k": int(torch.randint(-1, V + 2, (), generator=g)) if trial % 3 else 3,
            "top_p": float(torch.rand((), generator=g) * 0.98 + 0.01),
            "min_p": float(torch.rand((), generator=g) ** 4) if trial % 2 else 0.0,
        }
        rows = 2000 if V < 100 else 60
        ids = draw(logits.expand(rows, V), position=torch.arange(rows), **cut).long()
        probabilities = kept(logits, **cut)
        # A token within rounding of the edge of a cut may fall on either side of it.
        edge = {**cut, "top_p": min(1.0, cut["top_p"] + 1e-5), "min_p": cut["min_p"] * 0.9999}
        assert (kept(logits, **edge)[ids] > 0).all(), cut
        likely = (probabilities > 20 / rows).nonzero().flatten()
        assert torch.isin(likely, ids).all(), cut


@pytest.mark.parametrize("runner", [None, Pool(2), Pool(2, "portable")], ids=str)
def test_token_does_not_depend_on_the_batch(runner):
    """Same row, seed and position: same token at any place, beside any neighbours, on any threads,
    from any row stride."""
    g = torch.Generator().manual_seed(4)
    V = 5003
    logits = torch.randn(9, V, generator=g) * 3
    given = {
        "temperature": torch.tensor([1.0, 0.7, 0.0] * 3),
        "top_k": torch.tensor([0, 40, 0] * 3),
        "top_p": torch.tensor([1.0, 0.9, 0.95] * 3),
        "seed": torch.arange(9) * 1000,
        "position": torch.arange(9) % 4,
    }
    want = draw(logits, **given)
    order = torch.randperm(9, generator=g)
    shuffled = {name: value[order] for name, value in given.items()}
    assert torch.equal(draw(logits[order], runner, **shuffled), want[order])
    spaced = torch.full((9, V + 31), torch.nan)
    spaced[:, :V] = logits
    assert torch.equal(draw(spaced[:, :V], runner, **given), want)
    others = torch.randn(9, V, generator=g)
    for r in range(9):
        mixed = others.clone()
        mixed[3] = logits[r]
        parameters = {name: value[r] for name, value in given.items()}
        assert draw(mixed, runner, **parameters)[3] == want[r]


def test_seed_and_position_both_matter():
    logits = torch.zeros(1, 4096)
    seen = {
        int(draw(logits, seed=seed, position=position))
        for seed in (0, 1, -1, 2**40, -(2**63))
        for position in (0, 1, 2**33)
    }
    assert len(seen) == 15


@pytest.mark.parametrize("isa", _C.usable_isas())
@pytest.mark.parametrize("V", [3, 64, 200])
def test_ties(V, isa):
    """Equal logits: greedy takes the smallest id, top_k keeps all equal to the k-th, top_p the
    smallest ids first."""
    pool, rows = Pool(1, isa), 3000
    logits = torch.full((V,), 1.0)
    logits[0] = -1.0
    assert draw(logits[None], pool, temperature=0) == 1
    many = logits.expand(rows, V)
    ids = draw(many, pool, top_k=1, position=torch.arange(rows))
    assert torch.equal(ids.unique(), torch.arange(1, V, dtype=torch.int32))
    share = 0.5 * float(kept(logits)[1:].sum())
    ids = draw(many, pool, top_p=share, top_k=V - 1, position=torch.arange(rows))
    assert int(ids.min()) == 1
    assert int(ids.max()) == math.ceil(share * (V - 1))


def test_rows_without_an_answer():
    """NaN, +inf or nothing finite gives -1 for that row alone, greedy or not."""
    nan, inf = math.nan, math.inf
    logits = torch.tensor(
        [
            [0.0, nan, 1.0],
            [-inf, -inf, -inf],
            [0.0, inf, 1.0],
            [-inf, 5.0, -inf],
            [nan, nan, nan],
        ]
    )
    for temperature in (0.0, 1.0, 1e-30):
        for cut in ({}, {"top_k": 2, "top_p": 0.5, "min_p": 0.1}):
            ids = draw(logits, temperature=temperature, **cut)
            assert ids.tolist() == [-1, -1, -1, 1, -1]


def test_forbidden_tokens_are_never_drawn():
    logits = torch.full((20_000, 70), -math.inf)
    logits[:, 3] = logits[:, 68] = -3e38
    for cut in ({}, {"top_k": 50}, {"top_p": 0.999}, {"min_p": 1.0}):
        ids = draw(logits, position=torch.arange(20_000), temperature=100.0, **cut)
        assert ids.unique().tolist() == [3, 68]
    assert draw(torch.tensor([[3e38, -3e38, 3e38]]), temperature=1e-6) in (0, 2)


def test_philox_matches_its_published_answer():
    """The known answer of Philox4x32-10 for a counter and key of zeros."""
    assert [f"{int(x):08x}" for x in philox(0, 0, 4)] == [
        "6627e8d5",
        "e169c58d",
        "bc57ac4c",
        "9b00dbd8",
    ]


def test_recorded_step_reads_new_values():
    """A recorded call draws from what its tensors hold at each replay."""
    logits, ids = torch.zeros(2, 9), torch.zeros(2, dtype=torch.int32)
    one = dict.fromkeys(("top_p", "temperature"), torch.ones(2)) | {
        "min_p": torch.zeros(2),
        "top_k": torch.zeros(2, dtype=torch.int32),
        "seed": torch.zeros(2, dtype=torch.int64),
        "position": torch.zeros(2, dtype=torch.int64),
    }
    step = Step(Pool(1))
    sample(logits, ids, run=step, **one)
    for token in (4, 8):
        logits.fill_(-math.inf)[:, token] = 0
        step.run()
        assert ids.tolist() == [token, token]


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("temperature", -0.1, "finite values >= 0"),
        ("temperature", math.inf, "finite values >= 0"),
        ("temperature", math.nan, "finite values >= 0"),
        ("top_k", -2, "values >= -1"),
        ("top_p", 0.0, r"in \(0, 1\]"),
        ("top_p", 1.5, r"in \(0, 1\]"),
        ("min_p", -0.5, r"in \[0, 1\]"),
        ("min_p", math.nan, r"in \[0, 1\]"),
    ],
)
def test_values_are_checked(name, value, message):
    with pytest.raises(ValueError, match=f"sample: {name} must hold .*{message}, got .* at row 0"):
        draw(torch.zeros(2, 5), **{name: value})
