"""Which device an engine takes, and what it says when that cannot be had."""

import logging
from types import SimpleNamespace

import pytest
import torch

from elastic_infer.device import device as devices
from elastic_infer.device.device import CPU, Device, choose_device
from elastic_infer.device.shared import ReadBack, Shared
from elastic_infer.errors import InvalidRequest, OutOfCapacity
from elastic_infer.sizing import fit as placement
from support.engines import open_engine, write_text_model


def build(monkeypatch, architectures=("90a",), unusable="", torch_has_cuda=False):
    """A build with these CUDA kernels on a machine with (or without) a GPU."""
    module = SimpleNamespace(
        cuda_architectures=lambda: list(architectures),
        cuda_unusable=lambda index: unusable,
        cuda_missing=lambda: "nvcc was not found",
    )
    monkeypatch.setattr(devices, "_C", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_has_cuda)


@pytest.mark.parametrize(
    "found, message",
    [
        (
            {"architectures": ()},
            r"this build has no CUDA kernels \(nvcc was not found\); build it with `make cuda`",
        ),
        (
            {"unusable": "the driver gives none (no CUDA-capable device is detected)"},
            r"no usable GPU: the driver gives none \(no CUDA-capable device is detected\); use dev",
        ),
        (
            {"unusable": "it is of compute capability 7.5, 8.0 is the least"},
            "no usable GPU: it is of compute capability 7.5, 8.0 is the least; use device='cpu'",
        ),
        ({}, r"the installed torch .* has no CUDA; install one that has, or use device='cpu'"),
    ],
    ids=["no kernels", "no GPU", "old GPU", "torch without CUDA"],
)
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_unusable_gpu_is_said_in_one_sentence(monkeypatch, found, message, name):
    build(monkeypatch, **found)
    with pytest.raises(InvalidRequest, match=f"device '{name}' must be usable, got ") as e:
        choose_device(name)
    assert e.match(message) and "\n" not in str(e.value)
    assert choose_device("auto").is_cpu and choose_device("cpu").is_cpu


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cuda:-1", 0, None, "emulated", "CUDA"])
def test_other_names_are_refused(name):
    with pytest.raises(InvalidRequest, match="device must be auto, cpu, cuda or cuda:N, got "):
        choose_device(name)


def test_this_machine_says_why_or_has_one():
    """The real module: usable, or a reason."""
    assert bool(devices.why_not_cuda()) != torch.cuda.is_available() or devices.why_not_cuda()


def test_log_line_says_what_was_chosen(tmp_path, caplog):
    write_text_model(tmp_path)
    with (
        caplog.at_level(logging.INFO, "elastic_infer.engine.loading"),
        open_engine(tmp_path, device="cpu"),
    ):
        pass
    assert sum("kernels on 2 threads" in r.getMessage() for r in caplog.records) == 1


class Small(Device):
    """A device with its own memory beside the host's, of which `free` of `total` bytes are free."""

    def __init__(self, free, total):
        super().__init__("emulated")
        self._memory = free, total

    def memory(self):
        return self._memory


def budget(tmp_path, free, total, share=0.9, kv=None, **formats):
    write_text_model(tmp_path)
    with open_engine(tmp_path, device="cpu", **formats) as engine:
        served, cache = engine.core.model.weights.served, engine.core.model.cache
        return placement.cache_budget(
            Small(free, total),
            engine.config,
            engine.widths,
            served,
            torch.float32,
            max_model_len=512,
            max_num_seqs=16,
            max_num_batched_tokens=128,
            gpu_memory_utilization=share,
            kv_cache_memory_bytes=kv,
            dtypes=cache.dtypes,
        )


@pytest.mark.parametrize("kv", ["auto", "fp8"])
@pytest.mark.parametrize("state", ["float32", "float16"])
def test_the_least_cache_is_a_page_and_a_slot_as_they_are_kept(tmp_path, kv, state):
    """In every format of the cache: a byte less than what its own tensors take is refused."""
    formats = {"kv_cache_dtype": kv, "mamba_ssm_cache_dtype": state}
    needed = (100 << 20) - budget(tmp_path, 100 << 20, 100 << 20, 1.0, **formats)
    with open_engine(tmp_path, device="cpu", **formats) as engine:
        cache = engine.core.model.cache
        parts = (cache.k, cache.v, cache.ssm, cache.conv)
        least = sum(tensor[0].nbytes for part in parts for tensor in part)
    assert budget(tmp_path, needed + least, needed + least, 1.0, **formats) == least
    with pytest.raises(OutOfCapacity, match=rf"cache {least}\), got {needed + least - 1} "):
        budget(tmp_path, needed + least - 1, needed + least - 1, 1.0, **formats)


def test_budget_is_what_the_share_leaves(tmp_path):
    """More share or more free memory, more cache, byte for byte; what others use counts."""
    base = budget(tmp_path, 100 << 20, 100 << 20, 0.5)
    assert 0 < base < 50 << 20
    assert budget(tmp_path, 100 << 20, 100 << 20, 0.6) == base + (100 << 20) * 0.6 // 1 - (50 << 20)
    assert budget(tmp_path, 90 << 20, 100 << 20, 0.5) == base - (10 << 20)
    assert budget(tmp_path, 20 << 20, 100 << 20, 1.0) == base - (30 << 20)


def test_too_little_memory_names_what_fits(tmp_path):
    most = budget(tmp_path, 100 << 20, 100 << 20, 1.0)
    needed = (100 << 20) - most  # weights and buffers
    parts = r"must have \d+ bytes free \(weights \d+, buffers \d+, cache \d+\)"
    with pytest.raises(OutOfCapacity, match=rf"{parts}, got {needed} .*; max_width='M' fits"):
        budget(tmp_path, needed, needed, 1.0)
    with pytest.raises(OutOfCapacity, match="no width fits"):
        budget(tmp_path, 1 << 20, 1 << 20, 1.0)
    with pytest.raises(OutOfCapacity, match=f"cache {most + 1}\\)"):
        budget(tmp_path, 100 << 20, 100 << 20, 1.0, kv=most + 1)


def test_shared_tables_reach_the_device_with_one_copy():
    shared = Shared(Small(1, 1), {"a": (3,), "b": (2, 2)})
    shared.write("a", [1, 2, 3]), shared.write("b", [[4, 5]])
    assert not shared.a.any() and not shared.b.any()
    shared.upload("a")
    assert shared.a.tolist() == [1, 2, 3] and not shared.b.any()
    shared.upload("b")
    assert shared.b.tolist() == [[4, 5], [0, 0]]
    assert shared.a.data_ptr() % 4 == 0 and (shared.b.data_ptr() - shared.a.data_ptr()) == 64
    assert Shared.nbytes({"a": (3,), "b": (2, 2)}) == 128


def test_a_side_is_filled_while_the_other_may_still_be_copied():
    shared = Shared(Small(1, 1), {"a": (3,)}, sides=2)
    shared.write("a", [1, 2, 3])
    shared.upload("a")
    shared.turn()
    shared.write("a", [4])
    assert shared.a.tolist() == [1, 2, 3]
    shared.upload("a")
    assert shared.a.tolist() == [4, 0, 0] and shared.side == 1
    shared.turn()
    assert shared.host["a"].tolist() == [1, 2, 3] and shared.side == 0


def test_values_come_back_as_they_were_when_their_copy_began():
    values = torch.tensor([5, 6], dtype=torch.int32)
    back = ReadBack(Small(1, 1), 3)
    first = back.begin(values)
    values += 10
    second = back.begin(values[:1])
    values += 10
    assert first() == [5, 6] and second() == [15]


def test_on_a_cpu_both_sides_are_the_same_memory():
    shared = Shared(CPU, {"a": (3,)}, sides=2)
    shared.turn()
    shared.write("a", [1, 2])
    assert shared.a.tolist() == [1, 2, 0]
