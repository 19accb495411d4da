"""The laws that every registered op holds, on any device: what tests and `bench/gpu.py` check.

A function takes an op's spec and seeded arguments, runs the op on copies of them that lie on
`device` (None: where the arguments lie), with `runner` (None, a Pool or a Step), and raises
:class:`LawBroken` with what differs. References are computed where the arguments lie, in float64.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch

from .._spec import Arguments, Case, OpSpec, case_id

Outputs = dict[str, torch.Tensor]
SENTINEL, WHOLE_SENTINEL = 12345.0, 77  # in floating and in integer guards around outputs
GUARD = 64  # elements of them on each side


class LawBroken(AssertionError):
    """An op does not do what it promises."""


def hold(condition: Any, message: str) -> None:
    """Raises LawBroken with `message` unless `condition`."""
    if not condition:
        raise LawBroken(message)


def small_cases(spec: OpSpec) -> list[Case]:
    """The cases that are not a real model's."""
    return [c for c in spec.cases() if not c.get("bench")]


def make(spec: OpSpec, case: Case, dtype: torch.dtype) -> Arguments:
    """The case's arguments, seeded by op and case."""
    seed = zlib.crc32(f"{spec.name} {case_id(case)}".encode())
    return spec.inputs(case, dtype, torch.Generator().manual_seed(seed))


def copy(arguments: Arguments, device: str | torch.device | None = None) -> Arguments:
    """A deep copy that keeps strides, on `device` if one is given."""
    copied = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            fresh = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=device or value.device
            )
            value = fresh.copy_(value)
        copied[name] = value
    return copied


def call(spec: OpSpec, given: Arguments, runner=None, device=None) -> None:
    """Runs or records the op; what its `call` makes beside the arguments lies on `device` too."""
    with torch.device(device or "cpu"):
        spec.call(given, runner)


def run(spec: OpSpec, arguments: Arguments, runner=None, device=None) -> Outputs:
    """The op's outputs from a copy of `arguments` on `device`, back where the arguments lie."""
    given = copy(arguments, device)
    call(spec, given, runner, device)
    return {name: given[name].to(arguments[name].device) for name in spec.outputs}


def wide(spec: OpSpec, arguments: Arguments) -> Arguments:
    """Arguments in float64, but for those that are no floating values."""
    return {
        n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for n, v in arguments.items()
    }


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape and bytes: NaN equals the same NaN, and -0 is not 0."""
    dense = torch.contiguous_format  # also where a single element has another stride
    return a.shape == b.shape and torch.equal(
        *(t.flatten().clone(memory_format=dense).view(torch.uint8) for t in (a, b))
    )


def assert_close(name: str, got: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> None:
    """Error against float64 at most twice plain torch's, plus one ulp of the largest value."""
    if not got.is_floating_point():
        hold(torch.equal(got, exact.to(got.dtype)), name)
        return
    known = torch.isfinite(exact)
    hold(torch.isfinite(got[known]).all(), f"{name}: not finite")
    exact = exact[known].double()
    if exact.numel() == 0:
        return
    error = (got[known].double() - exact).abs().max().item()
    allowed = 2 * (plain[known].double() - exact).abs().max().item()
    allowed += torch.finfo(got.dtype).eps * exact.abs().max().item() + 1e-30
    hold(error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}")


def check_reference(spec: OpSpec, arguments: Arguments, runner=None, device=None) -> Outputs:
    """Law 1, of one set of arguments. Returns: the outputs."""
    got = run(spec, arguments, runner, device)
    exact = spec.reference(wide(spec, copy(arguments)))
    plain = spec.reference(copy(arguments))
    for name in spec.outputs:
        assert_close(f"{spec.name}: {name}", got[name], exact[name], plain[name])
    return got


def _framed(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of `value` inside a larger tensor of sentinels: (the copy, the larger tensor)."""
    sentinel = SENTINEL if value.is_floating_point() else WHOLE_SENTINEL
    shape = (value.numel() + 2 * GUARD,)
    flat = torch.full(shape, sentinel, dtype=value.dtype, device=value.device)
    inner = flat[GUARD : GUARD + value.numel()].view(value.shape)
    return inner.copy_(value), flat


def check_poison(spec: OpSpec, clean: Arguments, runner=None, device=None) -> None:
    """Law 2: what must not be read is NaN, what must not be written is a sentinel."""
    dirty = copy(clean)
    spec.poison(dirty)
    dirty = copy(dirty, device)
    frames = {}
    for name in spec.outputs:
        dirty[name], frames[name] = _framed(dirty[name])
    call(spec, dirty, runner, device)
    want = run(spec, clean, runner, device)
    exact = spec.reference(wide(spec, copy(clean)))
    for name, flat in frames.items():
        edges = torch.cat([flat[:GUARD], flat[-GUARD:]])
        sentinel = SENTINEL if edges.is_floating_point() else WHOLE_SENTINEL
        hold((edges == edges.new_tensor(sentinel)).all(), f"{name}: written outside")
        got = dirty[name].to(want[name].device)
        if not got.is_floating_point():
            hold(torch.equal(got, want[name]), f"{spec.name}: poison changed {name}")
            continue
        defined = torch.isfinite(exact[name]) & torch.isfinite(want[name])
        untouched = ~torch.isfinite(got)
        # Poison may stay where it was put, never reach a value that is defined and written.
        changed = ~torch.isclose(got, want[name], rtol=0, atol=0, equal_nan=True) & defined
        original = clean[name]
        kept = untouched & torch.isclose(want[name], original, rtol=0, atol=0, equal_nan=True)
        hold(not (changed & ~kept).any(), f"{spec.name}: poison reached {name}")


def check_slice(
    spec: OpSpec, arguments: Arguments, runner=None, device=None, exact: bool = True
) -> int:
    """Law 3: a prefix of the full weights equals a contiguous copy of that prefix, bit for bit.
    Unless `exact`, only where the copy has as many rows, and within rounding otherwise (bits may
    depend on how many rows share a launch). Returns: how many copies there were."""
    got = run(spec, arguments, runner, device)
    pairs = list(spec.sliced(copy(arguments)))
    for cut, indices in pairs:
        alone = run(spec, cut, runner, device)
        for name, (here, there) in indices.items():
            a, b = got[name][here], alone[name][there]
            if exact or not a.is_floating_point() or spec.rows(cut) == spec.rows(arguments):
                hold(same_bits(a, b), f"{spec.name}: {name} of a slice has other bits")
            elif a.numel():
                limit = 4 * torch.finfo(a.dtype).eps * b.abs().max()
                hold((a - b).abs().max() <= limit, f"{spec.name}: {name} of a slice differs")
    return len(pairs)


def some_rows(count: int) -> list[int]:
    """Rows at both ends, in the middle and around a block of kernels' rows."""
    wanted = {0, 1, 5, 6, 7, count // 2, count - 2, count - 1}
    return sorted(r for r in wanted if 0 <= r < count)


def check_batch(spec: OpSpec, arguments: Arguments, runner=None, device=None) -> None:
    """Law 5: a row in a batch of mixed widths equals the same row alone, bit for bit."""
    got = run(spec, arguments, runner, device)
    for r in some_rows(spec.rows(arguments)):
        one, indices = spec.row(copy(arguments), r)
        alone = run(spec, one, runner, device)
        for name, (here, there) in indices.items():
            same = same_bits(got[name][here], alone[name][there])
            hold(same, f"{spec.name}: {name} row {r} alone has other bits")


def check_rows(spec: OpSpec, arguments: Arguments, runner=None, device=None) -> None:
    """Law 5 within law 1: rows of a mixed batch, each alone, against float64."""
    count = spec.rows(arguments)
    for r in sorted({0, count // 2, count - 1}):
        one, _ = spec.row(copy(arguments), r)
        check_reference(spec, one, runner, device)


def check_inputs_unchanged(spec: OpSpec, arguments: Arguments, runner=None, device=None) -> None:
    """Law 8: what is not declared as an output keeps its bits."""
    given = copy(arguments, device)
    call(spec, given, runner, device)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and name not in spec.outputs:
            kept = same_bits(given[name].to(value.device), value)
            hold(kept, f"{spec.name}: {name} was changed")


def check_repeat(spec: OpSpec, arguments: Arguments, step, runner=None, device=None) -> None:
    """Law 7: equal bits on a second run, and when recorded in the empty `step` and replayed (twice,
    if the op has no state: the first replay may record a graph)."""
    want = run(spec, arguments, runner, device)
    again = run(spec, arguments, runner, device)
    hold(all(same_bits(again[n], want[n]) for n in spec.outputs), f"{spec.name}: a second run")
    recorded = copy(arguments, device)
    call(spec, recorded, step, device)
    hold(len(step) == 1, f"{spec.name}: recorded {len(step)} calls")
    for name in spec.outputs:
        here = arguments[name]
        hold(same_bits(recorded[name].to(here.device), here), f"{spec.name}: recording ran the op")
    for replay in ("the first replay", "a later replay"):
        for name in spec.outputs:
            recorded[name].copy_(arguments[name])
        step.run()
        for name in spec.outputs:
            same = same_bits(recorded[name].to(want[name].device), want[name])
            hold(same, f"{spec.name}: {name} of {replay}")


def one_width(arguments: Arguments) -> list[Arguments]:
    """The arguments with all rows at one width, for each width that rows have."""
    picker = "row_width" if "row_width" in arguments else "seq_width"
    if arguments.get(picker) is None:
        return [arguments]
    found = []
    for w in range(max(arguments[picker].tolist()) + 1):
        alike = copy(arguments)
        alike[picker].fill_(w)
        found.append(alike)
    return found
