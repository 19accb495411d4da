"""Chains of arithmetic, thought through step by step: problems, answers, training samples."""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass

from ..errors import InvalidRequest

MAX_OPERATIONS = 5
MAX_RESULT = 999
HELD_OUT_OF_1000 = 20
LONGEST_SEARCH = 400_000  # draws; the rarest problem of one operation is one in 30,000 of them
THINK, END_THINK = "<think>", "</think>"


@dataclass(frozen=True)
class Problem:
    """One chain: `expression` without "=", the `steps` "a+b=c" of its solution, its `answer`."""

    expression: str
    steps: tuple[str, ...]
    answer: int

    @property
    def prompt(self) -> str:
        """The text up to and including "="."""
        return self.expression + "="

    @property
    def completion(self) -> str:
        """The text that the model should write: thinking and answer, without the end token."""
        return f"{THINK}{';'.join(self.steps)}{END_THINK}{self.answer}"


def draw_problem(generator: random.Random, operations: int) -> Problem:
    """A chain of `operations` operations whose every result lies in 0..999."""
    value = generator.randint(1, 99)
    text, steps = str(value), []
    for index in range(operations):
        while True:
            sign = generator.choice("+-*")
            right = generator.randint(2, 9) if sign == "*" else generator.randint(1, 99)
            result = {"+": value + right, "-": value - right, "*": value * right}[sign]
            if 0 <= result <= MAX_RESULT:
                break
        if sign == "*" and index:
            text = f"({text})"
        text += f"{sign}{right}"
        steps.append(f"{value}{sign}{right}={result}")
        value = result
    return Problem(text, tuple(steps), value)


def is_held_out(expression: str) -> bool:
    """True for the 2 % of expressions, chosen by checksum, that training never sees."""
    return zlib.crc32(expression.encode()) % 1000 < HELD_OUT_OF_1000


def training_problem(generator: random.Random, operations: int) -> Problem:
    """A problem outside the held-out part."""
    while True:
        problem = draw_problem(generator, operations)
        if not is_held_out(problem.expression):
            return problem


def held_out_problems(seed: int, count: int, operations: int | None = None) -> list[Problem]:
    """`count` different held-out problems: of `operations`, or of 1 to 5 in equal numbers.

    Raises:
        InvalidRequest: there are not as many; of one operation there are a few hundred.
    """
    generator = random.Random(seed)
    found: dict[str, Problem] = {}
    draws = 0  # since the last one that was found
    while len(found) < count:
        draws += 1
        if draws > LONGEST_SEARCH:
            raise InvalidRequest(
                f"held_out_problems: count must be at most the problems there are, got {count} of "
                f"{operations or 'mixed'} operations, found {len(found)}"
            )
        size = operations or len(found) % MAX_OPERATIONS + 1
        problem = draw_problem(generator, size)
        if is_held_out(problem.expression) and problem.expression not in found:
            found[problem.expression] = problem
            draws = 0
    return list(found.values())


def cut_thinking(generator: random.Random, problem: Problem) -> str:
    """The thinking of a problem, stopped early: after some steps or inside one."""
    whole = ";".join(problem.steps)
    if generator.random() < 0.25:
        return whole[: generator.randrange(len(whole))]
    kept = generator.randrange(len(problem.steps))
    text = ";".join(problem.steps[:kept])
    return text + ";" if kept and generator.random() < 0.5 else text


def read_answer(text: str) -> int | None:
    """The number after the closing tag, or None where there is none."""
    match = re.search(r"</think>\s*(-?\d+)\s*$", text)
    return int(match.group(1)) if match else None
