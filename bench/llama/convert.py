"""A checkpoint as a GGUF file, in any of llama.cpp's types."""

from __future__ import annotations

import sys
from pathlib import Path

from bench.llama.folder import ROOT, run, sdist_folder

# Types the converter writes, and those made from the bf16 file (enum llama_ftype).
CONVERTED = ("f32", "bf16", "q8_0")
QUANTIZED = {"q4_0": 2, "q4_k": 14, "iq4_nl": 25, "iq4_xs": 30, "nvfp4": 39}
# Run by the converter's own interpreter: its command line with one change, see ``convert``.
_CONVERT = """
import sys
sys.path.insert(0, sys.argv[1] + "/gguf-py")
sys.path.insert(0, sys.argv[1])
from conversion.nemotron import NemotronHModel

def no_vocabulary(self):
    self._set_vocab_none()
    self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

NemotronHModel.set_vocab = no_vocabulary
import convert_hf_to_gguf
sys.argv = ["convert_hf_to_gguf.py"] + sys.argv[2:]
convert_hf_to_gguf.main()
"""


def write_gguf(folder: Path, kind: str, target: Path, root: Path) -> None:
    """Writes one file from the checkpoint, or from the bf16 file for quantized types."""
    if kind in CONVERTED:
        source = sdist_folder(root) / "vendor" / "llama.cpp"
        command = [sys.executable, "-c", _CONVERT, str(source), str(folder)]
        command += ["--outtype", kind, "--outfile", str(target)]
        run(command, f"conversion of {folder.name} to {kind}")
        return
    from bench.llama.process import Peer

    base = convert(folder, "bf16", root)
    with Peer(None, root=root) as peer:
        peer.quantize(base, target, QUANTIZED[kind])


def convert(folder: str | Path, kind: str = "bf16", root: Path = ROOT) -> Path:
    """The checkpoint as a GGUF file, written by llama.cpp's own converter.

    The converter insists on a tokenizer, which a random checkpoint has not; it is told to write
    the "none" vocabulary and the vocabulary's size instead. Experts stay one tensor per layer.

    Args:
        folder: checkpoint folder (full width; the elastic table is ignored).
        kind: str, ``f32``, ``bf16`` or ``q8_0``, or a key of ``QUANTIZED``: then every matrix that
            llama.cpp quantizes has that type (its ``pure`` option), embeddings and head included.
        root: folder that ``build_peer`` filled.

    Returns:
        ``<folder>/peer-<kind>.gguf``; an existing file newer than the weights is kept.

    Raises:
        ValueError: another kind, or no checkpoint there.
        RuntimeError: the converter failed.
    """
    folder = Path(folder)
    if kind not in CONVERTED and kind not in QUANTIZED:
        raise ValueError(f"peer: type must be one of {[*CONVERTED, *QUANTIZED]}, got {kind!r}")
    weights = folder / "model.safetensors"
    if not weights.exists():
        raise ValueError(f"peer: folder must hold model.safetensors, got {folder}")
    target = folder / f"peer-{kind}.gguf"
    if target.exists() and target.stat().st_mtime >= weights.stat().st_mtime:
        return target
    partial = folder / f"partial-{kind}.gguf"
    write_gguf(folder, kind, partial, root)
    partial.replace(target)
    return target
