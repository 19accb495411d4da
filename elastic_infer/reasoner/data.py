"""Training batches: sorted by length, so that almost nothing is padding."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .task import (
    END_THINK,
    MAX_OPERATIONS,
    THINK,
    cut_thinking,
    held_out_problems,
    training_problem,
)
from .vocabulary import BOS, EOS, PAD, THINK_ID, encode

CUT_SHARE = 0.2
BOS_SHARE = 0.2
POOL = 4096


class Batch(NamedTuple):
    """inputs and targets [B, T]; weights [B, T] are 1 where the loss counts, else 0."""

    inputs: Tensor
    targets: Tensor
    weights: Tensor


def draw_sample(generator: random.Random, operations: int) -> tuple[list[int], list[int]]:
    """Token ids and, for each, 1 where it is to be learnt.

    The prompt is not, nor is a closing tag that cuts the thinking short: the budget writes it.
    """
    problem = training_problem(generator, operations)
    ids = [BOS] if generator.random() < BOS_SHARE else []
    ids += encode(problem.prompt)
    learn = [0] * len(ids)
    if generator.random() < CUT_SHARE:
        thinking = encode(THINK + cut_thinking(generator, problem))
        answer = [*encode(str(problem.answer)), EOS]
        ids += thinking + encode(END_THINK) + answer
        learn += [1] * len(thinking) + [0] + [1] * len(answer)
    else:
        completion = [*encode(problem.completion), EOS]
        ids += completion
        learn += [1] * len(completion)
    return ids, learn


def pack(samples: list[tuple[list[int], list[int]]]) -> Batch:
    """Samples padded to the longest of them."""
    length = max(len(ids) for ids, _ in samples) - 1
    inputs = torch.full((len(samples), length), PAD)
    targets = torch.full((len(samples), length), PAD)
    weights = torch.zeros(len(samples), length)
    for row, (ids, learn) in enumerate(samples):
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets[row, : len(ids) - 1] = torch.tensor(ids[1:])
        weights[row, : len(ids) - 1] = torch.tensor(learn[1:], dtype=torch.float32)
    return Batch(inputs, targets, weights)


def batches(seed: int, tokens: int, largest: int) -> Iterator[Batch]:
    """One pool of batches of about `tokens` positions, chains of up to `largest` operations.

    Longer chains are drawn more often: they hold the shorter ones' steps as well.
    """
    generator = random.Random(seed)
    sizes = list(range(1, largest + 1))
    draws = generator.choices(sizes, weights=[1 + size for size in sizes], k=POOL)
    samples = sorted((draw_sample(generator, size) for size in draws), key=lambda s: len(s[0]))
    groups, current = [], []
    for sample in samples:
        if current and (len(current) + 1) * len(sample[0]) > tokens:
            groups.append(current)
            current = []
        current.append(sample)
    groups.append(current)
    generator.shuffle(groups)
    for group in groups:
        yield pack(group)


def held_out_batches(seed: int, each: int, largest: int = MAX_OPERATIONS) -> list[Batch]:
    """For 1 to `largest` operations, `each` held-out problems with their whole answers."""
    found = []
    for operations in range(1, largest + 1):
        samples = []
        for problem in held_out_problems(seed, each, operations):
            ids = [*encode(problem.prompt + problem.completion), EOS]
            first = ids.index(THINK_ID)
            samples.append((ids, [int(i >= first) for i in range(len(ids))]))
        found.append(pack(samples))
    return found
