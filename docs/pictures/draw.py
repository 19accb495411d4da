"""Draws every picture of the documentation from data.

    python -m docs.pictures.draw            # writes the files
    python -m docs.pictures.draw --check    # fails if one of them is another

`record.py` makes the data of the shipped model's run; all other numbers are committed results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from docs.pictures import cache, demo, speed, tiles, token_way, tower, width_switch

HERE = Path(__file__).parent

PICTURES: dict[str, Callable[[], str]] = {
    "demo.svg": demo.draw,
    "speed.svg": speed.draw,
    "tiles.svg": tiles.draw,
    "cache.svg": cache.draw,
    "token-way.svg": token_way.draw,
    "tower.svg": tower.draw,
    "width-switch.svg": width_switch.draw,
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, do not write")
    check = parser.parse_args().check
    for name, draw in PICTURES.items():
        path = HERE / name
        if not check:
            path.write_text(draw(), encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != draw():
            sys.exit(f"{name} must be what docs.pictures.draw draws; run it without --check")


if __name__ == "__main__":
    main()
