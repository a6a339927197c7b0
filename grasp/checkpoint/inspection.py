"""The contents of a checkpoint folder, read from configuration, safetensors headers and report, without weights."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grasp.checkpoint.compression_report import FILE_NAME, CompressionReport
from grasp.errors import CheckpointError
from grasp.model.checkpoint_format import (
    METHOD,
    StoredTensor,
    check_factor,
    check_rank,
    check_ranks,
    read_headers,
    weight_files,
)
from grasp.model.families import family_of
from grasp.reading import read_json

_LAYER = re.compile(r"\.(\d+)\.(.+)$")  # model.layers.3.mlp.up_proj → 3, mlp.up_proj
_NORM = re.compile(r"norm|(^|\.)ln_")
_EMBEDDING = re.compile(r"embed|wte|wpe")
_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1, "BOOL": 1}


@dataclass(frozen=True)
class LowRankModule:
    """A low-rank linear of a checkpoint; parameters and bytes include the bias, and bytes the ``order``."""

    name: str
    layer: int
    rank: int
    out_features: int
    in_features: int
    parameters: int
    dense_parameters: int
    bytes: int
    form: str = "factored"  # or "pivoted"


@dataclass(frozen=True)
class Part:
    """A part of the model, such as the dense MLP linears, and its size."""

    name: str
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """The result of ``inspect_checkpoint``; ``report`` is ``None`` if the folder has none."""

    directory: str
    model_type: str
    num_layers: int
    parts: tuple[Part, ...]  # largest first
    modules: tuple[LowRankModule, ...]  # in the order of the layers
    report: CompressionReport | None

    @property
    def parameters(self) -> int:
        """Logical parameters; a tied weight counts once."""
        return sum(part.parameters for part in self.parts)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.bytes for part in self.parts)

    @property
    def dense_parameters(self) -> int:
        """Parameters of the model if its low-rank linears were dense."""
        return self.parameters + sum(module.dense_parameters - module.parameters for module in self.modules)

    @property
    def compression_ratio(self) -> float:
        """Fraction of the dense model's parameters that was removed."""
        return 1 - self.parameters / self.dense_parameters

    def to_dict(self) -> dict[str, Any]:
        """All fields and sizes as JSON values."""
        return {
            "directory": self.directory,
            "model_type": self.model_type,
            "num_layers": self.num_layers,
            "parameters": self.parameters,
            "dense_parameters": self.dense_parameters,
            "compression_ratio": self.compression_ratio,
            "bytes": self.bytes,
            "parts": [asdict(part) for part in self.parts],
            "modules": [asdict(module) for module in self.modules],
            "report": None if self.report is None else self.report.to_dict(),
        }


def inspect_checkpoint(directory: str | Path) -> Inspection:
    """Read the contents of a checkpoint folder, compressed or not.

    Raises:
        CheckpointError: if configuration, tensors or report cannot be read, or do not match.

    Example:
        >>> import tempfile
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=12, n_layer=1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     inspect_checkpoint(folder).parameters
        617280
    """
    directory = Path(directory)
    expected = "the configuration of a checkpoint that `grasp compress` wrote"
    config = read_json(directory / "config.json", expected, CheckpointError, finite=False)
    ranks, pivoted = _ranks(config, directory / "config.json")
    tensors = read_headers(weight_files(directory))
    parts: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        parts[_part(name, ranks)][name] = tensor
    orders = {f"{name}.order" for name in pivoted}
    return Inspection(
        directory=str(directory),
        model_type=str(config.get("model_type", "unknown")),
        num_layers=len({match[1] for name in tensors if (match := _LAYER.search(name))}),
        parts=tuple(
            sorted(
                (
                    Part(
                        part,
                        len(stored),
                        sum(_parameters(tensor) for name, tensor in stored.items() if name not in orders),
                        sum(map(_bytes, stored.values())),
                    )
                    for part, stored in parts.items()
                ),
                key=lambda part: -part.bytes,
            )
        ),
        modules=tuple(
            sorted(
                (_module(name, rank, tensors, name in pivoted) for name, rank in ranks.items()),
                key=lambda module: module.layer,
            )
        ),
        report=CompressionReport.load(directory) if (directory / FILE_NAME).is_file() else None,
    )


def inspect_compressed(directory: str | Path) -> Inspection:
    """``inspect_checkpoint`` of a folder that must have low-rank layers.

    Raises:
        CheckpointError: if it has none, or is no folder; as ``inspect_checkpoint``.

    Example:
        >>> inspect_compressed("missing-folder")
        Traceback (most recent call last):
        grasp.errors.CheckpointError: no folder missing-folder; expected a checkpoint that `grasp compress` wrote
    """
    if not Path(directory).is_dir():
        raise CheckpointError(f"no folder {directory}; expected a checkpoint that `grasp compress` wrote")
    checkpoint = inspect_checkpoint(directory)
    if not checkpoint.modules:
        raise CheckpointError(
            f"{directory} is not compressed: its config.json has no ranks. Give a folder that `grasp compress` wrote"
        )
    return checkpoint


def short_name(module: str) -> str:
    """The last part of a module's path: ``"q_proj"``."""
    return module.rpartition(".")[2]


def _ranks(config: Mapping[str, Any], path: Path) -> tuple[dict[str, int], frozenset[str]]:
    """The ranks by path, and the paths of the pivoted modules."""
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{path}: quantization_config must be a JSON object, got {quantization!r}")
    if quantization.get("quant_method") != METHOD:
        return {}, frozenset()
    ranks, pivoted = quantization.get("ranks", {}), quantization.get("pivoted", [])
    try:
        check_ranks(quantization.get("format_version"), ranks, pivoted)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return dict(ranks), frozenset(pivoted)


def _parameters(tensor: StoredTensor) -> int:
    return math.prod(tensor.shape)


def _bytes(tensor: StoredTensor) -> int:
    if tensor.dtype not in _ITEM_BYTES:
        raise CheckpointError(f"a tensor has the dtype {tensor.dtype}; expected one of {', '.join(_ITEM_BYTES)}")
    return _parameters(tensor) * _ITEM_BYTES[tensor.dtype]


def _module(name: str, rank: int, tensors: Mapping[str, StoredTensor], pivoted: bool) -> LowRankModule:
    U, Vh, bias, order = (tensors.get(f"{name}.{suffix}") for suffix in ("U", "Vh", "bias", "order"))
    if U is None or Vh is None:
        raise CheckpointError(
            f"config.json gives {name} rank {rank}, but {name}.U or {name}.Vh is missing in the files"
        )
    if pivoted != (order is not None):
        raise CheckpointError(
            f"{name} has {'no' if pivoted else 'an'} order in the files, but config.json "
            f"{'names' if pivoted else 'does not name'} it in pivoted; save the model again"
        )
    rows, K = (*U.shape, 0)[0], (0, *Vh.shape)[-1]
    N = rows + rank * pivoted
    check_factor(f"{name}.U", U, (rows, rank))
    check_factor(f"{name}.Vh", Vh, (rank, K))
    check_rank(name, rank, (N, K), pivoted=pivoted)
    extra = [bias] if bias is not None else []
    for tensor in extra:
        check_factor(f"{name}.bias", tensor, (N,))
    if order is not None:
        check_factor(f"{name}.order", order, (N,))
    layer = _LAYER.search(name)
    return LowRankModule(
        name=name,
        layer=int(layer[1]) if layer else 0,
        rank=rank,
        out_features=N,
        in_features=K,
        parameters=sum(map(_parameters, (U, Vh, *extra))),
        dense_parameters=N * K + sum(map(_parameters, extra)),
        bytes=sum(map(_bytes, (U, Vh, *extra, *([] if order is None else [order])))),
        form="pivoted" if pivoted else "factored",
    )


def _part(tensor: str, ranks: Mapping[str, int]) -> str:
    module = tensor.rpartition(".")[0]
    match = _LAYER.search(tensor)
    if match is None:
        return "embeddings" if _EMBEDDING.search(tensor) else "norms" if _NORM.search(tensor) else "head and other"
    if _NORM.search(match[2]):
        return "norms"
    block = family_of(tensor).block(match[2])
    return f"{block}, low-rank" if module in ranks else f"{block}, dense"
