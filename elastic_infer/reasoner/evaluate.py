"""Accuracy of a width or a plan, with its 95 % interval, and speed.

``python -m elastic_infer.reasoner.evaluate MODEL --out FILE`` measures every width, the
plans that think narrow and answer wide, and thinking budgets, on problems that training never saw.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..device.machine import machine, today
from ..files.writing import write_json
from .task import MAX_OPERATIONS, Problem, held_out_problems, read_answer

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..plans.plan import Plan

SEED = 2026  # of the problems that published figures are about
BUDGETS = (0, 8, 16, 32, None)
MAX_TOKENS = 128  # more than the longest solution has
WINDOW = "window(16)"  # prompts and thinking are 20 to 100 tokens, so n must be small
POLICIES = ("carry", "exact", WINDOW)
AT_ONCE = 64  # sequences of a batch


def wilson(solved: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion; it is sound near 0 and 1 too.

    Args:
        solved: successes.
        count: trials.
        z: standard deviations, 1.96 for 95 %.

    Returns:
        (low, high), both in 0..1; (0, 1) without trials.
    """
    if count == 0:
        return 0.0, 1.0
    share, square = solved / count, z * z / count
    centre = (share + square / 2) / (1 + square)
    half = z * math.sqrt(share * (1 - share) / count + square / (4 * count)) / (1 + square)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass
class Score:
    """Problems solved out of those asked."""

    solved: int = 0
    count: int = 0

    def add(self, solved: bool) -> None:
        """Counts one more problem."""
        self.solved += int(solved)
        self.count += 1

    @property
    def accuracy(self) -> float:
        """Share solved, 0 without problems."""
        return self.solved / self.count if self.count else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Accuracy with its 95 % interval, and the two counts."""
        low, high = wilson(self.solved, self.count)
        return {
            "accuracy": round(self.accuracy, 5),
            "low": round(low, 5),
            "high": round(high, 5),
            "solved": self.solved,
            "count": self.count,
        }


@dataclass
class Evaluation:
    """Measurements of one width or plan.

    Attributes:
        score: problems solved, in all.
        by_operations: problems solved, by number of operations.
        tokens: generated tokens by width.
        rebuilt_tokens: read again by switches.
        seconds: from the first submission to the last answer, with as many sequences at once as the
            engine takes.
    """

    score: Score = field(default_factory=Score)
    by_operations: dict[int, Score] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    rebuilt_tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over wall time, prompts included in the time."""
        return sum(self.tokens.values()) / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            **self.score.to_dict(),
            "by_operations": {str(n): s.to_dict() for n, s in sorted(self.by_operations.items())},
            "tokens": self.tokens,
            "rebuilt_tokens": self.rebuilt_tokens,
            "tokens_per_second": round(self.tokens_per_second, 1),
        }


def evaluate(
    engine: Engine,
    problems: Sequence[Problem],
    *,
    width: str | None = None,
    plan: Plan | None = None,
    done: Callable[[], None] | None = None,
) -> Evaluation:
    """Solves problems greedily and counts the right answers.

    Args:
        engine: of a model of this task.
        problems: what is asked; all are submitted at once.
        width: one width for every token; or
        plan: which width for which token.
        done: called after every problem.

    Returns:
        Evaluation.

    Raises:
        ElasticError: a refusal by `Engine.submit`, or the error that ended a request.
    """
    from ..sampling.params import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    found, begin = Evaluation(), time.perf_counter()
    requests = [engine.submit(p.prompt, params, plan, width=width) for p in problems]
    try:
        for problem, request in zip(problems, requests):
            output = request.result()
            solved = read_answer(output.text or "") == problem.answer
            found.score.add(solved)
            found.by_operations.setdefault(len(problem.steps), Score()).add(solved)
            for name, count in output.width_runs:
                found.tokens[name] = found.tokens.get(name, 0) + count
            found.rebuilt_tokens += output.rebuilt_tokens
            if done is not None:
                done()
    finally:
        for request in requests:
            request.cancel()
    found.seconds = time.perf_counter() - begin
    return found


def think_answer(think: str, answer: str, policy: str = "carry", budget: int | None = None) -> Plan:
    """The plan of these figures: a budget is met to the token, for the task has no newlines."""
    from ..plans.plan import Plan

    return Plan.think_answer(think, answer, think_tokens=budget, grace=0, policy=policy)


def evaluate_model(
    engine: Engine,
    per_operation: int = 200,
    hard: int = 500,
    seed: int = SEED,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """All figures that a model card needs.

    Args:
        engine: an engine with at least two widths; the narrowest and the widest make the plans.
        per_operation: problems of each number of operations.
        hard: problems of five operations, for a figure of their own.
        seed: of the problems.
        say: told after each measurement.

    Returns:
        {"widths", "five_operations", "plans", "budgets"}: each {name: Evaluation as a dict};
        budgets by plan and then by budget.
    """
    problems = held_out_problems(seed, per_operation * MAX_OPERATIONS)
    hardest = held_out_problems(seed + 1, hard, MAX_OPERATIONS)
    names = list(engine.widths)
    narrow, wide = names[0], names[-1]

    def measure(what: str, asked: Sequence[Problem], **how: Any) -> dict[str, Any]:
        found = evaluate(engine, asked, **how)
        low, high = wilson(found.score.solved, found.score.count)
        say(
            f"{what}: {found.score.accuracy:.1%} ({low:.1%} to {high:.1%}), "
            f"{found.tokens_per_second:.0f} tokens/s"
        )
        return found.to_dict()

    widths = {name: measure(name, problems, width=name) for name in names}
    five = {name: measure(f"{name}, five operations", hardest, width=name) for name in names}
    plans = {
        f"{narrow}->{wide} {policy}": measure(
            f"{narrow}->{wide} {policy}", problems, plan=think_answer(narrow, wide, policy)
        )
        for policy in POLICIES
    }
    budgets: dict[str, dict[str, Any]] = {}
    for think, answer in ((narrow, narrow), (wide, wide), (narrow, wide)):
        title = think if think == answer else f"{think}->{answer}"
        for budget in BUDGETS:
            if budget is None:  # the figure without a budget is there already
                known = widths[title] if think == answer else plans[f"{title} carry"]
            else:
                plan = think_answer(think, answer, budget=budget)
                known = measure(f"{title}, {budget} tokens of thinking", problems, plan=plan)
            budgets.setdefault(title, {})["none" if budget is None else str(budget)] = known
    return {"widths": widths, "five_operations": five, "plans": plans, "budgets": budgets}


def main(arguments: Iterable[str] | None = None) -> None:
    """Command line."""
    import elastic_infer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--per-operation", type=int, default=200, help="problems of each length")
    parser.add_argument("--hard", type=int, default=500, help="problems of five operations")
    parser.add_argument("--threads", type=int)
    given = parser.parse_args(None if arguments is None else list(arguments))
    about = {"version": elastic_infer.__version__, "date": today(), "machine": machine()}
    with elastic_infer.Engine.from_pretrained(
        given.model, threads=given.threads, max_num_seqs=AT_ONCE
    ) as engine:
        figures = evaluate_model(
            engine, given.per_operation, given.hard, say=lambda text: print(text, flush=True)
        )
        about |= {"model": Path(given.model).name, "fingerprint": engine.fingerprint, "seed": SEED}
    if given.out is not None:
        write_json(given.out, {**about, **figures}, "--out", indent=1)


if __name__ == "__main__":
    main()
