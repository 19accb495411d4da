"""Random plans for property tests."""

from __future__ import annotations

from elastic_infer import Plan


def plans():
    """One of every kind, every policy among them."""
    return [
        Plan.fixed("S"),
        Plan.fixed("L"),
        Plan.schedule([(0, "S"), (5, "L"), (12, "M")], policy="carry"),
        Plan.schedule([(0, "M"), (6, "L")], policy="exact"),
        Plan.schedule([(0, "S"), (9, "L"), (17, "S")], policy="window(4)"),
        Plan.by_uncertainty("S", "L", threshold=4.0, hold=2, policy="carry"),
        Plan.think_answer("S", "L", 7, grace=0, start_tag=3, end_tag=4, policy="exact"),
        Plan.think_answer("M", "L", 3, grace=0, start_tag=3, end_tag=4),
    ]
