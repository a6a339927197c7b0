"""Calls of the ops that once read outside a tensor, gave a wrong result or raised an undocumented exception."""

from __future__ import annotations

from tests.fuzz.ops_calls import Call, Foreign, Spec

_X, _U, _S, _VH, _BIAS = Spec((3, 8)), Spec((6, 2)), Spec((2,)), Spec((2, 8)), Spec((6,))
_GROUP = {"U": _U, "s": _S, "Vh": _VH, "bias": _BIAS}
_GRADIENT = {"x": _X, "grad_y": Spec((3, 6)), "U": _U, "Vh": _VH, "cu_seqlens": None, "mask": None}
_OPTIONS = {"per_sample": False, "second_moment": None}


def _linear(x: object = _X, mode: str = "plain", registered: bool = False, **changes: object) -> Call:
    return Call("lowrank_linear", {"x": x}, [{**_GROUP, **changes}], backend="cpu", mode=mode, registered=registered)


def _gradient(backend: str = "auto", registered: bool = False, **changes: object) -> Call:
    tensors = {name: changes.get(name, value) for name, value in _GRADIENT.items()}
    options = {name: changes.get(name, value) for name, value in _OPTIONS.items()}
    return Call("singular_value_grad", tensors, options=options, backend=backend, registered=registered)


def _odd(backend: str) -> Call:
    """A slice in bf16 with odd rows, whose memory oneDNN's product on AMX left by one element."""
    x, U, Vh = (Spec(shape, "bfloat16", "sliced") for shape in ((33, 33), (3, 8), (8, 33)))
    return Call("lowrank_linear", {"x": x}, [{"U": U, "s": None, "Vh": Vh, "bias": None}], backend=backend)


def _group(dtype: str) -> dict[str, Spec | None]:
    return {"U": _U._replace(dtype=dtype), "s": None, "Vh": _VH._replace(dtype=dtype), "bias": None}


_META = {name: value._replace(device="meta") for name, value in _GROUP.items()}
_BF16, _HALF = _group("bfloat16"), _group("float16")

CORPUS: dict[str, Call] = {
    # Read outside a tensor, or read half precision as fp32.
    "a short s": _linear(registered=True, s=Spec((1,))),
    "a short bias": _linear(registered=True, bias=Spec((1,))),
    "an empty s": _linear(registered=True, s=Spec((0,))),
    "U in half precision": _linear(registered=True, U=Spec((6, 2), "float16")),
    "a list of factors that is too short": Call(
        "lowrank_linear_grouped", {"x": _X}, [_GROUP], {"flipped": 3}, "cpu", registered=True
    ),
    "an odd slice in bf16, by PyTorch": _odd("reference"),
    "an expanded s of a gate, by Triton with many rows": Call(
        "lowrank_glu",
        {"x": Spec((65, 8), "float16")},
        [{**_HALF, "s": Spec((2,), layout="expanded")}, _HALF],
        {"activation": "relu"},
        "triton",
    ),
    "a strided mask, by Triton": _gradient(backend="triton", mask=Spec((3,), "bool", "stepped")),
    "strided bounds, by Triton": _gradient(
        backend="triton", per_sample=True, cu_seqlens=Spec((3,), "int64", "stepped", values=(0, 1, 3))
    ),
    # Undocumented exceptions.
    "samples without bounds": _gradient(registered=True, per_sample=True),
    "the second moment of samples without bounds": _gradient(registered=True, second_moment="sample"),
    "an array for x": _linear(x=Foreign("array")),
    "an array for U": _linear(U=Foreign("array")),
    "a sparse x": _linear(x=Spec((3, 8), layout="coo")),
    "a nested s": _linear(s=Spec((2,), layout="nested")),
    "no U under autocast": _linear(mode="bfloat16", U=None),
    "no grad_y": _gradient(grad_y=None),
    "a list for per_sample": _gradient(per_sample=Foreign("tensor")),
    "a tensor of factors": Call("lowrank_linear_grouped", {"x": _X}, Foreign("tensor")),
    # Wrong in silence: integers cast by autocast; a registered op whose output had autocast's dtype.
    "integers under autocast": _linear(mode="bfloat16", U=Spec((6, 2), "int8")),
    "a registered op under autocast": Call(
        "lowrank_linear", {"x": Spec((3, 8), "bfloat16")}, [_BF16], {}, "reference", "float16", registered=True
    ),
    "tensors without data under autocast": Call(
        "lowrank_linear", {"x": _X._replace(device="meta")}, [_META], {}, "auto", "bfloat16", registered=True
    ),
    "no samples, and bounds that say so": _gradient(
        x=Spec((0, 8)), grad_y=Spec((0, 6)), cu_seqlens=Spec((1,), "int64", values=(0,)), per_sample=True
    ),
}
