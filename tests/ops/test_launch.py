from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from grasp_kernels.triton.launch import Gpu, gpu_of

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_dependent_launch_begins_with_sm_90() -> None:
    cards = [Gpu("any", 100, capability) for capability in (80, 89, 90, 100, 120)]
    assert [card.dependent_launch for card in cards] == [False, False, True, True, True]


def test_the_interpreter_is_a_card_without_dependent_launch() -> None:
    assert not gpu_of(CPU).dependent_launch


BIND = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

class H100:
    utils = Utils()
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

driver.set_active(H100())

from dataclasses import replace
from grasp_kernels import Factors, pack_factors
from grasp_kernels.triton import lowrank_glu, lowrank_linear
from grasp_kernels.triton.launch import Gpu
from grasp_kernels.launch_configs import rule_of_thumb

gpu = Gpu("H100", 132, 90)
bf16 = torch.bfloat16
x = torch.empty(4, 512, dtype=bf16)
group = [Factors(torch.empty(256, R, dtype=bf16), s, torch.empty(R, 512, dtype=bf16), None)
         for R, s in ((20, None), (1, torch.empty(1)))]
outputs = [torch.empty(4, 256, dtype=bf16) for _ in group]
config = rule_of_thumb("lowrank_linear", lowrank_linear.launch_key(x, group), gpu)
launches = lowrank_linear.plan(x, group, outputs, config, gpu)
launches += lowrank_linear.plan(x, pack_factors(group), outputs, replace(config, path="fused", reduce=True), gpu)
launches += lowrank_glu.plan(x, *group, "gelu", outputs[0], config, gpu)
order = torch.empty(256, dtype=torch.int32)
launches.append(lowrank_glu.invert_launch(group[0]._replace(order=order), order))
for launch in launches:
    compiled = launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options)
    metadata = compiled.metadata
    print(launch.kernel.__name__, metadata.num_warps, metadata.launch_pdl, metadata.launch_cooperative_grid)
"""


@pytest.mark.slow
def test_launches_bind_and_compile_as_they_would_on_a_card() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    done = subprocess.run([sys.executable, "-c", BIND], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "_lowrank_shrink_kernel 4 True False",
        "_lowrank_expand_kernel 4 True False",
        "_lowrank_fused_kernel 4 False True",
        "_lowrank_shrink_kernel 4 True False",
        "_lowrank_glu_expand_kernel 4 True False",
        "_invert_kernel 4 False False",
    ]
