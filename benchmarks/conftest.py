"""Loads the fixture ``gate`` and the option ``--gate`` for ``benchmarks/gate``."""

from __future__ import annotations

pytest_plugins = ["grasp.bench.plugin"]
