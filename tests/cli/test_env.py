from __future__ import annotations

import json

import torch

from tests.command_line import RunMain


def test_env_lists_every_backend_of_the_table(main: RunMain) -> None:
    from grasp_kernels.dispatch import BACKENDS, backend_missing

    facts = json.loads(main("env", "--json").out)
    assert facts["backends"] == {row.name: backend_missing(row.name) or "available" for row in BACKENDS}
    assert facts["versions"]["torch"] == torch.__version__
    shown = main("env").out
    for row in BACKENDS:
        assert row.name in shown
