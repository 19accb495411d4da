"""Calls of native ops with arguments made wrong, in a process that may die of them.

    python tests/support/fuzz_ops.py indices
    python tests/support/fuzz_ops.py mutants SEED COUNT

Prints what went wrong, one line each. The call under way is in the file that FUZZ_LOG names, so
that the caller can tell which one ended the process.
"""

import math
import os
import random
import sys

import torch

from elastic_infer import _C, ops
from elastic_infer.ops import Pool, Step, registry
from elastic_infer.ops.testing.laws import make, small_cases

LOW, HIGH = -(2**31), 2**31 - 1
# Tables of indices and sizes, by what the functions call them.
TABLES = (
    "ids",
    "row_width",
    "seq_width",
    "sizes",
    "k_sizes",
    "n_sizes",
    "f_sizes",
    "e_sizes",
    "h_sizes",
    "out_sizes",
    "x_sizes",
    "q_sizes",
    "slots",
    "cu_seqlens",
    "context",
    "page_table",
    "lengths",
    "slot_mapping",
    "feed",
)
ALLOWED = {  # what looks outside and is not: no feed at all; any number of tokens read before
    ("embed", "feed", LOW),
    ("ssm_scan", "context", HIGH),
    ("ssm_step", "context", HIGH),
    ("mamba_step", "context", HIGH),
}


class Recorder:
    """Stands for `_C` in a module of an op and keeps what its functions are called with."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        real = getattr(_C, name)

        def called(*given):
            self.calls.append((name, given))
            return real(*given)

        return called


def native_calls():
    """[(function of `_C`, arguments without `run`)] of every op's small cases."""
    found = []
    for spec in registry().values():
        modules = [m for m in sys.modules.values() if m.__name__.startswith(ops.__name__ + ".")]
        users = [m for m in modules if hasattr(m, "_C")]
        for case in small_cases(spec):
            if case.get("slow"):
                continue
            for dtype in spec.dtypes:
                arguments, recorder = make(spec, case, dtype), Recorder()
                try:
                    for module in users:
                        module._C = recorder
                    spec.call(arguments, None)
                finally:
                    for module in users:
                        module._C = _C
                found += [(n, g[:-1]) for n, g in recorder.calls if g and g[-1] is None]
    return found


def note(text):
    if path := os.environ.get("FUZZ_LOG"):
        with open(path, "w", encoding="utf-8") as f:
            f.write(text)


def indices():
    """Every table of every recorded op, filled with what is far outside: the replay must raise a
    ValueError that names op and table, or (ALLOWED) end."""
    for spec in registry().values():
        for case in small_cases(spec):
            if case.get("slow"):
                continue
            tables = [n for n in TABLES if n not in spec.outputs]
            for name in tables:
                arguments = make(spec, case, spec.dtypes[-1])
                table = arguments.get(name)
                if not isinstance(table, torch.Tensor) or table.numel() == 0:
                    continue
                for value in (LOW, HIGH):
                    arguments = make(spec, case, spec.dtypes[-1])
                    step = Step(Pool(2))
                    spec.call(arguments, step)
                    note(f"{spec.name} {case}: {name} = {value}")
                    arguments[name].fill_(value)
                    try:
                        step.run()
                    except ValueError as error:
                        wanted = f"{spec.name}: {name} must "
                        if not str(error).startswith(wanted) or str(value) not in str(error):
                            print(f"{spec.name} {case}: {name} = {value} gives {error}")
                    else:
                        used = spec.rows(arguments) > 0
                        if used and (spec.name, name, value) not in ALLOWED:
                            print(f"{spec.name} {case}: {name} = {value} was not noticed")


def wrong_number(rng, value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(
            (
                0,
                -1,
                -16,
                -64,
                1,
                16,
                value + 16,
                value - 16,
                2 * value,
                1 << 24,
                HIGH,
                LOW,
                1 << 62,
                -(1 << 62),
            )
        )
    return rng.choice((0.0, -1.0, math.nan, math.inf, 1e-45, 1e39))


def resized(rng, t):
    """Of other sizes: nothing, one, a few, or many rows that are all the same."""
    d = rng.randrange(t.ndim) if t.ndim else 0
    way = rng.randrange(6)
    if t.ndim == 0 or way == 0:
        return t[None]
    if way == 1:
        return t.narrow(d, 0, 0)
    if way == 2 and t.shape[d] > 0:
        return t.narrow(d, rng.randrange(t.shape[d]), 1)
    if way == 3:
        return t.narrow(d, 0, 1).expand(
            *(rng.choice((1, 7, 300, 4096)) if i == d else n for i, n in enumerate(t.shape))
        )
    if way == 4:
        return torch.cat([t, t], d)
    shape = [rng.choice((0, 0, 1, 16, n)) if rng.random() < 0.5 else n for n in t.shape]
    strides, dense = [], 1
    for n in reversed(shape):
        strides.append(dense)
        dense *= n if rng.random() < 0.9 else max(n, 1)
    return torch.zeros(max(1, dense), dtype=t.dtype).as_strided(shape, strides[::-1])


def restrided(rng, t):
    way = rng.randrange(3)
    if t.ndim == 0 or way == 0:
        return t.T.contiguous().T if t.ndim == 2 else t
    if way == 1:
        wider = torch.zeros(*t.shape[:-1], 2 * t.shape[-1] + 3, dtype=t.dtype)
        return wider[..., 1 : t.shape[-1] + 1].copy_(t)  # an odd offset, rows apart
    return t.repeat_interleave(2, -1)[..., ::2]


def aliased(rng, t, others):
    """Memory of another argument, from some element on, in the place of its own."""
    source = rng.choice(others)
    if not source.is_contiguous() or source.numel() == 0:
        return t
    raw = source.view(-1).view(torch.uint8)
    size, need = t.element_size(), max(1, t.numel()) * t.element_size()
    if len(raw) < need:
        return t
    start = rng.randrange((len(raw) - need) // size + 1) * size
    if (raw.data_ptr() + start) % size:
        return t
    return raw[start : start + need].view(t.dtype)[: t.numel()].view(t.shape)


def mutated(rng, given):
    """The arguments with one to three of them made wrong."""
    given = [v.clone() if isinstance(v, torch.Tensor) and v.is_contiguous() else v for v in given]
    tensors = [v for v in given if isinstance(v, torch.Tensor)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        i = rng.randrange(len(given))
        v = given[i]
        if isinstance(v, (int, float)):
            given[i] = wrong_number(rng, v)
        elif isinstance(v, (list, tuple)):
            given[i] = [
                tuple(wrong_number(rng, x) if rng.random() < 0.3 else x for x in s) for s in v
            ]
        elif isinstance(v, torch.Tensor):
            way = rng.randrange(7)
            if way == 0:
                given[i] = resized(rng, v)
            elif way == 1:
                given[i] = restrided(rng, v)
            elif way == 2:
                given[i] = aliased(rng, v, tensors)
            elif way == 3:
                given[i] = None
            elif way == 4:
                given[i] = v.to(
                    rng.choice(
                        (torch.float32, torch.bfloat16, torch.int32, torch.uint8, torch.float16)
                    )
                )
            elif way == 5 and not v.is_floating_point() and v.numel():
                given[i] = v.clone()
                given[i].view(-1)[rng.randrange(v.numel())] = rng.choice(
                    (0, 1, 3, 64, 127) if v.dtype == torch.uint8 else (0, -1, -2, 7, 65, HIGH, LOW)
                )
            elif way == 6:
                freed = v.clone()
                freed.untyped_storage().resize_(0)
                given[i] = freed
                break  # torch itself would crash on it
    return given


def mutants(seed, count):
    """Random wrong calls: at once, on a pool, or recorded and replayed with other tables."""
    calls, pools = native_calls(), [Pool(1), Pool(2), Pool(3, "portable")]
    for n in range(seed, seed + count):
        rng = random.Random(n)
        torch.manual_seed(n)
        name, given = rng.choice(calls)
        note(f"seed {n}: {name}")
        try:
            given = mutated(rng, given)
            how = rng.randrange(4)
            if how < 2:
                getattr(_C, name)(*given, None if how else rng.choice(pools))
                continue
            step = Step(rng.choice(pools))
            getattr(_C, name)(*given, step)
            for t in given:
                usable = isinstance(t, torch.Tensor) and t.untyped_storage().nbytes() > 0
                if usable and t.dtype == torch.int32 and rng.random() < 0.3:
                    t.fill_(rng.choice((-2, -1, 0, 1, 5, 64, HIGH, LOW)))
            step.run()
        except (TypeError, ValueError):
            pass
        except Exception as error:  # what no native call may raise
            if not isinstance(error, (RuntimeError, IndexError)):  # torch's own, of a mutation
                print(f"seed {n}: {name} gives {type(error).__name__}: {error}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "indices":
        indices()
    else:
        mutants(int(sys.argv[2]), int(sys.argv[3]))
    print("done")
