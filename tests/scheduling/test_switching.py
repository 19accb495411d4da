"""Law 9: what switches, forks, rollbacks, snapshots, preemptions and files leave in the cache."""

import pytest
import torch

from elastic_infer import CheckpointError, InvalidRequest, WidthError
from elastic_infer.plans.policy import Policy
from elastic_infer.scheduling.reads import Read
from support.engines import base_engine, held, in_threads, run_read

SMALL = {"kv_cache_dtype": "fp8", "mamba_ssm_cache_dtype": "float16"}


@pytest.fixture(scope="module", params=[{}, SMALL], ids=["default", "fp8-float16"])
def engine(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    with base_engine(folder, max_num_batched_tokens=128, **request.param) as engine:
        yield engine


def kept_as(engine):
    """The options of an engine whose cache is kept as this one's."""
    return SMALL if engine.core.model.cache.ssm[0].dtype == torch.float16 else {}


def prompt(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 130, (n,), generator=generator).tolist()


def same_cache(engine, a, b):
    """Whether two sequences hold the same bits: tokens, state and KV."""
    cache = engine.core.model.cache
    first, second = cache.export(a._sequence), cache.export(b._sequence)
    assert a._sequence.tokens == b._sequence.tokens
    for x, y in zip(first.state.layers, second.state.layers):
        assert torch.equal(x[0], y[0]) and torch.equal(x[1], y[1])
    n = a._sequence.length
    for x, y in zip(first.kv, second.kv):
        for s, t in zip(x, y):
            flat = [
                p[i].transpose(1, 2).flatten(0, 1)[:n]
                for p, i in ((s, first.pages), (t, second.pages))
            ]
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
        row = engine.core.call(lambda: run_read(engine.core.model, b._sequence, rest))[-1]
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


def test_rollback_to_a_snapshot_itself(engine):
    """Nothing is read again, and the logits there are those that were kept with it."""
    ids = prompt(40)
    with engine.open(ids, width="M") as a:
        row = a.logits()
        assert a.snapshot() == 40
        advance(a, [4, 5, 6])
        read = engine.stats()["tokens_read"]
        a.rollback(40)
        assert torch.equal(a.logits(), row) and a.token_ids == ids
        assert engine.stats()["tokens_read"] == read
        advance(a, [4])
        a.rollback(40)
        assert torch.equal(a.logits(), row), "the snapshot stays"


def test_rollback_over_every_kind_of_run(engine):
    """Steps, prompts, switches by all policies and widths: going back to any length gives the
    bits that a sequence had when it was that long."""
    ids = prompt(64, 3)
    with engine.open(ids[:30], width="S") as a:
        rows = {30: a.logits()}

        def go_on(tokens):
            for token in tokens:
                row = advance(a, [token])
                rows[len(a.token_ids)] = row

        go_on(ids[30:36])
        a.width = "L"
        go_on(ids[36:40])
        a.snapshot()
        a.width = "M"
        go_on(ids[40:50])
        runs = a.runs
        for length in (50, 49, 41, 40, 38, 36, 33, 30):
            a.rollback(length)
            assert torch.equal(a.logits(), rows[length]), length
        assert sum(r.count for r in a.runs) == 30 and runs[0].kind == "prefill"
        a.width = "L"
        advance(a, ids[:5])
        assert a.switch("S", "window(2)") >= 2
        row = advance(a, [9])
        advance(a, [8, 7])
        a.rollback(36)
        assert torch.equal(a.logits(), row)


def test_exact_includes_the_token_not_read_yet(engine):
    """A sampled token that nobody has read is part of the new prompt, not a step after it."""
    ids = prompt(20)
    with engine.open(ids, width="S", track=False) as a:
        token = a.step().id
        assert a.switch("L", "exact") == 20, "one of them had not been read before"
        assert [(r.width, r.kind, r.count) for r in a.runs] == [("L", "prefill", 21)]
        with engine.open([*ids, token], width="L") as b:
            assert torch.equal(a.logits(), b.logits())
            same_cache(engine, a, b)


def test_width_before_anything_is_read(engine):
    with engine.open(prompt(9), width="S", track=False) as a, engine.open(prompt(9)) as b:
        a.width = "L"  # nothing was read narrow, so nothing is missing
        assert torch.equal(a.logits(), b.logits())


def test_unread_tokens_take_the_width_that_reads_them(engine):
    ids = prompt(12)
    with engine.open(ids, width="L") as a, engine.open(ids, width="L") as b:
        a.logits(), b.logits()
        a.append([5])
        a.width = "S"
        a.logits()
        assert [(r.width, r.count) for r in a.runs] == [("L", 12), ("S", 1)]
        assert not torch.equal(a.logits(), advance(b, [5]))


def test_twins_share_pages_until_they_write(engine):
    ids = prompt(100)
    with engine.open(ids) as a:
        a.logits()
        assert engine.stats()["pages_used"] == 2
        twins = [a.fork() for _ in range(4)]
        assert engine.stats()["pages_used"] == 2
        rows = [advance(twin, [7]) for twin in twins]
        assert engine.stats()["pages_used"] == 2 + 4, "a private copy of the last page each"
        assert all(torch.equal(row, advance(a, [7])) for row in rows[:1])
        for twin in twins:
            twin.close()
        assert engine.stats()["pages_used"] == 2


def test_a_file_goes_on_in_another_engine(engine, tmp_path):
    """Other limits, threads and page numbers: the same bits, tokens and rollbacks."""
    ids = prompt(90)
    with engine.open(ids, width="S") as a:
        advance(a, [5, 6])
        a.width = "M"
        a.step()
        a.save(tmp_path / "s.safetensors")
        with base_engine(tmp_path / "other", threads=1, max_num_seqs=3, **kept_as(engine)) as other:
            other.open(prompt(70)).logits()  # other pages and another slot
            with other.load(tmp_path / "s.safetensors") as b:
                assert [a.step().id for _ in range(8)] == [b.step().id for _ in range(8)]
                assert torch.equal(a.logits(), b.logits())
                a.rollback(91), b.rollback(91)
                assert torch.equal(a.logits(), b.logits())


def test_one_call_at_a_time(engine, tmp_path):
    """A second call on a sequence that is being read is refused, whatever it is, and neither the
    first call nor the engine's other work takes notice."""
    with engine.open(prompt(300)) as a, engine.open(prompt(300)) as alone:  # three passes
        want = alone.logits()
        with held(engine) as hold:
            reading = in_threads(a.logits)
            hold.arrived(readers=1)
            assert hold.step() == 1
            for call in (
                a.logits,
                a.step,
                a.fork,
                a.snapshot,
                lambda: a.switch("S"),
                lambda: a.append([5]),
                lambda: a.rollback(3),
                lambda: a.save(tmp_path / "s.safetensors"),
            ):
                with pytest.raises(InvalidRequest, match="one call at a time must be made on it"):
                    call()
        assert torch.equal(reading()[0], want)
        assert a.step().id == alone.step().id


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
    with base_engine(tmp_path / "same", **kept_as(engine)) as same:
        same.load(tmp_path / "s.safetensors").close()
    from support import tiny
    from support.engines import base_config, base_widths, tiny_engine

    with tiny_engine(
        tmp_path / "other", 8, config=base_config(), widths=base_widths(), **kept_as(engine)
    ) as other:
        assert tiny and other.fingerprint != engine.fingerprint
        used = other.stats()["slots_used"]
        with pytest.raises(CheckpointError, match="must belong to these weights"):
            other.load(tmp_path / "s.safetensors")
        assert other.stats()["slots_used"] == used
    whole = (tmp_path / "s.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="must be a complete safetensors file"):
        engine.load(tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError, match="must name a file"):
        engine.load(tmp_path / "none.safetensors")


def test_file_of_another_cache_is_refused(engine, tmp_path):
    with engine.open(prompt(5)) as a:
        a.logits()
        a.save(tmp_path / "s.safetensors")
    for name, value in SMALL.items():
        options = kept_as(engine) | {name: "auto" if kept_as(engine) else value}
        with base_engine(tmp_path / name, **options) as other:
            with pytest.raises(CheckpointError, match="must be loaded by an engine that keeps"):
                other.load(tmp_path / "s.safetensors")
            assert other.stats()["slots_used"] == 0


def test_a_prompt_cut_anywhere_replays_bit_equal(engine):
    """Two prompts one after the other, the first ending off the grid of 64 tokens."""
    with engine.open(prompt(90)) as a:
        a.logits()
        a.append([5])
        a.logits()
        assert a.switch("S", "window(2)") > 0  # everything again, as one prompt
        a.append(prompt(75, 2))
        want = a.logits()
        a.append([9])
        a.logits()
        a.rollback(a._sequence.length - 1)
        assert torch.equal(a.logits(), want)


def test_preempt_and_resume(engine):
    """Moved to host memory and back, with its snapshots, a sequence goes on bit-equal."""
    ids = prompt(70)
    cache = engine.core.model.cache
    with engine.open(ids, width="S") as a, engine.open(ids, width="S") as b:
        a.logits(), b.logits()
        a.snapshot(), b.snapshot()
        advance(a, [5, 6]), advance(b, [5, 6])
        used = (cache.pages.used, cache.slots.used)

        def out_and_in():
            cache.preempt(a._sequence)
            assert cache.slots.used == used[1] - 2
            cache.resume(a._sequence)

        engine.core.call(out_and_in)
        assert torch.equal(advance(a, [7]), advance(b, [7]))
        same_cache(engine, a, b)
        a.rollback(71), b.rollback(71)
        same_cache(engine, a, b)


def test_nothing_leaks(engine):
    stats = engine.stats()
    assert stats["slots_used"] == 0 and stats["pages_used"] == 0


def test_policies_parse():
    assert Policy.parse("window:8") == Policy("window", 8)
