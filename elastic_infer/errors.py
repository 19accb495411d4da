"""Every error that this library raises on purpose."""

from __future__ import annotations


class ElasticError(Exception):
    """Base of all errors of this library."""


class InvalidRequest(ElasticError, ValueError):
    """A request, prompt, plan or sampling parameter that cannot be served."""


class CheckpointError(ElasticError, ValueError):
    """A checkpoint folder, its config.json or one of its tensors that cannot be used."""


class WidthError(ElasticError, ValueError):
    """A width or width table that does not fit its checkpoint, or an unknown width name."""


class OutOfCapacity(ElasticError, RuntimeError):
    """The request needs more cache than the engine has; says needed, free and what fits."""


class EngineFull(ElasticError, RuntimeError):
    """The waiting queue has reached its limit; try again later."""


class RequestCancelled(ElasticError, RuntimeError):
    """The request was cancelled before it was finished."""


class NonFiniteLogits(ElasticError, RuntimeError):
    """The model returned NaN or infinite logits for this request."""


class NonFiniteLoss(ElasticError, RuntimeError):
    """A training step had a NaN or infinite loss; says which, and what was kept."""
