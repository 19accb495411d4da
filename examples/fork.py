"""Best of n by fork: the prompt is read once, then n twins continue on their own.

    python examples/fork.py '(48+17)*3-29=' --n 8

Each twin thinks at the narrow width with its own seed; a twin shares the pages of its origin until
one of the two writes. The answer is what most twins say. The widest width then reads the thinking
of the winner, and writes the answer: by policy "exact", so that nothing of the narrow width is left
in the cache it answers from.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace

from elastic_infer import Engine, EngineSequence, SamplingParams, demo_model

THINKING = SamplingParams(temperature=0.8, top_p=0.95, logprobs=0)


def think(engine: Engine, twin: EngineSequence, seed: int, limit: int = 120) -> tuple[str, float]:
    """Lets a twin think to its end tag: what it thought, and the mean log-probability."""
    params, start, total, count = replace(THINKING, seed=seed), len(twin.token_ids), 0.0, 0
    end = engine.tokenizer.token_id("</think>")
    while count < limit:
        token = twin.step(params=params)
        total, count = total + token.logprob, count + 1
        if token.id == end:
            break
    return engine.decode(twin.token_ids[start:]), total / count


def last_result(thought: str) -> str:
    """The number that the last step of the thinking arrives at."""
    return thought.removesuffix("</think>").rpartition("=")[2]


def answer(engine: Engine, winner: EngineSequence, width: str, limit: int = 8) -> str:
    """The answer after the thinking, at `width`."""
    winner.switch(width, policy="exact")
    said = []
    while len(said) < limit:
        token = winner.step()
        if token.id in engine.tokenizer.eos_ids:
            break
        said.append(token.text)
    return "".join(said)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question", nargs="?", default="(48+17)*3-29=")
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--model", default=str(demo_model()))
    given = parser.parse_args()
    with Engine.from_pretrained(given.model, max_num_seqs=given.n + 1) as engine:
        narrow, *_, wide = engine.widths
        with engine.open(given.question, width=narrow) as origin:
            origin.logits()  # reads the prompt, so that the twins need not
            twins = [origin.fork() for _ in range(given.n)]
            thoughts = [think(engine, twin, seed) for seed, twin in enumerate(twins)]
            for thought, score in thoughts:
                print(f"{score:7.3f}  {thought}")
            votes = Counter(last_result(thought) for thought, _ in thoughts)
            most, count = votes.most_common(1)[0]
            winner = max(
                (i for i in range(given.n) if last_result(thoughts[i][0]) == most),
                key=lambda i: thoughts[i][1],
            )
            said = answer(engine, twins[winner], wide)
            print(f"{count} of {given.n} agree on {most}; {wide} answers {said}")
            for twin in twins:
                twin.close()


if __name__ == "__main__":
    main()
