"""Low-rank kernels for PyTorch: they know tensors, not models."""

from grasp_kernels.dispatch import BackendUnavailableError, available_backends, explain
from grasp_kernels.extension import get_include
from grasp_kernels.ops import (
    SingularValueGrad,
    lowrank_glu,
    lowrank_linear,
    lowrank_linear_grouped,
    lowrank_linear_merged,
    singular_value_grad,
)
from grasp_kernels.packing import pack_factors
from grasp_kernels.reference import Dense, Factors
from grasp_kernels.warming import warm_up

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
