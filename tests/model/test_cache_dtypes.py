"""KV in 8 bits and Mamba state in 16: bits, sizes, options, and what the smaller formats cost."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from elastic_infer import _C, InvalidRequest, SamplingParams
from elastic_infer.cache.dtypes import CacheDtypes, cache_dtypes
from elastic_infer.cache.pages import PAGE
from elastic_infer.cache.sequence import Run, append_run
from elastic_infer.checkpoint.config import ModelConfig
from elastic_infer.checkpoint.widths import full_width
from elastic_infer.errors import CheckpointError
from elastic_infer.ops import Pool
from elastic_infer.ops._ssm import round_stochastic
from elastic_infer.ops.ssm_scan import ssm_scan
from elastic_infer.ops.ssm_step import ssm_step
from elastic_infer.sizing.capacity import slot_bytes
from support import tiny
from support.engines import base_config, base_engine, base_widths, draw, open_engine

H, P, N, G = 4, 32, 48, 2


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


class Heads:
    """The recurrence of one sequence in slot 1 of three, its state in float16."""

    def __init__(self, tokens, dtype=torch.bfloat16, run=None, slot=1, quiet=False):
        g = torch.Generator().manual_seed(11)
        self.run, self.slot = run, slot
        x = torch.zeros(tokens, H * P) if quiet else torch.randn(tokens, H * P, generator=g)
        self.x = x.to(dtype)
        self.B, self.C = (torch.randn(tokens, G * N, generator=g).to(dtype) for _ in "BC")
        self.dt = torch.randn(tokens, H, generator=g).to(dtype)
        self.vectors = [torch.rand(H, generator=g) for _ in range(3)]
        self.state = torch.randn(3, H, P, N, generator=g).half()
        self.read = 0

    def take(self, count, step=False, **changed):
        """y of the next `count` tokens."""
        part = slice(self.read, self.read + count)
        y = torch.empty_like(self.x[part])
        given = [t[part] for t in (self.x, self.B, self.C, self.dt)]
        options = {
            "slots": int32(self.slot),
            "context": int32(self.read),
            "seed": 3,
            "run": self.run,
        } | changed
        if step:
            ssm_step(*given, *self.vectors, self.state, y, **options)
        else:
            ssm_scan(*given, *self.vectors, self.state, y, cu_seqlens=int32(0, count), **options)
        self.read += count
        return y

    @property
    def own(self):
        return self.state[self.slot]


@pytest.mark.parametrize("isa", _C.usable_isas())
def test_cuts_at_multiples_of_64_change_no_bit(isa):
    whole, cut = Heads(200, run=Pool(1, isa)), Heads(200, run=Pool(2, isa))
    whole.state[1], cut.state[1] = 0, 0
    want = whole.take(200)
    assert same_bits(torch.cat([cut.take(64), cut.take(128), cut.take(8)]), want)
    assert same_bits(cut.own, whole.own)


def test_a_step_and_a_prompt_of_one_token_are_the_same():
    a, b = Heads(70), Heads(70)
    for _ in range(70):
        assert same_bits(a.take(1, step=True), b.take(1))
    assert same_bits(a.own, b.own)


def test_bits_depend_on_seed_and_position_not_on_the_slot():
    base = Heads(1)
    base.take(1, step=True)
    moved = Heads(1, slot=0)
    moved.state[0] = Heads(1).state[1]
    moved.take(1, step=True)
    assert same_bits(moved.own, base.own)
    for change in ({"seed": 4}, {"context": int32(1)}):
        other = Heads(1)
        other.take(1, step=True, **change)
        differing = (other.own != base.own).float().mean()
        assert 0.2 < differing < 0.8  # two draws of a rounding differ in up to half of the cases


@pytest.mark.parametrize("step", [True, False])
def test_every_instruction_set_rounds_alike(step):
    """With x = 0 the recurrence is one product, whose bits are the same everywhere."""
    states = []
    for isa in _C.usable_isas():
        heads = Heads(3, torch.float32, Pool(2, isa), quiet=True)
        heads.state[1, 0, 0, :8] = torch.tensor(
            [0.0, -0.0, 6e-8, 3e-6, 65504.0, -65504.0, torch.inf, torch.nan]
        )
        heads.take(1, step) if step else heads.take(3)
        states.append(heads.own)
    assert all(same_bits(state, states[0]) for state in states)
    assert torch.isnan(states[0][0, 0, 7]) and states[0][0, 0, 6] == torch.inf


def test_the_op_rounds_as_the_reference_does():
    heads = Heads(1, torch.float32, quiet=True)
    dt = torch.log1p((heads.dt + heads.vectors[2]).exp())
    decay = torch.exp(-heads.vectors[0].exp() * dt)[0]
    want = round_stochastic(decay[:, None, None] * heads.own.float(), 3, 1)
    heads.take(1, step=True)
    apart = (heads.own.view(torch.int16) - want.view(torch.int16)).abs()
    assert apart.max() <= 1 and (apart == 0).float().mean() > 0.99  # exp may differ by an ulp


def test_rounding_is_unbiased_and_never_far():
    """Over many positions the mean is the value; each result is one of its two neighbours."""
    h = torch.cat([torch.randn(32) * scale for scale in (1e-6, 1e-3, 1.0, 300.0)]).view(4, 2, 16)
    count, total = 4096, torch.zeros(h.shape, dtype=torch.float64)
    below = torch.minimum(h.half().float(), h)  # at most one step away
    for position in range(count):
        rounded = round_stochastic(h, 7, position)
        total += rounded.double()
    step = (h.abs() * 2**-10).clamp(min=2.0**-24)
    assert ((rounded.float() - h).abs() <= step).all() and (below <= h).all()
    assert ((total / count - h).abs() <= step * 4 * 0.5 / count**0.5).all()  # four sigma
    words = [round_stochastic(torch.full((1, 1, 64), 1 + 2.0**-11), 1, p) for p in range(512)]
    up = torch.stack(words).view(512, 64).float().sub(1).mul(2**10)  # 0 or 1, half of each
    assert abs(up.mean() - 0.5) < 0.02
    for shifted in (up[1:] * up[:-1], up[:, 1:] * up[:, :-1]):  # neighbours are independent
        assert abs(shifted.mean() - 0.25) < 0.02


def test_float16_state_needs_the_number_of_tokens():
    with pytest.raises(ValueError, match=r"^ssm_step: context must be a tensor, got None"):
        Heads(1).take(1, step=True, context=None)
    with pytest.raises(ValueError, match=r"^ssm_scan: context must be at least 0, got -1"):
        Heads(1).take(1, context=int32(-1))
    with pytest.raises(ValueError, match=r"^ssm_step: seed must be in"):
        Heads(1).take(1, step=True, seed=-1)


# -- engine -------------------------------------------------------------------------------------


def test_options_choose_the_dtypes():
    config, bf16 = ModelConfig.from_dict(base_config()), torch.bfloat16
    assert cache_dtypes(config, bf16, "auto", "auto") == CacheDtypes.of(bf16)
    small = cache_dtypes(config, bf16, "fp8", "float16")
    assert (small.kv, small.ssm, small.conv) == (torch.uint8, torch.float16, bf16)
    assert small.names == ("fp8", "float16")
    for stated, want in (("float16", "float16"), ("bfloat16", "float32"), (None, "float32")):
        other = ModelConfig.from_dict(base_config(mamba_ssm_cache_dtype=stated))
        assert cache_dtypes(other, bf16, "auto", "auto").names == ("bfloat16", want)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype must be auto or fp8, got 'int8'"),
        (
            {"mamba_ssm_cache_dtype": "bfloat16"},
            "mamba_ssm_cache_dtype must be auto, float32 or float16, got 'bfloat16'",
        ),
    ],
)
def test_unknown_dtypes_are_refused(tmp_path, options, message):
    with pytest.raises(InvalidRequest, match=message):
        base_engine(tmp_path, **options)


def test_the_cache_takes_the_memory_that_is_counted(tmp_path):
    options = {"kv_cache_dtype": "fp8", "mamba_ssm_cache_dtype": "float16"}
    with base_engine(tmp_path, **options) as engine:
        cache, config = engine.core.model.cache, engine.config
        slot = sum(s[0].nbytes for s in cache.ssm + cache.conv)
        assert slot == slot_bytes(config, full_width(config), cache.dtypes)
        assert all(page.dtype == torch.uint8 for page in cache.k + cache.v)
        default = slot_bytes(config, full_width(config), CacheDtypes.of(torch.float32))
        assert default - slot == sum(s[0].nbytes for s in cache.ssm)  # half of the states


def test_batches_and_chunks_change_no_bit(tmp_path):
    """Law 5 for the small cache: alone, together, in other chunks, on other threads."""
    small = {"kv_cache_dtype": "fp8", "mamba_ssm_cache_dtype": "float16"}
    prompts = [draw(n, n) for n in (5, 90, 200)]
    params, answers = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True), []
    for i, limits in enumerate([{"max_num_batched_tokens": 128}, {"threads": 1}]):
        with base_engine(tmp_path / str(i), **small, **limits) as engine:
            together = engine.generate(prompts, params, width=["S", "L", "M"])
            alone = [engine.generate(p, params, width=w) for p, w in zip(prompts, "SLM")]
            scores = [engine.score(p, width="M") for p in prompts]
            answers.append((together, alone, scores))
    (together, alone, scores), (others, _, again) = answers
    for a, b, c in zip(together, alone, others):
        assert a.token_ids == b.token_ids == c.token_ids
    assert all(same_bits(a, b) for a, b in zip(scores, again))


def test_small_caches_stay_near_the_default(tmp_path):
    """Logits after 150 stepped tokens: not the same, and not far."""
    ids, rows = draw(160, 3), {}
    for kv, state in (("auto", "auto"), ("auto", "float16"), ("fp8", "auto"), ("fp8", "float16")):
        options = {"kv_cache_dtype": kv, "mamba_ssm_cache_dtype": state}
        folder = tmp_path / f"{kv}{state}"
        with base_engine(folder, **options) as engine, engine.open(ids[:10], width="L") as sequence:
            for token in ids[10:]:
                sequence.append([token])
                row = sequence.logits()
            rows[kv, state] = row
    exact = rows.pop(("auto", "auto"))
    for name, row in rows.items():
        error = (row - exact).norm() / exact.norm()
        assert 0 < error < (0.1 if "fp8" in name else 0.01), (name, error)


def loud_folder(folder, scales):
    """The fixed model with keys and values 4,096 times as large, made up for in the queries and
    the output, and with `scales` beside every key and value projection."""
    tiny.write_tiny(folder, base_config(), base_widths(), torch.float32, 7)
    file = folder / "model.safetensors"
    state = load_file(file)
    loud = {"q_proj": 2**-12, "k_proj": 2**12, "v_proj": 2**12, "o_proj": 2**-12}
    for name in [n for n in state if n.split(".")[-2] in loud]:
        at, part, _ = name.rsplit(".", 2)
        state[name] *= loud[part]
        if scales and part in ("k_proj", "v_proj"):
            state[f"{at}.{part}.{part[0]}_scale"] = torch.tensor(scales[part[0] == "v"])
    save_file(state, file, metadata={"format": "pt"})
    return folder


def test_scales_of_a_checkpoint_keep_large_keys_and_values_from_saturating(tmp_path):
    ids, rows = draw(120, 5), {}
    for name, scales, kv in (
        ("exact", None, "auto"),
        ("scaled", (70.0, 45.0), "fp8"),
        ("plain", None, "fp8"),
    ):
        folder = loud_folder(tmp_path / name, scales)
        with open_engine(folder, kv_cache_dtype=kv) as engine:
            rows[name] = engine.score(ids, width="M").float()
    error = {n: (rows[n] - rows["exact"]).norm() / rows["exact"].norm() for n in rows}
    assert 0 < error["scaled"] < 0.1, error
    assert error["plain"] > 3 * error["scaled"], error


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_no_positive_number_is_refused(tmp_path, scale):
    folder = loud_folder(tmp_path / "model", (scale, 1.0))
    with pytest.raises(CheckpointError, match="k_scale must be one finite number above 0"):
        open_engine(folder, kv_cache_dtype="fp8")


def test_prompts_off_the_grid_are_runs_of_their_own():
    runs = []
    for count in (PAGE, 10, 20):
        append_run(runs, "S", "prefill", count, False)
    append_run(runs, "S", "step", 1, False)
    append_run(runs, "S", "step", 1, False)
    assert runs == [
        Run("S", "prefill", PAGE + 10),
        Run("S", "prefill", 20),
        Run("S", "step", 2),
    ]
