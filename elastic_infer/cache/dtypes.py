"""Formats of the cache: KV in the model's dtype or in 8 bits, SSM state in 32 or 16 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..checkpoint.config import ModelConfig
from ..codes import dtype_name
from ..errors import InvalidRequest, shown
from ..value_checks import is_one_of

FP8 = torch.uint8  # pages of 8-bit floats (E4M3) hold their codes
_STATES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class CacheDtypes:
    """kv: of keys and values (uint8: E4M3 codes). ssm: of the Mamba state (float16: rounded
    stochastically). conv: of the convolution's history, the model's own."""

    kv: torch.dtype
    ssm: torch.dtype
    conv: torch.dtype

    @classmethod
    def of(cls, dtype: torch.dtype | CacheDtypes) -> CacheDtypes:
        """Defaults for a model dtype; a CacheDtypes is returned unchanged."""
        return dtype if isinstance(dtype, cls) else cls(dtype, torch.float32, dtype)

    @property
    def names(self) -> tuple[str, str]:
        """KV and state as the engine's options call them: ("fp8", "float16")."""
        return "fp8" if self.kv == FP8 else dtype_name(self.kv), dtype_name(self.ssm)


def item_size(dtype: torch.dtype) -> int:
    """Bytes of one element."""
    return torch.empty(0, dtype=dtype).element_size()


def cache_dtypes(
    config: ModelConfig, dtype: torch.dtype, kv_cache_dtype: str, mamba_ssm_cache_dtype: str
) -> CacheDtypes:
    """The dtypes that an engine's options choose.

    Args:
        config: the checkpoint; its mamba_ssm_cache_dtype is what "auto" means where it is float32
            or float16 (anything else, and nothing, means float32).
        dtype: of the model.
        kv_cache_dtype: "auto" (the model's dtype) or "fp8".
        mamba_ssm_cache_dtype: "auto", "float32" or "float16".

    Raises:
        InvalidRequest: another name.
    """
    if not is_one_of(kv_cache_dtype, ("auto", "fp8")):
        raise InvalidRequest(
            f"engine: kv_cache_dtype must be auto or fp8, got {shown(kv_cache_dtype)}"
        )
    if not is_one_of(mamba_ssm_cache_dtype, ("auto", *_STATES)):
        raise InvalidRequest(
            "engine: mamba_ssm_cache_dtype must be auto, float32 or float16, got "
            f"{shown(mamba_ssm_cache_dtype)}"
        )
    stated = config.raw.get("mamba_ssm_cache_dtype")
    state = stated if mamba_ssm_cache_dtype == "auto" else mamba_ssm_cache_dtype
    ssm = _STATES.get(state, torch.float32) if isinstance(state, str) else torch.float32
    return CacheDtypes(FP8 if kv_cache_dtype == "fp8" else dtype, ssm, dtype)
