"""Tokens that a pass drew are read by the next one without a way through the host."""

import pytest
import torch

from elastic_infer.model.batch import Segment
from elastic_infer.model.draw import Draw
from elastic_infer.model.model import Model
from elastic_infer.ops.embed import embed
from elastic_infer.scheduling.reads import Read
from support.emulated import built, load
from support.engines import base_engine, draw, run_read
from tests.support.late_device import Late, late_device

emu = load(built())
WIDTHS = ("L", "S", "M")  # a pass has its rows in another order
DRAWS = [Draw(), Draw(temperature=0.8, seed=3), Draw(temperature=1.2, top_k=9, seed=5)]


@pytest.fixture(params=[None, emu], ids=["cpu kernels", "cuda kernels"])
def late(request):
    with late_device(Late(), request.param) as device:
        device.lengths = (9, 3, 5) if request.param else (70, 3, 62)  # emulation takes its time
        yield device


@pytest.fixture
def model(late, tmp_path):
    with base_engine(tmp_path, device="cuda") as engine:
        yield engine.core.model
        late.wait()


def begin(model):
    """Three sequences, read as prompts."""
    lengths = model.device.lengths
    opened = [model.cache.open(track=True) for _ in lengths]
    for sequence, n in zip(opened, lengths):
        run_read(model, sequence, Read(draw(n, n), "L", "prefill"))
    return opened


def steps(model, opened, tokens, fed=None, at=0):
    """A pass of one step of each; fed: the result whose tokens they read, in place of `tokens`."""
    feeds = [-1] * len(opened) if fed is None else [start for start, _ in fed.spans]
    return model.forward(
        [
            Segment(s, [0 if fed else t], w, feed=f, draw=Draw(**{**vars(d), "position": at}))
            for s, t, w, f, d in zip(opened, tokens, WIDTHS, feeds, DRAWS)
        ]
    )


def drawn(result):
    return [int(result.drawn[start]) for start, _ in result.spans]


def by_way_of_the_host(model, count):
    """Tokens and the last logits of `count` passes that read what the one before drew."""
    opened, tokens, found = begin(model), [5, 6, 7], []
    for at in range(count):
        result = steps(model, opened, tokens, at=at)
        model.device.wait()
        tokens = drawn(result)
        found.append(tokens)
    logits = [result.of(i).clone() for i in range(3)]
    for sequence in opened:
        model.cache.close(sequence)
    return found, logits


def test_fed_passes_give_the_same_bits(model, late, monkeypatch):
    """With rows of other widths, in other orders, and in a recorded pass of more rows."""
    monkeypatch.setattr(Model, "recorded_size", lambda model, steps: 5)
    wanted, logits = by_way_of_the_host(model, 4)
    opened = begin(model)
    result = steps(model, opened, [5, 6, 7])
    for at in range(1, 4):
        # The pass waits in line, unknown to the host, when the one that reads its tokens is given.
        before, given = result, late._given
        result = steps(model, opened, [0, 0, 0], fed=before, at=at)
        assert late._done < given, "the pass before was not waited for"
        late.run_until(given)
        for sequence, token, width in zip(opened, drawn(before), WIDTHS):
            model.cache.advance(sequence, [token], width, "step")
        assert drawn(before) == wanted[at - 1]
    late.wait()
    assert drawn(result) == wanted[-1]
    assert all(torch.equal(result.of(i), row) for i, row in enumerate(logits))
    for sequence in opened:
        model.cache.close(sequence)


def test_a_token_that_could_not_be_drawn_harms_nobody(model, late):
    """The row that is fed with none ends; its neighbours have the bits that they have anyway."""
    wanted, logits = by_way_of_the_host(model, 2)
    opened = begin(model)
    late.wait()
    model.cache.ssm[0][opened[1].slot].fill_(torch.nan)
    first = steps(model, opened, [5, 6, 7])
    second = steps(model, opened, [0, 0, 0], fed=first, at=1)
    late.wait()
    for i in (0, 2):
        assert drawn(second)[i] == wanted[1][i] and torch.equal(second.of(i), logits[i])
    for sequence in opened:
        model.cache.close(sequence)


def test_feed_is_refused_where_nothing_was_drawn(model):
    opened = begin(model)
    result = steps(model, opened, [5, 6, 7])
    prompt = Segment(opened[0], [1, 2], "L", "prefill")
    for segments in (
        [Segment(opened[0], [0], "S", feed=3)],  # three were drawn
        [Segment(opened[0], [0], "S", feed=0), prompt],
    ):
        with pytest.raises(ValueError, match="model: feed must be -1 unless"):
            model.forward(segments)
    model.forward([prompt])
    with pytest.raises(ValueError, match=r"got 2 after 0 tokens"):
        steps(model, opened, [0, 0, 0], fed=result)


def test_ids_outside_are_refused_by_name():
    given = {
        "ids": torch.tensor([0, 9], dtype=torch.int32),
        "table": torch.zeros(5, 16),
        "out": torch.zeros(2, 16),
        "drawn": torch.tensor([4, -1, 3], dtype=torch.int32),
        "feed": torch.tensor([-1, 1], dtype=torch.int32),
    }
    embed(**given)  # the 9 is not used

    def refused(pattern, **changed):
        changed = {n: v and torch.tensor(v, dtype=torch.int32) for n, v in changed.items()}
        with pytest.raises(ValueError, match=pattern):
            embed(**given | changed)

    refused(r"embed: feed must hold indices in \[-1, 3\), got 3 at row 1", feed=[-1, 3])
    refused(r"embed: feed must hold indices in \[-1, 3\), got -2 at row 0", feed=[-2, 1])
    refused(r"embed: drawn must hold indices in \[-1, 5\), got 5 at row 1", drawn=[4, 5, 3])
    refused(r"embed: ids must hold indices in \[0, 5\), got 9 at row 1", feed=[-1, -1])
    refused(r"embed: ids must hold indices in \[0, 5\), got -1 at row 0", ids=[-1, 0])
    refused(r"embed: feed must be given with drawn", feed=None)
    refused(r"embed: feed must be absent without drawn", drawn=None)
