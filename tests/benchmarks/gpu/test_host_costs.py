from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]

SAME_LAUNCHES = """
import torch
from benchmarks.gpu.host_costs import factors_of, measure, stubbed
from grasp_kernels.triton import lowrank_linear

def numbers(arguments):
    for value in arguments:
        yield tuple(numbers(value)) if isinstance(value, tuple) else getattr(value, "data_ptr", lambda: value)()

label = "64x48r20+64x32r16"
factors = factors_of(label)
pivoted = factors[1]._replace(U=factors[1].U[16:].contiguous(), order=torch.arange(32, dtype=torch.int32))
x = torch.zeros(1, 64, dtype=torch.bfloat16)
outputs = [torch.empty(1, 48, dtype=torch.bfloat16), torch.empty(1, 32, dtype=torch.bfloat16)]
with stubbed() as stub, torch.no_grad():
    for _ in range(2):
        stub.launches = []
        lowrank_linear.lowrank_linear_grouped(x, [factors[0], pivoted], outputs)
        (shrink, expand) = (list(numbers(launch)) for launch in stub.launches)
        hidden = shrink[6]
        for launch in (shrink, expand):  # grid, stream and arguments; new memory gets the name h
            print(*("h" if value == hidden else "(h,)" if value == (hidden,) else value for value in launch))
    stub.launches = None
    time = measure(label, 1, factors, calls=50)
    assert 0 < time.prepared < time.planned, time
    assert max(time.describe, time.allocate, time.launch) < time.prepared < time.public_op, time
"""


@pytest.mark.slow
def test_triton_gets_the_same_launches_from_a_prepared_pair_in_less_time() -> None:
    """Two calls on the same tensors: only the memory of h is another."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-c", SAME_LAUNCHES]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    launches = done.stdout.splitlines()
    assert len(launches) == 4
    assert launches[:2] == launches[2:]
