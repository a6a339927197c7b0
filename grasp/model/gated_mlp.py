"""Gated MLPs, ``down_proj(act_fn(gate_proj(x)) * up_proj(x))``, in which one op computes all but ``down_proj``."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling
from transformers import activations

from grasp.model.lowrank_linear import LowRankLinear
from grasp_kernels import lowrank_glu
from grasp_kernels.dispatch import backend_missing, cuda_rows

FORMULA = "self.down_proj(self.act_fn(self.gate_proj({x})) * self.up_proj({x}))"
ACTIVATIONS: dict[type[nn.Module], str] = {  # type → the name that ``lowrank_glu`` has for it
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    nn.ReLU: "relu",
}


@functools.cache
def formula_of(forward: Callable[..., Any]) -> str | None:
    """The expression that a method returns for its argument ``{x}``, with each variable replaced by its value.

    ``None`` unless its source is assignments and a return, and the expression has all calls of the source, each once.

    Example:
        >>> from transformers.models.llama.modeling_llama import LlamaMLP
        >>> formula_of(LlamaMLP.forward)
        'self.down_proj(self.act_fn(self.gate_proj({x})) * self.up_proj({x}))'
    """
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(forward))).body
    except (OSError, TypeError, SyntaxError):  # no source: built in, typed at a prompt, or a lambda amid other code
        return None
    if not isinstance(function, ast.FunctionDef) or function.decorator_list:
        return None
    arguments, calls = function.args, _count_calls(function)
    if len(arguments.args) != 2 or arguments.vararg or arguments.kwarg or arguments.kwonlyargs or arguments.posonlyargs:
        return None
    first, x = (argument.arg for argument in arguments.args)
    if first != "self":
        return None
    values = _Values(x)
    for line in function.body[ast.get_docstring(function) is not None :]:
        match line:
            case ast.Assign([ast.Name(name)], value):
                values.of[name] = values.visit(value)
            case ast.Assign([ast.Tuple([ast.Name(name), ast.Name("_")])], value):
                values.of[name] = ast.Subscript(values.visit(value), ast.Constant(0))
            case ast.Return(ast.expr() as value):  # a line after it would have calls or be without effect
                formula = values.visit(value)
                return ast.unparse(formula) if _count_calls(formula) == calls else None
            case _:
                return None
    return None


class _Values(ast.NodeTransformer):
    """Replaces variables by their values."""

    def __init__(self, x: str) -> None:
        self.of: dict[str, ast.expr] = {x: ast.Name("{x}")}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.of.get(node.id, node)


def _count_calls(node: ast.AST) -> int:
    return sum(isinstance(part, ast.Call) for part in ast.walk(node))


def fuse_gate_(module: nn.Module, enabled: bool) -> None:
    """Give a gated MLP the class that uses ``lowrank_glu``, or return it to its own; no-op for other modules."""
    kind: Any = vars(type(module)).get("gated_kind", type(module))
    low_rank = type(getattr(module, "gate_proj", None)) is type(getattr(module, "up_proj", None)) is LowRankLinear
    wanted = _gated(kind) if enabled and low_rank and formula_of(kind.forward) == FORMULA else kind
    if type(module) is not wanted:
        module.__class__ = wanted


@functools.cache
def _gated(kind: Any) -> Any:
    """A subclass of a gated MLP's class with its name: ``lowrank_glu`` computes gate, activation and up if it can.

    A class, not a forward of the instance: replicas and copies use their own factors, and no cycle keeps an MLP alive.
    """

    class Gated(kind):
        gated_kind = kind

        def forward(self, x: Tensor) -> Tensor:
            if _gains_by_fusing(x) and (product := _gated_product(self, x)) is not None:
                return self.down_proj(product)
            return super().forward(x)

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            return _new_gated, (kind,), *object.__reduce_ex__(self, 2)[2:]  # for pickle and deepcopy

    Gated.__name__, Gated.__qualname__, Gated.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Gated


def _new_gated(kind: Any) -> Any:
    return _gated(kind).__new__(_gated(kind))


def _gated_product(mlp: Any, x: Tensor) -> Tensor | None:
    """``act_fn(gate_proj(x)) * up_proj(x)`` by one op; ``None`` if it cannot, or if more than the formula must run."""
    gate, up, activation = mlp.gate_proj, mlp.up_proj, ACTIVATIONS.get(type(mlp.act_fn))
    if (
        activation is None
        or not type(gate) is type(up) is LowRankLinear
        or not gate.backend == up.backend == "auto"
        or not gate.U.device == up.U.device == x.device  # one was offloaded
        or not all(map(_is_bare, (gate, up, mlp.act_fn)))
    ):
        return None
    return lowrank_glu(x, gate.factors, up.factors, activation=activation)


def _is_bare(module: nn.Module) -> bool:
    """Whether a call of the module is its forward and nothing else: no hooks, and no library has replaced it."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return not any(hooks) and "forward" not in vars(module)


def _gains_by_fusing(x: Tensor) -> bool:
    """Whether ``lowrank_glu`` is faster than linears, activation and product: on a GPU, where it writes a third.

    Not where ``cuda`` runs the linears of an eager call, whose time is that of the host. Not with gradients: the op
    would compute gate and up again in the backward pass. On a CPU, measured, it is up to a third slower at one row.
    """
    if not x.is_cuda or is_grad_enabled():
        return False
    return is_compiling() or x.numel() > cuda_rows(x.dtype) * x.shape[-1] or backend_missing("cuda") is not None
