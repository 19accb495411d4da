"""Smaller caches over 4,000 steps: Mamba state in float16, keys and values in FP8.

    python -m bench.cpu.drift                  # bench/results/drift.json and drift.svg
    python -m bench.cpu.drift --problems 40    # fewer problems of the reasoner

Three measurements. **Heads**: the recurrence of a Mamba layer, one head for each decay from 0.9 to
0.99999 per token, its inputs as a convolution with SiLU leaves them, a passage of 1,000 tokens and
then a tenth of its size; the output compared with float64. **Reasoner**: the shipped model reads
4,000 tokens of its task, one at a time; its logits compared with those of a float32 cache.
**Accuracy**: problems that each of its widths solves. Rounding to nearest (float16 and bfloat16) is
no option of the library; it is computed here, in torch, to show why the state is rounded
stochastically: what a slow head loses or gains per token is less than half a step of the format.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from elastic_infer import Engine, demo_model
from elastic_infer.device.machine import machine, today
from elastic_infer.model.batch import Segment
from elastic_infer.ops.ssm_step import ssm_step
from elastic_infer.reasoner.evaluate import SEED, evaluate
from elastic_infer.reasoner.task import MAX_OPERATIONS, held_out_problems

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
TOKENS, EVERY, LOUD = 4000, 100, 1000
FADES = [10 ** (-1 - i / 2) for i in range(9)]  # 0.1 to 0.00001
Figures = dict[str, Any]
SMALL = {
    "float32": {},
    "float16, stochastic": {"mamba_ssm_cache_dtype": "float16"},
    "FP8 keys and values": {"kv_cache_dtype": "fp8"},
    "both": {"mamba_ssm_cache_dtype": "float16", "kv_cache_dtype": "fp8"},
}
NEAREST = {"float16, nearest": torch.float16, "bfloat16, nearest": torch.bfloat16}
Say = Callable[[str], None]


class Heads:
    """Seeded inputs of one Mamba layer: x, B, C after SiLU, and a head for each of `FADES`, the
    share of the state that goes with a token."""

    def __init__(self, tokens: int, size: int, state: int, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        heads = len(FADES)
        self.shape = (heads, size, state)

        def silu(columns: int) -> torch.Tensor:
            return torch.nn.functional.silu(torch.randn(tokens, columns, generator=g))

        self.x, self.B, self.C = silu(heads * size), silu(state), silu(state)
        self.x[LOUD:] *= 0.1
        step = torch.tensor(FADES)
        self.dt_bias = step + torch.log(-torch.expm1(-step))  # softplus(dt_bias) = step
        self.dt = torch.randn(tokens, heads, generator=g) * 0.5
        self.A_log = self.D = torch.zeros(heads)

    def exact(self, kept: torch.dtype = torch.float64) -> Iterator[torch.Tensor]:
        """y [heads, size] after every token; computed in float64, or in float32 with the state
        rounded to nearest to `kept` after every token."""
        kind = torch.float64 if kept == torch.float64 else torch.float32
        H, P, N = self.shape
        x, B, C, raw = (t.to(kind) for t in (self.x, self.B, self.C, self.dt + self.dt_bias))
        dt = torch.nn.functional.softplus(raw)
        decay = torch.exp(-self.A_log.to(kind).exp() * dt)
        h = torch.zeros(H, P, N, dtype=kind)
        for t in range(len(x)):
            drive = (dt[t][:, None] * x[t].view(H, P))[:, :, None]
            h = decay[t][:, None, None] * h + drive * B[t]
            yield (h @ C[t]).double()
            h = h.to(kept).to(kind)

    def stepped(self, state: torch.dtype) -> Iterator[torch.Tensor]:
        """The same from `ssm_step`, its state kept in `state`."""
        H, P, N = self.shape
        pool, y = torch.zeros(1, H, P, N, dtype=state), torch.empty(1, H * P)
        slots, context = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        for t in range(len(self.x)):
            context[0] = t
            one = slice(t, t + 1)
            ssm_step(
                self.x[one],
                self.B[one],
                self.C[one],
                self.dt[one],
                self.A_log,
                self.D,
                self.dt_bias,
                pool,
                y,
                slots=slots,
                context=context,
                seed=1,
            )
            yield y.view(H, P).double()


def head_drift(tokens: int = TOKENS, size: int = 32, state: int = 64, seed: int = 0) -> Figures:
    """By kind of state: {"over_time": relative error of y (2-norm) over every `EVERY` tokens, root
    mean square of the heads, "by_fade": of each head over the last `EVERY`}."""
    layer = Heads(tokens, size, state, seed)
    runs = {
        "float32": layer.stepped(torch.float32),
        "float16, stochastic": layer.stepped(torch.float16),
    }
    runs |= {name: layer.exact(kept) for name, kept in NEAREST.items()}
    wrong = {name: torch.zeros(len(FADES)).double() for name in runs}
    found: Figures = {name: {"over_time": []} for name in runs}
    whole = torch.zeros(len(FADES)).double()
    for t, want in enumerate(layer.exact(), 1):
        whole += want.square().sum(1)
        for name, run in runs.items():
            wrong[name] += (next(run) - want).square().sum(1)
        if t % EVERY == 0:
            for name in runs:
                square = wrong[name] / whole
                found[name]["over_time"].append(float(square.mean().sqrt()))
                found[name]["by_fade"] = square.sqrt().tolist()
                wrong[name].zero_()
            whole.zero_()
    return found


def _long_reasoner(folder: Path) -> Path:
    """The shipped reasoner with a context of `TOKENS` (nothing in it counts positions)."""
    for file in demo_model().iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((demo_model() / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = TOKENS + 64
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _task_tokens(engine: Engine, count: int) -> list[int]:
    """Token ids of problems of the task, one after another."""
    ids: list[int] = []
    for problem in held_out_problems(SEED, count // 4):
        ids += engine.tokenizer.encode(problem.prompt)
        if len(ids) >= count:
            break
    return ids[:count]


def _logits(
    folder: Path,
    ids: list[int],
    width: str,
    options: dict[str, str],
    kept: torch.dtype | None = None,
) -> torch.Tensor:
    """float32 [tokens, V]: logits after every token, read one by one; with `kept` the state is
    rounded to nearest in between."""
    rows = []
    with Engine.from_pretrained(folder, max_num_seqs=1, threads=1, **options) as engine:
        model = engine.core.model

        def job() -> None:
            sequence = model.cache.open()
            for i, token in enumerate(ids):
                segment = Segment(sequence, [token], width, "step" if i else "prefill")
                rows.append(model.forward([segment]).logits[0].clone())
                if kept is not None:
                    for state in model.cache.ssm:
                        state[sequence.slot] = state[sequence.slot].to(kept).float()
            model.cache.close(sequence)

        engine.core.call(job)
    return torch.stack(rows)


def reasoner_drift(width: str, tokens: int = TOKENS, every: int = EVERY) -> Figures:
    """By kind of cache: {"error": relative error of the logits over each `every` tokens, "agree":
    share of all tokens whose likeliest next token is that of the float32 cache}."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = _long_reasoner(Path(temporary))
        with Engine.from_pretrained(folder, max_num_seqs=1, threads=1) as engine:
            ids = _task_tokens(engine, tokens)
        exact = _logits(folder, ids, width, {})
        runs = {n: _logits(folder, ids, width, o) for n, o in SMALL.items() if n != "float32"}
        runs |= {n: _logits(folder, ids, width, {}, kept) for n, kept in NEAREST.items()}
    found = {}
    for name, rows in runs.items():
        wrong = (rows - exact).square().sum(1).view(-1, every).sum(1)
        share = (wrong / exact.square().sum(1).view(-1, every).sum(1)).sqrt()
        agree = (rows.argmax(1) == exact.argmax(1)).float().mean()
        found[name] = {"error": share.tolist(), "agree": float(agree)}
    return found


def accuracy(problems: int, say: Say) -> Figures:
    """Solved problems by kind of cache, then by width."""
    asked, found = held_out_problems(SEED, problems * MAX_OPERATIONS), {}
    for name, options in SMALL.items():
        with Engine.from_pretrained(demo_model(), max_num_seqs=64, **options) as engine:
            rows = {w: evaluate(engine, asked, width=w).score.to_dict() for w in engine.widths}
        found[name] = rows
        say(f"{name}: " + ", ".join(f"{w} {r['accuracy']:.1%}" for w, r in rows.items()))
    return found


def draw(figures: Figures, picture: Path) -> None:
    """Error over tokens, of heads and of the reasoner, as an SVG."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.6, 3.8), layout="constrained")
    FigureCanvasSVG(figure)
    left, middle, right = figure.subplots(1, 3)
    at = [figures["every"] * (i + 1) for i in range(figures["tokens"] // figures["every"])]
    colours = {name: f"C{i}" for i, name in enumerate([*SMALL, *NEAREST])}
    for name, row in figures["heads"].items():
        left.plot(at, row["over_time"], color=colours[name], label=name)
        middle.plot(FADES, row["by_fade"], color=colours[name], label=name)
    for name, row in figures["reasoner"].items():
        right.plot(at, row["error"], color=colours[name], label=name)
    left.set(title="Mamba heads: output against float64", ylabel="relative error")
    middle.set(title="by what a head forgets per token, at the end", xscale="log")
    right.set(title=f"Reasoner at {figures['width']}: logits against float32 caches")
    for axes in (left, middle, right):
        axes.set(xlabel="1 - decay" if axes is middle else "tokens", yscale="log")
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.savefig(picture, metadata={"Date": None})


def measure(problems: int, say: Say) -> Figures:
    """All figures of the results file."""
    where = machine()
    heads = head_drift()
    say("heads: " + ", ".join(f"{n} {r['over_time'][-1]:.2e}" for n, r in heads.items()))
    width = json.loads((demo_model() / "config.json").read_text())["elastic"]["default_width"]
    reasoner = reasoner_drift(width)
    say("reasoner: " + ", ".join(f"{n} {r['error'][-1]:.2e}" for n, r in reasoner.items()))
    return {
        "date": today(),
        "machine": where,
        "tokens": TOKENS,
        "every": EVERY,
        "width": width,
        "fades": FADES,
        "problems": problems * MAX_OPERATIONS,
        "heads": heads,
        "reasoner": reasoner,
        "accuracy": accuracy(problems, say),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=100, help="per number of operations")
    parser.add_argument("--out", type=Path, default=RESULTS / "drift.json")
    given = parser.parse_args()
    figures = measure(given.problems, lambda text: print(text, file=sys.stderr, flush=True))
    given.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    draw(figures, given.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
