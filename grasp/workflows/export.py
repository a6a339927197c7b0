"""``grasp convert``: a checkpoint → files for programs that know nothing of grasp."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grasp.checkpoint.inspection import inspect_checkpoint
from grasp.checkpoint.saving import LICENSES, check_directory, new_folder, read_texts
from grasp.errors import MissingPackageError
from grasp.export.gguf_file import export_gguf
from grasp.export.linear_pairs import export_linear_pairs
from grasp.export.onnx_file import export_onnx
from grasp.files import remove_abandoned
from grasp.loading import load_quietly
from grasp.progress import Progress, no_progress, one_step


class Exporter(NamedTuple):
    """A format."""

    # writes a model, which it may change, and a tokenizer into a folder; its answer is ``Export.note``
    write: Callable[[PreTrainedModel, PreTrainedTokenizerBase, Path], str]
    # that it imports, besides those of grasp; the extra of grasp with the format's name installs them
    packages: tuple[str, ...] = ()


EXPORTS: Mapping[str, Exporter] = {
    "linear-pairs": Exporter(export_linear_pairs),
    "onnx": Exporter(export_onnx, ("onnx", "onnxscript")),
    "gguf": Exporter(export_gguf, ("gguf",)),
}


@dataclass(frozen=True)
class Export:
    """The written files."""

    model: str  # the given checkpoint
    output: str  # the folder
    to: str  # a name of ``EXPORTS``
    before: int  # bytes of the files of the checkpoint
    after: int  # bytes of the written files
    note: str  # what became of the low-rank linears

    def to_dict(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return asdict(self)


def export(directory: Path, output: Path, to: str, *, progress: Progress = no_progress) -> Export:
    """Write a checkpoint for programs that know nothing of grasp, into a new folder, with its licences.

    The model is loaded on the CPU, in the dtype in which it is stored.

    Args:
        directory: a folder that ``grasp compress`` or ``save_pretrained`` wrote.
        output: new or empty.
        to: a name of ``EXPORTS``.
        progress: called after each step.

    Raises:
        CheckpointError: if ``directory`` is no checkpoint, or ``output`` cannot be written.
        UnsupportedModelError: if the other program does not know such a model; the message has the alternative.
        MissingPackageError: if the package that writes the format is not installed.
        GraspError: as ``load_model``.
    """
    exporter = EXPORTS[to]
    if missing := [package for package in exporter.packages if find_spec(package) is None]:
        raise MissingPackageError(f"--to {to} needs {', '.join(missing)}; install with: pip install 'grasp-llm[{to}]'")
    target = check_directory(output)
    inspect_checkpoint(directory)
    remove_abandoned(target)
    texts = read_texts(directory, LICENSES)
    model, tokenizer = load_quietly(str(directory.absolute()), device="cpu", progress=progress)
    with one_step(progress, f"writing {to}"), new_folder(target, texts, seen={}) as folder:
        note = exporter.write(model, tokenizer, folder)
    return Export(str(directory), str(target), to, _file_bytes(directory), _file_bytes(target), note)


def _file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
