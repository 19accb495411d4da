"""Shapes that all pictures share. Colours are classes of one style sheet with a light and a dark
half, and every picture brings its own paper, so that it can be read on any page."""

from __future__ import annotations

from xml.sax.saxutils import escape

# class: (light, dark). Widths have the colours that the command line gives them.
COLOURS = {
    "paper": ("#ffffff", "#0d1117"),
    "ink": ("#1f2937", "#e6edf3"),
    "dim": ("#6b7280", "#9aa4b2"),
    "rest": ("#e5e7eb", "#30363d"),
    "line": ("#9ca3af", "#6e7681"),
    "S": ("#0e7490", "#22d3ee"),
    "M": ("#c2410c", "#fb923c"),
    "L": ("#a21caf", "#e879f9"),
    "ours": ("#0e7490", "#22d3ee"),
    "theirs": ("#9ca3af", "#6e7681"),
    "note": ("#fef9c3", "#3b3413"),
}
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
SANS = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


def style() -> str:
    """The style sheet: fill (`f-NAME`) and stroke (`s-NAME`) of every colour, light and dark."""

    def rules(which: int) -> str:
        return "".join(
            f".f-{name}{{fill:{pair[which]}}}.s-{name}{{stroke:{pair[which]}}}"
            for name, pair in COLOURS.items()
        )

    fonts = f"text{{font-family:{SANS}}}.mono{{font-family:{MONO}}}"
    return f"<style>{fonts}{rules(0)}@media (prefers-color-scheme:dark){{{rules(1)}}}</style>"


def text(
    x: float,
    y: float,
    words: str,
    colour: str = "ink",
    size: float = 13,
    anchor: str = "start",
    bold: bool = False,
    mono: bool = False,
    length: float | None = None,
    inner: str = "",
) -> str:
    """One line of text; `length` fixes how wide it is whatever the font, `inner` is animation."""
    more = f' text-anchor="{anchor}"' if anchor != "start" else ""
    more += ' font-weight="bold"' if bold else ""
    if length is not None:
        more += f' textLength="{length:.1f}" lengthAdjust="spacingAndGlyphs"'
    kind = f"f-{colour} mono" if mono else f"f-{colour}"
    head = f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" class="{kind}"{more}>'
    return f"{head}{escape(words)}{inner}</text>"


def box(
    x: float,
    y: float,
    w: float,
    h: float,
    fill: str | None,
    stroke: str | None = None,
    corner: float = 3,
    opacity: float | None = None,
    dash: str = "",
    inner: str = "",
) -> str:
    """A rectangle; no fill is an outline."""
    kind = f"f-{fill}" if fill else ""
    kind += f" s-{stroke}" if stroke else ""
    more = "" if fill else ' fill="none"'
    more += f' fill-opacity="{opacity:g}"' if opacity is not None else ""
    more += f' stroke-dasharray="{dash}"' if dash else ""
    head = f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{corner:g}"'
    end = f">{inner}</rect>" if inner else "/>"
    return f'{head} class="{kind.strip()}"{more}{end}'


def line(
    x1: float,
    y1: float,
    x2: float,
    y2: float,
    colour: str = "line",
    width: float = 1.5,
    dash: str = "",
    arrow: bool = False,
) -> str:
    """A straight line, with a tip at its end if it is an arrow."""
    more = f' stroke-dasharray="{dash}"' if dash else ""
    more += ' marker-end="url(#tip)"' if arrow else ""
    return (
        f'<path d="M{x1:.1f} {y1:.1f} L{x2:.1f} {y2:.1f}" class="s-{colour}" fill="none" '
        f'stroke-width="{width:g}"{more}/>'
    )


TIP = (
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
    'orient="auto"><path d="M0 0 L8 4 L0 8 z" class="f-line"/></marker></defs>'
)


def picture(width: float, height: float, title: str, parts: list[str]) -> str:
    """A whole file. The title is what a screen reader says."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img">'
    )
    paper = box(0.5, 0.5, width - 1, height - 1, "paper", "rest", corner=6)
    return "\n".join(
        [head, f"<title>{escape(title)}</title>", style(), TIP, paper, *parts, "</svg>\n"]
    )
