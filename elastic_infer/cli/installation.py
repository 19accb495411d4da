"""Facts about the installation, told without torch and without a model."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import elastic_infer

from ..device.machine import available_cpus
from . import common as c

PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "transformers")


def installed(package: str) -> str | None:
    """Version of a package, without importing it; None where it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """Returns everything that `elastic-infer info` without a model tells, as plain values."""
    from .. import _C

    return {
        "version": elastic_infer.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "packages": {name: installed(name) for name in PACKAGES},
        "kernels": {"used": _C.Pool().isa, "usable": _C.usable_isas()},
        "cuda": {
            "architectures": _C.cuda_architectures(),
            "missing": _C.cuda_missing() or None,
            "unusable": _C.cuda_unusable(0) if _C.cuda_architectures() else None,
        },
        "threads": available_cpus(),
        "demo_model": str(elastic_infer.demo_model()),
    }


def show(facts: dict[str, Any]) -> None:
    """Prints the facts, a line each."""
    screen = c.console()
    packages = ", ".join(f"{name} {text or 'missing'}" for name, text in facts["packages"].items())
    kernels, cuda = facts["kernels"], facts["cuda"]
    others = ", ".join(k for k in kernels["usable"] if k != kernels["used"]) or "no other"
    if cuda["missing"]:
        state = f"no kernels in this build ({cuda['missing']}); `make cuda` builds them"
    else:
        built = ", ".join(cuda["architectures"])
        state = f"kernels for {built}, {cuda['unusable'] or 'usable here'}"
    for line in (
        f"elastic_infer {facts['version']} on Python {facts['python']}, {facts['machine']}",
        f"packages: {packages}",
        f"CPU kernels: {kernels['used']} on {facts['threads']} threads (this processor also runs "
        f"{others})",
        f"CUDA: {state}",
        f"shipped model: {facts['demo_model']}",
        "sizes of a checkpoint: elastic-infer info MODEL",
    ):
        screen.print(line, soft_wrap=True, markup=False)
