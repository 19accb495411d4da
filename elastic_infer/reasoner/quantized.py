"""Accuracy of each width with quantized weights, with and without distillation.

``python -m elastic_infer.reasoner.quantized MODEL --out FILE`` quantizes MODEL in a
temporary folder in several ways, runs every width of each on the same held-out problems, and
writes accuracy, bytes and the errors of the weights after each.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..device.machine import machine, today
from ..elastify.corpus import IteratorData
from ..engine.engine import Engine
from ..files.writing import write_json
from ..quantize.distill import DistillSettings, distill_quantized
from ..quantize.write import DEFAULT_GROUPS, GROUPS, Quantizer, choose_formats, quantize_checkpoint
from ..sizing.footprint import bytes_per_token
from .data import batches, held_out_batches
from .evaluate import AT_ONCE, SEED, evaluate
from .task import MAX_OPERATIONS, held_out_problems

TOKENS = 1536  # positions of a batch
DATA_SEED, CHECK_SEED = 4242, 78
WAYS = {
    "fp8": ("fp8", DEFAULT_GROUPS, False),
    "nvfp4": ("nvfp4", DEFAULT_GROUPS, False),
    "fp8, every matrix": ("fp8", GROUPS, False),
    "nvfp4, every matrix": ("nvfp4", GROUPS, False),
    "nvfp4, every matrix, distilled": ("nvfp4", GROUPS, True),
}


def training_data(steps: int) -> IteratorData:
    """Batches of the task as it is trained on, and held-out ones; every position that the task
    asks for counts."""
    found: list[Any] = []
    pool = 0
    while len(found) < steps:
        found += [(b.inputs, b.weights) for b in batches(DATA_SEED + pool, TOKENS, MAX_OPERATIONS)]
        pool += 1
    held = [(b.inputs, b.weights) for b in held_out_batches(CHECK_SEED, 20)]
    return IteratorData(found[:steps], held)


def quantized_folder(
    checkpoint: Checkpoint, out: Path, kind: str, groups: tuple[str, ...], settings: Any
) -> dict[str, Any]:
    """Writes one quantized checkpoint; settings: of the distillation, None without.

    Returns:
        Its report.
    """
    chosen = dict.fromkeys(groups, kind)
    formats = choose_formats(checkpoint.config, checkpoint.names, chosen)
    if settings is None:
        return quantize_checkpoint(checkpoint, out, formats).to_dict()
    quantizer = Quantizer(checkpoint, formats)
    packed, begin = dict(quantizer.each()), time.monotonic()
    data = training_data(settings.steps)
    packed, state, told = distill_quantized(checkpoint, packed, data, settings)
    told["minutes"] = round((time.monotonic() - begin) / 60, 1)
    quantizer.report.distilled = told
    options: dict[str, Any] = {"packed": packed, "state": state, "report": quantizer.report}
    return quantize_checkpoint(checkpoint, out, formats, **options).to_dict()


def measure(folder: Path, per_operation: int, threads: int | None) -> dict[str, Any]:
    """{"size": bytes of the weights' file, "widths": {name: accuracy, weight_bytes_per_token}}."""
    problems = held_out_problems(SEED, per_operation * MAX_OPERATIONS)
    rows = {}
    with Engine.from_pretrained(folder, threads=threads, max_num_seqs=AT_ONCE) as engine:
        weights = engine.core.model.weights
        for name, width in engine.widths.items():
            found = evaluate(engine, problems, width=name).score.to_dict()
            read = bytes_per_token(engine.config, width, weights.dtype, formats=weights.formats)
            rows[name] = {**found, "weight_bytes_per_token": read}
    return {"size": (folder / "model.safetensors").stat().st_size, "widths": rows}


def main(arguments: Iterable[str] | None = None) -> None:
    """Command line."""
    import elastic_infer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--per-operation", type=int, default=200, help="problems of each length")
    parser.add_argument("--steps", type=int, default=120, help="updates of the distillation")
    parser.add_argument("--lr", type=float, default=2e-4, help="its learning rate")
    parser.add_argument("--threads", type=int)
    given = parser.parse_args(None if arguments is None else list(arguments))
    figures: dict[str, Any] = {
        "version": elastic_infer.__version__,
        "date": today(),
        "machine": machine(),
        "model": given.model.name,
        "seed": SEED,
    }
    settings = DistillSettings(steps=given.steps, lr=given.lr)
    checkpoint = Checkpoint.open(given.model)
    ways = {"bf16": measure(given.model, given.per_operation, given.threads)}
    figures |= {"fingerprint": checkpoint.fingerprint, "ways": ways}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (kind, groups, train)) in enumerate(WAYS.items()):
            out = Path(folder) / str(number)
            report = quantized_folder(checkpoint, out, kind, groups, settings if train else None)
            row = measure(out, given.per_operation, given.threads)
            row["groups"], row["error"] = list(groups), report["total"]
            if "distilled" in report:
                row["distilled"] = report["distilled"]
            ways[name] = row
            shown = {width: row["widths"][width]["accuracy"] for width in row["widths"]}
            print(name, shown, flush=True)
            if given.out is not None:  # what is measured stays, also if the run is ended
                write_json(given.out, figures, "--out", indent=1)


if __name__ == "__main__":
    main()
