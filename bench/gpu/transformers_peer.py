"""transformers' NemotronH of the same sizes, with random weights: the whole model's peer."""

from __future__ import annotations

from typing import Any

import torch

from bench.gpu.setting import Setting


class Peer:
    """The model in bfloat16 on the device, as `transformers` builds and runs it."""

    def __init__(self, setting: Setting, data: dict[str, Any]):
        from transformers import NemotronHConfig, NemotronHForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        config = NemotronHConfig(**{k: v for k, v in data.items() if k != "elastic"})
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(setting.device):
                self.model = NemotronHForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)
        self.vocabulary, self.device = config.vocab_size, setting.device

    def _random(self, batch: int, tokens: int) -> torch.Tensor:
        return torch.randint(self.vocabulary, (batch, tokens), device=self.device)

    @torch.inference_mode()
    def prefill(self, batch: int, tokens: int):
        """Reads a prompt; returns the cache after it."""
        out = self.model(input_ids=self._random(batch, tokens), use_cache=True, logits_to_keep=1)
        return getattr(out, "past_key_values", None) or out.cache

    @torch.inference_mode()
    def step(self, batch: int, cache) -> None:
        """One token of every sequence."""
        self.model(input_ids=self._random(batch, 1), past_key_values=cache, use_cache=True)
