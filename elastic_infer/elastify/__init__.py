"""Elastic training in plain torch: the differentiable model, and the shipped small reasoner."""

from elastic_infer.elastify.torch_model import ElasticNemotronH, initialise

__all__ = ["ElasticNemotronH", "initialise"]
