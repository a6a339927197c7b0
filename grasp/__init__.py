"""GRASP: make a causal language model smaller by replacing redundant layers with low-rank ones."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grasp.compress import compress_
    from grasp.config import GraspConfig
    from grasp.evaluate import perplexity
    from grasp.modules import LowRankLinear
    from grasp.recovery import RecoveryConfig, recover_
    from grasp.recovery_report import RecoveryReport
    from grasp.redundancy import block_influence
    from grasp.removal import remove_layers_
    from grasp.report import CompressionReport

__version__ = "0.1.0"

__all__ = [
    "CompressionReport",
    "GraspConfig",
    "LowRankLinear",
    "RecoveryConfig",
    "RecoveryReport",
    "block_influence",
    "compress_",
    "perplexity",
    "recover_",
    "remove_layers_",
]

# Where each public name lives. They are imported on first use, so that `import grasp` costs nothing: torch and
# transformers take seconds.
_HOMES = {
    "CompressionReport": "grasp.report",
    "GraspConfig": "grasp.config",
    "LowRankLinear": "grasp.modules",
    "RecoveryConfig": "grasp.recovery",
    "RecoveryReport": "grasp.recovery_report",
    "block_influence": "grasp.redundancy",
    "compress_": "grasp.compress",
    "perplexity": "grasp.evaluate",
    "recover_": "grasp.recovery",
    "remove_layers_": "grasp.removal",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'grasp' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
