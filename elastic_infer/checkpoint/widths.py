"""The submodels of a checkpoint (Width): reading their table, slicing a config, their costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import WidthError
from ..public import public
from ..showing import name_text, one_line
from .config import LAYER_KEYS

if TYPE_CHECKING:
    from .config import ModelConfig


MOST_WIDTHS = 256  # every width has a table of sizes per layer


@public
@dataclass(frozen=True)
class Width:
    """One named submodel: a prefix length on every axis.

    Per-layer tuples have one entry per layer of the whole model, 0 where the layer is of
    another kind.
    """

    name: str
    hidden_size: int
    mamba_num_heads: tuple[int, ...]
    num_attention_heads: tuple[int, ...]
    n_routed_experts: tuple[int, ...]
    moe_intermediate_size: tuple[int, ...]
    moe_shared_expert_intermediate_size: tuple[int, ...]
    intermediate_size: tuple[int, ...]

    @one_line
    def __repr__(self) -> str:
        parts = [name_text(self.name), f"hidden_size {self.hidden_size}"]
        for key in LAYER_KEYS:
            sizes = [size for size in getattr(self, key) if size]
            if sizes:
                least, most = min(sizes), max(sizes)
                parts.append(f"{key} {least if least == most else f'{least}–{most}'}")
        return f"Width({', '.join(parts)})"

    def same_sizes(self, other: Width) -> bool:
        """True when both keep the same prefixes, whatever their names."""
        return self.hidden_size == other.hidden_size and all(
            getattr(self, key) == getattr(other, key) for key in LAYER_KEYS
        )

    def fits_in(self, other: Width) -> bool:
        """True when every prefix of this width is inside that of `other`."""
        return self.hidden_size <= other.hidden_size and all(
            a <= b for key in LAYER_KEYS for a, b in zip(getattr(self, key), getattr(other, key))
        )


# Reading a width table ---------------------------------------------------------------------------


def full_width(config: ModelConfig, name: str = "full") -> Width:
    """The width that keeps everything the checkpoint has."""
    per_layer = {
        key: tuple(getattr(config, key) if layer == kind else 0 for layer in config.layers)
        for key, kind in LAYER_KEYS.items()
    }
    return Width(name=name, hidden_size=config.hidden_size, **per_layer)


def widest(widths: Mapping[str, Width] | Sequence[Width], name: str = "widest") -> Width:
    """The axis-wise maximum of some widths, which need not be one of them.

    Args:
        widths: at least one width of one checkpoint.
        name: name of the result when it is none of them.

    Returns:
        The width itself, under its own name, when one of them contains all the others.

    Raises:
        WidthError: no width given.
    """
    items = list(widths.values() if isinstance(widths, Mapping) else widths)
    if not items:
        raise WidthError("widest: widths must hold at least one width, got none")
    per_layer = {
        key: tuple(max(sizes) for sizes in zip(*(getattr(w, key) for w in items)))
        for key in LAYER_KEYS
    }
    union = Width(name=name, hidden_size=max(w.hidden_size for w in items), **per_layer)
    for width in items:
        if width.same_sizes(union):
            return width
    return union


# Costs ------------------------------------------------------------------------------------------
