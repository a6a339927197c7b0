"""A compressed model in torch.compile and torch.export; AOTInductor is in tests/serving."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from grasp.model.lowrank_linear import set_backend_
from grasp_kernels.dispatch import backend_missing
from tests.command_line import environment
from tests.lowrank_models import compressed_model
from tests.tiny_models import VOCABULARY

pytestmark = pytest.mark.long

SHAPES = ((2, 12), (3, 7), (1, 20))
# Loads argv[1], computes the logits of the tokens in argv[2], writes them to argv[3].
LOAD = """
import sys
import grasp_kernels
import torch
program = torch.export.load(sys.argv[1]).module()
torch.save([program(tokens) for tokens in torch.load(sys.argv[2])], sys.argv[3])
assert "transformers" not in sys.modules and "grasp" not in sys.modules
"""


class Logits(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits


def inputs(device: str = "cpu") -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randint(3, VOCABULARY, shape, device=device) for shape in SHAPES]


def exported(model: nn.Module) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (inputs()[0],), dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},))


def low_rank_ops(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if "grasp" in str(node.target)]


@torch.no_grad()
def test_a_model_compiles_to_one_graph_for_all_shapes() -> None:
    model, graphs = compressed_model("qwen2"), []

    def keep(module: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(low_rank_ops(module.graph))
        return module

    torch.compiler.reset()
    compiled = torch.compile(Logits(model), fullgraph=True, dynamic=True, backend=keep)
    for tokens in inputs():
        torch.testing.assert_close(compiled(tokens), Logits(model)(tokens), rtol=1e-4, atol=1e-4)
    assert len(graphs) <= 2  # a batch of one has another graph
    for ops in graphs:
        assert sorted(ops) == 4 * ["grasp.lowrank_linear.default"] + 4 * ["grasp.lowrank_linear_grouped.default"]


def test_an_exported_program_gives_the_same_logits_in_a_process_without_transformers(tmp_path: Path) -> None:
    model = Logits(compressed_model("qwen2"))
    program = exported(model)
    assert len(low_rank_ops(program.graph)) == 8
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save(inputs(), tmp_path / "tokens.pt")
    files = [tmp_path / name for name in ("model.pt2", "tokens.pt", "logits.pt")]
    run = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, files)], env=environment(), capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    with torch.no_grad():
        for logits, tokens in zip(torch.load(files[2]), inputs(), strict=True):
            torch.testing.assert_close(logits, model(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA GPU")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("rows", [1, 4])
@torch.inference_mode()
def test_cuda_graphs_replay_a_compiled_model(backend: str, rows: int) -> None:
    """bf16, few rows and 512 features: kernels with workspaces and counters serve these calls, not matrix products."""
    if (reason := backend_missing(backend)) is not None:
        pytest.skip(f"{backend}: {reason}")
    model = compressed_model("qwen2", torch.bfloat16, hidden_size=512, intermediate_size=1024).to("cuda")
    set_backend_(model, backend)
    torch.compiler.reset()
    compiled = torch.compile(Logits(model), fullgraph=True, mode="reduce-overhead")
    tokens = inputs("cuda")[0][0, :rows, None]
    for shift in range(4):  # warm-up, capture, two replays with other tokens
        shifted = (tokens + shift) % VOCABULARY
        expected = Logits(model)(shifted).float()
        assert (compiled(shifted).float() - expected).norm() <= 0.03 * expected.norm()
