"""The fixture ``gate`` and the option ``--gate`` for the benchmarks of this folder."""

from __future__ import annotations

pytest_plugins = ["grasp.bench.plugin"]
