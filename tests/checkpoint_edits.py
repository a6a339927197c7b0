"""Changes of the files of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

Edit = Callable[[dict[str, Any]], object]  # in place


def edit_json(path: Path, edit: Edit) -> None:
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def edit_config(folder: Path, edit: Edit) -> None:
    """Change the ``quantization_config``."""
    edit_json(folder / "config.json", lambda config: edit(config["quantization_config"]))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
