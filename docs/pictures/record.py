"""Records what the pictures of the shipped model show: one greedy run, and what each policy of a
switch reads again.

    python -m docs.pictures.record     # writes docs/pictures/demo.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "demo.json"
PROMPT, THINK, ANSWER = "(48+17)*3-29=", "S", "L"
POLICIES = ("carry", "exact", "window(16)")


def record() -> dict[str, Any]:
    """The run, token by token, and the runs of widths under every policy."""
    from elastic_infer import Engine, Plan, SamplingParams, demo_model

    greedy = SamplingParams(temperature=0.0)
    with Engine.from_pretrained(demo_model(), threads=1) as engine:
        plan = Plan.think_answer(think=THINK, answer=ANSWER)
        tokens = list(engine.stream(PROMPT, greedy, plan=plan))
        again = {}
        for policy in POLICIES:
            plan = Plan.think_answer(think=THINK, answer=ANSWER, policy=policy)
            output = engine.generate(PROMPT, greedy, plan=plan)
            again[policy] = {
                "runs": [list(run) for run in output.width_runs],
                "rebuilt": output.rebuilt_tokens,
            }
    return {
        "prompt": PROMPT,
        "prompt_tokens": output.usage.prompt_tokens,
        "tokens": [[token.text, token.width] for token in tokens],
        "policies": again,
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(record()) + "\n", encoding="utf-8")
