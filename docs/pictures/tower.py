"""tower.svg: the folders of the package as floors, with the imports between them."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from docs.pictures.svg import box, line, picture, text

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "elastic_infer"
LAW = ROOT / "tests/project/test_architecture.py"
LEFT, TOP, WIDE, HIGH, GAP = 40.0, 72.0, 700.0, 34.0, 22.0


@cache
def floors() -> list[list[str]]:
    """The tower from the top down: the names on each floor, as the test of the floors has them."""
    for node in ast.parse(LAW.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "FLOORS":
            return [list(row) for row in reversed(ast.literal_eval(node.value))]
    raise ValueError(f"docs: {LAW} must have a list FLOORS")


def label(name: str) -> str:
    """The name as it is drawn; the package's own module has an empty one."""
    return name or PACKAGE.name


def files(name: str) -> list[Path]:
    """The modules behind a name of the tower."""
    if not name:
        return [PACKAGE / "__init__.py"]
    folder = PACKAGE / name
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{name}.py"]


def imported(path: Path) -> set[str]:
    """Names of the tower that a module imports, anywhere in it."""
    found = set()
    place = ["elastic_infer", *path.relative_to(PACKAGE).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = place[: len(place) - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    parts = [name.split(".") for name in found]
    return {part[1] for part in parts if part[0] == "elastic_infer" and len(part) > 1}


def arrows() -> dict[tuple[str, str], int]:
    """{(importing name, imported name): modules that import}.

    Raises:
        ValueError: an import that goes up.
    """
    level = {name: number for number, row in enumerate(floors()) for name in row}
    counts: dict[tuple[str, str], int] = {}
    for name in level:
        for path in files(name):
            for other in imported(path) & set(level) - {name}:
                if level[other] < level[name]:
                    raise ValueError(f"docs: {path.name} must not import {other}, a higher floor")
                counts[name, other] = counts.get((name, other), 0) + 1
    return counts


def draw() -> str:
    """The picture as SVG."""
    rows, pairs = floors(), arrows()
    parts = [
        text(LEFT, 32, "The package, floor by floor", "ink", 15, bold=True),
        text(LEFT, 52, "every import goes down, or stays in its folder", "dim", 12),
    ]
    centre: dict[str, tuple[float, float]] = {}
    boxes = []
    for number, row in enumerate(rows):
        y, wide = TOP + number * (HIGH + GAP), (WIDE - 12 * (len(row) - 1)) / len(row)
        for column, name in enumerate(row):
            x = LEFT + column * (wide + 12)
            centre[name] = (x + wide / 2, y)
            boxes += [
                box(x, y, wide, HIGH, "paper", "ours", corner=5),
                text(x + wide / 2, y + HIGH / 2 + 5, label(name), "ink", 13, "middle", bold=True),
            ]
    for (name, other), _ in sorted(pairs.items()):
        (x1, y1), (x2, y2) = centre[name], centre[other]
        if y2 > y1:
            parts.append(line(x1, y1 + HIGH, x2, y2, "line", 0.6))
    bottom = TOP + len(rows) * (HIGH + GAP)
    told = f"{len(pairs)} pairs of folders import, none upwards; drawn from the imports themselves"
    parts += [*boxes, text(LEFT, bottom + 8, told, "dim", 12)]
    title = "Folders of elastic_infer as floors: " + " / ".join(
        ", ".join(map(label, row)) for row in rows
    )
    return picture(LEFT * 2 + WIDE, bottom + 28, title, parts)
