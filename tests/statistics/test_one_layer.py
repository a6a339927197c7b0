from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from grasp.method.least_squares import Moments
from grasp.model.batch import as_batches
from grasp.statistics.one_layer import OneLayer
from grasp.statistics.sweep import capture_prefix
from tests.tiny_models import tiny_batches, tiny_model

Visited = list[tuple[Tensor, Tensor]]


def sums(change: Callable[[nn.Module], None]) -> tuple[nn.Module, dict[nn.Module, Tensor], Tensor, Tensor, Visited]:
    """The MLP of a layer, inputs of its linears, sums of ``up_proj`` after the layer's input changed, and visits."""
    model = tiny_model("llama", torch.float64)
    mlp = model.model.layers[1].mlp
    change(mlp)
    prefix = capture_prefix(model, as_batches(tiny_batches(2, 3)), {1})
    run, hidden = OneLayer(prefix, 1), prefix.hidden[1]
    linears = [module for module in model.model.layers[1].modules() if isinstance(module, nn.Linear)]
    inputs, _ = run.inputs_and_outputs(hidden, linears)
    groups = {member: calls for members, calls in run.groups(linears, hidden[0]) for member in members}
    width = mlp.up_proj.in_features
    total, visited = Moments.zeros(width, torch.device("cpu"), torch.float64, 0), Visited()
    noise = torch.Generator().manual_seed(0)
    changed = [states + 0.1 * torch.randn(states.shape, generator=noise, dtype=states.dtype) for states in hidden]

    def visit(batch: int, x: Tensor, seen: Tensor) -> None:
        assert batch == len(visited)
        visited.append((x, seen))

    run.add_covariances_(total, mlp.up_proj, groups[mlp.up_proj], inputs.get(mlp.up_proj, ()), changed, visit)
    seen = [torch.cat(list(stored)) for stored in inputs.values()]
    return mlp, dict(zip(inputs, seen, strict=True)), total.cross, total.inputs, visited


def called_twice(mlp: nn.Module) -> None:
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) + forward(2 * x)


def routed(mlp: nn.Module) -> None:
    """The MLP sees the tokens whose first entry is positive."""
    forward = mlp.forward

    def some(x: Tensor) -> Tensor:
        chosen = x[..., 0] > 0
        return torch.zeros_like(x).masked_scatter(chosen[..., None], forward(x[chosen]))

    mlp.forward = some


@pytest.mark.parametrize(("change", "calls"), [(lambda mlp: None, 1), (called_twice, 2)])
def test_inputs_of_all_calls_are_paired_with_those_before_the_change(
    change: Callable[[nn.Module], None], calls: int
) -> None:
    mlp, inputs, cross, gram, visited = sums(change)
    x, tokens = inputs[mlp.up_proj], sum(batch.numel() for batch in tiny_batches(2, 3))
    assert len(x) == calls * tokens
    torch.testing.assert_close(inputs[mlp.gate_proj], x)
    # The inputs after the change are x + e with independent e, so Σ x x̂ᵀ is near Σ x xᵀ and Σ x̂ x̂ᵀ is larger.
    before = x.mT @ x
    assert (cross - before).norm() < 0.2 * before.norm()
    assert not torch.equal(cross, gram)
    xs, seen = map(torch.cat, zip(*visited, strict=True))
    torch.testing.assert_close(xs, x)
    torch.testing.assert_close(xs.mT @ seen, cross)
    torch.testing.assert_close(seen.mT @ seen, gram)


def test_linears_that_see_some_tokens_only_are_not_paired() -> None:
    _, _, cross, gram, visited = sums(routed)
    torch.testing.assert_close(cross, gram)
    assert gram.norm() > 0
    assert not visited
