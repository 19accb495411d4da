"""The results of the miniature as tables of a page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.elastify.pareto import near_gain

Figures = dict[str, Any]
NARROW = ("M", "S")
WAYS = (
    ("a", "router", "nested, learnt sizes"),
    ("b", "uniform", "nested, hand-picked sizes"),
    ("c", "cut", "prefix of (b)'s sizes, not distilled"),
    ("d", "scratch", "alone, from scratch"),
    ("e", "alone", "alone, distilled"),
)
NESTED = (
    ("router", "learnt sizes"),
    ("uniform", "hand-picked sizes"),
    ("unswitched", "hand-picked sizes, no switches in training"),
)


def rows(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def first(results: Figures, part: str) -> Figures:
    """A part of the first seed."""
    return next(iter(results[part].values()))


def percent(low: float, high: float | None = None) -> str:
    """A share, or two as a range."""
    return f"{low:.1%}" if high is None else f"{100 * low:.1f}–{100 * high:.1f}"


def solved(score: Figures, others: Iterable[Figures] = ()) -> str:
    """Solved problems, their 95 % interval, what other seeds gave, parameters."""
    text = f"{percent(score['solved'])} ({percent(*score['interval'])})"
    rest = [percent(other["solved"]) for other in others]
    text += f"; other seeds {', '.join(rest)}" if rest else ""
    return text + (f"; {score['parameters'] / 1e3:.0f}k" if "parameters" in score else "")


def greedy(score: Figures) -> str:
    """Accuracy of greedy decoding with its interval."""
    return f"{percent(score['accuracy'])} ({percent(score['low'], score['high'])})"


def scale_text(figures: Figures) -> str:
    """Scale, place and time of the runs."""
    scale, machine, results = figures["scale"], figures["machine"], figures["results"]
    more: dict[str, list[str]] = {}
    for part, runs in results.items():
        for seed in list(runs)[1:]:
            more.setdefault(seed, []).append(part)
    seeds = "".join(f"; seed {seed} too for {', '.join(parts)}" for seed, parts in more.items())
    made = {(r["date"], r["commit"]) for runs in results.values() for r in runs.values()}
    when = "; ".join(f"{date}, commit {commit}" for date, commit in sorted(made))
    return (
        f"Chains of 1 to {scale['operations']} operations; {scale['parent_steps']} steps of the "
        f"parent, {scale['steps']} of every model alone, {scale['nested_steps']} of a nested run "
        f"({scale['switches']:.0%} of them across a switch), {scale['tokens']} positions a step; "
        f"Muon and AdamW throughout. {scale['checks']} held-out problems of each length, solved "
        f"where every token of the solution is the likeliest one; 95 % intervals. Seed "
        f"{next(iter(results['router']))}{seeds}; the parent has one seed. "
        f"{figures['threads']} thread of {machine['processor']} that other work shared, "
        f"{when}."
    )


def widths_table(figures: Figures) -> str:
    """Every way to a smaller model, and what the family cost in tokens."""
    results = figures["results"]
    parent = first(results, "parent")
    body = [["", "parent", solved(parent["widths"]["L"]), "", "", f"{parent['tokens']:,}"]]
    for letter, part, title in WAYS:
        if part == "cut":
            runs = [{"widths": first(results, "order")["orders"]["importance"], "tokens": 0}]
        else:
            runs = list(results[part].values())
        cells = []
        for name in ("L", *NARROW):
            scores = [run["widths"][name] for run in runs if name in run["widths"]]
            cells.append(solved(scores[0], scores[1:]) if scores else "")
        body.append([letter, title, *cells, f"{runs[0]['tokens']:,}"])
    head = ("", "way", "L", "M", "S", "tokens learnt from, whole family")
    return rows(head, body) + "\n\n" + tokens_text(results) + "\n\n" + nested_text(results)


def tokens_text(results: Figures) -> str:
    """Token costs beside the published ones."""
    parent, nested = first(results, "parent")["tokens"], first(results, "router")["tokens"]
    alone = first(results, "alone")["tokens"]
    return (
        f"One nested run learnt from {nested / 1e6:.2f} million tokens. Distilling M and S one by "
        f"one took {alone / nested:.1f} times as many (published, against sequential compression: "
        f"7 times); training both from scratch for as long as the parent would take "
        f"{2 * parent / nested:.1f} times as many (published, against pretraining: 360 times). The "
        "miniature cannot show such ratios: its parent saw only "
        f"{parent / nested:.1f} times the tokens of the nested run."
    )


def nested_text(results: Figures) -> str:
    """One nested run beside one run a width, learnt sizes beside picked ones."""
    parts = []
    for part, title in NESTED[:2]:
        for seed, run in results[part].items():
            text = []
            for name in NARROW:
                own, points = run["widths"][name]["solved"], []
                for other, against in (("alone", "distilled alone"), ("scratch", "from scratch")):
                    if seed in results[other]:
                        score = results[other][seed]["widths"][name]["solved"]
                        points.append(f"{100 * (own - score):+.1f} against {against}")
                text += [f"{name} {' and '.join(points)}"] if points else []
            if text:
                parts.append(f"Nested with {title}, seed {seed}, in points: {', '.join(text)}.")
    learnt, picked = (first(results, part)["widths"] for part in ("router", "uniform"))
    sizes = [
        f"{name} {learnt[name]['parameters'] / picked[name]['parameters']:.2f}" for name in NARROW
    ]
    parts.append(
        f"Parameters of the learnt sizes over those of the picked ones: {', '.join(sizes)}."
    )
    return " ".join(parts)


def sizes_table(figures: Figures) -> str:
    """The sizes that the router chose."""
    results = figures["results"]
    body = []
    for seed, run in results["router"].items():
        for name in NARROW:
            sizes = run["sizes"][name]
            text = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
            body.append([seed, name, text])
    return rows(("seed", "width", "learnt sizes"), body)


def order_table(figures: Figures) -> str:
    """Importance against random order, before any training."""
    orders = first(figures["results"], "order")["orders"]
    body = [
        [
            name,
            *(
                f"{widths[w]['divergence']:.2f}; {percent(widths[w]['tokens_right'])}; "
                f"{percent(widths[w]['solved'])}"
                for w in NARROW
            ),
        ]
        for name, widths in orders.items()
    ]
    verdict = []
    for name in NARROW:
        own = orders["importance"][name]["divergence"]
        best = min(o[name]["divergence"] for key, o in orders.items() if key != "importance")
        word = "closer to the parent than every" if own < best else "not closer than the best"
        verdict.append(f"{name}: {word} random order ({own:.2f}, best random {best:.2f})")
    head = ("order", *(f"{w}: KL; tokens right; solved" for w in NARROW))
    text = f"By divergence, the order of importance is, for {'; '.join(verdict)}."
    return f"{rows(head, body)}\n\n{text}"


def depth_table(figures: Figures) -> str:
    """Leaving out layers against narrowing, at the parameters of M."""
    results = figures["results"]
    depth, alone = first(results, "depth"), first(results, "alone")["widths"]["M"]
    cut = first(results, "order")["orders"]["importance"]["M"]
    others = [run["distilled"] for run in list(results["depth"].values())[1:]]
    rest = [run["widths"]["M"] for run in list(results["alone"].values())[1:]]
    removed = ", ".join(map(str, depth["removed"]))
    body = [
        [
            f"depth: without layers {removed}",
            solved(depth["cut"]),
            solved(depth["distilled"], others),
        ],
        ["width: M", solved(cut), solved(alone, rest)],
    ]
    return rows(("smaller by", "cut", "then distilled alone"), body)


def caches_table(figures: Figures) -> str:
    """Likeness of caches and accuracy on a transplanted one."""
    found = first(figures["results"], "caches")
    body = []
    for part, title in NESTED:
        for pair, alike in found[part]["cosine"].items():
            small = pair.partition("-")[2]
            cells = []
            for writer, reader in ((small, "L"), ("L", small)):
                moved = found[part]["transplanted"][f"{writer}->{reader}"]
                own = found[part]["alone"][reader]["solved"]
                cells.append(f"{percent(moved['solved'])}, {100 * (moved['solved'] - own):+.1f}")
            body.append(
                [title, pair, *(f"{alike[key]:.2f}" for key in ("K", "V", "state")), *cells]
            )
    head = (
        "nested run",
        "widths",
        "K",
        "V",
        "state",
        "narrow cache, L goes on: solved, points",
        "L's cache, narrow goes on: solved, points",
    )
    values = [
        v
        for part in found.values()
        if isinstance(part, dict)
        for alike in part["cosine"].values()
        for v in alike.values()
    ]
    inside = sum(0.89 <= value <= 0.96 for value in values)
    return (
        f"{rows(head, body)}\n\nPublished: cosine 0.89 to 0.96 and -0.75 points for the narrow "
        f"cache under the full model. Here {inside} of {len(values)} cosines lie in that range. "
        f"L on the cache of S loses {lost(found, 'unswitched'):.1f} points where training held no "
        f"switches, {lost(found, 'uniform'):.1f} where it did, at the same sizes."
    )


def lost(found: Figures, part: str) -> float:
    """Points that the full model loses on the narrowest width's cache."""
    own, moved = found[part]["alone"]["L"], found[part]["transplanted"]["S->L"]
    return 100 * (own["solved"] - moved["solved"])


def control_table(figures: Figures) -> str:
    """The fronts of budget control and the two gains."""
    control = first(figures["results"], "control")
    body = []
    for p in sorted(control["again"], key=lambda p: p["priced"] or p["cpu"]):
        priced = "" if p["priced"] is None else f"{1000 * p['priced']:.2f}"
        budget = "none" if p["budget"] is None else str(p["budget"])
        body.append(
            [
                f"{p['think']} → {p['answer']}",
                p["policy"],
                budget,
                greedy(p),
                f"{1000 * p['cpu']:.2f}",
                priced,
            ]
        )
    head = (
        "think → answer",
        "policy",
        "thinking tokens allowed",
        "solved",
        "miniature, CPU ms",
        "priced, ms",
    )
    count = control["again"][0]["count"]
    chosen = control.get("chosen_by")
    chosen = "" if chosen is None else f" The priced front was chosen by another list: {chosen}."
    notes = [
        f"{len(control['points'])} points of {control['points'][0]['count']} problems were asked; "
        f"the table has both fronts and the full model alone, again with {count} problems. "
        "CPU ms: one thread, 64 problems at once. Priced: the tokens of each width, at the "
        f"prices of {control['prices']}.{chosen}"
    ]
    for latency, title in (("cpu", "On the miniature"), ("priced", "Priced")):
        near = near_gain(control["again"], latency)
        notes.append(gains_text(control["gains"][latency], near, latency, title))
    return rows(head, body) + "\n\n" + "\n".join(f"- {note}" for note in notes)


def gains_text(gains: Figures, near: Figures, latency: str, title: str) -> str:
    """The gains in words, the priced ones beside those of the publication."""
    if not gains:
        return f"{title}: the full model alone solved nothing, so nothing can be compared."

    def point(p: Figures) -> str:
        budget = "no limit" if p["budget"] is None else f"{p['budget']} tokens"
        return (
            f"{p['think']} → {p['answer']} {p['policy']}, {budget}: {percent(p['accuracy'])}, "
            f"{1000 * p[latency]:.2f} ms"
        )

    more, less = gains["accuracy"], gains["latency"]
    beside = ("", "") if latency == "cpu" else (" (published: +16 %)", " (published: 1.9 times)")
    return (
        f"{title}: at equal latency {100 * more['gain']:+.1f} points over the full model with a "
        f"plain budget{beside[0]}: {point(more['by'])} against {point(more['plain'])}; at equal "
        f"accuracy {less['gain']:.2f} times faster{beside[1]}: {point(less['by'])} against "
        f"{point(less['plain'])}; at an accuracy inside the interval of the full model at its best "
        f"{near['gain']:.2f} times faster: {point(near['by'])} against {point(near['plain'])}."
    )


def shipped_table(figures: Figures) -> str:
    """The nested runs beside the model that is shipped."""
    found = first(figures["results"], "shipped")
    titles = {
        "router": "nested, learnt sizes",
        "uniform": "nested, hand-picked sizes",
        "shipped": "shipped model",
    }
    body = [
        [title, *(greedy(found["same"][key][name]) for name in ("L", *NARROW))]
        for key, title in titles.items()
    ]
    longest = ", ".join(f"{n} {greedy(found['longest'][n])}" for n in ("L", *NARROW))
    return (
        f"{rows(('model', 'L', 'M', 'S'), body)}\n\nGreedy decoding of the same problems of 1 to "
        f"{figures['scale']['operations']} operations. The shipped model was trained on up to 5, "
        f"which the miniature never saw; there it solves: {longest}. It stays the shipped one."
    )


TABLES = {
    "elastify-scale": scale_text,
    "elastify-widths": widths_table,
    "elastify-sizes": sizes_table,
    "elastify-order": order_table,
    "elastify-depth": depth_table,
    "elastify-caches": caches_table,
    "elastify-control": control_table,
    "elastify-shipped": shipped_table,
}
