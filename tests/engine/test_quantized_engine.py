"""The engine on quantized checkpoints: every width against float64-exact weights in transformers,
a slice against the prefix bit for bit, and the memory that is told."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from elastic_infer.checkpoint.checkpoint import Checkpoint
from elastic_infer.checkpoint.slicing import slice_checkpoint
from elastic_infer.errors import CheckpointError
from elastic_infer.model.loader import WeightLoader
from elastic_infer.sampling.params import SamplingParams
from elastic_infer.sizing.footprint import bytes_per_token, mean_bits, weight_bytes
from support import engines, tiny
from support.quantized import plain_folder, write_quantized

pytestmark = pytest.mark.usefixtures("one_thread")

EVERYTHING = {"": "nvfp4"}
RELEASED = {"experts": "nvfp4", "lm_head": "nvfp4", "in_proj": "fp8", "out_proj": "fp8"}
REST = {
    "q_proj": "fp8",
    "k_proj": "fp8",
    "v_proj": "fp8",
    "o_proj": "nvfp4",
    "out_proj": "nvfp4",
    "up_proj": "fp8",
    "down_proj": "fp8",
}
FORMATS = {"everything": EVERYTHING, "released": RELEASED, "rest": REST}
TOKENS = [5, 77, 12, 3, 99, 41, 8, 8, 120, 64, 2, 17, 33, 55, 101, 9, 6, 70]


def make(tmp_path, formats, layout="modelopt", dtype=torch.float32):
    config, widths = engines.base_config(), engines.base_widths()
    true = write_quantized(
        tmp_path / "q", config, widths, formats, layout=layout, dtype=dtype, seed=1
    )
    return config, widths, true, tmp_path / "q"


def scores(folder, width=None, **options):
    with engines.open_engine(folder, threads=1, **options) as engine:
        names = list(engine.widths) if width is None else [width]
        return {name: engine.score(TOKENS, width=name).clone() for name in names}


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("formats", FORMATS)
def test_every_width_is_transformers_on_the_dequantized_weights(tmp_path, formats, layout):
    """float32 activations: logits within 1e-4 of the largest one, as for plain weights."""
    config, widths, true, folder = make(tmp_path, FORMATS[formats], layout)
    plain = plain_folder(tmp_path / "plain", config, widths, true)
    found = scores(folder)
    for name, width in Checkpoint.open(folder).widths.items():
        oracle = tiny.transformers_slice(plain, width, true)
        with torch.no_grad():
            want = oracle(torch.tensor([TOKENS]), use_cache=False).logits[0]
        error = (found[name] - want).abs().max() / want.abs().max()
        assert error < 1e-4, (name, float(error))
        assert torch.equal(found[name].argmax(-1), want.argmax(-1)), name


@pytest.mark.parametrize("formats", ["everything", "released"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slice_equals_the_prefix_bit_for_bit(tmp_path, formats, dtype):
    _, _, _, folder = make(tmp_path, FORMATS[formats], dtype=dtype)
    checkpoint = Checkpoint.open(folder)
    for name in ("S", "M"):
        out = slice_checkpoint(checkpoint, name, tmp_path / name)
        alone = scores(out, "full")["full"]
        assert torch.equal(alone, scores(folder, name)[name])
        assert torch.equal(alone, scores(folder, name, max_width=name)[name])


def test_scales_outside_a_prefix_are_never_used(tmp_path):
    """NaN block scales beyond S's rows and columns: S cannot tell, and loading L refuses them."""
    _, _, _, folder = make(tmp_path, EVERYTHING)
    before = scores(folder, "S", max_width="S")["S"]
    state = load_file(folder / "model.safetensors")
    width = Checkpoint.open(folder).widths["S"]
    for name, tensor in state.items():
        if name.endswith("up_proj.weight_scale") and "shared" in name:
            inner = width.moe_shared_expert_intermediate_size
            layer = int(name.split(".")[2])
            tensor.view(torch.uint8)[inner[layer] :] = 0x7F
            tensor.view(torch.uint8)[:, width.hidden_size // 16 :] = 0x7F
    save_file(state, folder / "model.safetensors")
    assert torch.equal(scores(folder, "S", max_width="S")["S"], before)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_scale must hold numbers"):
        engines.open_engine(folder)


@pytest.mark.parametrize("formats", FORMATS)
def test_told_memory_is_that_of_the_loaded_weights(tmp_path, formats):
    _, _, _, folder = make(tmp_path, FORMATS[formats])
    checkpoint = Checkpoint.open(folder)
    config, found = checkpoint.config, checkpoint.formats
    for dtype in (torch.float32, torch.bfloat16):
        for width in checkpoint.widths.values():
            loaded = WeightLoader(checkpoint, width, dtype).load()
            assert loaded.nbytes == weight_bytes(config, width, dtype, found)
            assert loaded.formats == found
            read = bytes_per_token(config, width, dtype, formats=found)
            assert 0 < read < loaded.nbytes
            assert read < bytes_per_token(config, width, dtype)
            told = mean_bits(config, width, dtype, found)
            assert told < mean_bits(config, width, dtype, None)


def test_a_long_generation_of_mixed_widths(tmp_path):
    """Rows of different widths in one batch: the same tokens as alone."""
    _, _, _, folder = make(tmp_path, RELEASED, dtype=torch.bfloat16)
    with engines.open_engine(folder, threads=1) as engine:
        prompts, names = [TOKENS[:7], TOKENS[3:], TOKENS[5:9]], ["S", "L", "M"]
        params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
        alone = [engine.generate(p, params, width=w).token_ids for p, w in zip(prompts, names)]
        requests = [engine.submit(p, params, width=w) for p, w in zip(prompts, names)]
        assert [r.result().token_ids for r in requests] == alone


def test_one_matrix_of_two_formats_is_refused(tmp_path):
    mixed = {"q_proj": "nvfp4", "k_proj": "fp8", "v_proj": "nvfp4"}
    _, _, _, folder = make(tmp_path, mixed)
    with pytest.raises(CheckpointError, match=r"k_proj\.weight must have the format of .*q_proj"):
        engines.open_engine(folder)
    (tmp_path / "e").mkdir()
    _, _, _, folder = make(tmp_path / "e", {"experts.1.up": "nvfp4"})
    with pytest.raises(CheckpointError, match=r"experts\.1\.up_proj\.weight must have the format"):
        engines.open_engine(folder)
