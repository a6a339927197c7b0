"""The contents of a checkpoint folder, read from configuration, safetensors headers and report, without weights."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grasp.checkpoint.compression_report import FILE_NAME, CompressionReport
from grasp.errors import CheckpointError
from grasp.method.ranks import Shape
from grasp.method.storage import Storage
from grasp.model.checkpoint_format import (
    METHOD,
    StoredTensor,
    check_format,
    check_rank,
    check_tensor,
    read_headers,
    require_inside,
    storages,
    weight_files,
)
from grasp.model.families import family_of
from grasp.reading import read_json

_LAYER = re.compile(r"\.(\d+)\.(.+)$")  # model.layers.3.mlp.up_proj → 3, mlp.up_proj
_NORM = re.compile(r"norm|(^|\.)ln_")
_EMBEDDING = re.compile(r"embed|wte|wpe")
_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1}


@dataclass(frozen=True)
class LowRankModule:
    """A low-rank linear of a checkpoint; parameters and bytes include the bias, and bytes scales and ``order``."""

    name: str
    layer: int
    rank: int
    out_features: int
    in_features: int
    parameters: int
    dense_parameters: int
    bytes: int
    form: str = "factored"  # or "pivoted"
    storage: str | None = None  # a name of ``STORAGES``, such as "int8"; ``None`` for floating factors


@dataclass(frozen=True)
class Part:
    """A part of the model, such as the dense MLP linears, and its size. A quantised value is one parameter."""

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
    quantized: Mapping[str, str] = field(default_factory=dict)  # path of each quantised module → its storage
    shapes: Mapping[str, Shape] = field(default_factory=dict)  # path of each linear of a narrowed MLP → (N, K)

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
    def is_compressed(self) -> bool:
        """Whether modules are low-rank, quantised or narrowed, or a report says what was done."""
        return bool(self.modules or self.quantized or self.shapes or self.report)

    @property
    def parameters_before(self) -> int:
        """Parameters of the model before the compression: also of removed layers, if there is a report."""
        return self.dense_parameters if self.report is None else self.report.before.parameters

    @property
    def compression_ratio(self) -> float:
        """Fraction of the parameters before the compression that was removed."""
        return 1 - self.parameters / self.parameters_before

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
            "quantized": dict(self.quantized),
            "report": None if self.report is None else self.report.to_dict(),
        }


def inspect_checkpoint(directory: str | Path) -> Inspection:
    """Read the contents of a checkpoint folder, compressed or not.

    Raises:
        CheckpointError: if it is no folder, or configuration, tensors or report cannot be read, or do not match.

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
    if not directory.is_dir():
        raise CheckpointError(f"no folder {directory}; expected a checkpoint that `grasp compress` wrote")
    require_inside(directory)
    expected = "the configuration of a checkpoint that `grasp compress` wrote"
    config = read_json(directory / "config.json", expected, CheckpointError, finite=False)
    stored = _Stored(config, directory / "config.json", read_headers(weight_files(directory)))
    if not stored.tensors:
        raise CheckpointError(f"{directory} has no tensors; expected the weights of a model")
    parts: dict[str, list[str]] = defaultdict(list)
    for name in stored.tensors:
        parts[stored.part(name)].append(name)
    for name in stored.storages.keys() - stored.ranks.keys():
        stored.check_dense(name)
    modules = [stored.module(name, rank) for name, rank in stored.ranks.items()]
    report = CompressionReport.load(directory) if (directory / FILE_NAME).is_file() else None
    kept = None if report is None else len(report.block_influence) - len(report.removed_layers)
    if kept is not None and any(module.layer >= kept for module in modules):
        raise CheckpointError(
            f"{directory / FILE_NAME} is of a model of which {kept} layers remain, but a later one is low-rank here; "
            "expected the report of this checkpoint"
        )
    sized = (
        Part(part, len(of), sum(map(stored.parameters, of)), sum(map(stored.bytes, of))) for part, of in parts.items()
    )
    return Inspection(
        directory=str(directory),
        model_type=str(config.get("model_type", "unknown")),
        num_layers=len({match[1] for name in stored.tensors if (match := _LAYER.search(name))}),
        parts=tuple(sorted(sized, key=lambda part: -part.bytes)),
        modules=tuple(sorted(modules, key=lambda module: module.layer)),
        report=report,
        quantized={name: str(storage) for name, storage in stored.storages.items()},
        shapes=stored.shapes,
    )


def inspect_compressed(directory: str | Path) -> Inspection:
    """``inspect_checkpoint`` of a folder that must be of a compressed model.

    Raises:
        CheckpointError: if it is not; as ``inspect_checkpoint``.

    Example:
        >>> inspect_compressed("missing-folder")
        Traceback (most recent call last):
        grasp.errors.CheckpointError: no folder missing-folder; expected a checkpoint that `grasp compress` wrote
    """
    checkpoint = inspect_checkpoint(directory)
    if not checkpoint.is_compressed:
        raise CheckpointError(
            f"{directory} is not compressed: its config.json has no ranks, and there is no report.json. Give a folder "
            "that `grasp compress` wrote"
        )
    return checkpoint


def short_name(module: str) -> str:
    """The last part of a module's path: ``"q_proj"``."""
    return module.rpartition(".")[2]


class _Stored:
    """The tensors in the files of a checkpoint, and the modules that its configuration names."""

    def __init__(self, config: Mapping[str, Any], path: Path, tensors: Mapping[str, StoredTensor]) -> None:
        self.tensors = tensors
        self.ranks: dict[str, int] = {}
        self.pivoted: frozenset[str] = frozenset()
        self.storages: dict[str, Storage] = {}
        self.shapes: dict[str, Shape] = {}
        quantization = config.get("quantization_config") or {}
        if not isinstance(quantization, dict):
            raise CheckpointError(f"{path}: quantization_config must be a JSON object, got {quantization!r}")
        if (method := quantization.get("quant_method", METHOD)) != METHOD:
            raise CheckpointError(
                f"{path}: the model is quantised ({method}), and its files do not tell the parameters; expected a "
                "dense model or one that grasp has written"
            )
        if not quantization:
            return
        defaults: dict[str, Any] = {"ranks": {}, "pivoted": [], "quantized": {}, "shapes": {}}
        ranks, pivoted, quantized, shapes = (quantization.get(key, default) for key, default in defaults.items())
        try:
            check_format(quantization.get("format_version"), ranks, pivoted, quantized, shapes)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        self.ranks, self.pivoted, self.storages = dict(ranks), frozenset(pivoted), storages(quantized)
        self.shapes = {name: (n, k) for name, (n, k) in shapes.items()}
        for name, shape in self.shapes.items():
            if name not in self.ranks and name not in self.storages and f"{name}.weight" in tensors:
                check_tensor(f"{name}.weight", tensors[f"{name}.weight"], shape)
        for name in tensors:
            module = name.rpartition(".")[0]
            if name.endswith("_scales") and "." in module and module not in self.storages:  # see ``check_dense``
                raise CheckpointError(f"the files have {name}, but quantized in config.json does not name {module}")

    def parameters(self, name: str) -> int:
        """The parameters in a tensor, whose module is checked."""
        module, _, tensor = name.rpartition(".")
        if tensor.endswith("_scales") or (tensor == "order" and module in self.pivoted):
            return 0
        stored = self.tensors[name]
        if module in self.storages and stored.dtype == "U8":
            return math.prod(stored.shape[:-1]) * self.depth(name)
        return math.prod(stored.shape)

    def bytes(self, name: str) -> int:
        """The bytes of a tensor."""
        tensor = self.tensors[name]
        if tensor.dtype not in _ITEM_BYTES:
            raise CheckpointError(f"a tensor has the dtype {tensor.dtype}; expected one of {', '.join(_ITEM_BYTES)}")
        return math.prod(tensor.shape) * _ITEM_BYTES[tensor.dtype]

    def depth(self, name: str) -> int:
        """The columns of a matrix; of int4 values, whose headers do not tell an odd number from the next, the even."""
        module, _, tensor = name.rpartition(".")
        if tensor == "U" and module in self.ranks:
            return self.ranks[module]
        columns = (0, *self.tensors[name].shape)[-1]
        return columns * 8 // self.storages[module].bits if module in self.storages else columns

    def check_dense(self, name: str) -> None:
        """Check the tensors of a quantised dense module. An output layer, whose path has no dot, may have none: it is
        tied, or transformers gives it another name in files.
        """
        weight, bias = f"{name}.weight", f"{name}.bias"
        if weight in self.tensors:
            rows = (*self.tensors[weight].shape, 0)[0]
            self._check_matrix(weight, rows, self.depth(weight))
            if bias in self.tensors:
                check_tensor(bias, self.tensors[bias], (rows,))
        elif "." in name or f"{weight}_scales" in self.tensors:
            raise CheckpointError(f"config.json quantises {name}, but {weight} is missing in the files")

    def module(self, name: str, rank: int) -> LowRankModule:
        """A low-rank linear, whose tensors are checked."""
        pivoted = name in self.pivoted
        U, Vh, bias, order = (f"{name}.{suffix}" for suffix in ("U", "Vh", "bias", "order"))
        if U not in self.tensors or Vh not in self.tensors:
            raise CheckpointError(
                f"config.json gives {name} rank {rank}, but {name}.U or {name}.Vh is missing in the files"
            )
        if pivoted != (order in self.tensors):
            raise CheckpointError(
                f"{name} has {'no' if pivoted else 'an'} order in the files, but config.json "
                f"{'names' if pivoted else 'does not name'} it in pivoted; save the model again"
            )
        rows, K = (*self.tensors[U].shape, 0)[0], self.depth(Vh)
        N = rows + rank * pivoted
        tensors = [*self._check_matrix(U, rows, rank), *self._check_matrix(Vh, rank, K)]
        check_rank(name, rank, (N, K), pivoted=pivoted)
        for tensor, dtype in ((bias, None), (order, "I32")):
            if tensor in self.tensors:
                check_tensor(tensor, self.tensors[tensor], (N,), dtype)
                tensors.append(tensor)
        layer, storage = _LAYER.search(name), self.storages.get(name)
        return LowRankModule(
            name=name,
            layer=int(layer[1]) if layer else 0,
            rank=rank,
            out_features=N,
            in_features=K,
            parameters=sum(map(self.parameters, tensors)),
            dense_parameters=N * K + N * (bias in self.tensors),
            bytes=sum(map(self.bytes, tensors)),
            form="pivoted" if pivoted else "factored",
            storage=None if storage is None else str(storage),
        )

    def part(self, tensor: str) -> str:
        """The part of the model that a tensor belongs to, with the storage of its values."""
        module = tensor.rpartition(".")[0]
        storage = f", {self.storages[module]}" if module in self.storages else ""
        match = _LAYER.search(tensor)
        if match is None:
            part = "embeddings" if _EMBEDDING.search(tensor) else "norms" if _NORM.search(tensor) else "head and other"
            return part + storage
        if _NORM.search(match[2]):
            return "norms"
        block = family_of(tensor).block(match[2])
        return f"{block}, {'low-rank' if module in self.ranks else 'dense'}{storage}"

    def _check_matrix(self, name: str, rows: int, depth: int) -> list[str]:
        """Check a matrix, and return the names of its tensors."""
        storage = self.storages.get(name.rpartition(".")[0])
        if storage is None:
            check_tensor(name, self.tensors[name], (rows, depth))
            return [name]
        scales = f"{name}_scales"
        if scales not in self.tensors:
            raise CheckpointError(f"config.json quantises {name}, but {scales} is missing in the files")
        check_tensor(name, self.tensors[name], (rows, storage.columns(depth)), storage.dtype)
        check_tensor(scales, self.tensors[scales], (rows, storage.scales(depth)))
        return [name, scales]
