"""From a training run to the shipped folder: weights in bfloat16, tokenizer, sizes.

``python -m elastic_infer.reasoner.export RUN --out DIR``. The model card is written
afterwards, from what `evaluate` measured on that folder, by the `card` module.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from ..elastify.torch_model import ElasticNemotronH
from ..errors import CheckpointError
from ..files.writing import make_folder, withdraw, write_json
from .design import reasoner_config
from .vocabulary import write_tokenizer


def export(run: Path, out: Path) -> dict[str, float]:
    """Writes the folder that `Engine.from_pretrained` and transformers load.

    Args:
        run: folder of `train`, with its state.pt.
        out: folder to fill; files of these names are replaced.

    Returns:
        What was spent on training: steps, minutes, tokens. Also written to training.json.

    Raises:
        CheckpointError: the run has no state.pt, or a file cannot be written; the folder does not
            open then.
    """
    path = run / "state.pt"
    if not path.is_file():
        raise CheckpointError(f"export: {run} must hold state.pt, got a folder without it")
    state = torch.load(path, weights_only=True)
    model = ElasticNemotronH(reasoner_config())
    model.load_state_dict(state["model"])
    make_folder(out, "export")
    withdraw(out, "export")
    write_tokenizer(out)
    spent = {
        "steps": state["step"],
        "minutes": round(state["spent"] / 60, 1),
        "tokens": state["tokens_seen"],
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    write_json(out / "training.json", spent, "export")
    model.save(out, torch.bfloat16)
    return spent


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the training run")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    given = parser.parse_args(arguments)
    print(json.dumps(export(given.run, given.out)))


if __name__ == "__main__":
    main()
