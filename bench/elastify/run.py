"""Proof in miniature that elastic training works: one parent, every way of making it smaller.

    python -m bench.elastify.run                # everything, continues where it was stopped
    python -m bench.elastify.run --quick        # smaller everything, minutes
    python -m bench.elastify.run --seeds 0 1    # the comparison trainings twice
    python -m bench.elastify.run --parts order depth

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
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.common.commit import commit
from bench.elastify.caches import compare_caches
from bench.elastify.data import CHECK_SEED, PlainTraining, Problems, accuracy
from bench.elastify.pareto import price_again
from bench.elastify.price import calculated, from_file
from bench.elastify.report import write_report
from elastic_infer.checkpoint.checkpoint import Checkpoint
from elastic_infer.checkpoint.config import ModelConfig
from elastic_infer.checkpoint.counts import count_parameters
from elastic_infer.checkpoint.slicing import slice_state_dict
from elastic_infer.checkpoint.width_table import parse_widths, slice_config
from elastic_infer.checkpoint.widths import Width, full_width
from elastic_infer.device.machine import machine, today
from elastic_infer.elastify import (
    Cost,
    Distiller,
    ElasticNemotronH,
    Importance,
    LearnedSizes,
    Settings,
    Stage,
    default_choices,
    export_elastic,
    importance_order,
    measure_importance,
    plot_metrics,
    random_order,
    sort_model,
)
from elastic_infer.elastify.distill import Result, evaluate
from elastic_infer.elastify.importance import layer_errors
from elastic_infer.files.writing import write_json
from elastic_infer.reasoner.design import WIDTHS, reasoner_config
from elastic_infer.reasoner.task import MAX_OPERATIONS, held_out_problems
from elastic_infer.reasoner.vocabulary import write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
NARROW = ("M", "S")
NESTED = ("router", "uniform", "unswitched")


@dataclass(frozen=True)
class Scale:
    """How much of everything: steps of the parent and of each distillation, sizes of checks."""

    parent_steps: int = 3600
    steps: int = 900
    nested_steps: int = 1500
    switches: float = 0.3
    tokens: int = 2048
    operations: int = 3
    checks: int = 200
    calibration: int = 32
    random_orders: int = 3
    problems: int = 200
    front_problems: int = 1000
    budgets: tuple[int | None, ...] = (0, 8, 16, 32, 64, None)
    policies: tuple[str, ...] = ("carry", "exact", "window(16)")


QUICK = Scale(
    parent_steps=1000,
    steps=80,
    nested_steps=120,
    tokens=1024,
    operations=1,
    checks=100,
    calibration=4,
    random_orders=1,
    problems=32,
    front_problems=64,
    budgets=(8, None),
    policies=("carry", "exact"),
)


class Bench:
    """The parts, their results and what they share."""

    def __init__(self, out: Path, scale: Scale, seed: int):
        self.out, self.scale, self.seed = out, scale, seed
        self.commit = commit()
        self.tag = f"-{seed}" if seed else ""
        out.mkdir(parents=True, exist_ok=True)
        self.data = Problems(scale.tokens, scale.operations)
        self.checks = self.data.checks(scale.checks)
        raw = {k: v for k, v in reasoner_config().raw.items() if k != "elastic"}
        self.config = ModelConfig.from_dict({**raw, "dtype": "float32"})
        self.picked = parse_widths(self.config, WIDTHS)
        self.whole = count_parameters(self.config, full_width(self.config)).total

    def file(self, name: str) -> Path:
        """Where a part's result is; the parent is one for all seeds."""
        return self.out / f"{name}{'' if name == 'parent' else self.tag}.json"

    def part(self, name: str) -> dict[str, Any]:
        """The result of a part: read where it was made before."""
        path = self.file(name)
        if not path.is_file():
            print(f"{name}, seed {self.seed} …", flush=True)
            start = time.monotonic()
            result = getattr(self, f"run_{name}")()
            result = {
                **result,
                "seconds": round(time.monotonic() - start, 1),
                "seed": self.seed,
                "commit": self.commit,
                "date": today(),
            }
            write_json(path, result)
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

    def choices(self) -> dict[str, list[int]]:
        """Sizes that the router may give: the usual ones, and those that were picked by hand."""
        found = {axis: set(sizes) for axis, sizes in default_choices(self.config).items()}
        for sizes in WIDTHS.values():
            for axis, size in sizes.items():
                found[axis].add(size)
        return {axis: sorted(sizes, reverse=True) for axis, sizes in found.items()}

    def settings(self, nested: bool = False, **changes: Any) -> Settings:
        """Of every distillation: equal rates and data; a nested one has the steps of a family."""
        steps = self.scale.nested_steps if nested else self.scale.steps
        stages = (Stage(steps * 2 // 3, 512), Stage(steps - steps * 2 // 3, 512))
        values = {
            "stages": stages,
            "optimizer": "muon",
            "lr": 3e-3,
            "muon_lr": 0.02,
            "warmup": 30,
            "final_lr": 0.02,
            "save_every": 100,
        }
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
            self.config, self.data, self.scale.parent_steps, 0, self.out / "train-parent"
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
            nested=True,
            budgets=(1.0, *shares),
            cost=Cost("total"),
            choices=self.choices(),
            router_steps=self.scale.nested_steps // 2,
            switch_probability=self.scale.switches,
        )
        run = self.out / f"router{self.tag}"
        distiller = Distiller(self.sorted_parent(), self.data, run, settings)
        result = distiller.run()
        plot_metrics(run / "metrics.jsonl", self.out / f"router{self.tag}.png")
        elastic = self.out / f"elastic-router{self.tag}"
        elastic.mkdir(exist_ok=True)
        export_elastic(Checkpoint.open(self.out / "parent"), result, elastic)
        LearnedSizes(distiller.router, settings.cost, result.widths, result.losses).save(elastic)
        table = json.loads((elastic / "config.json").read_text())["elastic"]["widths"]
        cut = self.measured(self.sorted_parent(), result.widths)
        return {**self.distilled("router", result, distiller), "sizes": table, "cut": cut}

    def nested(self, name: str, switches: float) -> dict[str, Any]:
        """All widths at once, sizes picked by hand; leaves an elastic checkpoint."""
        settings = self.settings(True, budgets=(1.0, 0.7, 0.4), switch_probability=switches)
        run = self.out / f"{name}{self.tag}"
        distiller = Distiller(self.sorted_parent(), self.data, run, settings, widths=self.picked)
        result = distiller.run()
        elastic = self.out / f"elastic-{name}{self.tag}"
        elastic.mkdir(exist_ok=True)
        export_elastic(Checkpoint.open(self.out / "parent"), result, elastic)
        return self.distilled(name, result, distiller)

    def run_uniform(self) -> dict[str, Any]:
        """(b) All widths at once, sizes picked by hand."""
        return self.nested("uniform", self.scale.switches)

    def run_unswitched(self) -> dict[str, Any]:
        """(b) without training across switches."""
        return self.nested("unswitched", 0.0)

    def run_scratch(self) -> dict[str, Any]:
        """(d) One model per width, trained alone from scratch on as many steps as a family."""
        out, tokens = {}, 0
        for name in NARROW:
            raw = slice_config(self.config, self.picked[name])
            config = ModelConfig.from_dict(raw)
            folder = self.out / f"scratch-{name}{self.tag}"
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
            self.out / f"alone-{name}{self.tag}",
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

    def run_caches(self) -> dict[str, Any]:
        """How alike caches of widths are, and what a transplanted one is worth, per nested run."""
        found = {}
        for name in NESTED:
            folder = self.out / f"elastic-{name}{self.tag}"
            widths = Checkpoint.open(folder).widths
            found[name] = compare_caches(ElasticNemotronH.load(folder), self.checks, widths)
            found[name]["alone"] = self.part(name)["widths"]
        return found

    def run_control(self) -> dict[str, Any]:
        """Accuracy and latency of think, answer pairs under thinking budgets and policies."""
        from bench.elastify.control import measure

        scale = self.scale
        return measure(
            self.out / f"elastic-router{self.tag}",
            self.data.problems(scale.problems),
            self.data.problems(scale.front_problems, CHECK_SEED + 1),
            scale.budgets,
            scale.policies,
            calculated(),
        )

    def run_shipped(self) -> dict[str, Any]:
        """The nested runs and the shipped model on the same problems, by greedy decoding."""
        from bench.elastify.control import solved_by_width
        from elastic_infer import demo_model

        folders = {name: self.out / f"elastic-{name}{self.tag}" for name in ("router", "uniform")}
        problems = self.data.problems(self.scale.front_problems, CHECK_SEED + 1)
        folders["shipped"] = demo_model()
        out = {name: solved_by_width(folder, problems) for name, folder in folders.items()}
        hardest = held_out_problems(CHECK_SEED, self.scale.problems, MAX_OPERATIONS)
        return {"same": out, "longest": solved_by_width(folders["shipped"], hardest)}


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


PARTS = ("parent", "order", "router", "uniform", "unswitched", "scratch", "alone", "depth")
PARTS += ("caches", "control", "shipped")
# Parts that other parts read, besides the parent.
NEEDED = {"caches": NESTED, "control": ("router",), "shipped": ("router", "uniform")}
REPEATED = ("router", "uniform", "scratch", "alone", "depth")  # with every seed


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the run, default: build/elastify")
    parser.add_argument("--quick", action="store_true", help="smaller everything")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[0],
        help="of the comparison trainings; the parent is the same",
    )
    parser.add_argument("--prices", type=Path, help="measured step times of the large shapes")
    parser.add_argument("--report", action="store_true", help="tables of the parts that are there")
    parser.add_argument("--results", type=Path, help="folder that gets the tables and plots")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_flush_denormal(True)
    out = given.out or ROOT / "build" / ("elastify-quick" if given.quick else "elastify")
    scale = QUICK if given.quick else Scale()
    found: dict[str, dict[str, Any]] = {}
    for seed in given.seeds:
        bench = Bench(out, scale, seed)
        for name in PARTS:
            if given.report and not bench.file(name).is_file():
                continue
            bench.part("parent")
            wanted = name == "parent" or name in given.parts
            if wanted and (seed == given.seeds[0] or name in REPEATED):
                for before in NEEDED.get(name, ()):
                    bench.part(before)
                found.setdefault(name, {})[str(seed)] = bench.part(name)
    if given.prices is not None and "control" in found:
        for control in found["control"].values():
            price_again(control, from_file(given.prices))
    print(write_report(given.results or out, header(given, scale), found))


def header(given: argparse.Namespace, scale: Scale) -> dict[str, Any]:
    """Machine, date and scale of the figures; every result names its own commit."""
    return {
        "machine": machine(),
        "date": today(),
        "threads": given.threads,
        "quick": given.quick,
        "scale": asdict(scale),
    }


if __name__ == "__main__":
    main()
