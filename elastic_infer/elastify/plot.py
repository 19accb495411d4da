"""A picture of a run: losses per width, and the router's choices over time."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InvalidRequest
from ..files.reading import parse_json, read_text
from ..files.writing import write_whole

__all__ = ["plot_metrics"]

_SHORT = {
    "hidden_size": "hidden",
    "mamba_num_heads": "Mamba heads",
    "num_attention_heads": "query heads",
    "n_routed_experts": "experts",
    "moe_intermediate_size": "expert width",
    "moe_shared_expert_intermediate_size": "shared width",
    "intermediate_size": "FFN width",
}


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = read_text(path, str(path)).splitlines()
        return [parse_json(text, "a line", dict) for text in lines if text]
    except CheckpointError as error:
        raise InvalidRequest(f"plot: {path} must hold JSON lines, got {error}") from error


def _smooth(values: list[float], share: float = 0.9) -> list[float]:
    out, mean = [], values[0]
    for value in values:
        mean = share * mean + (1 - share) * value
        out.append(mean)
    return out


def plot_metrics(metrics: str | Path, picture: str | Path) -> Path:
    """Draws metrics.jsonl of a run: KL per width above, sizes as a share of full below.

    Args:
        metrics: the JSON lines of `Distiller`.
        picture: PNG file to write.

    Returns:
        The picture.

    Raises:
        InvalidRequest: no metrics there, or matplotlib is not installed.
        CheckpointError: the picture cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidRequest(
            'plot: matplotlib must be installed (pip install "elastic-infer[plot]"), got none'
        ) from error
    lines = _lines(Path(metrics))
    if not lines:
        raise InvalidRequest(f"plot: {metrics} must hold at least one line, got none")
    names = list(dict.fromkeys(name for line in lines for name in line["loss"]))
    routed = [line for line in lines if line.get("sizes")]
    shown = list(routed[-1]["sizes"]) if routed else []
    names.sort(key=lambda name: shown.index(name) if name in shown else len(shown))
    columns = max(1, len(shown))
    figure = Figure(figsize=(4.2 * columns, 7.2 if shown else 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2 if shown else 1, columns)
    top = figure.add_subplot(grid[0, :])
    for i, name in enumerate(names):
        points = [(line["step"], line["loss"][name]) for line in lines if name in line["loss"]]
        steps, losses = zip(*points)
        top.plot(steps, losses, color=f"C{i}", alpha=0.25, linewidth=0.8)
        top.plot(steps, _smooth(list(losses)), color=f"C{i}", label=name)
    top.set(xlabel="step", ylabel="KL(parent | width) per token", yscale="log")
    top.legend()
    full = {}
    for line in routed:
        for sizes in line["sizes"].values():
            for axis, size in sizes.items():
                full[axis] = max(full.get(axis, 0), size)
    for i, name in enumerate(shown):
        below = figure.add_subplot(grid[1, i])
        steps = [line["step"] for line in routed]
        for axis in routed[-1]["sizes"][name]:
            share = [line["sizes"][name][axis] / full[axis] for line in routed]
            below.plot(steps, share, label=_SHORT.get(axis, axis))
        below.set(title=name, xlabel="step", ylim=(0, 1.05))
        if i == 0:
            below.set_ylabel("size, share of the largest")
            below.legend(fontsize="small")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    return write_whole(picture, drawn.getvalue(), "plot")
