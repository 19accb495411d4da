"""Proof in miniature that elastic training works: one parent, every way of making it smaller.

    python bench/elastify.py                # everything, continues where it was stopped
    python bench/elastify.py --quick        # smaller everything, minutes
    python bench/elastify.py --parts order depth

A dense model of the arithmetic task is trained, then made elastic. Per width: (a) nested with a
learnt router, (b) nested with hand-picked sizes, (c) the prefix without distillation, (d) a model
of its size trained alone on as many tokens, (e) one distilled alone. Besides: importance against
random order, width against depth, caches of different widths, and budget control. Each part writes
its JSON when it is done; a part that is there is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from elastify_data import CHECK_SEED, PlainTraining, Problems, accuracy
from elastify_report import pareto, write_report

from elastic_infer.checkpoint import Checkpoint
from elastic_infer.config import (
    ModelConfig,
    Width,
    count_parameters,
    full_width,
    parse_widths,
    slice_config,
)
from elastic_infer.elastify import (
    Cost,
    Distiller,
    ElasticNemotronH,
    Importance,
    LearnedSizes,
    Settings,
    Stage,
    export_elastic,
    importance_order,
    measure_importance,
    plot_metrics,
    random_order,
    sort_model,
)
from elastic_infer.elastify.distill import Result, evaluate
from elastic_infer.elastify.importance import layer_errors
from elastic_infer.elastify.reasoner.design import WIDTHS, reasoner_config
from elastic_infer.elastify.reasoner.vocabulary import write_tokenizer
from elastic_infer.elastify.torch_model import Attention, Mamba
from elastic_infer.slicing import slice_state_dict

ROOT = Path(__file__).resolve().parents[1]
NARROW = ("M", "S")


@dataclass(frozen=True)
class Scale:
    """How much of everything: steps of the parent and of each distillation, sizes of checks."""

    parent_steps: int = 3600
    steps: int = 900
    tokens: int = 2048
    operations: int = 3
    checks: int = 200
    calibration: int = 32
    random_orders: int = 3
    problems: int = 200
    front_problems: int = 1000
    budgets: tuple[int | None, ...] = (0, 8, 16, 32, 64, None)
    policies: tuple[str, ...] = ("carry", "exact", "window(16)")


QUICK = Scale(300, 100, 1024, 2, 100, 4, 2, 16, 32, (8, None), ("carry", "exact"))


class Bench:
    """The parts, their results and what they share."""

    def __init__(self, out: Path, scale: Scale, seed: int):
        self.out, self.scale, self.seed = out, scale, seed
        out.mkdir(parents=True, exist_ok=True)
        self.data = Problems(scale.tokens, scale.operations)
        self.checks = self.data.checks(scale.checks)
        raw = {k: v for k, v in reasoner_config().raw.items() if k != "elastic"}
        self.config = ModelConfig.from_dict({**raw, "dtype": "float32"})
        self.picked = parse_widths(self.config, WIDTHS)
        self.whole = count_parameters(self.config, full_width(self.config)).total

    def part(self, name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a part: read where it was made before."""
        path = self.out / f"{name}.json"
        if not path.is_file():
            print(f"{name} …", flush=True)
            start = time.monotonic()
            result = {**run(), "seconds": round(time.monotonic() - start, 1), "seed": self.seed}
            partial = path.with_suffix(".tmp")
            partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            partial.replace(path)
        return json.loads(path.read_text(encoding="utf-8"))

    # What parts start from ----------------------------------------------------------------------

    def parent(self) -> ElasticNemotronH:
        """The dense parent, as it was trained."""
        return ElasticNemotronH.load(self.out / "parent")

    def sorted_parent(self) -> ElasticNemotronH:
        """The parent in the order of importance."""
        importance = Importance.load(self.out / "importance.safetensors")
        return sort_model(self.parent(), importance_order(self.config, importance))

    def calibration(self) -> list[Any]:
        """The batches that importance is measured on."""
        stream = self.data.batches(1, 1, seed=77)
        return [next(stream) for _ in range(self.scale.calibration)]

    def settings(self, **changes: Any) -> Settings:
        """Of every distillation: equal steps, rates and data."""
        steps = self.scale.steps
        stages = (Stage(steps * 2 // 3, 512), Stage(steps - steps * 2 // 3, 512))
        values = {"stages": stages, "lr": 1e-3, "warmup": 30, "save_every": 100}
        return Settings(**{**values, "seed": self.seed, **changes})

    def measured(self, model: ElasticNemotronH, widths: dict[str, Width]) -> dict[str, Any]:
        """Accuracy and parameters of widths."""
        out = {}
        for name, width in widths.items():
            counts = count_parameters(model.config, width)
            out[name] = {
                **accuracy(model, self.checks, width),
                "parameters": counts.total,
                "active": counts.active,
            }
        return out

    # Parts --------------------------------------------------------------------------------------

    def run_parent(self) -> dict[str, Any]:
        """Trains the dense parent and measures importance."""
        training = PlainTraining(
            self.config, self.data, self.scale.parent_steps, self.seed, self.out / "train-parent"
        )
        model, tokens = training.run()
        model.save(self.out / "parent")
        write_tokenizer(self.out / "parent")
        found = measure_importance(model, self.calibration(), layers=True)
        found.save(self.out / "importance.safetensors")
        widths = {"L": full_width(self.config, "L")}
        return {
            "tokens": tokens,
            "widths": self.measured(model, widths),
            "layer_errors": found.layer_errors.tolist(),
        }

    def run_order(self) -> dict[str, Any]:
        """Importance order against random ones: prefixes cut before any training."""
        parent = self.parent()
        batches = self.data.validation(1, 1, 1)
        orders = {"importance": self.sorted_parent()}
        for seed in range(self.scale.random_orders):
            order = random_order(self.config, seed)
            orders[f"random {seed}"] = sort_model(copy.deepcopy(parent), order)
        out = {}
        for name, model in orders.items():
            losses = evaluate(model, parent, self.picked, batches)
            out[name] = self.measured(model, self.picked)
            for width, loss in losses.items():
                out[name][width]["divergence"] = loss
        return {"orders": out}

    def distilled(self, name: str, result: Result, distiller: Distiller) -> dict[str, Any]:
        model = ElasticNemotronH(distiller.model.config)
        model.load_state_dict(result.weights)
        found = self.measured(model, result.widths)
        for width, loss in result.losses.items():
            found[width]["divergence"] = loss
        return {"widths": found, "tokens": distiller.tokens}

    def run_router(self) -> dict[str, Any]:
        """(a) All widths at once, sizes learnt."""
        shares = [count_parameters(self.config, self.picked[n]).total / self.whole for n in NARROW]
        settings = self.settings(
            budgets=(1.0, *shares), cost=Cost("total"), router_steps=self.scale.steps * 2 // 3
        )
        run = self.out / "router"
        distiller = Distiller(self.sorted_parent(), self.data, run, settings)
        result = distiller.run()
        plot_metrics(run / "metrics.jsonl", self.out / "router.png")
        elastic = self.out / "elastic"
        elastic.mkdir(exist_ok=True)
        export_elastic(Checkpoint.open(self.out / "parent"), result, elastic)
        LearnedSizes(distiller.router, settings.cost, result.widths, result.losses).save(elastic)
        table = json.loads((elastic / "config.json").read_text())["elastic"]["widths"]
        cut = self.measured(self.sorted_parent(), result.widths)
        return {**self.distilled("router", result, distiller), "sizes": table, "cut": cut}

    def run_uniform(self) -> dict[str, Any]:
        """(b) All widths at once, sizes picked by hand."""
        settings = self.settings(budgets=(1.0, 0.7, 0.4))
        distiller = Distiller(
            self.sorted_parent(), self.data, self.out / "uniform", settings, widths=self.picked
        )
        return self.distilled("uniform", distiller.run(), distiller)

    def run_scratch(self) -> dict[str, Any]:
        """(d) One model per width, trained alone from scratch on as many steps as a family."""
        out, tokens = {}, 0
        for name in NARROW:
            raw = slice_config(self.config, self.picked[name])
            config = ModelConfig.from_dict(raw)
            folder = self.out / f"scratch-{name}"
            model, seen = PlainTraining(
                config, self.data, self.scale.steps, self.seed, folder
            ).run()
            out |= self.measured(model, {name: full_width(config, name)})
            tokens += seen
        return {"widths": out, "tokens": tokens}

    def alone(self, name: str, model: ElasticNemotronH) -> tuple[dict[str, Any], int]:
        """A smaller model distilled by itself from the parent."""
        settings = self.settings(budgets=(1.0,), names=(name,))
        distiller = Distiller(
            model,
            self.data,
            self.out / f"alone-{name}",
            settings,
            widths={name: full_width(model.config, name)},
            teacher=self.parent(),
        )
        result = self.distilled(name, distiller.run(), distiller)
        return result["widths"][name], result["tokens"]

    def run_alone(self) -> dict[str, Any]:
        """(e) One model per width, cut from the sorted parent and distilled alone."""
        out, tokens, parent = {}, 0, self.sorted_parent()
        for name in NARROW:
            width = self.picked[name]
            model = ElasticNemotronH(ModelConfig.from_dict(slice_config(self.config, width)))
            state = slice_state_dict(self.config, parent.checkpoint_state(), width)
            model.load_checkpoint_state(state)
            out[name], seen = self.alone(name, model)
            tokens += seen
        return {"widths": out, "tokens": tokens}

    def run_depth(self) -> dict[str, Any]:
        """Layers left out until the parameters are those of width M, then distilled alone."""
        parent = self.parent()
        limit = count_parameters(self.config, self.picked["M"]).total
        removed: list[int] = []
        model = parent
        while count_parameters(model.config, model.full).total > limit:
            errors = layer_errors(parent, self.calibration(), removed)
            errors[removed] = torch.inf
            removed.append(int(errors.argmin()))
            model = without_layers(parent, removed)
        before = accuracy(parent, self.checks, skip=set(removed))
        after, tokens = self.alone("depth", model)
        return {"removed": removed, "cut": before, "distilled": after, "tokens": tokens}

    @torch.no_grad()
    def run_similarity(self) -> dict[str, Any]:
        """Cosine of K, V and Mamba state between widths of the elastic model, on the same text."""
        checkpoint = Checkpoint.open(self.out / "elastic")
        model = ElasticNemotronH.load(self.out / "elastic")
        batch = self.data.checks(16)[-1]
        kept = {n: caches(model, batch.inputs, w) for n, w in checkpoint.widths.items()}
        out = {}
        for name in NARROW:
            out[f"L-{name}"] = {
                part: round(float(F.cosine_similarity(kept["L"][part], small, dim=-1).mean()), 4)
                for part, small in kept[name].items()
            }
        return {"cosine": out}

    def run_control(self) -> dict[str, Any]:
        """Accuracy and latency of think, answer pairs under thinking budgets and policies."""
        from elastic_infer import Engine
        from elastic_infer.elastify.reasoner.evaluate import evaluate as solve
        from elastic_infer.elastify.reasoner.evaluate import think_answer
        from elastic_infer.elastify.reasoner.task import held_out_problems

        scale, points = self.scale, []

        def ask(engine: Any, point: dict[str, Any], count: int) -> dict[str, Any]:
            each = count // scale.operations
            problems = [
                problem
                for operations in range(1, scale.operations + 1)
                for problem in held_out_problems(CHECK_SEED, each, operations)
            ]
            plan = think_answer(
                point["think"], point["answer"], budget=point["budget"], policy=point["policy"]
            )
            found = solve(engine, problems, plan=plan)
            return {**point, **found.to_dict(), "seconds": found.seconds / len(problems)}

        with Engine.from_pretrained(self.out / "elastic", max_num_seqs=64) as engine:
            for think in engine.widths:
                for answer in engine.widths:
                    for policy in scale.policies if think != answer else ("carry",):
                        for budget in scale.budgets:
                            point = {"think": think, "answer": answer}
                            point |= {"policy": policy, "budget": budget}
                            points.append(ask(engine, point, scale.problems))
            front = [ask(engine, point, scale.front_problems) for point in pareto(points)]
        return {"points": points, "front": front}


def without_layers(model: ElasticNemotronH, removed: list[int]) -> ElasticNemotronH:
    """A model of the other layers, with their weights."""
    kept = [i for i in range(model.config.num_layers) if i not in removed]
    raw = {k: v for k, v in model.config.raw.items() if k not in ("layers_block_type", "elastic")}
    raw["hybrid_override_pattern"] = "".join(model.config.layers[i] for i in kept)
    raw["num_hidden_layers"] = len(kept)
    small = ElasticNemotronH(ModelConfig.from_dict(raw))
    state = {}
    for name, tensor in model.checkpoint_state().items():
        if not name.startswith("backbone.layers."):
            state[name] = tensor
            continue
        index, rest = name.removeprefix("backbone.layers.").split(".", 1)
        if int(index) in kept:
            state[f"backbone.layers.{kept.index(int(index))}.{rest}"] = tensor
    small.load_checkpoint_state(state)
    return small


def caches(model: ElasticNemotronH, ids: torch.Tensor, width: Width) -> dict[str, torch.Tensor]:
    """K and V [positions, K] and the final Mamba states [heads, P*N] of all layers.

    States only of heads that every width has: others are not there to compare.
    """
    found: dict[str, list[torch.Tensor]] = {"K": [], "V": [], "state": []}
    groups, heads = model.config.n_groups, min(WIDTHS["S"]["mamba_num_heads"], *width_heads(width))

    def watch(mixer: Any, arguments: tuple[Any, ...]) -> None:
        x, hidden = arguments[0], width.hidden_size
        if isinstance(mixer, Attention):
            for part, layer in (("K", mixer.k_proj), ("V", mixer.v_proj)):
                out = F.linear(x, layer.weight[:, :hidden])
                found[part].append(out.unflatten(-1, (-1, model.config.head_dim)).flatten(0, 2))
        elif isinstance(mixer, Mamba):
            found["state"].append(final_states(mixer, x, hidden)[:, :, : heads // groups])

    handles = [b.mixer.register_forward_pre_hook(watch) for b in model.backbone.layers]
    model.hidden(ids, width)
    for handle in handles:
        handle.remove()
    states = [state.flatten(3).flatten(0, 2) for state in found["state"]]
    return {"K": torch.cat(found["K"]), "V": torch.cat(found["V"]), "state": torch.cat(states)}


def width_heads(width: Width) -> list[int]:
    """Mamba heads of the layers that have any."""
    return [heads for heads in width.mamba_num_heads if heads]


def final_states(mixer: Mamba, x: torch.Tensor, hidden: int) -> torch.Tensor:
    """sum_t exp(A sum_{s>t} dt_s) dt_t x_t B_t': state after the last token [B, G, H/G, P, N]."""
    from elastic_infer.elastify.torch_ops import causal_conv

    cfg = mixer.config
    inner, state = cfg.mamba_num_heads * cfg.mamba_head_dim, cfg.n_groups * cfg.ssm_state_size
    sizes = [inner, inner + 2 * state, cfg.mamba_num_heads]
    _, xbc, dt = F.linear(x, mixer.in_proj.weight[:, :hidden]).split(sizes, -1)
    xbc = F.silu(causal_conv(xbc, mixer.conv1d.weight[:, 0], mixer.conv1d.bias))
    xs, b, _ = xbc.split([inner, state, state], -1)
    dt = F.softplus(dt + mixer.dt_bias)
    later = dt.flip(1).cumsum(1).flip(1) - dt
    scale = torch.exp(-mixer.A_log.exp() * later) * dt
    xs = (xs.unflatten(-1, (cfg.mamba_num_heads, -1)) * scale[..., None])
    xs = xs.unflatten(2, (cfg.n_groups, -1))
    return torch.einsum("btghp,btgn->bghpn", xs, b.unflatten(-1, (cfg.n_groups, -1)))


PARTS = ("parent", "order", "router", "uniform", "scratch", "alone", "depth", "similarity")
PARTS += ("control",)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the run")
    parser.add_argument("--quick", action="store_true", help="smaller everything")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_flush_denormal(True)
    name = "elastify-quick" if given.quick else "elastify"
    out = given.out or ROOT / "build" / f"{name}-{given.seed}"
    bench = Bench(out, QUICK if given.quick else Scale(), given.seed)
    results = {"parent": bench.part("parent", bench.run_parent)}  # the others start from it
    for part in PARTS:
        if part in given.parts and part != "parent":
            if part in ("similarity", "control"):
                bench.part("router", bench.run_router)
            results[part] = bench.part(part, getattr(bench, f"run_{part}"))
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    head = {"commit": commit, "machine": platform.machine(), "date": time.strftime("%Y-%m-%d"),
            "scale": vars(bench.scale), "seed": given.seed, "threads": given.threads}  # fmt: skip
    print(write_report(out, head, results))


if __name__ == "__main__":
    main()
