"""Lets plain transformers load grasp checkpoints: PyTorch calls ``install`` at the end of ``import torch``.

Nothing but the standard library is imported here: neither grasp nor transformers is loaded before it is needed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TABLES = "transformers.quantizers.auto"  # holds transformers' tables of checkpoint formats
_LOADER = "transformers.modeling_utils"  # needs the tables, and no model is loaded without it


def install() -> None:
    """Have ``grasp.model.hf_quantizer`` register its format when transformers can take it. Idempotent, never raises."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    tables = sys.modules.get(_TABLES)
    if tables is None:
        sys.meta_path.insert(0, _Finder(_TABLES))
    elif hasattr(tables, "get_hf_quantizer"):  # the last name it defines
        _register()
    else:  # torch is being imported from the middle of the tables, too late to hook them
        sys.meta_path.insert(0, _Finder(_LOADER))


def _register() -> None:
    """Import ``grasp.model.hf_quantizer``, which registers itself; a failure is logged, never raised."""
    try:
        # Where this import is what led here, it has no such name yet, and registers itself at its own end.
        register = getattr(import_module("grasp.model.hf_quantizer"), "register", None)
        if register is not None:
            register()
    except Exception as error:  # noqa: BLE001 - whatever is wrong with grasp, other users of transformers must go on
        logging.getLogger("grasp").warning(
            "grasp checkpoints cannot be loaded in this process, all others can: importing grasp.model.hf_quantizer "
            "raised %s: %s. Upgrade or reinstall grasp-llm; TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns this off.",
            type(error).__name__,
            error,
        )


class _Finder(MetaPathFinder):
    """Finds one module where it is, and has ``_register`` run right after it.

    It stays in ``sys.meta_path``: removing an entry makes an import that another thread is in the middle of skip one.
    """

    def __init__(self, hooked: str) -> None:
        self._hooked = hooked

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._hooked:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(fullname, path, target) if find and finder is not self else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RegisterAfter(spec.loader)
                return spec
        return None


class _RegisterAfter(Loader):
    """Runs a module with its own loader, which it gives back to the module first, then ``_register``."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()
