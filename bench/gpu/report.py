"""Figures as text: a few lines after every part, one table at the end."""

from __future__ import annotations

from typing import Any

Figures = dict[str, Any]


def text(name: str, part: Figures) -> str:
    """Report of a part: its results and its omissions."""
    done, wrong = len(part["rows"]), part["failed"]
    lines = [f"{name}: {done} done in {part['seconds']:.0f} s, {len(wrong)} failed"]
    lines += [f"  FAILED {item}: {_short(why)}" for item, why in wrong.items()]
    for item, row in part["rows"].items():
        lines += [f"  BROKEN {item}: {why}" for why in row.get("broken", ())]
    lines += [f"  passed over {item}: {_short(why)}" for item, why in part["passed_over"].items()]
    if part["left_out"]:
        lines.append(f"  no time for {len(part['left_out'])}: {', '.join(part['left_out'])}")
    if part["worker"]:
        lines.append(f"  {_short(part['worker'])}")
    return "\n".join(lines)


def _short(message: str, most: int = 300) -> str:
    flat = " ".join(message.split())
    return flat if len(flat) <= most else flat[: most - 1] + "…"


def summary(figures: Figures) -> str:
    """The table of everything that was measured."""
    head = f"{figures['card']}, driver {figures['driver']}, {figures['date']}"
    lines = [f"{head}, commit {figures['commit'] or 'unknown'}"]
    for name, part in figures["parts"].items():
        make = _LINES.get(name)
        if make and part["rows"]:
            lines += [f"-- {name}", *(make(item, row) for item, row in part["rows"].items())]
    return "\n".join(lines)


def _op(item: str, row: Figures) -> str:
    if item == "roof":
        return _roof(row)
    peer = f"{row['ratio']:6.2f}x {row['peer'][:44]}" if "ratio" in row else row.get("note", "")
    distinct = f" D={row['distinct_experts']}" if "distinct_experts" in row else ""
    return (
        f"{item:42} {row['us']:10.1f} us {row['gb_s']:7.0f} GB/s {row['tflop_s']:7.1f} TFLOP/s "
        f"{row['percent_of_roof']:6.1f} % of {row['roof']:8} {peer}{distinct}"
    )


def _roof(row: Figures) -> str:
    return (
        f"roof: copy {row['copy_bytes_s'] / 1e9:.0f} GB/s, reading "
        f"{row['read_bytes_s'] / 1e9:.0f} GB/s, bf16 {row['bf16_flops_s'] / 1e12:.1f} TFLOP/s"
    )


def _model(item: str, row: Figures) -> str:
    if item == "roof":
        return _roof(row)
    parts = [f"{item:42}"]
    for key, unit in (
        ("ms", "ms"),
        ("tokens_s", "tokens/s"),
        ("percent_of_roof", "% of the floor"),
        ("ratio", "ratio"),
        ("peer_ms", "ms peer"),
        ("distinct_experts", "experts"),
        ("weight_bytes", "B of weights"),
        ("extra_bytes", "B extra"),
        ("captures", "captures"),
    ):
        if key in row:
            value = row[key]
            parts.append(f"{value:10.3f} {unit}" if isinstance(value, float) else f"{value} {unit}")
    return " ".join(parts)


def _plain(item: str, row: Figures) -> str:
    shown = ", ".join(f"{k} {v}" for k, v in row.items() if not isinstance(v, (list, dict)))
    return f"{item}: {shown}"


_LINES = {
    "build": _plain,
    "sanitize": _plain,
    "ops": _op,
    "decode": _model,
    "prefill": _model,
    "graphs": _model,
}
