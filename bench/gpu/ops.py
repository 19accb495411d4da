"""Every kernel at true sizes: time, traffic, share of the roof, and a peer in turns with it."""

from __future__ import annotations

import math
from typing import Any

import torch

from bench.common.pairs import UNCHECKED, compare
from bench.gpu.peers import COMPILED, peers_of
from bench.gpu.shapes import OpCase, OpCases, sizes
from bench.gpu.timing import RoofPart, emptied, floor, free_bytes
from bench.gpu.worker import PassedOver
from elastic_infer.codes import dtype_name
from elastic_infer.ops import registry
from elastic_infer.ops._spec import Arguments, case_id
from elastic_infer.ops.matmul import weight_bytes
from elastic_infer.ops.testing.laws import copy
from elastic_infer.ops.testing.shapes import NATIVE

DTYPE = torch.bfloat16
CONTEXT, PROMPT = 4096, 4096  # tokens
COPIES = 24 << 30  # bytes that all copies of one problem may take


class Part(RoofPart):
    """Items are "roof", then the ops' cases in turns of steps and prompts, then further peers."""

    def __init__(self, setting, module):
        super().__init__(setting, module)
        self.specs = registry()
        made = OpCases(sizes(setting.emulate))
        context, prompt = (70, 16) if setting.emulate else (CONTEXT, PROMPT)
        steps, prompts = made.steps(context), made.prompts(prompt)
        if setting.emulate:
            steps = [c for c in steps if c.rows <= 8]
        head = len(prompts) // 2
        ordered = [*steps[:25], *prompts[:head], *steps[25:], *prompts[head:]]
        if setting.quick:
            ordered = list({c.op: c for c in reversed(ordered)}.values())
        self.cases = {c.name: c for c in ordered}
        known = {c.op for c in ordered}
        for spec in self.specs.values():  # an op that no model's case names brings its own
            for case in spec.cases() if spec.name not in known else ():
                if bool(case.get("bench")) != setting.emulate:
                    own = OpCase(spec.name, case_id(case), 0, "", case, case)
                    self.cases.setdefault(own.name, own)

    def items(self) -> list[str]:
        further = (
            []
            if self.setting.emulate
            else [
                f"{name} | compiled"
                for name, c in self.cases.items()
                if c.op in COMPILED and c.rows in (1, 32)
            ]
        )
        return ["roof", *self.cases, *further]

    def row(self, item: str) -> dict[str, Any]:
        name, _, way = item.partition(" | ")
        with emptied(), torch.device(self.setting.device):  # cases are drawn where they are used
            return self._row(self.cases[name], bool(way))

    def _require(self, case: OpCase) -> None:
        """Passes over a kernel that is for other cards."""
        native = NATIVE.get(case.case.get("kernel", ""))
        why = native and native.lacks(self.module, self.setting.device)
        if why:
            raise PassedOver(why)

    def _problems(self, case: OpCase) -> list[Arguments]:
        """Copies of the case that together exceed the cache, as far as memory allows."""
        spec, device = self.specs[case.op], self.setting.device
        dtype = DTYPE if DTYPE in spec.dtypes else torch.float32
        problem = spec.inputs(case.case, dtype, torch.Generator(device).manual_seed(0))
        size = sum(v.nbytes for v in problem.values() if isinstance(v, torch.Tensor))
        moved, _ = spec.cost(case.cost, dtype.itemsize)
        each = 4 * size  # the problem, ours, its tiles, the peer's
        if each > free_bytes(self.setting):
            raise PassedOver(f"needs {each / 1e9:.0f} GB of free device memory")
        copies = max(1, min(32, COPIES // each, math.ceil(self.clock.flushed / moved)))
        return [problem, *(copy(problem) for _ in range(copies - 1))]

    def _row(self, case: OpCase, compiled: bool) -> dict[str, Any]:
        self._require(case)
        spec, problems = self.specs[case.op], self._problems(case)
        ours, theirs = [copy(p) for p in problems], [copy(p) for p in problems]
        step = self.module.Step(self.module.Pool())
        for mine in ours:
            spec.call(mine, step)
        step.run()
        peer = self._peer(case, problems[0], ours[0], theirs, compiled)
        for mine, fresh in zip(ours, problems):  # states have moved on: as for the peer, from start
            for output in spec.outputs:
                mine[output].copy_(fresh[output])
        times = self.clock.pairs(step.run, peer.get("work"))
        return self._figures(case, problems, times, peer)

    def _peer(
        self, case: OpCase, problem: Arguments, mine: Arguments, theirs: list[Arguments], further
    ) -> dict[str, Any]:
        """The peer's recorded work and description, compared with ours first; or why none."""
        spec = self.specs[case.op]
        makers = peers_of(case.op)
        if not makers:
            return {"note": "no peer computes this"}
        make = makers[0]
        try:
            calls = [make(t) for t in theirs]
            if further:
                calls = [torch.compile(call, dynamic=False) for call in calls]
            calls[0]()
            getattr(calls[0], "finish", lambda: None)()
            if case.op not in UNCHECKED:
                compare(spec, mine, theirs[0], problem)
            work, how = self.clock.recorded(calls)
        except Exception as error:
            if "CUDA error" in str(error):
                raise
            return {"note": f"the peer failed: {type(error).__name__}: {error}"[:500]}
        about = (make.__doc__ or "").strip().split("\n")[0]
        return {"work": work, "peer": ("compiled: " if further else "") + about, "peer_how": how}

    def _figures(
        self, case: OpCase, problems: list[Arguments], times: dict[str, float], peer: dict[str, Any]
    ) -> dict[str, Any]:
        spec, copies = self.specs[case.op], len(problems)
        dtype = DTYPE if DTYPE in spec.dtypes else torch.float32
        moved, flops = spec.cost(case.cost, dtype.itemsize)
        row: dict[str, Any] = {
            "op": case.op,
            "part": case.part,
            "rows": case.rows,
            "width": case.width,
            "case": case_id(case.case),
            "dtype": dtype_name(dtype),
        }
        if case.op == "moe_matmul":  # the count of experts is known here, not an expectation
            E, J = case.cost["E"], case.cost["J"]
            distinct = sum(len(p["ids"].unique()) for p in problems) / copies
            expected = E * (1 - (1 - J / E) ** case.rows)
            each = 2 * case.cost["D"] * case.cost["F"] * weight_bytes(case.cost, dtype.itemsize)
            moved += (distinct - expected) * each
            row["distinct_experts"] = round(distinct, 1)
        seconds = times["seconds"] / copies
        limit, least = floor(moved, flops, self.roof)
        row |= {
            "us": 1e6 * seconds,
            "spread": times["spread"],
            "problems": copies,
            "bytes": int(moved),
            "flops": flops,
            "gb_s": moved / seconds / 1e9,
            "tflop_s": flops / seconds / 1e12,
            "roof": limit,
            "percent_of_roof": 100 * least / seconds,
        }
        row |= {k: v for k, v in peer.items() if k != "work"}
        if "ratio" in times:
            row |= {"peer_us": 1e6 * times["peer_seconds"] / copies, "ratio": times["ratio"]}
        return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
