"""Passes of the model: cut anywhere, mixed with anything, a row has the same bits."""

from itertools import cycle

import pytest
import torch

from elastic_infer import SamplingParams
from elastic_infer.model.batch import Segment
from elastic_infer.scheduling.reads import Read
from support.engines import base_engine, run_read, tiny_engine


def logits_of(model, sequence, tokens, width, kind):
    return run_read(model, sequence, Read(tokens, width, kind), "all")


@pytest.mark.parametrize("n", [1, 3, 4, 63, 64, 65, 127, 128, 129])
def test_prefill_then_step(tmp_path, n):
    """Law 6: prefill(n) then a step agrees with prefill(n + 1)."""
    with tiny_engine(tmp_path, 1, max_num_batched_tokens=96) as engine:
        model, ids = engine.core.model, list(range(n + 1))
        ids = [(7 * i + 3) % engine.config.vocab_size for i in ids]
        name = engine.default_width
        whole, parts = model.cache.open(), model.cache.open()
        want = logits_of(model, whole, ids, name, "prefill")[-1]
        logits_of(model, parts, ids[:n], name, "prefill")
        got = logits_of(model, parts, ids[n:], name, "step")[-1]
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
        for a, b in zip(model.cache.ssm, model.cache.ssm):
            assert torch.allclose(a[whole.slot], b[parts.slot], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", [2, 4, 9])
def test_mixed_batch_equals_alone(tmp_path, seed, dtype):
    """Law 5: in one pass of steps and prefills at all widths, a row has the bits it has alone."""
    with tiny_engine(tmp_path, seed, dtype, max_num_batched_tokens=256) as engine:
        model = engine.core.model
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
        segments = [
            Segment(s, t, w, k, "last") for s, (t, k), (_, w, _) in zip(together, nexts, jobs)
        ]
        result = model.forward(segments)
        batched = [result.of(i).clone() for i in range(len(jobs))]
        for i, (s, (t, k), (_, w, _)) in enumerate(zip(alone, nexts, jobs)):
            got = model.forward([Segment(s, t, w, k, "last")]).of(0)
            assert torch.equal(got, batched[i]), f"row {i} at {w}"
            for state in model.cache.ssm + model.cache.conv:
                assert torch.equal(state[s.slot], state[together[i].slot])


@pytest.mark.parametrize("kind", ["prefill", "step"])
@pytest.mark.parametrize("name", ["S", "M"])
def test_tracking_updates_every_head(tmp_path, name, kind):
    """A narrow sequence that tracks leaves all served Mamba heads with a state; one that does not
    leaves the others as they were, and both say the same."""
    with base_engine(tmp_path) as engine:
        model, width = engine.core.model, engine.widths[name]
        tracked, plain = model.cache.open(track=True), model.cache.open(track=False)
        rows = [
            run_read(model, sequence, Read([5, 6, 7, 8], name, kind), "all")
            for sequence in (tracked, plain)
        ]
        assert torch.equal(*rows)
        layers = engine.config.layers_of("M")
        for layer, ssm, conv in zip(layers, model.cache.ssm, model.cache.conv):
            kept = width.mamba_num_heads[layer]
            assert 0 < kept < ssm.shape[1]
            assert torch.equal(ssm[tracked.slot, :kept], ssm[plain.slot, :kept])
            assert not ssm[plain.slot, kept:].any()
            assert ssm[tracked.slot, kept:].abs().amax((1, 2)).min() > 0
            served = ssm.shape[1] * engine.config.mamba_head_dim
            own = kept * engine.config.mamba_head_dim
            assert conv[tracked.slot, own:served].abs().amax(1).min() > 0
            assert not conv[plain.slot, own:served].any()


def poison(engine):
    """NaN in everything that a pass has no business to read: all pages, slots and activations."""
    model = engine.core.model
    for tensor in (*model.cache.k, *model.cache.v, *model.cache.ssm, *model.cache.conv):
        tensor.fill_(torch.nan)
    for tensor in vars(model.buffers).values():
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)


@pytest.mark.parametrize("seed", [0, 2, 6])
def test_what_was_left_behind_is_never_read(tmp_path, seed):
    """Law 2: poisoned cache and buffers change no bit, whatever the widths of the batch."""
    with tiny_engine(tmp_path, seed, max_num_batched_tokens=128) as engine:
        ids = [(11 * i + 2) % engine.config.vocab_size for i in range(150)]
        params = SamplingParams(temperature=0.8, seed=1, max_tokens=8, logprobs=2, ignore_eos=True)
        prompts = [ids[:n] for n in (150, 3, 64, 90)]
        widths = [name for name, _ in zip(cycle(engine.widths), prompts)]

        def run():
            outs = engine.generate(prompts, params, width=widths)
            scores = [engine.score(ids, width=name) for name in engine.widths]
            return [(o.token_ids, o.logprobs) for o in outs], scores

        clean, scores = run()
        poison(engine)
        dirty, again = run()
        assert dirty == clean
        assert all(torch.equal(a, b) for a, b in zip(scores, again))


def test_narrow_widths_read_no_wider_weights(tmp_path):
    """NaN in the row-major weights outside the narrow width changes none of its bits."""
    with base_engine(tmp_path) as engine:
        ids, width = list(range(3, 80)), engine.widths["S"]
        want = engine.score(ids, width="S")
        weights = engine.core.model.weights
        weights.embedding[:, width.hidden_size :] = torch.nan
        weights.final_norm[width.hidden_size :] = torch.nan
        for layer, kind in zip(weights.layers, engine.config.layers):
            layer.norm[width.hidden_size :] = torch.nan
            if kind == "M":
                heads = max(width.mamba_num_heads)
                for vector in (layer.A_log, layer.D, layer.dt_bias):
                    vector[heads:] = torch.nan
                layer.gated_norm[heads * engine.config.mamba_head_dim :] = torch.nan
            if kind == "E":
                layer.correction_bias[max(width.n_routed_experts) :] = torch.nan
        assert torch.equal(engine.score(ids, width="S"), want)
        assert engine.score(ids, width="L").isnan().all()
