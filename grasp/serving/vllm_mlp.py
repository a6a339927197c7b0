"""Gated MLPs of vLLM, ``down_proj(act_fn(gate_up_proj(x)))``, in which one op computes all but ``down_proj``."""

from __future__ import annotations

import functools
import weakref
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.linear import LinearBase

from grasp.model.gated_mlp import formula_of

# Of the forward of an MLP. The function is ``act_fn`` unless down_proj has 8-bit inputs, which grasp's has not.
FORMULAS = (
    "self.down_proj(self.act_fn(self.gate_up_proj({x})[0]))[0]",
    "self.down_proj(maybe_fused_act_quant(self.act_fn, self.gate_up_proj({x})[0], self.down_proj))[0]",
)
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}  # by ``approximate``
_parents: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


@functools.cache
def watch_parents() -> None:
    """From now on, remember the MLP to which a ``gate_up_proj`` is assigned: vLLM shows a method only its linear."""

    def remember(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if name == "gate_up_proj" and isinstance(child, LinearBase):
            _parents[child] = weakref.ref(parent)

    register_module_module_registration_hook(remember)


def fuse_gate_(linear: LinearBase) -> str | None:
    """Give the MLP of a ``gate_up_proj`` the class that uses ``lowrank_glu``, if its forward is one of ``FORMULAS``.

    Returns:
        The activation; ``None``, and nothing changes, for another forward or activation.
    """
    mlp = _parents[linear]() if linear in _parents else None
    kind: Any = vars(type(mlp)).get("gated_kind", type(mlp))
    activation = _activation(getattr(mlp, "act_fn", None))
    gathers = getattr(linear, "gather_output", False) and linear.tp_size > 1
    if mlp is None or activation is None or gathers or formula_of(kind.forward) not in FORMULAS:
        return None
    mlp.__class__ = _gated(kind)
    return activation


def _activation(module: Any) -> str | None:
    """The name that ``lowrank_glu`` has for an activation of vLLM, if any."""
    if type(module) is GeluAndMul:
        return _GELUS.get(module.approximate)
    return "silu" if type(module) is SiluAndMul else None


@functools.cache
def _gated(kind: Any) -> Any:
    """A subclass of an MLP's class, with its name, for MLPs whose ``gate_up_proj`` has two low-rank parts."""

    class Gated(kind):
        gated_kind = kind

        def forward(self, x: Tensor) -> Tensor:
            linear = self.gate_up_proj
            return self.down_proj(linear.quant_method.gated(linear, x, _activation(self.act_fn)))[0]

    Gated.__name__, Gated.__qualname__, Gated.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Gated
