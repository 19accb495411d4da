"""Accuracy against thinking budget: what an answer is worth when thinking is cut short.

    python examples/budget.py                  # 200 problems per figure, all widths
    python examples/budget.py --problems 50 --budgets 0 16 64

Each figure is the share of held-out problems that the shipped reasoner solves when at most so many
tokens may be thought, with its 95 % interval. "none" sets no limit.
"""

from __future__ import annotations

import argparse

from elastic_infer import Engine, demo_model
from elastic_infer.reasoner.evaluate import SEED, evaluate, think_answer, wilson
from elastic_infer.reasoner.task import held_out_problems


def budget(text: str) -> int | None:
    """A number of tokens, or "none"."""
    return None if text == "none" else int(text)


def main() -> None:
    """Prints one line per plan, one column per budget."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(demo_model()))
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--budgets", type=budget, nargs="+", default=[0, 8, 16, 32, None])
    given = parser.parse_args()
    problems = held_out_problems(SEED, given.problems)
    with Engine.from_pretrained(given.model, max_num_seqs=64) as engine:
        narrow, *_, wide = engine.widths
        pairs = [(width, width) for width in engine.widths] + [(narrow, wide)]
        titles = "".join(f"{'none' if b is None else b:>20}" for b in given.budgets)
        print(f"{'think, answer':14}{titles}")
        for think, answer in pairs:
            line = f"{think}, {answer}".ljust(14)
            for tokens in given.budgets:
                plan = think_answer(think, answer, budget=tokens)
                score = evaluate(engine, problems, plan=plan).score
                low, high = wilson(score.solved, score.count)
                line += f"{score.accuracy:.0%} ({low:.0%} to {high:.0%})".rjust(20)
            print(line, flush=True)


if __name__ == "__main__":
    main()
