"""Random calls of the ops as data: what is passed, and, independent of ``checks.py``, what should become of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from grasp_kernels.dispatch import OPS

FLOATS = ("float32", "float16", "bfloat16", "float64")
OTHER_DTYPES = ("int8", "int64", "bool", "complex64", "float8_e4m3fn")
DENSE = ("contiguous", "transposed", "sliced", "stepped", "expanded", "offset")
OTHER_LAYOUTS = ("coo", "csr", "mkldnn", "quantized", "nested", "jagged")
SIZES = (1, 1, 2, 3, 5, 8, 16, 17, 33)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
MODES = (*("plain",) * 12, "no_grad", "inference", "grad", "grad", "bfloat16", "float16", "fake", "meta", "function")
AUTOCAST = ("bfloat16", "float16")
FACTORS = {"U": "NR", "s": "R", "Vh": "RK", "bias": "N"}  # argument → its sizes
OUTCOMES = ("accepted", "refused", "unavailable")


class Spec(NamedTuple):
    """A tensor: a vector of the integers ``values``, or random numbers."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    device: str = "cpu"
    values: tuple[int, ...] | None = None


class Foreign(NamedTuple):
    """Something that is not a tensor, by its name in ``FOREIGN`` of test_ops.py."""

    name: str


Group = dict[str, Any]  # U, s, Vh and bias: a Spec, a Foreign or None


class Call(NamedTuple):
    """A call of a public op, or with ``registered`` of the op that PyTorch's dispatcher knows."""

    op: str
    tensors: dict[str, Any]  # x, and for the gradient grad_y, U, Vh, cu_seqlens and mask
    groups: Any = ()  # the linears: a list of Groups, or a Foreign
    options: dict[str, Any] = {}  # noqa: RUF012 - activation, second_moment, per_sample, flipped (of `present`)
    backend: Any = "auto"
    mode: str = "plain"
    registered: bool = False


# --- random calls -----------------------------------------------------------------------------------------------------


def random_call(rng: random.Random, backends: Sequence[str]) -> Call:
    """A valid call, of which about two fifths get one or two arguments that may be wrong."""
    op = rng.choice(OPS)
    dtype = rng.choice(("float32", "bfloat16", "float16", "float32", "bfloat16", "float64"))
    call = _gradient(rng, dtype) if op == "singular_value_grad" else _linear(rng, op, dtype)
    call = call._replace(
        backend=rng.choice(backends), mode=rng.choice(MODES), registered=rng.random() < 0.2 and call.groups != []
    )
    if rng.random() < 0.4:
        for _ in range(rng.choice((1, 1, 2))):
            call = _spoil(rng, call)
    if call.mode == "fake" and not _is_dense(call):  # PyTorch fakes dense tensors only
        call = call._replace(mode="plain")
    if call.mode == "meta":
        call = _map_tensors(call, lambda spec: spec._replace(device="meta", values=None))
    return call


def _leading(rng: random.Random) -> tuple[int, ...]:
    return rng.choice(((1,), (1,), (3,), (7,), (33,), (65,), (0,), (), (2, 3), (1, 1, 2), (2, 0), (1,) * 8))


def _spec(rng: random.Random, shape: tuple[int, ...], dtype: str) -> Spec:
    return Spec(shape, dtype, "contiguous" if rng.random() < 0.5 else rng.choice(DENSE))


def _linear(rng: random.Random, op: str, dtype: str) -> Call:
    K, width = rng.choice(SIZES), rng.choice(SIZES)
    count = {"lowrank_linear": 1, "lowrank_glu": 2}.get(op) or rng.choice((1, 2, 2, 2, 3, 3, 9))
    groups = []
    for _ in range(count):
        N, R = width if op == "lowrank_glu" else rng.choice(SIZES), rng.choice(SIZES)
        groups.append({
            "U": _spec(rng, (N, R), dtype),
            "s": rng.choice((None, _spec(rng, (R,), "float32"), _spec(rng, (R,), dtype))),
            "Vh": _spec(rng, (R, K), dtype),
            "bias": rng.choice((None, _spec(rng, (N,), dtype))),
        })  # fmt: skip
    options = {"activation": rng.choice(ACTIVATIONS)} if op == "lowrank_glu" else {}
    return Call(op, {"x": _spec(rng, (*_leading(rng), K), dtype)}, groups, options)


def _gradient(rng: random.Random, dtype: str) -> Call:
    K, N, R, leading = rng.choice(SIZES), rng.choice(SIZES), rng.choice(SIZES), _leading(rng)
    tokens = 1
    for size in leading:
        tokens *= size
    cu_seqlens = None
    if rng.random() < 0.4:
        inner = sorted(rng.randint(0, tokens) for _ in range(rng.randint(0, 3)))
        bounds = (0, *inner, tokens)
        cu_seqlens = Spec(
            (len(bounds),), rng.choice(("int32", "int64")), rng.choice(("contiguous", "stepped")), "cpu", bounds
        )
    tensors = {
        "x": _spec(rng, (*leading, K), dtype),
        "grad_y": _spec(rng, (*leading, N), dtype),
        "U": _spec(rng, (N, R), dtype),
        "Vh": _spec(rng, (R, K), dtype),
        "cu_seqlens": cu_seqlens,
        "mask": _spec(rng, leading, "bool") if rng.random() < 0.3 else None,
    }
    options = {"per_sample": rng.random() < 0.5, "second_moment": rng.choice((None, "token", "sample"))}
    return Call("singular_value_grad", tensors, options=options)


def _map_tensors(call: Call, change: Any) -> Call:
    def apply(arguments: Group) -> Group:
        return {name: change(value) if isinstance(value, Spec) else value for name, value in arguments.items()}

    groups = call.groups
    if not _is_foreign(groups):
        groups = [apply(group) if isinstance(group, dict) else group for group in groups]
    return call._replace(tensors=apply(call.tensors), groups=groups)


def _is_dense(call: Call) -> bool:
    groups = [group for group in call.groups if isinstance(group, dict)] if not _is_foreign(call.groups) else []
    values = [value for arguments in (call.tensors, *groups) for value in arguments.values()]
    return all(value.layout in DENSE for value in values if isinstance(value, Spec))


def _is_foreign(value: Any) -> bool:
    return isinstance(value, Foreign)


def _spoil(rng: random.Random, call: Call) -> Call:
    """The call with one argument changed, which may leave it valid."""
    if not call.registered and rng.random() < 0.15:  # names; PyTorch's schema checks those of registered ops
        name = rng.choice((*call.options, "backend"))
        value = rng.choice((None, "", "bogus", 3, Foreign("list"), Foreign("tensor"), "none", "cuda", True))
        if name == "backend":
            return call._replace(backend=value)
        return call._replace(options={**call.options, name: value})
    if _is_foreign(call.groups):
        return call
    if call.registered and call.op == "lowrank_linear_grouped" and rng.random() < 0.2:
        return call._replace(options={"flipped": rng.randrange(4 * len(call.groups))})
    if call.groups and rng.random() < 0.8:
        index = rng.randrange(len(call.groups))
        groups = list(call.groups)
        if not isinstance(groups[index], dict):
            return call
        if not call.registered and rng.random() < 0.1:
            groups[index] = Foreign(rng.choice(("list", "tuple", "array", "none", "tensor")))
            if call.op == "lowrank_linear_grouped" and rng.random() < 0.4:
                return call._replace(groups=rng.choice(([], Foreign("tensor"), Foreign("none"), Foreign("integer"))))
        else:
            name = rng.choice(tuple(FACTORS))
            value = _other(rng, groups[index][name], call.registered, name in ("s", "bias"))
            groups[index] = {**groups[index], name: value}
        if call.op == "lowrank_linear" and not isinstance(groups[0], dict):
            return call
        return call._replace(groups=groups)
    name = rng.choice(tuple(call.tensors))
    value = _other(rng, call.tensors[name], call.registered, name in ("cu_seqlens", "mask"))
    return call._replace(tensors={**call.tensors, name: value})


def _other(rng: random.Random, value: Any, registered: bool, optional: bool) -> Any:
    """Another value for an argument."""
    spec = value if isinstance(value, Spec) else Spec((3,))
    kind = rng.randrange(7)
    if kind == 0 and (optional or not registered):
        return None
    if kind == 1 and not registered:
        return Foreign(rng.choice(("array", "list", "integer", "text", "tuple")))
    if kind == 2:
        return spec._replace(dtype=rng.choice((*FLOATS, *FLOATS, *OTHER_DTYPES)), values=None)
    if kind == 3:
        return spec._replace(device="meta", values=None)
    if kind == 4 and not registered:
        return Spec((3, 8), layout=rng.choice(OTHER_LAYOUTS))
    if kind == 5 and spec.values is not None:
        values = list(spec.values)
        values[rng.randrange(len(values))] += rng.choice((-1, 1, 40, -(2**30)))
        return spec._replace(values=tuple(values))
    shape = list(spec.shape)
    if shape and rng.random() < 0.7:
        shape[rng.randrange(len(shape))] = rng.choice((0, 1, *SIZES))
    elif shape and rng.random() < 0.5:
        shape.pop()
    else:
        shape.append(rng.choice(SIZES))
    return spec._replace(shape=tuple(shape), values=None)


# --- the outcome that a call should have ------------------------------------------------------------------------------


def outcome(call: Call) -> str:
    """One of ``OUTCOMES``: from descriptions alone, by unification of sizes."""
    if not isinstance(call.backend, str) or call.backend not in ("auto", "cuda", "triton", "cpu", "reference"):
        return "refused"
    call = autocast(call)
    if "flipped" in call.options or _is_foreign(call.groups):
        return "refused"
    if not all(isinstance(group, dict) for group in call.groups):
        return "refused"
    if not (_gradient_is_valid(call) if call.op == "singular_value_grad" else _linear_is_valid(call)):
        return "refused"
    if call.mode in ("fake", "meta") or call.backend in ("auto", "reference"):
        return "accepted"
    if call.backend == "cuda" or call.tensors["x"].dtype == "float64":
        return "unavailable"
    return "accepted"


def autocast(call: Call) -> Call:
    """The call as autocast changes it: linears in its dtype, statistics in the widest of all; fp64 stays.

    Singular values of the other 16-bit dtype become fp32.
    """
    x = call.tensors["x"]
    if call.mode not in AUTOCAST or call.registered or not isinstance(x, Spec) or x.device == "meta":
        return call
    names = ("x", "grad_y", "U", "Vh", "bias")
    if call.op == "singular_value_grad":
        dtypes = [call.tensors[name].dtype for name in names[:4] if isinstance(call.tensors[name], Spec)]
        ranks = {"float16": 0, "bfloat16": 0, "float32": 1, "float64": 2}
        if not all(dtype in ranks for dtype in dtypes):
            return call
        widest = max(dtypes, key=ranks.__getitem__)
        dtype = "float32" if {"float16", "bfloat16"} <= set(dtypes) and ranks[widest] == 0 else widest
    elif x.dtype == "float64":
        return call
    else:
        dtype = call.mode

    def cast(arguments: Any) -> Any:
        if not isinstance(arguments, dict):
            return arguments
        changed = dict(arguments)
        for name, value in arguments.items():
            if name in names and isinstance(value, Spec) and value.dtype in FLOATS:
                changed[name] = value._replace(dtype=dtype)
            elif name == "s" and isinstance(value, Spec) and value.dtype in {"float16", "bfloat16"} - {dtype}:
                changed[name] = value._replace(dtype="float32")
        return changed

    groups = call.groups if _is_foreign(call.groups) else [cast(group) for group in call.groups]
    return call._replace(tensors=cast(call.tensors), groups=groups)


def _fits(value: Any, letters: str, sizes: dict[str, int], dtypes: Sequence[str], device: str) -> bool:
    """Whether a tensor is dense, has the sizes that the letters stand for, and one of the dtypes on the device."""
    return (
        isinstance(value, Spec)
        and value.layout in DENSE
        and len(value.shape) == len(letters)
        and all(size > 0 and sizes.setdefault(letter, size) == size for letter, size in zip(letters, value.shape))  # noqa: B905
        and value.dtype in dtypes
        and value.device == device
    )


def _linear_is_valid(call: Call) -> bool:
    x = call.tensors["x"]
    if not isinstance(x, Spec) or x.layout not in DENSE or not x.shape or x.dtype not in FLOATS or not call.groups:
        return False
    sizes: dict[str, int] = {"K": x.shape[-1]}
    for group in call.groups:
        sizes = {"K": sizes["K"], **({"N": sizes["N"]} if call.op == "lowrank_glu" and "N" in sizes else {})}
        for name in ("U", "Vh", "s", "bias"):
            dtypes = (x.dtype, "float32") if name == "s" else (x.dtype,)
            if (group[name] is not None or name in ("U", "Vh")) and not _fits(
                group[name], FACTORS[name], sizes, dtypes, x.device
            ):
                return False
    return call.op != "lowrank_glu" or call.options["activation"] in ACTIVATIONS


def _gradient_is_valid(call: Call) -> bool:
    x, grad_y, mask, bounds = (call.tensors[name] for name in ("x", "grad_y", "mask", "cu_seqlens"))
    moment, per_sample = call.options["second_moment"], call.options["per_sample"]
    if moment not in (None, "token", "sample") or isinstance(moment, bool) or not isinstance(per_sample, bool):
        return False
    if not isinstance(x, Spec) or x.layout not in DENSE or not x.shape or x.dtype not in FLOATS:
        return False
    sizes: dict[str, int] = {"K": x.shape[-1]}
    if not all(_fits(call.tensors[name], FACTORS[name], sizes, (x.dtype,), x.device) for name in ("U", "Vh")):
        return False
    same = isinstance(grad_y, Spec) and grad_y.layout in DENSE and (grad_y.dtype, grad_y.device) == (x.dtype, x.device)
    if not same or grad_y.shape != (*x.shape[:-1], sizes["N"]):
        return False
    if mask is not None and not (
        isinstance(mask, Spec)
        and mask.layout in DENSE
        and (mask.shape, mask.dtype, mask.device) == (x.shape[:-1], "bool", x.device)
    ):
        return False
    if bounds is None:
        return True
    if not isinstance(bounds, Spec) or bounds.layout not in DENSE or bounds.dtype not in ("int32", "int64"):
        return False
    if len(bounds.shape) != 1 or bounds.shape[0] < 1 or bounds.device != x.device:
        return False
    return call.mode in ("fake", "meta") or _rises(bounds, x)


def _rises(bounds: Spec, x: Spec) -> bool:
    tokens = 1
    for size in x.shape[:-1]:
        tokens *= size
    values = bounds.values or (0,) * bounds.shape[0]
    return values[0] == 0 and values[-1] == tokens and all(a <= b for a, b in pairwise(values))
