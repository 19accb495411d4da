"""Quantized checkpoints: published layouts read, cut and sliced; what cannot be read is named."""

from __future__ import annotations

import itertools
import json
import re
import time

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from elastic_infer.checkpoint.checkpoint import Checkpoint
from elastic_infer.checkpoint.layout import tensor_selections
from elastic_infer.checkpoint.patterns import matches, regex_problem
from elastic_infer.checkpoint.published import modelopt_config, read_published
from elastic_infer.checkpoint.slicing import slice_checkpoint
from elastic_infer.checkpoint.tensor_files import take
from elastic_infer.codes import encode_e2m1, round_e2m1, unpack_e2m1
from elastic_infer.errors import CheckpointError
from support import tiny
from support.quantized import dequantize, write_quantized

MIXED = {
    "experts": "nvfp4",
    "lm_head": "nvfp4",
    "q_proj": "nvfp4",
    "k_proj": "nvfp4",
    "v_proj": "nvfp4",
    "o_proj": "fp8",
    "in_proj": "fp8",
    "out_proj": "nvfp4",
}
LAYOUTS = ("modelopt", "compressed-tensors")


def make(tmp_path, layout="modelopt", formats=MIXED, seed=3):
    config = tiny.tiny_config(seed)
    widths = tiny.tiny_widths(config, seed, count=3, per_layer=False)
    folder = tmp_path / "full"
    true = write_quantized(folder, config, widths, formats, layout=layout, seed=seed)
    return folder, true


def opened(folder, tmp_path):
    return Checkpoint.open(folder, config_home=tmp_path / "home")


def change(folder, edit):
    """Rewrites the tensors of a folder."""
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors")


def change_config(folder, edit):
    raw = json.loads((folder / "config.json").read_text())
    edit(raw["quantization_config"])
    (folder / "config.json").write_text(json.dumps(raw))


def test_rounding_is_that_of_the_format():
    """Every midpoint and its neighbours, against nearest-even over the list of values."""
    grid = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for i, (low, high) in enumerate(itertools.pairwise(grid)):
        middle = torch.tensor((low + high) / 2)
        assert round_e2m1(torch.nextafter(middle, torch.tensor(0.0))) == low
        assert round_e2m1(middle) == (low if i % 2 == 0 else high)
        assert round_e2m1(torch.nextafter(middle, torch.tensor(9.0))) == high
    assert round_e2m1(torch.tensor(1e9)) == 6
    values = torch.randn(3, 64) * 3
    codes = encode_e2m1(values)
    assert codes.shape == (3, 32)
    assert codes[0, 0] & 15 == encode_e2m1(values[:, :2])[0, 0] & 15
    want = torch.copysign(round_e2m1(values.abs()), values)
    assert torch.equal(unpack_e2m1(codes), want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(3))
def test_values_are_those_of_an_independent_reader(tmp_path, layout, seed):
    """All of a matrix, and the rows and columns of every width, equal numpy's, to the last bit of
    float32."""
    folder, true = make(tmp_path, layout, seed=seed)
    checkpoint = opened(folder, tmp_path)
    assert set(checkpoint.formats.values()) == {"nvfp4", "fp8"}
    for width in checkpoint.widths.values():
        for name, kept in tensor_selections(checkpoint.config, width).items():
            want = take(true[name].float(), *kept)
            assert torch.equal(checkpoint.selected(name, kept), want), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_slice_holds_cut_codes_and_unchanged_scalars(tmp_path, layout):
    folder, true = make(tmp_path, layout)
    checkpoint = opened(folder, tmp_path)
    whole = load_file(folder / "model.safetensors")
    width = checkpoint.widths["S"]
    out = slice_checkpoint(checkpoint, "S", tmp_path / "S")
    sliced = opened(out, tmp_path)
    state = load_file(out / "model.safetensors")
    for name, kept in tensor_selections(checkpoint.config, width).items():
        assert torch.equal(sliced.tensor(name), take(true[name].float(), *kept)), name
    assert sliced.formats == {n: f for n, f in checkpoint.formats.items() if n in sliced.names}
    scalars = [name for name, tensor in state.items() if tensor.numel() == 1]
    assert scalars and all(torch.equal(state[name], whole[name]) for name in scalars)
    if layout == "modelopt":
        assert any(name.endswith("input_scale") for name in scalars)


def test_columns_that_cut_a_block_are_refused(tmp_path):
    folder, _ = make(tmp_path)
    with pytest.raises(ValueError, match="whole blocks of 16"):
        opened(folder, tmp_path).packed("lm_head.weight", None, slice(0, 8))


def test_the_fingerprint_covers_scales(tmp_path):
    folder, _ = make(tmp_path)
    before = opened(folder, tmp_path).fingerprint
    change(folder, lambda state: state["lm_head.weight_scale_2"].mul_(2))
    assert opened(folder, tmp_path).fingerprint != before


def _set(name, value):
    def edit(state):
        state[name] = value(state[name])

    return edit


def _poke(name, bits):
    def edit(state):
        state[name].view(torch.uint8)[1, 0] = bits

    return edit


OUT = "backbone.layers.{}.mixer.out_proj"
BAD_TENSORS = {
    "truncated block scales": (
        _set("lm_head.weight_scale", lambda t: t[:, :-1].contiguous()),
        r"lm_head\.weight_scale must have shape",
    ),
    "truncated codes": (
        _set("lm_head.weight", lambda t: t[:-1].contiguous()),
        r"lm_head\.weight must have shape",
    ),
    "no block scales": (
        lambda s: s.pop("lm_head.weight_scale"),
        r"come with lm_head\.weight_scale, got none",
    ),
    "no scale": (
        lambda s: s.pop("lm_head.weight_scale_2"),
        r"come with lm_head\.weight_scale_2, got none",
    ),
    "a scale per channel": (
        _set("lm_head.weight_scale_2", lambda t: t.expand(4).clone()),
        r"scale_2 must be one number \(a scale per channel",
    ),
    "float block scales": (
        _set("lm_head.weight_scale", lambda t: t.float()),
        "weight_scale must be E4M3",
    ),
    "an integer scale": (
        _set("lm_head.weight_scale_2", lambda t: t.int()),
        "must be float32, bfloat16 or float16",
    ),
    "a plain weight beside scales": (
        _set("lm_head.weight", lambda t: torch.zeros(t.shape[0], t.shape[1] * 2)),
        r"lm_head\.weight must be quantized where there is lm_head\.weight_scale",
    ),
    "a quantized embedding": (
        _set("backbone.embeddings.weight", lambda t: t.to(torch.float8_e4m3fn)),
        r"embeddings\.weight must be float32, bfloat16 or float16 \(embedding",
    ),
    "negative block scale": (
        _poke("lm_head.weight_scale", 0xB8),
        r"not negative, got -1\.0 \(row 1",
    ),
    "NaN block scale": (_poke("lm_head.weight_scale", 0x7F), "not negative, got nan"),
    "NaN scale": (
        _set("lm_head.weight_scale_2", lambda t: t * float("nan")),
        r"scale_2 must be a finite number not negative, got nan",
    ),
    "negative scale": (_set("lm_head.weight_scale_2", lambda t: -t), "must be a finite number"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused_by_name(tmp_path, case):
    edit, message = BAD_TENSORS[case]
    folder, _ = make(tmp_path)
    change(folder, edit)
    with pytest.raises(CheckpointError, match=message):
        opened(folder, tmp_path).packed("lm_head.weight")


def test_a_code_that_is_no_number_is_refused(tmp_path):
    folder, _ = make(tmp_path, formats={"lm_head": "fp8"})
    change(folder, _poke("lm_head.weight", 0xFF))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight must hold numbers, got nan"):
        opened(folder, tmp_path).packed("lm_head.weight")


def test_a_zero_that_divides_is_refused(tmp_path):
    folder, _ = make(tmp_path, "compressed-tensors")
    change(folder, lambda state: state["lm_head.weight_global_scale"].zero_())
    with pytest.raises(CheckpointError, match="finite number above 0, got 0"):
        opened(folder, tmp_path).packed("lm_head.weight")


def _pop_layer(config):
    del config["quantized_layers"]["lm_head"]


BAD_CONFIGS = {
    "unknown method": (
        lambda c: c.update(quant_method="awq"),
        "quant_method of config.json must be supp.*'awq'",
    ),
    "unknown algorithm": (
        lambda c: c.update(quant_algo="FP8_PB_WO"),
        "quant_algo.*must be supported.*FP8_PB_WO",
    ),
    "unknown algorithm of a layer": (
        lambda c: c["quantized_layers"]["lm_head"].update(quant_algo="MXFP8"),
        "quant_algo of lm_head.*MXFP8",
    ),
    "other block": (
        lambda c: c["quantized_layers"]["lm_head"].update(group_size=32),
        "group_size.*must be 16",
    ),
    "mixed without layers": (lambda c: c.pop("quantized_layers"), "quantized_layers"),
    "a layer that is not said to be quantized": (
        _pop_layer,
        r"lm_head\.weight must be not quantized as config.json states, got nvfp4",
    ),
    "a layer of another format": (
        lambda c: c["quantized_layers"].update(lm_head={"quant_algo": "FP8"}),
        r"lm_head\.weight must be fp8 as config.json states, got nvfp4",
    ),
    "an ignored layer": (lambda c: c["ignore"].append("lm_*"), "must be not quantized"),
    "a layer that is not there": (
        lambda c: c["quantized_layers"].update(
            {
                "backbone.layers.0.mixer.gate": {"quant_algo": "FP8"},
                "backbone.layers.0.mixer.conv1d": {"quant_algo": "FP8"},
            }
        ),
        "must be fp8 as config.json states, got torch.float32",
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs_are_refused_by_name(tmp_path, case):
    edit, message = BAD_CONFIGS[case]
    folder, _ = make(tmp_path)
    change_config(folder, edit)
    with pytest.raises(CheckpointError, match=message):
        opened(folder, tmp_path)


COMPRESSED = {
    "channel scales": ("fp8", {"strategy": "channel"}),
    "block scales": ("fp8", {"strategy": "block"}),
    "integers": ("nvfp4", {"type": "int"}),
    "other block": ("nvfp4", {"group_size": 32}),
}


@pytest.mark.parametrize("case", COMPRESSED)
def test_bad_groups_are_refused_by_name(tmp_path, case):
    group, wrong = COMPRESSED[case]
    folder, _ = make(tmp_path, "compressed-tensors")
    change_config(folder, lambda c: c["config_groups"][group]["weights"].update(wrong))
    with pytest.raises(CheckpointError, match=rf"config_groups\['{group}'\].*must be supported"):
        opened(folder, tmp_path)


def test_bytes_without_a_config_are_refused(tmp_path):
    folder, _ = make(tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    del raw["quantization_config"]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="must come with a quantization_config"):
        opened(folder, tmp_path)


def test_patterns_of_both_libraries():
    """What the two exporters write: wildcards and whole branches, regular expressions and names."""
    modelopt = {
        "quantization": {
            "quant_algo": "NVFP4",
            "group_size": 16,
            "exclude_modules": ["lm_head", "backbone.layers.1.mixer", "*.in_proj"],
        }
    }
    found = read_published({"quantization_config": modelopt}, None)
    assert found.format_of("backbone.layers.2.mixer.up_proj") == "nvfp4"
    for module in ("lm_head", "backbone.layers.1.mixer.q_proj", "backbone.layers.5.mixer.in_proj"):
        assert found.format_of(module) is None, module
    assert found.format_of("backbone.layers.11.mixer.q_proj") == "nvfp4"
    branch = {
        "quant_algo": "MIXED_PRECISION",
        "quant_method": "modelopt",
        "quantized_layers": {
            "backbone.layers.1.mixer.experts": {"quant_algo": "NVFP4"},
            "mtp.layers.0.experts": {"quant_algo": "FP8_PB_WO"},
        },
    }
    found = read_published({"quantization_config": branch}, None)
    assert found.format_of("backbone.layers.1.mixer.experts.7.up_proj") == "nvfp4"
    assert found.format_of("backbone.layers.2.mixer.experts.7.up_proj") is None
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    compressed = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", r"re:.*\.gate$"],
    }
    found = read_published({"quantization_config": compressed}, None)
    assert found.format_of("backbone.layers.1.mixer.q_proj") == "fp8"
    assert found.format_of("lm_head") is None
    assert found.format_of("backbone.layers.1.mixer.gate") is None


@pytest.mark.parametrize("kinds", [("nvfp4",), ("fp8",), ("nvfp4", "fp8")])
def test_what_is_written_is_what_is_read(tmp_path, kinds):
    formats = {f"backbone.layers.{i}.mixer.up_proj": kinds[i % len(kinds)] for i in range(4)}
    left = ["lm_head", "backbone.layers.9.mixer.in_proj"]
    inline, sidecar = modelopt_config(formats, left, "1")
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(sidecar))
    for found in (
        read_published({"quantization_config": inline}, tmp_path),
        read_published({}, tmp_path),
    ):
        assert {module: found.format_of(module) for module in formats} == formats
        assert [found.format_of(module) for module in left] == [None, None]


def test_the_independent_reader_reads_e4m3_as_torch_does():
    bits = torch.arange(256, dtype=torch.uint8)
    want = bits.view(torch.float8_e4m3fn).double()
    got = torch.from_numpy(dequantize(bits.numpy()[None], None, 1.0))[0]
    assert torch.equal(got[want.isfinite()], want[want.isfinite()])
    assert bool(got[~want.isfinite()].isnan().all())


# Good layouts of MIXED_PRECISION, and patterns with a bound ---------------------------------------


def _groups(layers):
    """ModelOpt's groups of targets for its list of layers."""
    groups: dict = {}
    for module, how in layers.items():
        fp8 = how["quant_algo"] == "FP8"
        weights = {"num_bits": 8 if fp8 else 4, "type": "float", "dynamic": False}
        weights |= {} if fp8 else {"group_size": 16}
        groups.setdefault(f"group_{int(fp8)}", {"weights": weights, "targets": []})[
            "targets"
        ].append(module)
    return groups


@pytest.mark.parametrize("place", ["sidecar", "groups", "both"])
def test_layers_of_mixed_precision_in_every_place(tmp_path, place):
    """config.json without the list of layers: it lies beside it, or is a list of groups."""
    folder, _ = make(tmp_path)
    want = opened(folder, tmp_path).formats
    raw = json.loads((folder / "config.json").read_text())
    layers = raw["quantization_config"].pop("quantized_layers")
    if place != "sidecar":
        raw["quantization_config"]["config_groups"] = _groups(layers)
    if place != "groups":
        beside = {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}}
        (folder / "hf_quant_config.json").write_text(json.dumps(beside))
    (folder / "config.json").write_text(json.dumps(raw))
    assert opened(folder, tmp_path).formats == want
    assert len(set(want.values())) == 2


def test_groups_of_mixed_precision_need_no_format_of_their_own(tmp_path):
    folder, _ = make(tmp_path, "compressed-tensors")
    want = opened(folder, tmp_path).formats
    change_config(folder, lambda c: [g.pop("format") for g in c["config_groups"].values()])
    assert opened(folder, tmp_path).formats == want


ENDLESS = [
    r"([\w.]+)+!",
    r"(a*)*b",
    r"(a|aa)+$",
    r"(.*)(.*)(.*)(.*)(.*)(.*)!",
    r"(?:a?){40}a{40}b",
    r"^(([a-z])+.)+[A-Z]([a-z])+$",
    r"((a{1,9}){1,9}){1,9}!",
    r"(?=(\w+)+!)x",
    "a" * 2000,
    r"(x+x+)+y",
    "a?" * 64 + "a" * 64,
    "(" * 200 + "a" + ")+" * 200,
    "(a",
    "a**",
]
USUAL = [
    r".*mlp\.gate$",
    r"model\.layers\.\d+\.mixer\.(q|k|v|o)_proj",
    r".*(?:lm_head|embed).*",
    r"^(?!.*experts).*gate.*",
    r"backbone\.layers\.([0-9]|1[0-9])\..*shared_experts.*",
    r".*\.experts\.\d+\.(up|down)_proj$",
    r"(mtp\.)*layers.*",
    r"[^.]+\.norm",
]


@pytest.mark.parametrize("pattern", ENDLESS)
@pytest.mark.parametrize("where", ["ignore", "targets"])
def test_patterns_that_never_end_are_refused(pattern, where):
    """Repeats inside repeats, choices inside repeats, and too many repeats, wherever they stand."""
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    group = {"targets": ["Linear"], "weights": weights}
    config = {"quant_method": "compressed-tensors", "config_groups": {"g": group}, "ignore": []}
    (group if where == "targets" else config)[where] = [f"re:{pattern}"]
    with pytest.raises(CheckpointError, match=f"{where}.* must hold regular expressions that can"):
        read_published({"quantization_config": config}, None)


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_patterns_are_taken(pattern):
    modules = [
        "backbone.layers.12.mixer.shared_experts.up_proj",
        "lm_head",
        "mtp.layers.0",
        "model.layers.3.mixer.q_proj",
        "a.mlp.gate",
        "a" * 64,
    ]
    config = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": [f"re:{pattern}"]}
    found = read_published({"quantization_config": config}, None)
    assert [found.is_ignored(m) for m in modules] == [bool(re.match(pattern, m)) for m in modules]


@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")  # sets of later versions
@given(st.text("ab.|()*+?{}23[]^$\\w", max_size=14))
@settings(max_examples=300)
def test_a_pattern_that_is_taken_ends(text):
    """Random expressions of small parts: what is not refused matches within the bound."""
    if regex_problem(text) is None:
        start = time.process_time()
        for module in ("a" * 64, "ab" * 32, "a." * 31 + "!"):
            matches(f"re:{text}", module)
        assert time.process_time() - start < 5


def test_a_scale_without_a_reciprocal_is_refused(tmp_path):
    folder, _ = make(tmp_path, "compressed-tensors")
    change(folder, lambda state: state["lm_head.weight_global_scale"].fill_(1e-44))
    with pytest.raises(CheckpointError, match="have a finite reciprocal in float32"):
        opened(folder, tmp_path).packed("lm_head.weight")
