"""Making checkpoints elastic: importance, sorting, router, distillation, and the whole way.

`torch_model` is the differentiable model that they train; `reasoner` is the shipped small one.
"""

from .budget import Answer, LearnedSizes, add_width, width_for_text
from .corpus import Corpus, IteratorData
from .costs import Cost
from .distill import Distiller, Result
from .importance import Importance, layer_order, measure_importance
from .pipeline import elastify, export_elastic
from .plot import plot_metrics
from .router import Router, default_choices
from .settings import Settings, Stage
from .sorting import importance_order, random_order, sort_checkpoint, sort_model
from .torch_model import ElasticNemotronH, initialize

__all__ = [
    "Answer",
    "Corpus",
    "Cost",
    "Distiller",
    "ElasticNemotronH",
    "Importance",
    "IteratorData",
    "LearnedSizes",
    "Result",
    "Router",
    "Settings",
    "Stage",
    "add_width",
    "default_choices",
    "elastify",
    "export_elastic",
    "importance_order",
    "initialize",
    "layer_order",
    "measure_importance",
    "plot_metrics",
    "random_order",
    "sort_checkpoint",
    "sort_model",
    "width_for_text",
]
