"""Measure the decoding time of a model's linears, dense and at several ranks, as stored, and of the rest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from grasp.bench.conditions import device_name
from grasp.bench.timing import interleave
from grasp.errors import ResultsError
from grasp.evaluation.generation import now, time_generation
from grasp.method.cost_table import CostTable, LinearSeconds, find_card, from_roofline
from grasp.method.ranks import Form, Shape, break_even_rank
from grasp.method.storage import Storage
from grasp.model.dense import dense_shape
from grasp.model.hooks import hooked, replaced
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.narrowing import narrowest_shapes
from grasp.model.quantized_linear import QuantizedLinear, QuantizedLowRankLinear, quantized_like, storage_outside
from grasp.model.running import first_device
from grasp.model.targets import all_targets, decoder
from grasp.progress import Progress, no_progress
from grasp_kernels.packing import RANK_MULTIPLE
from grasp_kernels.roofline import Card
from speedgate.timing import Batch, Rotation, batch

ROTATE_BYTES = 64 << 20  # distinct weights that calls rotate through: a model reads other weights in between
POINTS = 4  # timed ranks up to the break-even one, besides the lowest
REPETITIONS = 9
TOLERANCE = 0.02  # norm-wise and relative; bf16 rounds the product of the input with Vh, and the result
PROMPT_TOKENS, NEW_TOKENS, DECODES = 32, 16, 5
_Kind = tuple[Storage | None, int | None]  # storage and rank of a linear: ``None`` for floating, and for dense


def costs_for(
    model: PreTrainedModel,
    source: str | None,
    form: Form,
    storages: Sequence[Storage] = (),
    *,
    measured: CostTable | None = None,
    progress: Progress = no_progress,
) -> CostTable:
    """The costs that ``source`` names: a file, a card, or ``None`` for this machine: ``measured``, or measured now.

    Raises:
        CostTableError: if it is neither a file nor a card, or the table is for another model, dtype or form, or lacks
            a storage.
    """
    shapes = {*linear_shapes(model), *narrowest_shapes(model)}
    if source is None:
        if measured is None or not {*product(shapes, (None, *storages))} <= measured.linears.keys():
            measured = measure_costs(model, form, storages, progress=progress)
        return measured
    costs = find_costs(source)
    dtype = str(model.dtype).removeprefix("torch.")
    if isinstance(costs, Card):
        head = tuple(model.get_output_embeddings().weight.shape)
        weights: dict[str, Any] = {"dtype": dtype, "itemsize": model.dtype.itemsize, "head": head}
        costs = from_roofline(costs, shapes, form=form, storages=storages, **weights)
    costs.require(shapes, dtype, form, storages)
    return costs


def find_costs(source: str) -> CostTable | Card:
    """The table in a file, or the card with a name.

    Raises:
        CostTableError: if ``source`` is neither, or the file is damaged.
    """
    path = Path(source)
    return CostTable.load(path) if path.is_file() else find_card(source)


def linear_shapes(model: PreTrainedModel) -> list[Shape]:
    """Shapes (N, K) of the linears of the decoder layers that low-rank factors make smaller."""
    shapes = [dense_shape(target.module) for target in all_targets(model)]
    return [shape for shape in shapes if break_even_rank(shape, "factored") >= 1]


def measured_ranks(shape: Shape, form: Form) -> tuple[int, ...]:
    """Ranks to time, from one block of a kernel to the break-even rank; multiples of 16 if there are any."""
    most = break_even_rank(shape, form)
    spaced = (most * i // POINTS for i in range(1, POINTS + 1))
    ranks = {max(1, rank // RANK_MULTIPLE * RANK_MULTIPLE or rank) for rank in spaced}
    return tuple(sorted(ranks | {min(RANK_MULTIPLE, most)}))


@torch.inference_mode()
def measure_costs(
    model: PreTrainedModel,
    form: Form = "pivoted",
    storages: Sequence[Storage] = (),
    *,
    progress: Progress = no_progress,
) -> CostTable:
    """Time linears of the model's shapes, dtype and device on one token, and the model's own decoding.

    Of MLPs that may lose channels the narrowest shapes are timed too; those in between are interpolated.
    Calls rotate through copies of a linear, so that no weights are in a cache. The dense linear and its ranks take
    turns, floating and in each of the ``storages``; the medians count. The rest of the decoder layers, and of a token,
    is measured by decoding with the model; with ``storages``, also with all its linears in the first of them.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 64, "hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 2}
        >>> table = measure_costs(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)))
        >>> [shape for shape, _ in sorted(table.linears)], table.source
        ([(256, 512), (512, 256), (512, 512)], 'measured')
    """
    device, dtype, shapes = first_device(model), model.dtype, linear_shapes(model)
    linears: dict[tuple[Shape, Storage | None], LinearSeconds] = {}
    timed = sorted({*shapes, *narrowest_shapes(model)})
    steps = len(timed) + 1
    for done, shape in enumerate(timed):
        progress("costs of linears", done, steps)
        ranks = measured_ranks(shape, form)
        times = _time_linears(shape, list(product((None, *storages), (None, *ranks))), form, device, dtype)
        for storage in (None, *storages):
            low_rank = tuple(times[storage, rank] for rank in ranks)
            linears[shape, storage] = LinearSeconds(times[storage, None], ranks, low_rank)
    progress("costs of linears", steps - 1, steps)
    beside: dict[Storage | None, tuple[float, float]] = {}
    stored = (None, *storages[:1])
    for storage, (layers, rest) in zip(stored, _time_decoding(model, stored), strict=True):
        other = layers - sum(linears[shape, storage].dense for shape in shapes)
        beside[storage] = max(0.0, other / len(decoder(model).layers)), rest
    progress("costs of linears", steps, steps)
    layer, rest = beside[None]
    layer_quantized, rest_quantized = beside[storages[0]] if storages else (None, None)
    return CostTable(
        device=device_name(device),
        source="measured",
        dtype=str(dtype).removeprefix("torch."),
        form=form,
        linears=linears,
        layer=layer,
        rest=rest,
        layer_quantized=layer_quantized,
        rest_quantized=rest_quantized,
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        versions={name: version(name) for name in ("torch", "transformers", "grasp-llm")},
    )


@torch.inference_mode()
def require_product(linear: LowRankLinear | QuantizedLowRankLinear | QuantizedLinear, name: str) -> None:
    """Check that a low-rank or quantised linear computes the product with its weight, for one token.

    Raises:
        ResultsError: if it does not; the message has its error.
    """
    scales_or_weights = next(p for p in linear.parameters() if p.is_floating_point() and p.itemsize > 1)
    x = torch.randn(1, 1, linear.in_features).to(scales_or_weights)
    expected = x.double() @ linear.dense_weight().double().mT
    if linear.bias is not None:
        expected += linear.bias.double()
    error = float((linear(x).double() - expected).norm() / expected.norm())
    if not error <= TOLERANCE:
        raise ResultsError(f"{name} is off by {error:.1e}, expected at most {TOLERANCE:.0e}")


def _time_linears(
    shape: Shape, kinds: Sequence[_Kind], form: Form, device: torch.device, dtype: torch.dtype
) -> dict[_Kind, float]:
    """Seconds of linears of one shape on one token; all of them take turns."""
    x = torch.randn(1, 1, shape[1], device=device).to(dtype)
    batches: dict[_Kind, Batch] = {}
    for storage, rank in kinds:
        make = _maker(shape, storage, rank, form, device, dtype)
        first = make()
        if isinstance(first, QuantizedLinear | QuantizedLowRankLinear | LowRankLinear):
            size = f"{shape[1]}x{shape[0]}" + ("" if rank is None else f"r{rank}")
            require_product(first, f"the {storage or 'floating'} linear {size}")
        copies = max(2, ROTATE_BYTES // sum(p.nbytes for p in first.parameters()))
        modules = Rotation([first, *(make() for _ in range(copies - 1))])
        batches[storage, rank] = batch(device.type, lambda module: module(x), modules)
    return {kind: sample.median for kind, sample in interleave(batches, REPETITIONS).items()}


def _maker(
    shape: Shape, storage: Storage | None, rank: int | None, form: Form, device: torch.device, dtype: torch.dtype
) -> Callable[[], nn.Module]:
    """A function that makes a linear with random weights."""
    n, k = shape
    make: Callable[..., nn.Module] = partial(nn.Linear, k, n, bias=False, dtype=dtype)
    if rank is not None:
        make = partial(LowRankLinear, k, n, rank, bias=False, pivoted=form == "pivoted", dtype=dtype)
    if storage is None:
        return partial(make, device=device)
    return partial(_quantized, make(device="meta"), storage, device)


def _quantized(floating: nn.Module, storage: Storage, device: torch.device) -> nn.Module:
    module = quantized_like(floating, storage, device)
    assert module is not None
    for parameter in module.parameters():
        if parameter.dtype == torch.float8_e4m3fn:
            parameter.view(torch.uint8).random_(0, 127)  # 127 is NaN
        elif parameter.is_floating_point():
            parameter.uniform_(5e-4, 2e-3)
        else:
            parameter.random_()
    return module


def _time_decoding(model: PreTrainedModel, stored: Sequence[Storage | None]) -> list[tuple[float, float]]:
    """Median seconds of one token in all decoder layers together, and outside them, stored in these ways in turns."""
    layers, replacements = decoder(model).layers, [_quantized_modules(model, storage) for storage in stored]
    inside: list[list[float]] = [[] for _ in stored]
    outside: list[list[float]] = [[] for _ in stored]
    for repetition, turn in product(range(DECODES + 1), range(len(stored))):
        with replaced(model, replacements[turn]), _timed(list(layers), first_device(model)) as seconds:
            generation = time_generation(model, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS)
        if repetition:  # the first repetition warms up
            within = sum(seconds[-NEW_TOKENS * len(layers) :])  # without the prompt's calls
            inside[turn].append(within / NEW_TOKENS)
            outside[turn].append((generation.decode_s - within) / NEW_TOKENS)
    return list(zip(map(median, inside), map(median, outside), strict=True))


def _quantized_modules(model: PreTrainedModel, storage: Storage | None) -> dict[str, nn.Module]:
    """Quantised modules of zeros by path, for all that ``quantize_`` replaces; none without a storage."""
    if storage is None:
        return {}
    inside, device = set(decoder(model).layers.modules()), first_device(model)
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        own = storage if module in inside else storage_outside(model, module, storage)
        if (quantized := quantized_like(module, own, device)) is not None:
            modules[name] = quantized
    return modules


@contextmanager
def _timed(layers: Collection[nn.Module], device: torch.device) -> Iterator[list[float]]:
    """The seconds of all calls of the layers, in order."""
    seconds: list[float] = []
    starts: list[float] = []
    with hooked(
        *layers,
        before=lambda *_: starts.append(now(device)),
        after=lambda *_: seconds.append(now(device) - starts.pop()),
    ):
        yield seconds
