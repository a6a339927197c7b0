"""Finds gated MLPs: modules whose forward is ``down_proj(act_fn(gate_proj(x)) * up_proj(x))`` and nothing else."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable

from torch import Tensor, nn
from transformers import activations

FORMULA = "self.down_proj(self.act_fn(self.gate_proj({x})) * self.up_proj({x}))"
ACTIVATIONS: dict[type[nn.Module], str] = {  # type → the name that ``lowrank_glu`` has for it
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    nn.ReLU: "relu",
}


@functools.cache
def is_gated_forward(forward: Callable[..., Tensor]) -> bool:
    """Whether the source of a method is the formula, in one statement or with one variable for its value.

    Example:
        >>> from transformers.models.llama.modeling_llama import LlamaMLP
        >>> is_gated_forward(LlamaMLP.forward)
        True
    """
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(forward))).body
    except (OSError, TypeError, SyntaxError):  # no source: built in, typed at a prompt, or a lambda amid other code
        return False
    if not isinstance(function, ast.FunctionDef) or function.decorator_list:
        return False
    arguments = function.args
    if len(arguments.args) != 2 or arguments.vararg or arguments.kwarg or arguments.kwonlyargs or arguments.posonlyargs:
        return False
    first, x = (argument.arg for argument in arguments.args)
    formula = FORMULA.format(x=x)
    line, *rest = [ast.unparse(line) for line in function.body[ast.get_docstring(function) is not None :]] or [""]
    name, _, value = line.partition(" = ")
    return first == "self" and ([line, *rest] == [f"return {formula}"] or (value, *rest) == (formula, f"return {name}"))
