"""Making checkpoints elastic: importance, sorting, router, distillation, and the whole way.

`torch_model` is the differentiable model that they train; `reasoner` is the shipped small one.
"""

from elastic_infer.elastify.budget import Answer, LearnedSizes, add_width, width_for_text
from elastic_infer.elastify.corpus import Corpus, IteratorData
from elastic_infer.elastify.costs import Cost
from elastic_infer.elastify.distill import Distiller, Result
from elastic_infer.elastify.importance import Importance, layer_order, measure_importance
from elastic_infer.elastify.pipeline import elastify, export_elastic
from elastic_infer.elastify.plot import plot_metrics
from elastic_infer.elastify.router import Router, default_choices
from elastic_infer.elastify.settings import Settings, Stage
from elastic_infer.elastify.sorting import (
    importance_order,
    random_order,
    sort_checkpoint,
    sort_model,
)
from elastic_infer.elastify.torch_model import ElasticNemotronH, initialise

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
    "initialise",
    "layer_order",
    "measure_importance",
    "plot_metrics",
    "random_order",
    "sort_checkpoint",
    "sort_model",
    "width_for_text",
]
