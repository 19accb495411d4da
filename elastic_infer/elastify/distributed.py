"""Several processes of one training: sharded weights, one batch split over the ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import InvalidRequest, shown
from .corpus import Batch
from .torch_model import ElasticNemotronH

__all__ = ["Group"]


@dataclass(frozen=True)
class Group:
    """The processes that train together; `Group()` is one process alone.

    Attributes:
        rank: of this process in 0..size-1.
        size: number of processes.
        device: of this process.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def current(cls, device: str | torch.device = "auto") -> Group:
        """The processes that torchrun started (or that joined already), else this one alone.

        Args:
            device: "auto" takes a GPU where there is one, "cpu" or "cuda" or a torch device.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise InvalidRequest(
                f"device: must be auto, cpu, cuda or cuda:N, got {shown(device)}"
            ) from error
        if device.type not in ("cpu", "cuda"):
            raise InvalidRequest(f"device: must be auto, cpu, cuda or cuda:N, got {device}")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise InvalidRequest(f"device: must be one that torch has, got {device} without CUDA")
        if dist.is_available() and not dist.is_initialized() and dist.is_torchelastic_launched():
            # The others wait while the first process measures importance.
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=12))
        if not (dist.is_available() and dist.is_initialized()):
            return cls(0, 1, device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", dist.get_node_local_rank(fallback_rank=dist.get_rank()))
            torch.cuda.set_device(device)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def first(self) -> bool:
        """True if this process writes files and messages."""
        return self.rank == 0

    def close(self) -> None:
        """Leaves the other processes; to be called once at the end."""
        if self.size > 1:
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.size > 1:
            dist.barrier()

    def part(self, batch: Batch) -> Batch:
        """This rank's rows of a batch, on its device.

        Raises:
            InvalidRequest: the number of rows is no multiple of the number of processes.
        """
        rows = len(batch.ids)
        if rows % self.size:
            raise InvalidRequest(
                f"batch_size: must be a multiple of {self.size} processes, got {rows}"
            )
        weights = None if batch.weights is None else self.rows(batch.weights)
        return Batch(self.rows(batch.ids), weights)

    def rows(self, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor's rows, on its device."""
        rows = len(tensor)
        own = slice(self.rank * rows // self.size, (self.rank + 1) * rows // self.size)
        return tensor[own].to(self.device)

    def sum(self, value: Tensor) -> Tensor:
        """Sum of a tensor over all processes, a new tensor."""
        total = value.detach().clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def shard(self, model: ElasticNemotronH, stay_whole: bool = False) -> None:
        """Shards parameters over the processes (FSDP2): every mixer by itself, then the rest.

        Args:
            model: in place.
            stay_whole: every process keeps the gathered weights from their first use until
                `scatter`: after `switched`, gradients reach a mixer's weights through the cache,
                past the outputs at which FSDP would gather them again.
        """
        if self.size == 1:
            return
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = dist.init_device_mesh(self.device.type, (self.size,))
        for block in model.backbone.layers:
            fully_shard(block.mixer, mesh=mesh, reshard_after_forward=not stay_whole)
        fully_shard(model, mesh=mesh, reshard_after_forward=not stay_whole)
        register_fsdp_forward_method(model, "switched")
        model.set_reshard_after_backward(not stay_whole)

    def scatter(self, model: ElasticNemotronH) -> None:
        """Every process keeps its own share of the weights again."""
        if self.size > 1:
            for module in model.modules():
                if hasattr(module, "reshard"):
                    module.reshard()

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Mean over the processes of the gradients of parameters that are not sharded."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.size

    def whole_state(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """(model state, optimizer state) with whole tensors on the CPU; empty beyond rank 0.

        Every process must call it.
        """
        if self.size == 1:
            return model.state_dict(), None if optimizer is None else optimizer.state_dict()
        from torch.distributed.checkpoint import state_dict as states

        options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = states.get_model_state_dict(model, options=options)
        if optimizer is None:
            return weights, None
        return weights, states.get_optimizer_state_dict(model, optimizer, options=options)

    def load_state(
        self,
        model: nn.Module,
        weights: Mapping[str, Any],
        optimizer: torch.optim.Optimizer,
        moments: Mapping[str, Any],
    ) -> None:
        """Puts what `whole_state` gave back, on every rank."""
        if self.size == 1:
            model.load_state_dict(weights)
            optimizer.load_state_dict(moments)
            return
        from torch.distributed.checkpoint import state_dict as states

        options = states.StateDictOptions(full_state_dict=True)
        states.set_model_state_dict(model, weights, options=options)
        states.set_optimizer_state_dict(model, optimizer, moments, options=options)

    def autocast(self, dtype: torch.dtype) -> contextlib.AbstractContextManager:
        """torch.autocast to `dtype` on this device; nothing for float32."""
        if dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=dtype)
