"""From a trained parent to an elastic checkpoint: importance, sorting, distillation, export.

Every stage can be called by itself; `elastify` runs them all and continues where it was stopped.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.layout import expected_shapes
from ..checkpoint.slicing import SHARD_BYTES, copy_side_files, with_kv_factors
from ..checkpoint.tensor_files import write_safetensors
from ..checkpoint.width_table import width_to_dict
from ..errors import CheckpointError, InvalidRequest, shown
from ..files.reading import user_path
from ..files.writing import make_folder, only_writer, require_new, withdraw, write_json
from ..value_checks import is_int
from .budget import LearnedSizes
from .corpus import Corpus, as_data
from .distill import METRICS, Distiller, Result, is_finished
from .distributed import Group
from .importance import Importance, measure_importance
from .plot import plot_metrics
from .router import check_choices, default_choices
from .settings import Settings
from .sorting import importance_order, sort_model
from .torch_model import ElasticNemotronH, encode_floats

__all__ = ["calibration_batches", "elastify", "export_elastic", "open_data", "parent_importance"]

logger = logging.getLogger(__name__)

RUN = "run"
Progress = Callable[[str, int, int, Mapping[str, Any]], None]


def open_data(data: Any, checkpoint: Checkpoint, longest: int, run: Path, group: Group) -> Any:
    """Training data as `Distiller` takes it; a path is tokenized with the parent's tokenizer.

    Args:
        data: batches, a Corpus, or the path of a folder or file of text or JSON lines.
        checkpoint: the parent.
        longest: longest sequence of any stage.
        run: folder that keeps the tokens.
        group: the processes; the first one writes.
    """
    if not isinstance(data, (str, Path)):
        return as_data(data)
    from ..text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(checkpoint.folder)
    end = checkpoint.config.eos_token_ids
    options = {
        "end_token": end[0] if end and end[0] < checkpoint.config.vocab_size else None,
        "vocab_size": checkpoint.config.vocab_size,
        "cache": run / "tokens.int32",
    }
    encode = None if tokenizer is None else tokenizer.encode
    if group.first:
        Corpus.from_folder(data, encode, longest, **options)
    group.barrier()
    return Corpus.from_folder(data, encode, longest, **options)


def calibration_batches(data: Any, settings: Settings, count: int) -> Iterator[Tensor | tuple]:
    """The first `count` training sequences (each once), in batches of the first stage.

    Raises:
        InvalidRequest: count is not positive.
    """
    if not is_int(count) or count < 1:
        raise InvalidRequest(f"calibration: must be at least 1 sequence, got {shown(count)}")
    first = settings.stages[0]
    count = min(count, data.sequences(first.sequence_length) or count)
    stream = data.batches(first.batch_size, first.sequence_length, settings.seed)
    while count > 0:
        ids, weights = next(stream)
        yield ids[:count] if weights is None else (ids[:count], weights[:count])
        count -= len(ids)


def parent_importance(
    parent: ElasticNemotronH,
    batches: Iterable[Any],
    file: Path,
    group: Group,
    progress: Callable[[int], None] | None = None,
) -> Importance:
    """Importance of the parent, kept in a file; measured by the first process if it is missing."""
    if group.first and not file.is_file():
        found = measure_importance(parent.to(group.device), batches, progress=progress)
        found.save(file)
    group.barrier()
    return Importance.load(file)


def export_elastic(
    checkpoint: Checkpoint,
    result: Result,
    out: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes the elastic checkpoint: weights in the parent's dtypes, its widths in config.json.

    config.json is removed first and comes last, so an interrupted export does not open.

    Args:
        checkpoint: the parent.
        result: of the distillation.
        out: existing folder; files of these names are replaced.
        shard_bytes: size at which the next safetensors file is begun.

    Raises:
        CheckpointError: a file cannot be written.
    """
    out, config = Path(out), checkpoint.config
    student = ElasticNemotronH(config)
    student.load_state_dict(result.weights)
    state = student.checkpoint_state()
    shapes = expected_shapes(config)
    specs = {name: (shapes[name], checkpoint.dtype_of(name)) for name in checkpoint.names}
    withdraw(out, "elastify")
    parts = with_kv_factors(checkpoint, specs, lambda name: state[name].to(specs[name][1]))
    write_safetensors(out, *parts, shard_bytes)
    copy_side_files(checkpoint.folder, out)
    entries = {name: width_to_dict(config, width) for name, width in result.widths.items()}
    raw = dict(config.raw)
    largest = max(result.budgets, key=result.budgets.__getitem__)
    raw["elastic"] = {"version": 1, "default_width": largest, "widths": entries}
    write_json(out / "config.json", encode_floats(raw), "elastify")
    return out


def elastify(
    parent: str | Path | Checkpoint,
    data: Any,
    out: str | Path,
    settings: Settings,
    *,
    calibration: int = 1024,
    device: str = "auto",
    progress: Progress | None = None,
) -> Path:
    """Makes a checkpoint elastic: ranks, sorts, and distils all widths at once.

    Called again with the same arguments after it was stopped, it continues; when it is finished,
    nothing is done. A second run in the same folder at the same time is refused. Launched by
    torchrun on several processes, they train together.

    Args:
        parent: a trained `nemotron_h` checkpoint: folder, Hub id, or open Checkpoint.
        data: batches, a Corpus, or a folder or file of text or JSON lines (see `corpus`).
        out: new folder, or that of a run that was stopped; out/run keeps the run's files.
        settings: budgets, stages, rates.
        calibration: sequences that importance is measured on.
        device: "auto", "cpu" or "cuda".
        progress: called with (stage, done, all, metrics), stage "importance" or "distil".

    Returns:
        `out`: an elastic checkpoint with its table in config.json and its router in
        elastic_router.json.

    Raises:
        CheckpointError: the parent is no model that this library runs, or `out` holds other
            things, is being written to, or cannot be.
        InvalidRequest, WidthError: settings or data that cannot be used.
        NonFiniteLoss: training diverged; the run keeps its last checkpoint.
    """
    checkpoint = parent if isinstance(parent, Checkpoint) else Checkpoint.open(parent)
    checkpoint.require_plain("elastify")
    if len(checkpoint.widths) > 1:
        raise CheckpointError(
            f"elastify: parent must have one width, got {', '.join(checkpoint.widths)}; slice out "
            "the one to start from"
        )
    config = checkpoint.config
    given = default_choices(config) if settings.choices is None else settings.choices
    choices = check_choices(config, given)
    out = user_path(out, "elastify: out")
    if _is_complete(out, settings, choices):
        logger.info("elastify: %s is finished", out)
        return out
    group = Group.current(device)
    make_folder(out, "elastify")
    with contextlib.ExitStack() as held:
        if group.first:  # the lock of the processes that train together
            held.enter_context(only_writer(out / RUN, "elastify", keep=True))
        group.barrier()
        _train(checkpoint, data, out, settings, calibration, group, progress)
        group.barrier()
    return out


def _train(
    checkpoint: Checkpoint,
    data: Any,
    out: Path,
    settings: Settings,
    calibration: int,
    group: Group,
    progress: Progress | None,
) -> None:
    """All stages of `elastify` that are not done yet."""
    run = out / RUN
    data = open_data(data, checkpoint, settings.longest, run, group)
    model = ElasticNemotronH.load(checkpoint.folder)

    if not group.first:
        progress = None
    batches = calibration_batches(data, settings, calibration)
    calibrated = None if progress is None else _counter(progress, "importance", calibration)
    importance = parent_importance(
        model, batches, run / "importance.safetensors", group, calibrated
    )
    model = sort_model(model.to("cpu"), importance_order(checkpoint.config, importance))
    distiller = Distiller(model, data, run, settings, group=group)

    def step_done(step: int, steps: int, line: Mapping[str, Any]) -> None:
        if progress is not None:
            progress("distil", step, steps, line)

    result = distiller.run(step_done)
    if group.first:
        learned = LearnedSizes(
            distiller.router, settings.cost, result.widths, result.losses, result.held_out
        )
        learned.save(out)
        _draw(run)
        export_elastic(checkpoint, result, out)


def _counter(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    """Adds up what is done of a stage, and tells the sum."""
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done = min(total, done + count)
        progress(stage, done, total, {})

    return tell


def _is_complete(out: Path, settings: Settings, choices: Mapping[str, Any]) -> bool:
    """True if the checkpoint of this very run is there already; a run that was killed after its
    last file must not fail when it is called again.

    Raises:
        CheckpointError: a folder with other things in it.
    """
    if out.is_dir() and RUN in os.listdir(out):
        if not (out / "config.json").is_file():
            return False
        if is_finished(out / RUN, settings, choices):
            return True
        raise CheckpointError(
            f"elastify: out must be a new or empty folder, or that of a stopped run, got {out} "
            "with the checkpoint of another run; name another one"
        )
    require_new(out, "elastify")
    return False


def _draw(run: Path) -> None:
    if not (run / METRICS).is_file():
        return
    try:
        plot_metrics(run / METRICS, run / "run.png")
    except InvalidRequest as error:  # the picture is an extra
        logger.warning("elastify: no picture of the run: %s", error)
