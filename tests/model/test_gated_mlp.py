"""Gated MLPs whose gate and up are low-rank, as on a GPU: one op, and the results of the class's forward."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from grasp.model import gated_mlp as fusing
from grasp.model.gated_mlp import FORMULA, formula_of
from grasp.model.grouping import group_linears_
from grasp.model.lowrank_linear import LowRankLinear, set_backend_
from grasp_kernels import Factors, lowrank_glu
from tests.lowrank_models import compressed_model, logits


@pytest.fixture(autouse=True)
def gated_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The activations of all calls of ``lowrank_glu``, which is used on the CPU too."""
    calls: list[str] = []

    def counted(x: Tensor, gate: Factors, up: Factors, *, activation: str) -> Tensor:
        calls.append(activation)
        return lowrank_glu(x, gate, up, activation=activation)

    monkeypatch.setattr(fusing, "lowrank_glu", counted)
    monkeypatch.setattr(fusing, "_gains_by_fusing", lambda _: not torch.is_grad_enabled())
    return calls


def gated_mlp(hidden_act: str = "silu") -> LlamaMLP:
    torch.manual_seed(0)
    mlp = LlamaMLP(
        LlamaConfig(hidden_size=24, num_attention_heads=2, intermediate_size=40, hidden_act=hidden_act, mlp_bias=True)
    )
    for name, rank in (("gate_proj", 5), ("up_proj", 7)):
        setattr(mlp, name, LowRankLinear(24, 40, rank))
    group_linears_(mlp)
    return mlp.eval()


@pytest.mark.parametrize(
    ("hidden_act", "name"),
    [("silu", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu", "relu"), ("mish", None)],
)
def test_an_mlp_is_one_op_and_down_proj(hidden_act: str, name: str | None, gated_calls: list[str]) -> None:
    mlp, x = gated_mlp(hidden_act), torch.randn(2, 3, 24)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), LlamaMLP.forward(mlp, x), rtol=1e-5, atol=1e-5)
    assert gated_calls == ([name] if name else [])


def test_gradients_are_those_of_the_class(gated_calls: list[str]) -> None:
    mlp, x = gated_mlp(), torch.randn(3, 24)
    mlp(x).sum().backward()
    got = {name: parameter.grad for name, parameter in mlp.named_parameters()}
    mlp.zero_grad()
    LlamaMLP.forward(mlp, x).sum().backward()
    assert all(torch.equal(got[name], parameter.grad) for name, parameter in mlp.named_parameters())
    assert gated_calls == []


def dequantized(mlp: LlamaMLP) -> None:
    mlp.up_proj = nn.Linear(24, 40)


def on_another_backend(mlp: LlamaMLP) -> None:
    set_backend_(mlp, "reference")


CHANGES: dict[str, Callable[[LlamaMLP], Any]] = {
    "a hook on gate": lambda mlp: mlp.gate_proj.register_forward_hook(lambda *_: None),
    "a hook on the activation": lambda mlp: mlp.act_fn.register_forward_pre_hook(lambda *_: None),
    "another activation": lambda mlp: setattr(mlp, "act_fn", ACT2FN["mish"]),
    "a dense up": dequantized,
    "a named backend": on_another_backend,
    "a parametrization": lambda mlp: nn.utils.parametrizations.weight_norm(mlp.up_proj, "Vh"),
    "an offloaded up": lambda mlp: cpu_offload(mlp.up_proj, torch.device("cpu")),
    "groups taken apart": lambda mlp: group_linears_(mlp, enabled=False),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_forward_of_the_class_runs_after_a_change(
    change: Callable[[LlamaMLP], Any], gated_calls: list[str]
) -> None:
    mlp, x = gated_mlp(), torch.randn(3, 24)
    change(mlp)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), LlamaMLP.forward(mlp, x))
    assert gated_calls == []


def test_an_mlp_taken_apart_has_its_class_again() -> None:
    mlp = gated_mlp()
    assert isinstance(mlp, LlamaMLP)
    assert repr(mlp).startswith("LlamaMLP(")
    assert type(mlp) is not LlamaMLP
    kind = type(mlp)
    group_linears_(mlp)
    assert type(mlp) is kind
    group_linears_(mlp, enabled=False)
    assert type(mlp) is LlamaMLP


def test_a_replica_computes_with_its_own_factors(gated_calls: list[str]) -> None:
    mlp, x = gated_mlp(), torch.randn(3, 24)
    twin = mlp._replicate_for_data_parallel()
    twin.gate_proj, twin.up_proj = LowRankLinear(24, 40, 2), LowRankLinear(24, 40, 2)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), LlamaMLP.forward(twin, x))
    assert gated_calls == ["silu"]


def test_nothing_keeps_an_mlp_alive() -> None:
    mlp = gated_mlp()
    alive = weakref.ref(mlp)
    gc.disable()
    try:
        del mlp
        assert alive() is None
    finally:
        gc.enable()


def test_copies_compute_with_their_own_factors(gated_calls: list[str]) -> None:
    mlp, x = gated_mlp(), torch.randn(3, 24)
    twin, buffer = copy.deepcopy(mlp), io.BytesIO()
    torch.save(mlp, buffer)
    loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    unpickled = pickle.loads(pickle.dumps(mlp))
    with torch.no_grad():
        expected = mlp(x)
        for other in (mlp, twin, loaded, unpickled):
            assert set(other.state_dict()) == set(mlp.state_dict())
        mlp.gate_proj.U.zero_()
        for other in (twin, loaded, unpickled):
            torch.testing.assert_close(other(x), expected)
    assert gated_calls == 4 * ["silu"]


def test_an_mlp_compiles_and_exports_with_one_op_for_gate_and_up(gated_calls: list[str]) -> None:
    mlp, x = gated_mlp(), torch.randn(3, 24)
    with torch.no_grad():
        expected = mlp(x)
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(mlp, fullgraph=True, backend="eager")(x), expected)
        program = torch.export.export(mlp, (x,))
        torch.testing.assert_close(program.module()(x), expected)
    assert [str(node.target) for node in program.graph.nodes if "grasp" in str(node.target)] == [
        "grasp.lowrank_glu.default"
    ]


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_a_loaded_model_uses_the_op(family: str, gated_calls: list[str]) -> None:
    model = compressed_model(family)
    fused = logits(model)
    assert gated_calls
    calls = len(gated_calls)
    group_linears_(model, enabled=False)
    torch.testing.assert_close(logits(model), fused, rtol=1e-4, atol=1e-4)
    assert len(gated_calls) == calls


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (nn.Identity() for _ in range(4))


class Direct(Base):
    def forward(self, hidden: Tensor) -> Tensor:
        """The formula."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


class Steps(Base):
    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        x = self.act_fn(gate) * self.up_proj(x)
        return self.down_proj(x)


class Repeated(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act_fn(x)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Dropped(Base):
    def forward(self, x: Tensor) -> Tensor:
        _ = self.up_proj(x)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Swapped(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Scaled(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return 2 * y


class Optional(Base):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Decorated(Base):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Abstract(Base):
    def forward(self, x: Tensor) -> Tensor:
        """The formula is elsewhere."""


Unparsable = type("Unparsable", (Base,), {
    "forward": lambda self, x: x,
})  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "gated"),
    [
        *((kind, True) for kind in (LlamaMLP, Direct, Steps)),
        *((kind, False) for kind in (Repeated, Dropped, Swapped, Scaled, Optional, Decorated, Abstract, Unparsable)),
    ],
)
def test_only_the_formula_is_recognised(kind: type[nn.Module], gated: bool) -> None:
    assert (formula_of(kind.forward) == FORMULA) is gated


def test_on_a_cpu_the_op_is_not_used(monkeypatch: pytest.MonkeyPatch, gated_calls: list[str]) -> None:
    monkeypatch.undo()
    assert not fusing._gains_by_fusing(torch.zeros(1, 1))
