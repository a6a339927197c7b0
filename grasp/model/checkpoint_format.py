"""The limits of a checkpoint that all its readers share: ranks, quantised modules, weight files, headers of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from grasp.errors import CheckpointError
from grasp.method.storage import STORAGES, Storage
from grasp.reading import read_json

METHOD = "grasp"
FORMAT_VERSION = 1  # of a checkpoint without pivoted layers
PIVOTED_VERSION = 2  # of one with them
QUANTIZED_VERSION = 3  # of one with quantised modules
NARROWED_VERSION = 4  # of one with linears of other shapes than the architecture's
VERSIONS = (FORMAT_VERSION, PIVOTED_VERSION, QUANTIZED_VERSION, NARROWED_VERSION)
_INDEX = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")


class StoredTensor(NamedTuple):
    """A tensor as the header of its file describes it; ``dtype`` is a name of safetensors, such as ``"BF16"``."""

    shape: tuple[int, ...]
    dtype: str


def check_format(format_version: object, ranks: object, pivoted: object, quantized: object, shapes: object) -> None:
    """Check the version, ranks, shapes, pivoted and quantised modules of a ``quantization_config``.

    Raises:
        CheckpointError: if the version is unknown, or below that of the modules; ``ranks`` does not map paths of
            modules to positive integers; ``pivoted`` is no list of some of these paths; ``quantized`` does not map
            names of ``STORAGES`` to lists of paths, or has a path twice; or ``shapes`` does not map paths to pairs of
            positive integers.
    """
    if type(format_version) is not int or format_version not in VERSIONS:
        raise CheckpointError(
            f"checkpoint has format_version {format_version!r:.80}, this version of grasp reads "
            f"{', '.join(map(str, VERSIONS))}; upgrade grasp-llm"
        )
    if not isinstance(ranks, Mapping):
        raise CheckpointError(f"ranks must map module names to ranks, got {ranks!r:.80}; save the model again")
    for name, rank in ranks.items():
        _check_path("ranks", name)
        if type(rank) is not int or rank < 1:
            raise CheckpointError(f"rank of {name} must be a positive integer, got {rank!r:.80}; save the model again")
    if not isinstance(pivoted, (list, tuple)) or not all(isinstance(name, str) for name in pivoted):
        raise CheckpointError(f"pivoted must be a list of module names, got {pivoted!r:.80}; save the model again")
    for name in pivoted:
        if name not in ranks:
            raise CheckpointError(f"pivoted names {name!r:.80}, which has no rank; save the model again")
    stored = storages(quantized)
    _check_shapes(shapes)
    for kind, modules, needed in (
        ("pivoted", pivoted, PIVOTED_VERSION),
        ("quantized", stored, QUANTIZED_VERSION),
        ("narrowed", shapes, NARROWED_VERSION),
    ):
        if modules and format_version < needed:
            raise CheckpointError(
                f"checkpoint has format_version {format_version} and {kind} layers, which need {needed}; save the "
                "model again"
            )


def _check_shapes(shapes: object) -> None:
    """Raise ``CheckpointError`` unless these map paths of modules to [N, K]."""
    if not isinstance(shapes, Mapping):
        raise CheckpointError(f"shapes must map module names to [N, K], got {shapes!r:.80}; save the model again")
    for name, shape in shapes.items():
        _check_path("shapes", name)
        is_pair = isinstance(shape, (list, tuple)) and len(shape) == 2
        if not is_pair or not all(type(size) is int and size >= 1 for size in shape):
            raise CheckpointError(
                f"the shape of {name} must be [N, K], two positive integers, got {shape!r:.80}; save the model again"
            )


def storages(quantized: object) -> dict[str, Storage]:
    """The storage of each quantised module of a ``quantization_config``, by path.

    Raises:
        CheckpointError: if ``quantized`` does not map names of ``STORAGES`` to lists of paths, or has a path twice.

    Example:
        >>> storages({"int8": ["lm_head"], "int4/64": ["model.layers.0.mlp.up_proj"]})["lm_head"].bits
        8
    """
    if not isinstance(quantized, Mapping):
        raise CheckpointError(f"quantized must map storages to module names, got {quantized!r:.80}; save it again")
    found: dict[str, Storage] = {}
    for storage, names in quantized.items():
        if storage not in STORAGES:
            raise CheckpointError(
                f"quantized has the storage {storage!r:.80}; expected one of {', '.join(STORAGES)}. If it is a newer "
                "one, upgrade grasp-llm"
            )
        if not isinstance(names, (list, tuple)):
            raise CheckpointError(f"quantized must list names for {storage}, got {names!r:.80}; save the model again")
        for name in names:
            _check_path("quantized", name)
            if name in found:
                raise CheckpointError(f"quantized names {name:.80} twice; save the model again")
            found[name] = STORAGES[storage]
    return found


def _check_path(field: str, name: object) -> None:
    if not (isinstance(name, str) and name.isprintable() and all(name.split("."))):
        raise CheckpointError(f"{field} name {name!r:.80}, which is no path of a module; save the model again")


def check_rank(name: str, rank: int, shape: tuple[int, int], *, pivoted: bool = False) -> None:
    """Check the rank of a linear whose weight has the shape (N, K).

    Raises:
        CheckpointError: if it is above min(N, K), or min(N − 1, K) for a pivoted one.
    """
    highest = min(shape[0] - pivoted, shape[1])
    if rank > highest:
        raise CheckpointError(
            f"rank {rank!s:.40} of {name} is above {highest}, the highest rank of a {'pivoted ' * pivoted}weight of "
            f"shape {shape}; the configuration was edited: save the model again"
        )


def check_tensor(name: str, stored: StoredTensor, shape: tuple[int, ...], dtype: str | None = None) -> None:
    """Check a tensor of a low-rank or quantised module against its shape and dtype; ``None`` is any floating one.

    Raises:
        CheckpointError: if they differ.
    """
    dtypes = _FLOATS if dtype is None else (dtype,)
    if stored.shape != shape:
        raise CheckpointError(
            f"{name} has the shape {stored.shape}, config.json requires {shape}; save the model again"
        )
    if stored.dtype not in dtypes:
        raise CheckpointError(
            f"{name} has the dtype {stored.dtype}; expected one of {', '.join(dtypes)}. Save the model again"
        )


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder: ``model.safetensors``, or the shards of its index, or all ``.safetensors``.

    Raises:
        CheckpointError: if there are none, the index cannot be read or leads out of the folder, or a shard is missing.
    """
    shards, single = _shards(folder), folder / "model.safetensors"
    files = [single] if single.is_file() else shards or sorted(folder.glob("*.safetensors"))
    if any(file.suffix != ".safetensors" for file in shards) or (not files and any(folder.glob("*.bin"))):
        raise CheckpointError(
            f"{folder} has pickled weights, such as .bin files, which can run code when read; expected .safetensors. "
            "If you trust them, convert them: load the model with transformers and call save_pretrained"
        )
    if not files:
        raise CheckpointError(f"{folder} has no .safetensors file; expected a folder that `grasp compress` wrote")
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(files)} shards, such as {missing[0]}; save the model again"
        )
    return files


def _shards(folder: Path) -> list[Path]:
    """The files that the index of a folder names; none without an index."""
    index = folder / _INDEX
    if not index.is_file():
        return []
    expected = "JSON with a weight_map; save the model again"
    weight_map = read_json(index, expected, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of names; expected {expected}")
    for name in (names := sorted(set(weight_map.values()))):
        if Path(name).name != name or not _is_inside(folder / name, folder):
            raise CheckpointError(f"{index} names {name!r:.80}, which is not in its folder; copy the file there")
    return [folder / name for name in names]


def require_inside(folder: Path) -> None:
    """Refuse links out of a checkpoint's folder, before anything in it is read: what they lead to may be private.

    Raises:
        CheckpointError: if there is one, among the files or the chat templates.
    """
    templates = folder / "additional_chat_templates"
    for path in sorted([*folder.iterdir(), *(templates.iterdir() if templates.is_dir() else ())]):
        if not _is_inside(path, folder):
            raise CheckpointError(f"{path} is a link that leads out of its folder; copy there what it leads to")


def _is_inside(file: Path, folder: Path) -> bool:
    """Whether a path, which may be a link, leads into a folder, or to the hub's cache if that has the folder."""
    try:
        home, target = folder.resolve(), file.resolve()
        # The files of the hub's cache are links: models--owner--name/snapshots/REVISION/FILE → ../../blobs/DIGEST.
        homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
        return any(target.is_relative_to(home) for home in homes)
    except (OSError, RuntimeError, ValueError):  # the name is too long, or has NUL; or a loop of links
        return False


def read_headers(files: Iterable[str | Path]) -> dict[str, StoredTensor]:
    """The tensors in safetensors files, by name.

    Raises:
        CheckpointError: if a file cannot be read, or two files have tensors of the same name.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="np") as handle:
                for name in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                    if name in tensors:
                        raise CheckpointError(
                            f"{file} has the tensor {name}, which another file has too; save the model again"
                        )
                    piece = handle.get_slice(name)
                    tensors[name] = StoredTensor(tuple(piece.get_shape()), piece.get_dtype())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}); expected a complete safetensors file") from error
    return tensors
