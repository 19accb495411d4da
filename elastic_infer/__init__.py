"""Inference of elastic hybrid models: many widths, one set of weights, one cache.

from elastic_infer import Engine, Plan, SamplingParams, demo_model

engine = Engine.from_pretrained(demo_model())
plan = Plan.think_answer(think="S", answer="L")
print(engine.generate("(48+17)*3-29=", plan=plan).text)
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import (
    CheckpointError,
    ElasticError,
    EngineFault,
    EngineFull,
    InvalidRequest,
    NonFiniteLogits,
    OutOfCapacity,
    RequestCancelled,
    RequestFailed,
    WidthError,
)
from .version import __version__

if TYPE_CHECKING:  # for type checkers, and for the documentation, which reads sources alone
    from .checkpoint.checkpoint import Checkpoint
    from .checkpoint.widths import Width
    from .engine.engine import Engine
    from .engine.session import EngineSequence
    from .outputs import Choice, Output, Token
    from .plans.plan import Plan
    from .plans.policy import Policy
    from .sampling.params import SamplingParams
    from .scheduling.request import Request

# Importing torch takes seconds: what needs it is imported when it is first used.
_LAZY = {
    "Engine": "engine.engine",
    "EngineSequence": "engine.session",
    "Plan": "plans.plan",
    "Policy": "plans.policy",
    "SamplingParams": "sampling.params",
    "Output": "outputs",
    "Choice": "outputs",
    "Token": "outputs",
    "Request": "scheduling.request",
    "Checkpoint": "checkpoint.checkpoint",
    "Width": "checkpoint.widths",
}

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Choice",
    "ElasticError",
    "Engine",
    "EngineFault",
    "EngineFull",
    "EngineSequence",
    "InvalidRequest",
    "NonFiniteLogits",
    "OutOfCapacity",
    "Output",
    "Plan",
    "Policy",
    "Request",
    "RequestCancelled",
    "RequestFailed",
    "SamplingParams",
    "Token",
    "Width",
    "WidthError",
    "__version__",
    "demo_model",
]


def demo_model() -> Path:
    """Folder of the small elastic reasoner that ships with the package (see its README.md)."""
    return Path(__file__).parent / "models" / "reasoner"


def __getattr__(name: str):
    if name in _LAZY:
        value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
