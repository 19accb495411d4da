"""Law 4: every width of a random model equals transformers on that width's weights.

In float32: logits after every token within 1e-4 of the largest, read as one prompt, token by
token, and as a prompt that is continued; greedy tokens equal. Cases in which the choice of experts
or of the token hangs on less than 1e-5 are drawn again and counted. In bfloat16: every layer by
itself, from inputs that were dumped, no further from float32 than 1.5 times transformers' own
bfloat16.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch

from elastic_infer import SamplingParams
from elastic_infer.checkpoint.widths import full_width
from elastic_infer.model import layers
from elastic_infer.model.batch import Segment, Shape
from elastic_infer.scheduling.reads import Read
from support import tiny
from support.engines import open_engine, run_read

LENGTH, GENERATED, MARGIN = 75, 6, 1e-5


@dataclass
class Case:
    """One random model. per_layer: whether its widths have per-layer lists (None: by seed)."""

    seed: int
    per_layer: bool | None = None
    overrides: tuple = ()

    def write(self, folder, dtype=torch.float32):
        config = tiny.tiny_config(self.seed, **dict(self.overrides))
        widths = tiny.tiny_widths(config, self.seed, per_layer=self.per_layer)
        tiny.write_tiny(folder, config, widths, dtype, self.seed)
        return config


CASES = {
    **{f"seed{n}": Case(n) for n in range(10)},
    **{f"per-layer{n}": Case(n, per_layer=True) for n in range(10, 14)},
    "tied": Case(20, overrides=(("tie_word_embeddings", True),)),
    "no-mamba": Case(21, overrides=(("hybrid_override_pattern", "*E-*E"),)),
    "no-attention": Case(22, overrides=(("hybrid_override_pattern", "ME-MM"),)),
    "mamba-only": Case(23, overrides=(("hybrid_override_pattern", "MMM"),)),
    "mlp-only": Case(24, overrides=(("hybrid_override_pattern", "--"),)),
    "experts-only": Case(25, overrides=(("hybrid_override_pattern", "EE"),)),
    "many-experts": Case(26, overrides=(("n_routed_experts", 40), ("num_experts_per_tok", 6))),
    "one-kv-head": Case(27, overrides=(("num_key_value_heads", 1), ("num_attention_heads", 8))),
    "eight-groups": Case(28, overrides=(("n_groups", 8), ("mamba_num_heads", 24))),
    "long-hidden": Case(29, overrides=(("hidden_size", 272), ("head_dim", 64))),
}


def router_margins(oracle, seen):
    """Hooks on every router of the oracle that collect how clear its choices are."""

    def hook(module, inputs, output):
        logits, _, _ = output
        scores = logits.sigmoid() + module.e_score_correction_bias
        top = scores.topk(min(module.top_k + 1, scores.shape[-1]), -1).values
        if top.shape[-1] > module.top_k:
            seen.append(float((top[:, -2] - top[:, -1]).min()))

    gates = [m for m in oracle.modules() if type(m).__name__ == "NemotronHTopkRouter"]
    return [gate.register_forward_hook(hook) for gate in gates]


def token_margin(logits):
    """The smallest distance of the two largest logits, of the largest logit of all."""
    top = logits.topk(2, -1).values
    return float((top[..., 0] - top[..., 1]).min() / logits.abs().max())


def greedy(oracle, ids, count):
    """(tokens that transformers generates after ids, smallest margin on the way)."""
    ids, margin = list(ids), float("inf")
    for _ in range(count):
        last = oracle(torch.tensor([ids]), use_cache=False).logits[0, -1]
        margin = min(margin, token_margin(last))
        ids.append(int(last.argmax()))
    return ids[-count:], margin


def clear_case(oracle, vocabulary, seed):
    """Draws tokens until no decision is close. Returns (ids, logits, greedy tokens, redrawn)."""
    seen = []
    hooks = router_margins(oracle, seen)
    for again in range(10):
        seen.clear()
        generator = torch.Generator().manual_seed(1000 * seed + again)
        ids = torch.randint(0, vocabulary, (LENGTH,), generator=generator)
        with torch.no_grad():
            logits = oracle(ids[None], use_cache=False).logits[0]
            tokens, margin = greedy(oracle, ids.tolist(), GENERATED)
        if min([margin, token_margin(logits), *seen]) > MARGIN:
            break
    else:
        pytest.fail("ten draws in a row hang on a margin below 1e-5")
    for hook in hooks:
        hook.remove()
    return ids.tolist(), logits, tokens, again


@pytest.mark.parametrize("name", CASES)
def test_float32(tmp_path, name, record_property):
    case = CASES[name]
    config = case.write(tmp_path)
    state = tiny.tiny_state_dict(config, seed=case.seed)
    redrawn = 0
    with open_engine(tmp_path, max_num_batched_tokens=96) as engine:
        assert len(engine.widths) >= 2
        for number, (width_name, width) in enumerate(engine.widths.items()):
            oracle = tiny.transformers_slice(tmp_path, width, state)
            ids, want, tokens, again = clear_case(
                oracle, config["vocab_size"], 10 * case.seed + number
            )
            redrawn += again
            scale = want.abs().max()
            got = engine.score(ids, width=width_name)
            assert got.shape == want.shape and got.dtype == torch.float32
            assert (got - want).abs().max() <= 1e-4 * scale, f"{width_name}: prompt"
            assert torch.equal(got.argmax(-1), want.argmax(-1))
            for begin in (1, 3):  # token by token, and a prompt continued token by token
                with engine.open(ids[:begin], width=width_name, track=False) as sequence:
                    for i in range(begin, 20):
                        error = (sequence.logits() - want[i - 1]).abs().max()
                        assert error <= 1e-4 * scale, f"{width_name}: step {i} from {begin}"
                        sequence.append([ids[i]])
            params = SamplingParams(temperature=0, max_tokens=GENERATED, ignore_eos=True)
            assert engine.generate(ids, params, width=width_name).token_ids == tokens
    record_property("redrawn", redrawn)
    assert redrawn <= 2


def test_float32_equals_transformers_own_loading(tmp_path):
    """The widest width against the folder as transformers itself loads it, cache and all."""
    CASES["seed3"].write(tmp_path)
    oracle = tiny.transformers_model(tmp_path)
    ids = list(range(5, 60))
    with open_engine(tmp_path) as engine, torch.no_grad():
        name = next(n for n, w in engine.widths.items() if w.same_sizes(full_width(engine.config)))
        want = oracle(torch.tensor([ids]), use_cache=False).logits[0]
        got = engine.score(ids, width=name)
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()
        generated = oracle.generate(
            torch.tensor([ids]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        out = engine.generate(ids, params, width=name)
        assert out.token_ids == generated[0, len(ids) :].tolist()


# -- bfloat16, layer by layer -----------------------------------------------------------------


def dumped_inputs(oracle, ids):
    """What enters every block of a float32 run, [T, D] each, rounded to bfloat16."""
    inputs = []
    hooks = [
        block.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.append(
                (args[0] if args else kwargs["hidden_states"])[0].bfloat16()
            ),
            with_kwargs=True,
        )
        for block in oracle.model.layers
    ]
    with torch.no_grad():
        oracle(torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return inputs


def their_layer(block, x, choice=None):
    """(mixer(norm(x)) of a transformers block, its experts [T, J] or None)."""
    picked = []

    def fix(module, inputs, output):
        logits, weights, ids = output
        if choice is not None:
            ids = choice
            weights = logits.sigmoid().gather(1, ids)
            weights = weights / weights.sum(-1, keepdim=True) * module.routed_scaling_factor
        picked.append(ids)
        return logits, weights, ids

    hook = block.mixer.gate.register_forward_hook(fix) if hasattr(block.mixer, "gate") else None
    with torch.no_grad():
        x = x[None].to(block.norm.weight.dtype)
        out = block(x)
        out = (out[0] if isinstance(out, tuple) else out) - x
        normed = block.norm(x)
        kind = block.block_type
        positions = torch.arange(x.shape[1])[None]
        if kind == "full_attention":
            mask = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)[None, None]
            out, _ = block.mixer(
                hidden_states=normed, attention_mask=mask.to(x.dtype), position_ids=positions
            )
        else:
            picked.clear()
            out = block.mixer(normed)
    if hook:
        hook.remove()
    return out[0].float(), (picked[0] if picked else None)


def our_layer(engine, layer, x, width, choice, monkeypatch):
    """The same of this library: one layer of a prefill pass, NaN in the residual beyond."""
    model, c = engine.core.model, engine.config
    R, kind = x.shape[0], c.layers[layer]
    route = layers.moe_route

    def fixed_route(normed, gate, bias, ids, weights, **rest):
        route(normed, gate, bias, ids, weights, **rest)
        rows = normed[:, : width.hidden_size].float()
        logits = rows @ choice_gate[:, : width.hidden_size].T
        chosen = logits.sigmoid().gather(1, choice)
        ids.copy_(choice)
        weights.copy_(chosen / chosen.sum(-1, keepdim=True) * c.routed_scaling_factor)

    if choice is not None:
        choice_gate = engine.core.checkpoint.tensor(
            f"backbone.layers.{layer}.mixer.gate.weight"
        ).float()[: width.n_routed_experts[layer]]
        monkeypatch.setattr(layers, "moe_route", fixed_route)
    sequence, shape, b = model.cache.open(), Shape(R, 0, 1), model.buffers
    segments = [Segment(sequence, [0] * R, width.name, "prefill")]
    model._reserve(segments)
    model.batch.fill(segments, shape, R)
    b.residual.fill_(torch.nan)
    b.residual[:R, : width.hidden_size] = x
    p, w, place = model.ops_of(model.pool, shape), model.weights, c.layers[:layer].count(kind)
    layers.norm(p, w.layers[layer].norm, None)
    if kind == "M":
        layers.mamba(p, layer, place)
    elif kind == "*":
        layers.attention(p, layer, place)
    elif kind == "-":
        layers.ffn(p, w.layers[layer].up, w.layers[layer].down, layer, b.delta)
    else:
        layers.moe(p, layer)
    model.cache.close(sequence)
    monkeypatch.undo()
    return b.delta[:R, : width.hidden_size].float().clone()


@pytest.mark.parametrize(
    "name", ["seed0", "seed1", "seed4", "per-layer10", "many-experts", "eight-groups"]
)
def test_bfloat16_layer_by_layer(tmp_path, name, monkeypatch):
    case = CASES[name]
    config = case.write(tmp_path, torch.bfloat16)
    state = tiny.tiny_state_dict(config, torch.bfloat16, seed=case.seed)
    ids = torch.randint(
        0, config["vocab_size"], (LENGTH,), generator=torch.Generator().manual_seed(case.seed)
    ).tolist()
    with open_engine(tmp_path, max_num_batched_tokens=96) as engine:
        assert engine.core.model.weights.dtype == torch.bfloat16
        for width in engine.widths.values():
            exact = tiny.transformers_slice(tmp_path, width, state)
            plain = copy.deepcopy(exact).bfloat16()
            for layer, x in enumerate(dumped_inputs(exact, ids)):
                want, choice = their_layer(exact.model.layers[layer], x)
                theirs, _ = their_layer(plain.model.layers[layer], x, choice)
                ours = our_layer(engine, layer, x, width, choice, monkeypatch)
                mine, their = (ours - want).norm(), (theirs - want).norm()
                where = f"{width.name} layer {layer} ({engine.config.layers[layer]})"
                assert mine <= 1.5 * their, f"{where}: {mine:.3g} against {their:.3g}"
                assert their < 0.02 * want.norm(), f"{where}: the oracle itself is off"


def test_bfloat16_whole_model(tmp_path):
    """Whole logits of a model without experts, whose choice would flip, in steps as in a prompt."""
    config = tiny.tiny_config(5, hybrid_override_pattern="M*M-M*-")
    tiny.write_tiny(tmp_path, config, tiny.tiny_widths(config, 5), torch.bfloat16, 5)
    state = tiny.tiny_state_dict(config, torch.bfloat16, seed=5)
    ids = list(range(3, 70))
    with open_engine(tmp_path) as engine:
        for name, width in engine.widths.items():
            oracle = tiny.transformers_slice(tmp_path, width, state)
            with torch.no_grad():
                exact = oracle(torch.tensor([ids]), use_cache=False).logits[0].float()
                plain = oracle.bfloat16()(torch.tensor([ids]), use_cache=False).logits[0].float()
            theirs = (plain - exact).norm()
            got = engine.score(ids, width=name)
            assert (got - exact).norm() <= 1.5 * theirs, f"{name}: prompt"

            def steps(name=name):
                sequence = engine.core.model.cache.open()
                first = run_read(engine.core.model, sequence, Read(ids[:1], name, "prefill"))
                rest = run_read(engine.core.model, sequence, Read(ids[1:], name, "step"), "all")
                engine.core.model.cache.close(sequence)
                return torch.cat([first, rest])

            assert (engine.core.call(steps) - exact).norm() <= 1.5 * theirs, f"{name}: steps"
