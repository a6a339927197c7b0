"""Lets plain transformers load grasp checkpoints: PyTorch calls ``install`` at the end of ``import torch``.

This module imports only the standard library, so ``import torch`` loads neither grasp nor transformers.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TABLES = "transformers.quantizers"  # has the tables of checkpoint formats
_NAMES = ("HfQuantizer", "register_quantization_config", "register_quantizer")  # what hf_quantizer takes from it
_LOADER = "transformers.modeling_utils"  # imports the tables; every model is loaded through it


def install() -> None:
    """Register the checkpoint format as soon as transformers has imported its tables. Idempotent, never raises."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    tables = sys.modules.get(_TABLES)
    if tables is None:
        sys.meta_path.insert(0, _Finder(_TABLES))
    elif all(hasattr(tables, name) for name in _NAMES):
        _register()
    else:  # the tables are importing torch right now, so it is too late to hook them
        sys.meta_path.insert(0, _Finder(_LOADER))


def _register() -> None:
    """Import ``grasp.model.hf_quantizer`` and register its format. A failure is logged, never raised."""
    try:
        # If the import of hf_quantizer triggered this call, it has no ``register`` yet; it registers itself at its end.
        register = getattr(import_module("grasp.model.hf_quantizer"), "register", None)
        if register is not None:
            register()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a broken grasp must not break other uses of transformers
        logging.getLogger("grasp").warning(
            "this process cannot load grasp checkpoints, but all others: importing grasp.model.hf_quantizer raised "
            "%s: %s. Upgrade or reinstall grasp-llm; TORCH_DEVICE_BACKEND_AUTOLOAD=0 disables this import.",
            type(error).__name__,
            error,
        )


class _Finder(MetaPathFinder):
    """Finds one module with the other finders, and runs ``_register`` after its import.

    It stays in ``sys.meta_path``: removing an entry would make a concurrent import in another thread skip a finder.
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
    """Restores the module's own loader, runs the module with it, then runs ``_register``."""

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
