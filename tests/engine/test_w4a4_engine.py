"""An engine whose activations are NVFP4 where its weights are, on the emulated GPU."""

from contextlib import contextmanager
from unittest import mock

import pytest

from elastic_infer import demo_model
from elastic_infer.errors import InvalidRequest
from elastic_infer.ops.moe_matmul import moe_matmul
from support.emulated import built, installed, load
from support.engines import base_config, base_widths, open_engine
from support.quantized import write_quantized

emu = load(built())
TOKENS = [5, 77, 12, 3, 99, 41, 8, 8, 120, 64, 2, 17]


@contextmanager
def card(capability):
    """Inside, engines run on an emulated card of this compute capability."""
    with installed(emu):
        emu.device(compute_capability=capability)
        yield


@pytest.fixture
def folder(tmp_path):
    write_quantized(tmp_path, base_config(), base_widths(), {"": "nvfp4"}, seed=1)
    return tmp_path


def test_engine_multiplies_quantized_rows(folder, monkeypatch):
    """Beside the CPU's engine with every row quantized in torch ahead of such a product, as
    `bench/cpu/activations.py` has it; without experts it would not be the same."""
    from bench.cpu import activations

    def score(**options):
        with open_engine(folder, threads=1, **options) as engine:
            return {w: engine.score(TOKENS, width=w).clone() for w in engine.widths}

    with card(120):
        found = score(device="emulated", activation_quantization="nvfp4")
        plain = score(device="emulated")
    with activations.nvfp4_activations():
        wanted = score(device="cpu")
        with mock.patch("elastic_infer.model.layers.moe_matmul", moe_matmul):
            outside = score(device="cpu")
    for width, logits in wanted.items():
        size = logits.norm()
        assert (found[width] - logits).norm() <= 0.01 * size
        assert (plain[width] - logits).norm() >= 0.05 * size
        assert (outside[width] - logits).norm() >= 0.02 * size


@pytest.mark.parametrize(
    "capability, options, why",
    [
        (90, {"device": "emulated"}, "the device has compute capability 9.0, 12.x needed"),
        (120, {"device": "cpu"}, "a GPU of compute capability 12.x is needed, the device is the"),
        (120, {"device": "emulated", "activation_quantization": "fp8"}, "or nvfp4, got 'fp8'"),
    ],
)
def test_engine_refuses_other_devices_and_forms(folder, capability, options, why):
    options = {"activation_quantization": "nvfp4", **options}
    refused = pytest.raises(InvalidRequest, match=f"activation_quantization must be none.*{why}")
    with card(capability), refused:
        open_engine(folder, **options)


def test_engine_refuses_plain_weights():
    refused = pytest.raises(InvalidRequest, match="the checkpoint has no NVFP4 matrix")
    with card(120), refused:
        open_engine(demo_model(), device="emulated", activation_quantization="nvfp4")
