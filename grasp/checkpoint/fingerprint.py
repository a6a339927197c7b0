"""The fingerprint of a run: versions, configuration, model weights and data, as JSON with SHA-256 digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.files import tensors_digest
from grasp.method.cost_table import CostTable
from grasp.model.batch import CalibrationBatch
from grasp.model.dense import gathered
from grasp.model.running import first_device
from grasp.version import __version__

if TYPE_CHECKING:
    from grasp.config import GraspConfig


_VOLATILE = ("_name_or_path", "transformers_version")  # keys of a model configuration that no result depends on


def request_fingerprint(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    held_out: Sequence[CalibrationBatch],
    config: GraspConfig,
    costs: CostTable | None = None,
) -> dict[str, Any]:
    """Everything that the result of ``compress_`` depends on. Hashing the weights takes about a second per GB."""
    return {
        **model_fingerprint(model, config.to_dict()),
        "batch size": len(batches[0].input_ids),
        "calibration batches": len(batches),
        "calibration sequences": sum(len(batch.input_ids) for batch in batches),
        "calibration tokens": tensors_digest(_tokens(batches)),
        "held-out tokens": tensors_digest(_tokens(held_out)),
        "costs": None if costs is None else hashlib.sha256(json.dumps(costs.to_dict()).encode()).hexdigest(),
    }


def model_fingerprint(model: PreTrainedModel, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Versions, ``settings``, and the model: class, dtype, device type, configuration and weights."""
    configuration = {key: value for key, value in model.config.to_dict().items() if key not in _VOLATILE}
    return {
        "grasp": __version__,
        **{f"version of {name}": version(name) for name in ("torch", "transformers")},
        **settings,
        "model": type(model).__name__,
        "model dtype": str(model.dtype).removeprefix("torch."),
        "device": first_device(model).type,
        "model configuration": hashlib.sha256(
            json.dumps(configuration, sort_keys=True, default=str).encode()
        ).hexdigest(),
        "model weights": tensors_digest(_parameters(model)),
    }


def differences(got: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Name the values that differ: ``"retain_ratio is 0.3, expected 0.2; ..."``; empty if none does."""
    names = dict.fromkeys((*expected, *got))
    return "; ".join(
        f"{name} is {_short(got.get(name))}, expected {_short(expected.get(name))}"
        for name in names
        if got.get(name) != expected.get(name)
    )


def _short(value: Any) -> str:
    return f"{value[:8]}..." if isinstance(value, str) and len(value) == 64 else str(value)


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The data of each distinct parameter. Offloaded and sharded parameters are loaded one module at a time."""
    seen: set[Tensor] = set()
    for path, module in model.named_modules():
        unseen = {name: value for name, value in module.named_parameters(recurse=False) if value not in seen}
        seen.update(unseen.values())
        with align_module_device(module):
            for name in unseen:
                yield f"{path}.{name}", gathered(module.get_parameter(name).detach())


def _tokens(batches: Sequence[CalibrationBatch]) -> Iterator[tuple[str, Tensor]]:
    for batch in batches:
        yield "ids", batch.input_ids
        if batch.attention_mask is not None:
            yield "mask", batch.attention_mask
        if batch.context:
            yield "context", torch.tensor(batch.context)
