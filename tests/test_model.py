"""Law 4: every width of a random model equals transformers on that width's weights."""

import pytest
import tiny
import torch
from engines import tiny_engine

from elastic_infer.config import full_width
from elastic_infer.model import Segment
from elastic_infer.session import run_read
from elastic_infer.switching import Read

SEEDS = range(10)
LENGTH = 75


def margins(logits):
    top = logits.topk(2, -1).values
    return (top[..., 0] - top[..., 1]) / logits.abs().max()


@pytest.mark.parametrize("seed", SEEDS)
def test_parity(tmp_path, seed):
    """Prefill and token by token, at every width, float32: logits within 1e-4 of the largest, and
    the greedy tokens where the top two are further apart than 1e-5."""
    with tiny_engine(tmp_path, seed, max_num_batched_tokens=96) as engine:
        state = tiny.tiny_state_dict(tiny.tiny_config(seed), seed=seed)
        ids = torch.randint(0, engine.config.vocab_size, (LENGTH,),
                            generator=torch.Generator().manual_seed(seed))  # fmt: skip
        assert len(engine.widths) >= 2
        for name, width in engine.widths.items():
            oracle = tiny.transformers_slice(tmp_path, width, state)
            with torch.no_grad():
                want = oracle(ids[None]).logits[0]
            got = engine.score(ids.tolist(), width=name)
            assert got.shape == want.shape and got.dtype == torch.float32
            scale = want.abs().max()
            assert (got - want).abs().max() <= 1e-4 * scale, f"{name}: prefill"
            clear = margins(want) > 1e-5
            assert torch.equal(got.argmax(-1)[clear], want.argmax(-1)[clear])
            with engine.open(ids[:3].tolist(), width=name, track=False) as sequence:
                for i in range(3, 20):
                    error = (sequence.logits() - want[i - 1]).abs().max()
                    assert error <= 1e-4 * scale, f"{name}: step {i}"
                    sequence.append([int(ids[i])])


def test_parity_full_oracle(tmp_path):
    """The widest width against transformers' own loading of the folder."""
    with tiny_engine(tmp_path, 3) as engine:
        oracle = tiny.transformers_model(tmp_path)
        ids = list(range(5, 60))
        with torch.no_grad():
            want = oracle(torch.tensor([ids])).logits[0]
        name = next(n for n, w in engine.widths.items() if w.same_sizes(full_width(engine.config)))
        got = engine.score(ids, width=name)
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_bfloat16(tmp_path):
    """bfloat16 weights and activations stay near float32: whole logits, norm-wise, no worse than
    1.5 times transformers' own bfloat16 run (a model without experts, whose choice would flip)."""
    config = tiny.tiny_config(5, hybrid_override_pattern="M*M-M*-")
    with tiny_engine(tmp_path, 5, torch.bfloat16, config=config) as engine:
        state = tiny.tiny_state_dict(config, torch.bfloat16, seed=5)
        ids = list(range(3, 70))
        for name, width in engine.widths.items():
            oracle = tiny.transformers_slice(tmp_path, width, state)
            with torch.no_grad():
                exact = oracle(torch.tensor([ids])).logits[0].float()
                plain = oracle.bfloat16()(torch.tensor([ids])).logits[0].float()
            got = engine.score(ids, width=name)
            ours, theirs = (got - exact).norm(), (plain - exact).norm()
            assert ours <= 1.5 * theirs, f"{name}: {ours / exact.norm():.2e}"


def logits_of(model, sequence, tokens, width, kind):
    return run_read(model, sequence, Read(tokens, width, kind), "all")


@pytest.mark.parametrize("n", [1, 3, 4, 63, 64, 65, 127, 128, 129])
def test_prefill_then_step(tmp_path, n):
    """Law 6: prefill(n) then a step agrees with prefill(n + 1)."""
    with tiny_engine(tmp_path, 1, max_num_batched_tokens=96) as engine:
        model, ids = engine._model, list(range(n + 1))
        ids = [(7 * i + 3) % engine.config.vocab_size for i in ids]
        name = engine.default_width
        whole, parts = model.cache.open(), model.cache.open()
        want = logits_of(model, whole, ids, name, "prefill")[-1]
        logits_of(model, parts, ids[:n], name, "prefill")
        got = logits_of(model, parts, ids[n:], name, "step")[-1]
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
        for a, b in zip(model.cache.ssm, model.cache.ssm):
            assert torch.allclose(a[whole.slot], b[parts.slot], rtol=1e-4, atol=1e-5)


def test_mixed_batch_equals_alone(tmp_path):
    """Law 5: in one pass of steps and prefills at all widths, every row has the bits it has alone."""
    with tiny_engine(tmp_path, 2, max_num_batched_tokens=256) as engine:
        model = engine._model
        names, generator = list(engine.widths), torch.Generator().manual_seed(0)
        def draw(n):
            return torch.randint(0, engine.config.vocab_size, (n,), generator=generator).tolist()
        prompts = [draw(n) for n in (5, 64, 70, 1, 33, 8)]
        jobs = [(p, names[i % len(names)], i % 2 == 0) for i, p in enumerate(prompts)]
        together, alone = [], []
        for group in (together, alone):
            for prompt, width, _ in jobs:
                sequence = model.cache.open(track=True)
                run_read(model, sequence, Read(prompt, width, "prefill"))
                group.append(sequence)
        nexts = [(draw(1), "step") if step else (draw(7), "prefill") for _, _, step in jobs]
        segments = [Segment(s, t, w, k, "last")
                    for s, (t, k), (_, w, _) in zip(together, nexts, jobs)]  # fmt: skip
        result = model.forward(segments)
        batched = [result.of(i).clone() for i in range(len(jobs))]
        for i, (s, (t, k), (_, w, _)) in enumerate(zip(alone, nexts, jobs)):
            got = model.forward([Segment(s, t, w, k, "last")]).of(0)
            assert torch.equal(got, batched[i]), f"row {i} at {w}"
            for state in model.cache.ssm + model.cache.conv:
                assert torch.equal(state[s.slot], state[together[i].slot])


def test_tracking_updates_every_head(tmp_path):
    """A narrow sequence that tracks leaves all served Mamba heads with a state."""
    with tiny_engine(tmp_path, 0) as engine:
        model, name = engine._model, next(iter(engine.widths))
        tracked, plain = model.cache.open(track=True), model.cache.open(track=False)
        for sequence in (tracked, plain):
            run_read(model, sequence, Read([5, 6, 7], name, "prefill"))
        for layer, ssm in zip(engine.config.layers_of("M"), model.cache.ssm):
            kept = engine.widths[name].mamba_num_heads[layer]
            assert torch.equal(ssm[tracked.slot, :kept], ssm[plain.slot, :kept])
            assert not ssm[plain.slot, kept:].any()
            if kept < ssm.shape[1]:
                assert ssm[tracked.slot, kept:].abs().amax((1, 2)).min() > 0
