"""In which basis a weight is decomposed: what a truncation then changes least.

With ``A = Σ x xᵀ / T`` and ``B = Σ d dᵀ / T`` over T calibration tokens, x the input of a linear and d the gradient of
the summed loss in its output, truncating the decomposition of

* ``W`` changes the weight least (GRASP, arXiv 2501.00339);
* ``W A^½`` changes the outputs least (SVD-LLM, arXiv 2403.07378): ``‖(W − Ŵ) A^½‖``;
* ``B^½ W A^½`` changes the loss least, as the Kronecker-factored Fisher information estimates it.

The gradients are those of labels that are drawn from the model's predictions. If a metric needs moments of the gradient
as well, all are those of the observed labels: then it is the empirical Fisher information.

A new basis is one row of ``BASES``.
"""

from __future__ import annotations

from typing import NamedTuple


class Basis(NamedTuple):
    """Which covariances an (N, K) weight is multiplied by before it is decomposed."""

    inputs: bool  # A, (K, K)
    outputs: bool  # B, (N, N)


BASES: dict[str, Basis] = {
    "plain": Basis(inputs=False, outputs=False),
    "whitened": Basis(inputs=True, outputs=False),
    "kfac": Basis(inputs=True, outputs=True),
}
