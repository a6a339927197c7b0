"""GRASP: make a causal language model smaller by replacing weights with low-rank factors."""

from importlib import import_module
from typing import TYPE_CHECKING

import grasp_autoload
from grasp.version import __version__

if TYPE_CHECKING:
    from grasp.checkpoint.compression_report import CompressionReport
    from grasp.checkpoint.recovery_report import RecoveryReport
    from grasp.compress import compress_
    from grasp.config import GraspConfig
    from grasp.evaluation.perplexity import perplexity
    from grasp.model.layer_removal import remove_layers_
    from grasp.model.lowrank_linear import LowRankLinear
    from grasp.recovery import RecoveryConfig, recover_
    from grasp.statistics.redundancy import block_influence

__all__ = [
    "CompressionReport",
    "GraspConfig",
    "LowRankLinear",
    "RecoveryConfig",
    "RecoveryReport",
    "__version__",
    "block_influence",
    "compress_",
    "perplexity",
    "recover_",
    "remove_layers_",
]

# The module of each public name. Names are imported at first use, because torch and transformers take seconds.
_HOMES = {
    "CompressionReport": "grasp.checkpoint.compression_report",
    "GraspConfig": "grasp.config",
    "LowRankLinear": "grasp.model.lowrank_linear",
    "RecoveryConfig": "grasp.recovery",
    "RecoveryReport": "grasp.checkpoint.recovery_report",
    "block_influence": "grasp.statistics.redundancy",
    "compress_": "grasp.compress",
    "perplexity": "grasp.evaluation.perplexity",
    "recover_": "grasp.recovery",
    "remove_layers_": "grasp.model.layer_removal",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'grasp' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__


grasp_autoload.install()  # for where PyTorch does not
