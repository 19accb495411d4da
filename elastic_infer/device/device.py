"""The device that a model runs on: where its tensors are, its memory and its stream."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext

import torch

from .. import _C
from ..errors import InvalidRequest, shown
from .memory import lazy_zeros


class Device:
    """Place of a model's tensors, and order of the work on them.

    Args:
        name: "cpu", "cuda:N", or "emulated" (tests: the CPU's memory stands for a device's).
    """

    def __init__(self, name: str):
        self.name = name
        self.place = torch.device("cpu" if name == "emulated" else name)
        self.stream = torch.cuda.Stream(self.place) if self.place.type == "cuda" else None

    @property
    def is_cpu(self) -> bool:
        """True if kernels read the host's memory themselves."""
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
        """Copies between the device and memory of `host_zeros`, in the order of the stream;
        the host does not wait."""
        target.copy_(source, non_blocking=True)

    def mark(self) -> torch.cuda.Event | None:
        """A point in the stream that the host can wait for: `event.synchronize()`."""
        return None if self.stream is None else self.stream.record_event()

    def memory(self) -> tuple[int, int]:
        """Bytes of device memory (free, in all); the emulated device has 1 GiB."""
        return torch.cuda.mem_get_info(self.place) if self.stream else (1 << 30, 1 << 30)


CPU = Device("cpu")


def is_emulated() -> bool:
    """True if the module of kernels is the tests' emulator."""
    return _C.cuda_architectures() == ["emulated"]


def why_not_cuda(index: int = 0) -> str:
    """Obstacle to the use of CUDA device `index`, with the remedy; empty if there is none."""
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

    Args:
        name: "cpu"; "cuda" or "cuda:N"; "auto" takes the first GPU if it can be used, else the CPU.

    Raises:
        InvalidRequest: another name, or a device that cannot be used, with the remedy.
    """
    if not isinstance(name, str):
        raise InvalidRequest(f"engine: device must be auto, cpu, cuda or cuda:N, got {shown(name)}")
    if is_emulated() and name in ("auto", "emulated"):
        return Device("emulated")
    if name == "auto":
        return Device("cpu") if why_not_cuda() else Device("cuda:0")
    if name == "cpu":
        return Device("cpu")
    match = re.fullmatch(r"cuda(?::(\d{1,9}))?", name)
    if match is None:
        raise InvalidRequest(f"engine: device must be auto, cpu, cuda or cuda:N, got {shown(name)}")
    index = int(match[1] or 0)
    if why := why_not_cuda(index):
        raise InvalidRequest(f"engine: device {name!r} must be usable, got {why}")
    return Device(f"cuda:{index}")
