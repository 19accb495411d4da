"""Independence from the modes that a caller may have put torch into."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def plain_torch() -> Iterator[None]:
    """Inside, tensors that this thread makes are ordinary ones in host memory, whatever device,
    inference mode or autocast surrounds the call; the engine's thread changes them later."""
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.no_grad())
        modes.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            modes.enter_context(torch.autocast(kind, enabled=False))
        yield
