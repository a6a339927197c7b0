"""pytest-speedgate for calls of PyTorch: ``pytest_plugins = ["grasp.bench.plugin"]`` in ``conftest.py``.

The calls run on the GPU if there is one, unless ``--gate-device`` says otherwise.
"""

from __future__ import annotations

import pytest
import torch

pytest_plugins = ["speedgate.plugin"]


@pytest.hookimpl(tryfirst=True)  # before speedgate reads the option
def pytest_configure(config: pytest.Config) -> None:
    """Choose the device."""
    config.option.gate_device = config.option.gate_device or ("cuda" if torch.cuda.is_available() else "cpu")
