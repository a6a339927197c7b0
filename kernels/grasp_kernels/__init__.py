"""Low-rank kernels for PyTorch: they know tensors, not models."""

from . import layers as layers
from .dispatch import BackendUnavailableError, available_backends, explain
from .extension import get_include
from .ops import (
    SingularValueGrad,
    lowrank_glu,
    lowrank_linear,
    lowrank_linear_grouped,
    lowrank_linear_merged,
    singular_value_grad,
)
from .packing import pack_factors
from .reference import Dense, Factors
from .warming import warm_up

__all__ = [
    "BackendUnavailableError",
    "Dense",
    "Factors",
    "SingularValueGrad",
    "available_backends",
    "explain",
    "get_include",
    "lowrank_glu",
    "lowrank_linear",
    "lowrank_linear_grouped",
    "lowrank_linear_merged",
    "pack_factors",
    "singular_value_grad",
    "warm_up",
]
