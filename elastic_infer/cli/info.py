"""`elastic-infer info`: a checkpoint's widths, their costs, and how much of them a memory holds."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..device.machine import available_cpus
from ..errors import InvalidRequest, shown
from ..showing import size_text
from . import common as c, installation

if TYPE_CHECKING:
    from ..checkpoint.config import ModelConfig
    from ..checkpoint.widths import Width

HELP = (
    "Tell a checkpoint's widths, their parameters and bytes, how much fits a given memory, and "
    "which kernels would run. Reads sizes only: of a Hub repository nothing but config.json is "
    "fetched. Without a checkpoint: the installation."
)
EXAMPLES = c.examples(
    "elastic-infer info",
    "elastic-infer info MODEL",
    "elastic-infer info owner/name --memory 64GB --length 32768",
    "elastic-infer info MODEL --json",
)
MOST_BYTES = 1 << 60
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {unit + "I": 1024 ** (i + 1) for i, unit in enumerate("KMGT")}
_AXES = {
    "mamba_num_heads": "Mamba heads",
    "num_attention_heads": "query heads",
    "n_routed_experts": "experts",
    "moe_intermediate_size": "expert width",
    "moe_shared_expert_intermediate_size": "shared expert width",
    "intermediate_size": "MLP width",
}


@dataclass
class Opened:
    """Sizes of a checkpoint. stored: dtype name of its plain weights. formats: of the quantized
    ones by name. checked: whether its tensors were looked at, too."""

    config: ModelConfig
    widths: dict[str, Width]
    default_width: str
    source: str
    stored: str
    formats: dict[str, str]
    checked: bool


def add_to(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("info", help=HELP, epilog=EXAMPLES)(info)


def info(
    model: c.OptionalModel = None,
    memory: Annotated[
        str | None, typer.Option(help="Such as 16GB or 24GiB; default: all that is free now.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of a sequence, prompt and output.")] = 4096,
    kv_cache_dtype: c.KvCacheDtype = "auto",
    state_dtype: c.StateDtype = "auto",
    widths: c.WidthTable = None,
    revision: c.Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
    verbose: c.Verbose = False,
) -> None:
    """The command; its arguments are its options."""
    c.log_to_stderr(verbose)
    if model is None:
        facts = installation.describe()
        if as_json:
            typer.echo(json.dumps(facts, indent=2))
        else:
            installation.show(facts)
        return
    from ..sizing.capacity import free_memory

    size = free_memory() if memory is None else parse_memory(memory)
    if length < 1:
        raise InvalidRequest(f"--length: must be at least 1, got {length}")
    opened = open_sizes(model, revision, widths)
    facts = describe(opened, size, length, kv_cache_dtype, state_dtype)
    if as_json:
        typer.echo(json.dumps({"model": model, **facts}, indent=2))
    else:
        show(model, opened, facts)


def parse_memory(text: str) -> int:
    """Bytes of "16GB", "24 GiB", "512M" or a plain number.

    Raises:
        InvalidRequest: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if match is None or match.group(2) not in _UNITS:
        raise InvalidRequest(f"--memory: must be a size such as 16GB or 24GiB, got {shown(text)}")
    size = float(match.group(1)) * _UNITS[match.group(2)]
    if size > MOST_BYTES:
        raise InvalidRequest(f"--memory: must be a size of at most 1 EiB, got {shown(text)}")
    return int(size)


def open_sizes(model: str, revision: str | None, widths: str | None) -> Opened:
    """Config and widths of a folder, whose tensors are checked where it has any, or of a Hub id,
    of which only the small files are fetched.

    Raises:
        CheckpointError: a folder that cannot be used.
        WidthError: a width table that cannot be used.
    """
    from ..checkpoint.config import ModelConfig
    from ..checkpoint.hub import WIDTHS_NAME, resolve_folder
    from ..checkpoint.layout import expected_shapes
    from ..checkpoint.published import SIDECAR, read_published
    from ..checkpoint.stored import stated_formats
    from ..checkpoint.tensor_files import INDEX_NAME, SINGLE_NAME
    from ..checkpoint.width_table import default_width_name, parse_widths
    from ..codes import dtype_name
    from ..files.reading import is_folder, read_json, user_path

    local = is_folder(user_path(model, "checkpoint: path"))
    folder = resolve_folder(model, revision, ("config.json", SIDECAR, WIDTHS_NAME))
    if local and any(os.path.lexists(folder / name) for name in (INDEX_NAME, SINGLE_NAME)):
        checkpoint = c.open_checkpoint(model, revision, widths)
        stored = dtype_name(checkpoint.dtype_of("backbone.embeddings.weight"))
        return Opened(
            checkpoint.config,
            checkpoint.widths,
            checkpoint.default_width,
            checkpoint.widths_source,
            stored,
            checkpoint.formats,
            True,
        )
    config = ModelConfig.from_folder(folder)
    beside = folder / WIDTHS_NAME
    table, source = config.elastic, "config.json" if config.elastic else "no table"
    if widths is not None or os.path.lexists(beside):
        path = beside if widths is None else user_path(widths, "checkpoint: widths")
        table, source = read_json(path), str(path)
    found = parse_widths(config, table)
    formats = stated_formats(expected_shapes(config), read_published(config.raw, folder))
    default = default_width_name(found, table)
    return Opened(config, found, default, source, config.dtype, formats, False)


def describe(
    opened: Opened, memory: int, length: int, kv_cache_dtype: str, state_dtype: str
) -> dict[str, Any]:
    """Everything that `info` tells, as plain values.

    Raises:
        InvalidRequest: dtypes of the cache that there are none of.
    """
    import torch

    from elastic_infer._C import Pool, cuda_architectures, usable_isas

    from ..cache.dtypes import cache_dtypes, item_size
    from ..checkpoint.counts import count_parameters, kv_bytes_per_token
    from ..codes import dtype_name
    from ..device.device import why_not_cuda
    from ..sizing.capacity import slot_bytes
    from ..sizing.fit import fit
    from ..sizing.footprint import bytes_per_token, weight_bytes

    config, formats = opened.config, opened.formats
    run = torch.float32 if opened.stored in ("float32", "float16") else torch.bfloat16
    length = min(length, config.max_position_embeddings)
    dtypes = cache_dtypes(config, run, kv_cache_dtype, state_dtype)
    rows = {}
    for name, width in opened.widths.items():
        counts = count_parameters(config, width)
        room = fit(config, width, run, memory, length, formats=formats, dtypes=dtypes)
        rows[name] = {
            "hidden_size": width.hidden_size,
            **{key: sizes(config, width, key) for key in _AXES if has(config, key)},
            "parameters": counts.total,
            "active_parameters": counts.active_without_embedding,
            "weight_bytes": {
                kind: weight_bytes(config, width, getattr(torch, kind), formats)
                for kind in ("bfloat16", "float32")
            },
            "weight_bytes_per_token": bytes_per_token(config, width, run, formats=formats),
            "state_bytes_per_sequence": slot_bytes(config, width, dtypes),
            "working_bytes": room.working,
            "sequences_that_fit": room.sequences,
            "longest_sequence_that_fits": room.longest,
        }
    return {
        "pattern": config.pattern,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "stored_dtype": opened.stored,
        "quantized_tensors": dict(sorted(Counter(formats.values()).items())),
        "run_dtype": dtype_name(run),
        "tensors_checked": opened.checked,
        "width_table": opened.source,
        "default_width": opened.default_width,
        "kv_cache_dtype": dtypes.names[0],
        "mamba_ssm_cache_dtype": dtypes.names[1],
        "kv_bytes_per_token": kv_bytes_per_token(config, item_size(dtypes.kv)),
        "memory": memory,
        "length": length,
        "widths": rows,
        "kernels": {
            "used": Pool().isa,
            "usable": usable_isas(),
            "cuda": cuda_architectures(),
            "cuda_unusable": why_not_cuda() or None,
        },
        "threads": available_cpus(),
    }


def has(config: ModelConfig, key: str) -> bool:
    """True if any layer is sized by this key."""
    from ..checkpoint.config import LAYER_KEYS

    return LAYER_KEYS[key] in config.layers


def sizes(config: ModelConfig, width: Width, key: str) -> int | list[int]:
    """A width's size on one axis: one number, or one per layer that has the axis."""
    from ..checkpoint.config import LAYER_KEYS

    values = [getattr(width, key)[i] for i in config.layers_of(LAYER_KEYS[key])]
    return values[0] if len(set(values)) == 1 else values


def cuda_state(kernels: dict[str, Any]) -> str:
    """CUDA support of this build and machine."""
    built, unusable = kernels["cuda"], kernels["cuda_unusable"]
    if not built:
        return f"no CUDA: {unusable}"
    return f"CUDA kernels for {', '.join(built)}: {unusable or 'usable here'}"


def show(model: str, opened: Opened, facts: dict[str, Any]) -> None:
    """Prints the facts as tables."""
    screen = c.console()
    state = "all tensors present, shapes right" if opened.checked else "sizes from config.json"
    screen.print(f"[bold]{escape(model)}[/]: {state}", soft_wrap=True)
    screen.print(
        f"layers {facts['pattern']} (M Mamba-2, * attention, - MLP, E experts), vocabulary "
        f"{facts['vocab_size']}, context {facts['max_position_embeddings']}, stored as "
        f"{stored_text(facts)}",
        soft_wrap=True,
        markup=False,
    )
    screen.print(
        f"widths from {facts['width_table']}, default {facts['default_width']}; KV cache "
        f"{facts['kv_bytes_per_token']} bytes per token at every width, in "
        f"{facts['kv_cache_dtype']}; Mamba state in {facts['mamba_ssm_cache_dtype']}",
        soft_wrap=True,
        markup=False,
    )
    screen.print(width_table(facts))
    kernels = facts["kernels"]
    screen.print(
        f"kernels: {kernels['used']} on {facts['threads']} threads (this processor also runs "
        f"{', '.join(k for k in kernels['usable'] if k != kernels['used']) or 'no other'}); "
        f"{cuda_state(kernels)}",
        soft_wrap=True,
        markup=False,
    )


def stored_text(facts: dict[str, Any]) -> str:
    """The stored dtype, and how many matrices are quantized."""
    counts = facts["quantized_tensors"]
    parts = [f"{number} matrices in {name.upper()}" for name, number in counts.items()]
    return " and ".join([facts["stored_dtype"], *parts])


def width_table(facts: dict[str, Any]) -> Table:
    """One column per width, one line per property."""
    rows: dict[str, dict[str, Any]] = facts["widths"]
    colours = c.colour_of(list(rows))
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in rows:
        table.add_column(escape(name), style=colours[name], justify="right")

    def line(title: str, value: Any) -> None:
        table.add_row(title, *(str(value(row)) for row in rows.values()))

    line("hidden channels", lambda r: r["hidden_size"])
    for key, title in _AXES.items():
        if key in next(iter(rows.values())):
            line(title, lambda r, key=key: spread(r[key]))
    line("parameters", lambda r: count(r["parameters"]))
    line("active per token", lambda r: count(r["active_parameters"]))
    for kind in ("bfloat16", "float32"):
        title = f"weights, {kind}" if not facts["quantized_tensors"] else f"weights, rest {kind}"
        line(title, lambda r, kind=kind: size_text(r["weight_bytes"][kind]))
    line("weights read per token", lambda r: size_text(r["weight_bytes_per_token"]))
    line("state per sequence", lambda r: size_text(r["state_bytes_per_sequence"]))
    table.add_section()
    memory = size_text(facts["memory"])
    table.add_row(f"in {memory} of memory, as the widest width, {facts['run_dtype']}:")
    line(f"sequences of {facts['length']} tokens", lambda r: r["sequences_that_fit"] or "none")
    line("longest sequence", lambda r: r["longest_sequence_that_fits"] or "does not fit")
    return table


def spread(value: int | list[int]) -> str:
    """One size, or the range over the layers."""
    return str(value) if isinstance(value, int) else f"{min(value)}–{max(value)}"


def count(number: int) -> str:
    """A number of parameters, such as 31.6 B."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
