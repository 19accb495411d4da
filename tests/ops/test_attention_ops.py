"""Attention over the paged cache: cutting a prompt changes no bit, prefill agrees with decode
(law 6) and with torch's own attention."""

from itertools import pairwise

import pytest
import torch

from elastic_infer import _C
from elastic_infer.ops import Pool
from elastic_infer.ops.attention_decode import NAN_CODE, attention_decode
from elastic_infer.ops.attention_prefill import attention_prefill
from elastic_infer.ops.kv_append import PAGE, from_codes, kv_append, to_codes
from elastic_infer.rounding import ceil_div

HQ, HKV, K = 12, 2, 48
SCALE = K**-0.5
LENGTHS = (1, 3, 4, 63, 64, 65, 127, 128, 129)
DTYPES = [torch.float32, torch.bfloat16]


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


class Prompt:
    """Queries, keys and values of one sequence, and its pages in shuffled order."""

    def __init__(self, tokens, dtype, runner=None, heads=HQ, fp8=False):
        g = torch.Generator().manual_seed(tokens)
        self.tokens, self.dtype, self.runner, self.heads = tokens, dtype, runner, heads
        self.q = torch.randn(tokens, HQ * K, generator=g).mul(2).to(dtype)
        self.k, self.v = (torch.randn(tokens, HKV * K, generator=g).to(dtype) for _ in "kv")
        pages = ceil_div(tokens, PAGE)
        self.table = torch.randperm(pages + 1, generator=g)[:pages].to(torch.int32)[None]
        shape = (pages + 1, HKV, PAGE, K)
        self.pages = [torch.full(shape, torch.nan, dtype=dtype) for _ in "kv"]
        self.scales = {}
        if fp8:
            self.pages = [torch.full(shape, NAN_CODE, dtype=torch.uint8) for _ in "kv"]
            self.scales = {"k_scale": 0.25, "v_scale": 0.03}

    def widths(self):
        width = {"seq_width": int32(0), "q_sizes": int32(self.heads)}
        return width | self.scales | {"run": self.runner}

    def append(self, begin, end):
        places = [int(self.table[0, t // PAGE]) * PAGE + t % PAGE for t in range(begin, end)]
        kv_append(
            self.k[begin:end],
            self.v[begin:end],
            *self.pages,
            slot_mapping=int32(*places),
            run=self.runner,
            **self.scales,
        )

    def read(self, begin, end):
        """Appends tokens [begin, end) and attends from them, as one prefill chunk."""
        self.append(begin, end)
        out = torch.full((end - begin, HQ * K), torch.nan, dtype=self.dtype)
        return attention_prefill(
            self.q[begin:end],
            *self.pages,
            out,
            page_table=self.table,
            cu_seqlens=int32(0, end - begin),
            context=int32(begin),
            scale=SCALE,
            **self.widths(),
        )

    def step(self, t):
        """Appends token t and attends from it, as a decode step."""
        self.append(t, t + 1)
        out = torch.full((1, HQ * K), torch.nan, dtype=self.dtype)
        return attention_decode(
            self.q[t : t + 1],
            *self.pages,
            out,
            page_table=self.table,
            lengths=int32(t + 1),
            scale=SCALE,
            **self.widths(),
        )

    def kept(self, name):
        """Keys or values as the cache holds them."""
        x = getattr(self, name)
        if not self.scales:
            return x
        scale = self.scales[f"{name}_scale"]
        return from_codes(to_codes(x, scale), scale, torch.float64)

    def torch_attention(self, dtype):
        """torch's own causal attention over the whole prompt, [tokens, HQ * K]."""
        kv_head = torch.arange(self.heads) % HKV
        q = self.q[:, : self.heads * K].view(self.tokens, self.heads, K).transpose(0, 1)
        k, v = (
            self.kept(name).view(self.tokens, HKV, K)[:, kv_head].transpose(0, 1)
            for name in ("k", "v")
        )
        out = torch.nn.functional.scaled_dot_product_attention(
            *(x.to(dtype)[None] for x in (q, k, v)), is_causal=True, scale=SCALE
        )
        return out[0].transpose(0, 1).reshape(self.tokens, self.heads * K)


def assert_within_law_1(got, exact, plain):
    error = (got.double() - exact).abs().max()
    allowed = 2 * (plain.double() - exact).abs().max()
    allowed += torch.finfo(got.dtype).eps * exact.abs().max()
    assert error <= allowed, (error, allowed)


@pytest.mark.parametrize("isa", _C.usable_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "cuts",
    [
        (64,),
        (64, 128),
        (128, 192),
        (192,),
        (1, 2, 3),
        (17, 100, 164),  # not on the grid that the scheduler keeps to: also equal
    ],
    ids=str,
)
@pytest.mark.parametrize("fp8", [False, True], ids=["", "fp8"])
def test_cut_prompt_equals_whole_prompt(cuts, dtype, isa, fp8):
    """Bit for bit, on other threads too."""
    whole = Prompt(197, dtype, Pool(1, isa), fp8=fp8).read(0, 197)
    cut = Prompt(197, dtype, Pool(2, isa), fp8=fp8)
    edges = [0, *cuts, 197]
    parts = [cut.read(begin, end) for begin, end in pairwise(edges)]
    assert same_bits(torch.cat(parts), whole)


@pytest.mark.parametrize("isa", _C.usable_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("fp8", [False, True], ids=["", "fp8"])
def test_prefill_then_step_agrees_with_prefill(n, dtype, isa, fp8):
    """Law 6: row t of a prefill and the decode step of token t, both within law 1."""
    pool = Pool(1, isa)
    stepped, whole = (Prompt(n + 1, dtype, pool, fp8=fp8) for _ in range(2))
    stepped.read(0, n)
    exact, plain = whole.torch_attention(torch.float64), whole.torch_attention(dtype)
    got = whole.read(0, n + 1)
    assert_within_law_1(stepped.step(n), exact[n:], plain)
    assert_within_law_1(got[n:], exact[n:], plain)


@pytest.mark.parametrize("isa", _C.usable_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [2, 5, 12])
def test_prefill_equals_torch_attention(heads, dtype, isa):
    """Against scaled_dot_product_attention of the active heads; the other heads are zero."""
    prompt = Prompt(150, dtype, Pool(2, isa), heads)
    got = prompt.read(0, 150)
    exact, plain = prompt.torch_attention(torch.float64), prompt.torch_attention(dtype)
    assert_within_law_1(got[:, : heads * K], exact, plain)
    assert (got[:, heads * K :] == 0).all()


@pytest.mark.parametrize("isa", _C.usable_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_is_read_as_torch_reads_it(dtype, isa):
    """A lone key has the weight 1, so that its value is the output: all 256 codes."""
    codes = torch.arange(256, dtype=torch.uint8)
    pages = torch.zeros(1, 1, PAGE, 256, dtype=torch.uint8)
    pages[0, 0, 0] = codes
    q, out = torch.zeros(1, 256, dtype=dtype), torch.empty(1, 256, dtype=dtype)
    attention_decode(
        q,
        torch.zeros_like(pages),
        pages,
        out,
        page_table=int32(0)[None],
        lengths=int32(1),
        scale=1.0,
        run=Pool(1, isa),
        v_scale=0.5,
    )
    want = (codes.view(torch.float8_e4m3fn).float() * 0.5).to(dtype)
    assert torch.equal(out[0].isnan(), want.isnan()) and want.isnan().sum() == 2
    assert torch.equal(out[0].nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("isa", _C.usable_isas())
def test_every_bfloat16_becomes_the_code_that_torch_gives(isa):
    """All 65536 of them: ties, subnormals, what is beyond 448, infinities, NaN."""
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for dtype in DTYPES:
        k = values.view(64, 1024).to(dtype)
        pages = [torch.zeros(1, 1, PAGE, 1024, dtype=torch.uint8) for _ in "kv"]
        kv_append(k, k, *pages, slot_mapping=int32(*range(64)), run=Pool(1, isa), v_scale=3.0)
        for got, scale in zip(pages, (1.0, 3.0)):
            want, lost = to_codes(values, scale), values.isnan()
            assert torch.equal(got.flatten()[~lost], want[~lost])
            assert (got.flatten()[lost] == NAN_CODE).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k_scale": 0.0}, "k_scale must be finite and above 0"),
        ({"v_scale": float("inf")}, "v_scale must be finite and above 0"),
        ({"v_scale": 2.0}, r"v_scale must be 1 unless the pages are uint8 \(E4M3\)"),
    ],
)
def test_page_scales_are_checked(change, message):
    prompt, out = Prompt(9, torch.float32), torch.empty(1, HQ * K)
    with pytest.raises(ValueError, match=f"^kv_append: {message}"):
        kv_append(prompt.k, prompt.v, *prompt.pages, slot_mapping=int32(*range(9)), **change)
    with pytest.raises(ValueError, match=f"^attention_decode: {message}"):
        attention_decode(
            prompt.q[:1],
            *prompt.pages,
            out,
            page_table=prompt.table,
            lengths=int32(9),
            scale=SCALE,
            **change,
        )


def test_float8_tensors_go_in_viewed_as_uint8():
    prompt = Prompt(9, torch.float32, fp8=True)
    pages = [p.view(torch.float8_e4m3fn) for p in prompt.pages]
    with pytest.raises((TypeError, ValueError)):
        kv_append(prompt.k, prompt.v, *pages, slot_mapping=int32(*range(9)))


def test_decode_over_many_splits_equals_torch_attention():
    prompt = Prompt(1300, torch.float32, Pool(2))
    prompt.append(0, 1299)
    exact = prompt.torch_attention(torch.float64)[-1:]
    assert_within_law_1(prompt.step(1299), exact, prompt.torch_attention(torch.float32)[-1:])


def test_large_scores_and_equal_scores():
    """Scores of +-1e4 neither overflow nor lose the largest; equal keys average their values."""
    prompt = Prompt(130, torch.float32)
    prompt.q.fill_(0.0)
    assert torch.allclose(
        prompt.read(0, 130)[-1].view(HQ, K)[0], prompt.v[:, :K].mean(0), atol=1e-6
    )
    prompt = Prompt(130, torch.float32)
    prompt.q.fill_(1e3), prompt.k.fill_(-1.0)
    prompt.k[40] = 1.0
    got = prompt.read(0, 130)
    assert torch.equal(got[129].view(HQ, K), prompt.v[40].view(HKV, K).repeat(HQ // HKV, 1))


def given(prompt):
    return {
        "page_table": prompt.table,
        "cu_seqlens": int32(0, 70),
        "context": int32(60),
        "scale": SCALE,
        "seq_width": int32(0),
        "q_sizes": int32(HQ),
    }


@pytest.mark.parametrize(
    "change, message",
    [
        ({"context": int32(-1)}, "context must be at least 0, got -1 at sequence 0"),
        ({"context": int32(200)}, "context must give each sequence 0 to 192 tokens"),
        ({"cu_seqlens": int32(1, 70)}, "cu_seqlens must start at 0"),
        ({"cu_seqlens": int32(0, 99)}, "cu_seqlens must rise within"),
        ({"page_table": int32(0, 9, 1)[None]}, "page_table must hold pages in .* got 9 for page 1"),
        (
            {"page_table": int32(0, 1, -1)[None]},
            "page_table must hold pages in .* got -1 for page 2",
        ),
        ({"q_sizes": int32(HQ + 1)}, "q_sizes must hold sizes in"),
        ({"seq_width": int32(1)}, "seq_width must hold indices in"),
        ({"seq_width": None}, "q_sizes must be absent without seq_width"),
        ({"scale": float("nan")}, "scale must be finite"),
    ],
)
def test_prefill_values_are_checked(change, message):
    prompt = Prompt(130, torch.float32)
    out = torch.empty(70, HQ * K)
    with pytest.raises(ValueError, match=f"attention_prefill: {message}"):
        attention_prefill(prompt.q[60:130], *prompt.pages, out, **given(prompt) | change)


def test_unneeded_entries_of_the_page_table_are_not_read():
    prompt = Prompt(130, torch.float32)
    want = prompt.read(0, 130)
    prompt.table = torch.cat([prompt.table, int32(-9, 2**31 - 1)[None]], 1)
    assert same_bits(prompt.read(0, 130), want)
