"""Models of true sizes, and the ops' cases in them.

The sizes are those of `models.THIRTY`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.common.models import THIRTY, model_config
from elastic_infer.cache.pages import pages_for
from elastic_infer.checkpoint.config import ModelConfig
from elastic_infer.checkpoint.geometry import layer_sizes, layer_tensors, size_of
from elastic_infer.checkpoint.width_table import parse_widths
from elastic_infer.checkpoint.widths import Width
from elastic_infer.ops._spec import Case


def sizes(emulate: bool) -> dict[str, Any]:
    """config.json of the model that is measured: the 30B's, or a tiny one for a rehearsal."""
    return model_config("tiny") if emulate else THIRTY


def alone(data: dict[str, Any], name: str) -> dict[str, Any]:
    """The config of one width by itself: what slicing it out of the checkpoint would write."""
    cut = {k: v for k, v in data.items() if k != "elastic"} | data["elastic"]["widths"][name]
    return cut | {"elastic": {"version": 1, "default_width": name, "widths": {name: {}}}}


def model_of(data: dict[str, Any]) -> tuple[ModelConfig, dict[str, Width]]:
    """Config and widths, narrow to wide."""
    config = ModelConfig.from_dict(data)
    return config, parse_widths(config, data["elastic"])


@dataclass(frozen=True)
class OpCase:
    """One row to measure. case: for the op's `inputs`. cost: the case whose `cost` is what the
    width really moves and computes (a prefix case holds the full weights)."""

    op: str
    part: str  # which of the model's layers, where an op serves several
    rows: int
    width: str
    case: Case
    cost: Case

    @property
    def name(self) -> str:
        part = f" {self.part}" if self.part else ""
        return f"{self.op}{part} R={self.rows} {self.width}"


# Layer kind, and the tensors that are one matrix in memory.
_MATRICES = {
    "in_proj": ("M", ("in_proj",)),
    "out_proj": ("M", ("out_proj",)),
    "qkv": ("*", ("q_proj", "k_proj", "v_proj")),
    "o_proj": ("*", ("o_proj",)),
    "shared_up": ("E", ("shared_experts.up_proj",)),
    "shared_down": ("E", ("shared_experts.down_proj",)),
}


class OpCases:
    """The ops of one model at its widths: `of(rows)` for steps, `prompt(tokens)` for a prefill."""

    def __init__(self, data: dict[str, Any]):
        self.config, self.widths = model_of(data)
        self.full = self.widths[list(self.widths)[-1]]
        self.layer = {kind: self.config.layers_of(kind)[0] for kind in "ME*"}

    def _size(self, width: Width, key: str, kind: str) -> int:
        return getattr(width, key)[self.layer[kind]]

    def _matrix(self, part: str, width: Width) -> tuple[tuple[int, ...], int]:
        """Rows of every segment, and columns, of one of the model's matrices."""
        if part == "head":
            return (self.config.vocab_size,), width.hidden_size
        kind, names = _MATRICES[part]
        sizes = layer_sizes(width)[self.layer[kind]]
        axes = {tensor.name: tensor.axes for tensor in layer_tensors(self.config, kind)}
        rows = tuple(axis.size(sizes) for name in names for axis in axes[f"{name}.weight"][0])
        return rows, size_of(axes[f"{names[0]}.weight"][1], sizes)

    def _matmul(
        self, part: str, rows: int, width: str, form: str = "", kernel: str = "auto"
    ) -> OpCase:
        (n_full, k_full), (n, k) = (
            self._matrix(part, at) for at in (self.full, self.widths[width])
        )
        act = "relu2" if part == "shared_up" else "none"
        whole = {"R": rows, "K": k_full, "segments": n_full, "k": (k,), "n": (n,), "act": act}
        whole |= {"weights": form} if form else {}
        whole |= {"kernel": kernel} if kernel != "auto" else {}
        name = " ".join(word for word in (part, form, whole.get("kernel")) if word)
        return OpCase("matmul", name, rows, width, whole, whole | {"K": k, "segments": n})

    def _moe(self, rows: int, width: str, form: str = "") -> OpCase:
        c, w, f = self.config, self.widths[width], self.full
        key = "moe_intermediate_size"
        case = {
            "R": rows,
            "D": f.hidden_size,
            "E": self._size(f, "n_routed_experts", "E"),
            "J": c.num_experts_per_tok,
            "F": self._size(f, key, "E"),
            "k": (w.hidden_size,),
            "f": (self._size(w, key, "E"),),
            "shared": True,
        }
        case |= {"weights": form} if form else {}
        cost = case | {"D": case["k"][0], "F": case["f"][0]}
        return OpCase("moe_matmul", form, rows, width, case, cost)

    def _route(self, rows: int, width: str) -> OpCase:
        w, f = self.widths[width], self.full
        e = self._size(w, "n_routed_experts", "E")
        case = {
            "R": rows,
            "D": f.hidden_size,
            "E": self._size(f, "n_routed_experts", "E"),
            "J": self.config.num_experts_per_tok,
            "k": (w.hidden_size,),
            "e": (e,),
            "ties": False,
        }
        return OpCase("moe_route", "", rows, width, case, case | {"D": w.hidden_size, "E": e})

    def _rows(self, op: str, rows: int, width: str) -> OpCase:
        """embed, rms_norm and gated_norm."""
        c, w, f = self.config, self.widths[width], self.full
        D, heads = f.hidden_size, self._size(w, "mamba_num_heads", "M")
        case, cost = {
            "embed": (
                {"R": rows, "V": c.vocab_size, "D": D, "widths": (w.hidden_size,)},
                {"D": w.hidden_size},
            ),
            "rms_norm": (
                {"R": rows, "D": D, "widths": (w.hidden_size,), "delta": True},
                {"D": w.hidden_size},
            ),
            "gated_norm": (
                {
                    "R": rows,
                    "H": self._size(f, "mamba_num_heads", "M"),
                    "P": c.mamba_head_dim,
                    "G": c.n_groups,
                    "widths": (heads,),
                },
                {"H": heads},
            ),
        }[op]
        return OpCase(op, "", rows, width, case, case | cost)

    def _mamba(self, op: str, lengths: tuple[int, ...], width: str) -> OpCase:
        c = self.config
        H, n = (self._size(v, "mamba_num_heads", "M") for v in (self.full, self.widths[width]))
        if op == "causal_conv":
            P, bc = c.mamba_head_dim, c.conv_dim(0)
            case = {"lengths": lengths, "x": H * P, "bc": bc, "widths": (n * P,)}
            cost = case | {"x": n * P}
        elif op == "mamba_step":
            case = {
                "S": len(lengths),
                "H": H,
                "P": c.mamba_head_dim,
                "N": c.ssm_state_size,
                "G": c.n_groups,
                "widths": (n,),
            }
            cost = case | {"H": n}
        else:
            case = {
                "lengths": lengths,
                "H": H,
                "P": c.mamba_head_dim,
                "N": c.ssm_state_size,
                "G": c.n_groups,
                "widths": (n,),
                "step": op == "ssm_step",
            }
            cost = case | {"H": n}
        several = len(lengths) > 1 and max(lengths) > 1
        part = f"of {len(lengths)} prompts" if several else ""
        return OpCase(op, part, sum(lengths), width, case, cost)

    def _attention(self, op: str, given: dict[str, tuple[int, ...]], rows: int) -> OpCase:
        c, (width, w) = self.config, list(self.widths.items())[-1]
        case = {
            **given,
            "Hq": self._size(w, "num_attention_heads", "*"),
            "Hkv": c.num_key_value_heads,
            "K": c.head_dim,
            "widths": None,
        }
        tokens = max(given.get("lengths") or (a + b for a, b in zip(*given.values())))
        return OpCase(op, f"of {tokens}", rows, width, case, case)

    def _append(self, rows: int) -> OpCase:
        c = self.config
        case = {
            "R": rows,
            "pages": pages_for(rows) + 64,
            "Hkv": c.num_key_value_heads,
            "K": c.head_dim,
            "skip": 0,
        }
        return OpCase("kv_append", "", rows, list(self.widths)[-1], case, case)

    def _sample(self, rows: int, cut: bool) -> OpCase:
        case = {"R": rows, "V": self.config.vocab_size, "cut": cut}
        part = "top-k, top-p" if cut else "temperature"
        return OpCase("sample", part, rows, list(self.widths)[-1], case, case)

    def steps(self, context: int) -> list[OpCase]:
        """Rows of decoding."""
        full, narrow = list(self.widths)[-1], next(iter(self.widths))
        found = []
        for R in (1, 32):
            for width in (full, narrow):
                found += [self._moe(R, width), self._matmul("in_proj", R, width)]
        found += [self._mamba("mamba_step", (1,) * R, full) for R in (32, 1, 8, 128)]
        found += [self._mamba("ssm_step", (1,) * R, full) for R in (32, 1)]
        found += [
            self._attention("attention_decode", {"lengths": (context,) * R}, R) for R in (8, 1, 32)
        ]
        for form in ("nvfp4", "fp8"):
            for R in (1, 32):
                found += [self._moe(R, full, form), self._matmul("in_proj", R, full, form)]
            found.append(self._matmul("head", 1, full, form))
        found += [self._moe(R, full) for R in (8, 128)]
        found += [self._matmul("in_proj", R, full) for R in (8, 128)]
        for part in ("head", "out_proj", "shared_up", "shared_down", "qkv", "o_proj"):
            found += [self._matmul(part, R, full) for R in (1, 32)]
        found += [self._route(R, full) for R in (1, 32, 128)]
        for op in ("rms_norm", "gated_norm", "embed"):
            found += [self._rows(op, R, full) for R in (1, 32)]
        found += [self._mamba("causal_conv", (1,) * R, full) for R in (1, 32)]
        found += [self._append(32), self._sample(1, False), self._sample(32, True)]
        return found

    def prompts(self, tokens: int) -> list[OpCase]:
        """Rows of reading a prompt."""
        full, narrow = list(self.widths)[-1], next(iter(self.widths))
        attention = (
            {"tokens": (tokens,), "context": (0,)},
            {"tokens": (tokens // 2,), "context": (tokens,)},
        )
        return [
            self._mamba("ssm_scan", (tokens,), full),
            self._mamba("ssm_scan", (2 * tokens,), full),
            self._moe(tokens, full),
            self._matmul("in_proj", tokens, full),
            self._matmul("in_proj", tokens, full, kernel="wgmma"),
            self._attention("attention_prefill", attention[0], tokens),
            self._mamba("ssm_scan", (tokens // 4,) * 4, full),
            self._moe(tokens, narrow),
            self._matmul("in_proj", tokens, narrow),
            self._attention("attention_prefill", attention[1], tokens // 2),
            self._mamba("causal_conv", (tokens,), full),
            *(self._rows(op, tokens, full) for op in ("rms_norm", "gated_norm")),
            self._append(tokens),
        ]
