"""Random calls of the ops: each is refused with a documented exception, or its result is that of fp64."""

from __future__ import annotations

import collections
import contextlib
import functools
import random
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from grasp_kernels import (
    BackendUnavailableError,
    Factors,
    available_backends,
    cpu,
    cuda,
    lowrank_glu,
    lowrank_linear,
    lowrank_linear_grouped,
    singular_value_grad,
)
from grasp_kernels.dispatch import CUDA_ROWS
from tests.fuzz import ops_exact as exact
from tests.fuzz.ops_calls import AUTOCAST, DENSE, FLOATS, OUTCOMES, Call, Foreign, Spec, autocast, outcome, random_call
from tests.fuzz.ops_corpus import CORPUS
from tests.ops.conftest import built_emulator, emulator  # noqa: F401 - fixtures
from tests.ops.cuda_emulator import Emulator

PUBLIC = {
    "lowrank_linear": lowrank_linear,
    "lowrank_linear_grouped": lowrank_linear_grouped,
    "lowrank_glu": lowrank_glu,
    "singular_value_grad": singular_value_grad,
}
FOREIGN = {
    "array": np.zeros((3, 8)),
    "list": [[1.0]],
    "integer": 3,
    "text": "x",
    "tuple": (torch.zeros(3),),
    "none": None,
    "tensor": torch.zeros(3, 8),
}
BLOCK = 1000  # calls per seed, and results per comparison
FAKE = FakeTensorMode()


# --- tensors ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8192)
def tensor(spec: Spec) -> Tensor:
    """The tensor of a description, always the same. Memory around a view is NaN, so that a read of it shows."""
    dtype = getattr(torch, spec.dtype)
    if spec.values is not None:
        values = torch.tensor(spec.values, dtype=dtype, device=spec.device)
        return values if spec.layout == "contiguous" else values.repeat_interleave(2)[::2]
    generator = torch.Generator().manual_seed(zlib.crc32(repr(spec).encode()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prototypes and deprecations of PyTorch
        return _lay_out(torch.randn(spec.shape, generator=generator), spec, dtype)


def _lay_out(values: Tensor, spec: Spec, dtype: torch.dtype) -> Tensor:
    if spec.layout not in DENSE:
        values = torch.randn(3, 8)
        return {
            "coo": values.to_sparse,
            "csr": values.to_sparse_csr,
            "mkldnn": values.to_mkldnn,
            "quantized": lambda: torch.quantize_per_tensor(values, 0.1, 0, torch.qint8),
            "nested": lambda: torch.nested.nested_tensor([values, values]),
            "jagged": lambda: torch.nested.nested_tensor([values, values], layout=torch.jagged),
        }[spec.layout]()
    values = values.to(spec.device)
    values = values > 0 if dtype == torch.bool else values.mul(0.5).to(dtype)
    if values.dtype in (torch.int32, torch.int64):
        values.zero_()
    if not values.dim() or not values.numel() or spec.layout == "contiguous":
        return values
    if spec.layout == "transposed":
        return values.mT.contiguous().mT if values.dim() > 1 else values
    if spec.layout == "expanded":
        return values[:1].expand(spec.shape)
    if spec.layout == "offset":
        around = _nan((values.numel() + 8,), values)
        return around[3 : 3 + values.numel()].view(spec.shape).copy_(values)
    if spec.layout == "stepped":
        return _nan((*spec.shape[:-1], 2 * spec.shape[-1]), values)[..., ::2].copy_(values)
    around = _nan(tuple(size + 3 for size in spec.shape), values)
    return around[tuple(slice(1, 1 + size) for size in spec.shape)].copy_(values)


def _nan(shape: tuple[int, ...], like: Tensor) -> Tensor:
    around = torch.empty(shape, dtype=like.dtype, device=like.device)
    return around.fill_(torch.nan if like.is_floating_point() or like.is_complex() else 1)


@functools.lru_cache(maxsize=8192)
def fake(spec: Spec) -> Tensor:
    """The tensor without its data."""
    return FAKE.from_tensor(tensor(spec))


def build(value: Any, mode: str = "plain") -> Any:
    """The argument of a description."""
    if isinstance(value, Foreign):
        return FOREIGN[value.name]
    if isinstance(value, dict):
        return Factors(**{name: build(part, mode) for name, part in value.items()})
    if not isinstance(value, Spec):
        return value
    if mode == "fake":
        return fake(value)
    result = tensor(value)
    if mode == "grad" and value.dtype in FLOATS and value.layout in DENSE:
        return result.detach().requires_grad_()
    return result


# --- calls ------------------------------------------------------------------------------------------------------------


class Passing(torch.overrides.TorchFunctionMode):
    """A mode that changes nothing; the ops must still give their calls to the registered op."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


CONTEXTS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "fake": lambda: FAKE,
    "function": Passing,
    **{dtype: functools.partial(torch.autocast, "cpu", getattr(torch, dtype)) for dtype in AUTOCAST},
}


def perform(call: Call) -> list[Tensor]:
    """The outputs of a call."""
    tensors = {name: build(value, call.mode) for name, value in call.tensors.items()}
    groups = build(call.groups) if isinstance(call.groups, Foreign) else [build(g, call.mode) for g in call.groups]
    options = {name: build(value) for name, value in call.options.items()}
    backend = build(call.backend)
    with CONTEXTS.get(call.mode, contextlib.nullcontext)():
        if call.registered:
            result = getattr(torch.ops.grasp, call.op)(*_registered(call.op, tensors, groups, options), backend)
            if call.op == "singular_value_grad" and options["second_moment"] is None:
                result = result[:1]
        elif call.op == "singular_value_grad":
            result = singular_value_grad(**tensors, **options, backend=backend)
        else:
            spread = [groups] if call.op == "lowrank_linear_grouped" else groups
            if call.op == "lowrank_linear":
                spread = groups[0]
            result = PUBLIC[call.op](tensors["x"], *spread, **options, backend=backend)
    return [result] if isinstance(result, Tensor) else [output for output in result if output is not None]


def _registered(op: str, tensors: dict[str, Any], groups: list[Factors], options: dict[str, Any]) -> list[Any]:
    if op == "singular_value_grad":
        x, grad_y, U, Vh, cu_seqlens, mask = tensors.values()
        return [x, grad_y, U, Vh, cu_seqlens, options["per_sample"], options["second_moment"] or "none", mask]
    if op == "lowrank_linear_grouped":
        present = [tensor is not None for group in groups for tensor in group]
        if "flipped" in options:
            present[options["flipped"]] ^= True
        return [tensors["x"], *([t for t in column if t is not None] for column in zip(*groups, strict=True)), present]
    return [tensors["x"], *(tensor for group in groups for tensor in group), *options.values()]


def expected(call: Call) -> list[exact.Exact]:
    """The outputs in fp64 of a valid call."""
    changed = autocast(call)
    tensors = {name: _wide(call.tensors[name], value) for name, value in changed.tensors.items()}
    if call.op == "singular_value_grad":
        results = exact.gradient(tensors, call.options["per_sample"], call.options["second_moment"])
        return [result for result in results if result is not None]
    linears = [
        exact.linear(tensors["x"], *map(_wide, group.values(), cast.values()))
        for group, cast in zip(call.groups, changed.groups, strict=True)
    ]
    return [exact.glu(*linears, call.options["activation"])] if call.op == "lowrank_glu" else linears


def _wide(value: Spec | None, cast: Spec | None) -> exact.Wide | None:
    """An argument on the CPU, rounded to the dtype that autocast gives it."""
    return None if value is None or cast is None else _widen(value._replace(device="cpu"), cast.dtype)


@functools.lru_cache(maxsize=8192)
def _widen(spec: Spec, dtype: str) -> exact.Wide:
    return exact.Wide.of(tensor(spec).to(getattr(torch, dtype)))


class Checker:
    """Runs calls, compares their outcomes, and compares results with fp64 in blocks."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.pending: list[tuple[Call, Tensor, exact.Exact]] = []

    def check(self, call: Call) -> None:
        wanted = outcome(call)
        assert wanted in OUTCOMES
        try:
            outputs = perform(call)
        except BackendUnavailableError:
            got = "unavailable"
        except (ValueError, TypeError) as error:
            got = "refused" if "\n" not in str(error) else "refused in several lines"
        except NotImplementedError:  # of PyTorch's dispatcher
            got = "refused" if call.registered else "not implemented"
        else:
            got = "accepted"
        # A refusal has two reasons at times.
        assert got == wanted or (wanted, got) == ("refused", "unavailable"), f"{wanted}, but {got}: {call}"
        self.counts[got] += 1
        if got == "accepted":
            self.compare(call, outputs)

    def compare(self, call: Call, outputs: list[Tensor]) -> None:
        for output, result in zip(outputs, expected(call), strict=True):
            assert output.shape == result.value.shape, call
            assert output.dtype == result.dtype, call
            assert output.is_contiguous(), call
            if call.mode != "fake" and not output.is_meta:
                self.pending.append((call, output.detach(), result))
        if len(self.pending) >= BLOCK:
            self.flush()

    def compare_rows(self, call: Call, outputs: list[Tensor]) -> None:
        """``compare`` for outputs of a backend, (M, N)."""
        leading = call.tensors["x"].shape[:-1]
        self.compare(call, [y.view(*leading, y.shape[-1]) for y in outputs])

    def flush(self) -> None:
        """Compare what is pending: all at once, one by one only if something is wrong."""
        if not self.pending:
            return
        got, value, bound = (
            torch.cat([tensor.double().flatten() for tensor in column])
            for column in zip(*((y, result.value, result.bound) for _, y, result in self.pending), strict=True)
        )
        if not bool(((got - value).abs() <= bound).all()):
            for call, y, result in self.pending:
                error = (y.double() - result.value).abs()
                assert bool((error <= result.bound).all()), f"off by {(error / result.bound).max()} bounds: {call}"
        self.pending.clear()


def report(counts: collections.Counter[str], record_property: Callable[[str, object], None], name: str) -> None:
    """Say how many calls there were."""
    record_property(name, dict(counts))
    print(f"\n{name}: {sum(counts.values())} calls, {dict(counts)}")


def random_calls(count: int, backends: tuple[str, ...]) -> Iterator[Call]:
    """The first calls; those of block i come from ``random.Random(i)``."""
    for seed in range(-(-count // BLOCK)):
        rng = random.Random(seed)
        for _ in range(min(BLOCK, count - seed * BLOCK)):
            yield random_call(rng, backends)


# A failed assertion prints the call, which can be added to CORPUS as it is.
COUNTS = {  # backends in the proportions in which they are drawn → random calls with --fuzz and without
    (*("auto",) * 12, *("cpu",) * 10, *("reference",) * 7, "cuda"): (900_000, 3_000),
    ("triton",): (2_000, 15),
}


@pytest.mark.parametrize(("backends", "counts"), COUNTS.items(), ids=["compiled and reference", "triton"])
def test_random_calls(
    backends: tuple[str, ...],
    counts: tuple[int, int],
    fuzzing: bool,
    record_property: Callable[[str, object], None],
    request: pytest.FixtureRequest,
) -> None:
    if missing := {"cpu", "triton"} & set(backends) - set(available_backends()):
        pytest.skip(f"this machine does not run {missing}")
    checker = Checker()
    for call in random_calls(counts[0] if fuzzing else counts[1], backends):
        checker.check(call)
    checker.flush()
    report(checker.counts, record_property, request.node.callspec.id)


def valid_linears(count: int) -> Iterator[tuple[Call, Tensor, list[Factors]]]:
    """The valid linears among the first calls, as a backend gets them: x is (M, K)."""
    for call in random_calls(count, ("cpu",)):
        plain = call._replace(mode="plain", registered=False)
        if call.mode != "meta" and call.op != "singular_value_grad" and outcome(plain) == "accepted":
            x = build(call.tensors["x"])
            yield plain, x.reshape(-1, x.shape[-1]), [build(group) for group in call.groups]


@pytest.mark.skipif("cpu" not in available_backends(), reason="the C++ kernels were not built")
def test_random_linears_with_each_instruction_set(
    fuzzing: bool, record_property: Callable[[str, object], None]
) -> None:
    checker = Checker()
    sets = [name for name in cpu.INSTRUCTION_SETS if cpu.supports(name)]
    for call, x, groups in valid_linears(60_000 if fuzzing else 300):
        for name in sets:
            checker.compare_rows(
                call, cpu.run(x, groups, activation=call.options.get("activation"), instruction_set=name)
            )
            checker.counts[name] += 1
    checker.flush()
    report(checker.counts, record_property, "instruction sets")


def test_random_linears_on_an_emulated_card(
    fuzzing: bool, record_property: Callable[[str, object], None], request: pytest.FixtureRequest
) -> None:
    if not fuzzing:
        pytest.skip("tests/ops/test_cuda.py has a grid of cases; --fuzz adds random ones")
    card: Emulator = request.getfixturevalue("emulator")
    checker, rng = Checker(), random.Random(0)
    for call, x, groups in valid_linears(5_000):
        if call.op != "lowrank_glu" and len(x) <= CUDA_ROWS:
            card.configure(processors=rng.choice((1, 3, 16)), seed=rng.randrange(3))
            path = rng.choice(tuple(cuda.PATH_CODES))
            outputs = cuda.run(x, groups, path=path)
            card.finish()
            checker.compare_rows(call, outputs)
            checker.counts[path] += 1
    checker.flush()
    report(checker.counts, record_property, "emulated card")


@pytest.mark.parametrize("call", CORPUS.values(), ids=CORPUS)
def test_calls_that_were_wrong_once(call: Call) -> None:
    if call.backend in {"cpu", "triton"} - set(available_backends()):
        pytest.skip(f"this machine does not run {call.backend}")
    checker = Checker()
    checker.check(call)
    checker.flush()
