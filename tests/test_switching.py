"""Law 9: what a switch, fork, rollback, snapshot, preemption and a file leave in the cache."""

import pytest
import torch
from engines import base_engine, run_read

from elastic_infer import CheckpointError, WidthError
from elastic_infer.plan import Policy
from elastic_infer.switching import Read


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with base_engine(tmp_path_factory.mktemp("model"), max_num_batched_tokens=128) as engine:
        yield engine


def prompt(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 130, (n,), generator=generator).tolist()


def same_cache(engine, a, b):
    """Whether two sequences hold the same bits: tokens, state and KV."""
    cache = engine._model.cache
    first, second = cache.export(a._sequence), cache.export(b._sequence)
    assert a._sequence.tokens == b._sequence.tokens
    for x, y in zip(first.state.layers, second.state.layers):
        assert torch.equal(x[0], y[0]) and torch.equal(x[1], y[1])
    n = a._sequence.length
    for x, y in zip(first.kv, second.kv):
        for s, t in zip(x, y):
            flat = [p[i].transpose(1, 2).flatten(0, 1)[:n]
                    for p, i in ((s, first.pages), (t, second.pages))]  # fmt: skip
            assert torch.equal(*flat)


def advance(sequence, tokens):
    """Steps through given tokens; the logits after the last."""
    for token in tokens:
        sequence.append([token])
        row = sequence.logits()
    return row


def test_exact_equals_fresh(engine):
    """After an `exact` switch the sequence is bit-equal to a new one with the same prompt."""
    ids = prompt(90)
    with engine.open(ids[:70], width="S", track=False) as a, engine.open(ids, width="L") as b:
        a.logits()
        advance(a, ids[70:])
        assert a.switch("L", "exact") == 90
        fresh = b.logits()
        assert torch.equal(a.logits(), fresh)
        more = prompt(5, 1)
        assert torch.equal(advance(a, more), advance(b, more))
        same_cache(engine, a, b)


def test_carry_keeps_the_cache(engine):
    """A `carry` switch changes nothing in the cache, and the next token is the wide width's."""
    ids = prompt(40)
    with engine.open(ids, width="S") as a, engine.open(ids, width="S") as b:
        a.logits(), b.logits()
        assert a.switch("L") == 0
        same_cache(engine, a, b)
        wide, narrow = advance(a, [9]), advance(b, [9])
        assert not torch.equal(wide, narrow)
        assert [(r.width, r.count) for r in a.runs] == [("S", 40), ("L", 1)]


def test_carry_needs_tracking_to_widen(engine):
    with engine.open(prompt(10), width="S", track=False) as sequence:
        sequence.logits()
        before = sequence.runs
        with pytest.raises(WidthError, match=r"must have tracked .* use policy 'exact'"):
            sequence.width = "L"
        assert sequence.width == "S" and sequence.runs == before
        assert sequence.switch("L", "exact") == 10
        sequence.width = "S"  # narrowing misses nothing
        advance(sequence, [5])


def test_window_equals_carry_at_the_snapshot(engine):
    """`window` equals a carry switch at the restored snapshot and prefill of the rest."""
    ids = prompt(60)
    n = 8
    with engine.open(ids[:20], width="S") as a, engine.open(ids[:20], width="S") as b:
        a.logits(), b.logits()
        for i in range(20, 60):
            if i % n == 0:
                assert a.snapshot() == i
            advance(a, [ids[i]])
        again = a.switch("L", f"window({n})")
        older = 48  # the newest snapshot with at least n tokens since; there is one at 56 too
        assert again == 60 - older
        for i in range(20, older):
            advance(b, [ids[i]])
        b.width = "L"
        rest = Read(ids[older:], "L", "prefill")
        row = engine._call(lambda: run_read(engine._model, b._sequence, rest))[-1]
        assert torch.equal(a.logits(), row)
        same_cache(engine, a, b)


def test_fork_continues_bit_equal(engine):
    ids = prompt(70)
    with engine.open(ids, width="M") as a, engine.open(ids, width="M") as lone:
        a.logits(), lone.logits()
        twin = a.fork()
        advance(a, [3, 4, 5])
        other = [6, 7, 8, 9]
        assert torch.equal(advance(twin, other), advance(lone, other))
        same_cache(engine, twin, lone)
        twin.close()


@pytest.mark.parametrize("with_snapshot", [False, True])
def test_rollback_replays_bit_equal(engine, with_snapshot):
    ids = prompt(100)
    with engine.open(ids[:66], width="S") as a, engine.open(ids[:66], width="S") as b:
        for sequence in (a, b):
            sequence.logits()
            sequence.width = "L"
            advance(sequence, ids[66:70])
        if with_snapshot:
            assert a.snapshot() == 70
        a.width = "M"
        advance(a, ids[70:90])
        b.width = "M"
        advance(b, ids[70:75])
        a.rollback(75)
        assert a.token_ids == ids[:75] and torch.equal(a.logits(), b.logits())
        same_cache(engine, a, b)
        assert torch.equal(advance(a, [11]), advance(b, [11]))


def test_save_and_load(engine, tmp_path):
    ids = prompt(66)
    with engine.open(ids, width="S") as a:
        a.logits()
        a.width = "L"
        advance(a, [5])
        a.append([6])
        a.save(tmp_path / "s.safetensors")
        with engine.load(tmp_path / "s.safetensors") as b:
            assert b.width == "L" and b.token_ids == a.token_ids and b.runs == a.runs
            assert torch.equal(a.logits(), b.logits())
            same_cache(engine, a, b)


def test_file_of_other_weights_is_refused(engine, tmp_path):
    with engine.open(prompt(5)) as a:
        a.logits()
        a.save(tmp_path / "s.safetensors")
    with base_engine(tmp_path / "same") as same:
        same.load(tmp_path / "s.safetensors").close()
    import tiny
    from engines import base_config, base_widths, tiny_engine

    with tiny_engine(tmp_path / "other", 8, config=base_config(), widths=base_widths()) as other:
        assert tiny and other.fingerprint != engine.fingerprint
        used = other.stats()["slots_used"]
        with pytest.raises(CheckpointError, match="must belong to these weights"):
            other.load(tmp_path / "s.safetensors")
        assert other.stats()["slots_used"] == used
    whole = (tmp_path / "s.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="must be whole safetensors"):
        engine.load(tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError, match="must name a file"):
        engine.load(tmp_path / "none.safetensors")


def test_preempt_and_resume(engine):
    """Moved to host memory and back, with its snapshots, a sequence goes on bit-equal."""
    ids = prompt(70)
    cache = engine._model.cache
    with engine.open(ids, width="S") as a, engine.open(ids, width="S") as b:
        a.logits(), b.logits()
        a.snapshot(), b.snapshot()
        advance(a, [5, 6]), advance(b, [5, 6])
        used = (cache.pages.used, cache.slots.used)

        def out_and_in():
            cache.preempt(a._sequence)
            assert cache.slots.used == used[1] - 2
            cache.resume(a._sequence)

        engine._call(out_and_in)
        assert torch.equal(advance(a, [7]), advance(b, [7]))
        same_cache(engine, a, b)
        a.rollback(71), b.rollback(71)
        same_cache(engine, a, b)


def test_nothing_leaks(engine):
    stats = engine.stats()
    assert stats["slots_used"] == 0 and stats["pages_used"] == 0


def test_policies_parse():
    assert Policy.parse("window:8") == Policy("window", 8)
