"""The device that a model runs on: where its tensors are, its memory and its stream."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from .. import _C
from ..errors import InvalidRequest, shown
from .memory import lazy_zeros


class Device:
    """Where the tensors of a model are, and in which order work on them happens.

    name: "cpu", "cuda:N", or "emulated" (tests: the CPU's memory stands for a device's).
    """

    def __init__(self, name: str):
        self.name = name
        self.place = torch.device("cpu" if name == "emulated" else name)
        self.stream = torch.cuda.Stream(self.place) if self.place.type == "cuda" else None

    @property
    def is_cpu(self) -> bool:
        """Whether kernels read the host's memory themselves."""
        return self.name == "cpu"

    def running(self) -> AbstractContextManager:
        """Inside, this thread gives its work on the device to the model's own stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def wait(self) -> None:
        """Until everything given to the stream has happened."""
        if self.stream is not None:
            self.stream.synchronize()

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Zeros on the device; on a CPU they take no memory until they are written."""
        if self.place.type == "cpu":
            return lazy_zeros(*shape, dtype=dtype)
        return torch.zeros(shape, dtype=dtype, device=self.place)

    def host_zeros(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeros in host memory that copies to the device need not wait for."""
        pinned = self.stream is not None
        return torch.zeros(shape, dtype=dtype, device="cpu", pin_memory=pinned)

    def to(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device; itself where it is there."""
        return tensor.to(self.place, non_blocking=True)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies between the device and memory of `host_zeros`, in the order of the stream; nobody
        waits for it."""
        target.copy_(source, non_blocking=True)

    def mark(self) -> torch.cuda.Event | None:
        """A point in the stream that the host can wait for: `event.synchronize()`."""
        return None if self.stream is None else self.stream.record_event()

    def memory(self) -> tuple[int, int]:
        """Bytes of device memory (free, in all); the emulated device has 1 GiB."""
        return torch.cuda.mem_get_info(self.place) if self.stream else (1 << 30, 1 << 30)


CPU = Device("cpu")


def is_emulated() -> bool:
    """Whether the module of kernels is the tests' emulator."""
    return _C.cuda_architectures() == ["emulated"]


def why_not_cuda(index: int = 0) -> str:
    """Why CUDA device `index` cannot be used, with the remedy; empty if it can."""
    if not _C.cuda_architectures():
        return (
            f"this build has no CUDA kernels ({_C.cuda_missing()}); build it with `make cuda` "
            "(CMake option ELASTIC_CUDA=ON), or use device='cpu'"
        )
    why = _C.cuda_unusable(index)
    if why:
        return f"no usable GPU: {why}; use device='cpu'"
    if not torch.cuda.is_available():
        return (
            f"the installed torch {torch.__version__} has no CUDA; install one that has, or use "
            "device='cpu'"
        )
    return ""


def choose_device(name: object) -> Device:
    """The device of an engine.

    name: "cpu"; "cuda" or "cuda:N"; "auto" takes the first GPU if it can be used, else the CPU.

    Raises: InvalidRequest for another name, or a device that cannot be used, with the remedy.
    """
    if is_emulated() and name in ("auto", "emulated"):
        return Device("emulated")
    if name == "auto":
        return Device("cpu") if why_not_cuda() else Device("cuda:0")
    if name == "cpu":
        return Device("cpu")
    match = re.fullmatch(r"cuda(?::(\d{1,9}))?", name) if isinstance(name, str) else None
    if match is None:
        raise InvalidRequest(f"engine: device must be auto, cpu, cuda or cuda:N, got {shown(name)}")
    index = int(match[1] or 0)
    if why := why_not_cuda(index):
        raise InvalidRequest(f"engine: device {name!r} must be usable, got {why}")
    return Device(f"cuda:{index}")


Table = tuple[tuple[int, ...], torch.dtype]
Sizes = dict[str, tuple[int, ...] | Table]
LINE = 64  # tables start at multiples of so many bytes


def _typed(sizes: Sizes) -> dict[str, Table]:
    return {n: s if s and isinstance(s[0], tuple) else (s, torch.int32) for n, s in sizes.items()}


def _lines(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // LINE) * LINE


class Shared:
    """Small tables that the host fills and the device reads, in one block: one copy brings all of
    them over. On a CPU both sides are the same memory.

    sizes: {name: shape} of int32 tables, or {name: (shape, dtype)}. Each is an attribute: the
    device's tensor; `host[name]` is the host's side as a numpy array, which takes small values ten
    times faster than a tensor. sides: how many of these there are, so that one can be filled while
    another may still be copied; `side` is the number of the one that `host` shows.
    """

    def __init__(self, device: Device, sizes: Sizes, sides: int = 1):
        self.device, self.side = device, 0
        total, sides = self.nbytes(sizes), 1 if device.is_cpu else sides
        self._memory = [device.host_zeros(total, dtype=torch.uint8) for _ in range(sides)]
        self._there = self._memory[0] if device.is_cpu else device.zeros(total, dtype=torch.uint8)
        self._hosts = [{} for _ in range(sides)]
        self._copied, self._ends, at = [None] * sides, {}, 0
        for name, (shape, dtype) in _typed(sizes).items():
            end = at + math.prod(shape) * dtype.itemsize
            for host, memory in zip(self._hosts, self._memory):
                host[name] = memory[at:end].view(dtype).view(shape).numpy()
            setattr(self, name, self._there[at:end].view(dtype).view(shape))
            self._ends[name] = end
            at += _lines(shape, dtype)
        self.host = self._hosts[0]

    @staticmethod
    def nbytes(sizes: Sizes) -> int:
        """Bytes of such a block on the device."""
        return sum(_lines(*table) for table in _typed(sizes).values())

    def write(self, name: str, values: list[int]) -> None:
        """Fills the beginning of a table on the host's side."""
        self.host[name][: len(values)] = values

    @property
    def sides(self) -> int:
        """How many host's sides there are: one on a CPU."""
        return len(self._hosts)

    def turn(self) -> None:
        """Goes to the next side of the host, which holds what was written there last."""
        self.side = (self.side + 1) % len(self._hosts)
        self.host = self._hosts[self.side]
        self.settle()

    def settle(self) -> None:
        """Waits until the last upload no longer reads this side of the host."""
        if self._copied[self.side] is not None:
            self._copied[self.side].synchronize()
            self._copied[self.side] = None

    def upload(self, last: str) -> None:
        """Copies all tables up to and including `last`, in the order of `sizes`."""
        memory = self._memory[self.side]
        if self._there is not memory:
            end = self._ends[last]
            self.device.copy(self._there[:end], memory[:end])
            self._copied[self.side] = self.device.mark()


class ReadBack:
    """int32 values on their way from the device to the host. Two may be on their way at once.

    count: the most values.
    """

    def __init__(self, device: Device, count: int):
        self._device, self._side = device, 0
        self._memory = [device.host_zeros(count, dtype=torch.int32) for _ in range(2)]

    def begin(self, values: torch.Tensor) -> Callable[[], list[int]]:
        """Copies `values` as they are at this point of the stream. Returns: what waits for the copy
        and gives them, until the next but one begins."""
        self._side = 1 - self._side
        host = self._memory[self._side][: len(values)]
        self._device.copy(host, values)
        copied = self._device.mark()

        def wait() -> list[int]:
            if copied is not None:
                copied.synchronize()
            return host.tolist()

        return wait
