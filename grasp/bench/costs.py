"""Measure the decoding time of a model's linears, dense and at several ranks, and of the rest of the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from torch import nn
from transformers import PreTrainedModel

from grasp.bench.conditions import device_name
from grasp.bench.timing import interleave
from grasp.errors import ResultsError
from grasp.evaluation.generation import now, time_generation
from grasp.method.cost_table import CostTable, LinearSeconds, find_card, from_roofline
from grasp.method.ranks import Form, Shape, break_even_rank, parameters_at
from grasp.model.dense import dense_shape
from grasp.model.hooks import hooked
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.running import first_device
from grasp.model.targets import decoder, layer_targets
from grasp.progress import Progress, no_progress
from grasp_kernels.packing import RANK_MULTIPLE
from grasp_kernels.roofline import Card
from speedgate.timing import Batch, Rotation, batch

ROTATE_BYTES = 64 << 20  # distinct weights that calls rotate through: a model reads other weights in between
POINTS = 4  # timed ranks up to the break-even one, besides the lowest
REPETITIONS = 9
TOLERANCE = 0.02  # norm-wise and relative; bf16 rounds the product of the input with Vh, and the result
PROMPT_TOKENS, NEW_TOKENS, DECODES = 32, 16, 5


def costs_for(
    model: PreTrainedModel,
    source: str | None,
    form: Form,
    measured: CostTable | None = None,
    *,
    progress: Progress = no_progress,
) -> CostTable:
    """The costs that ``source`` names: a file, a card, or ``None`` for this machine, measured now if not before.

    Raises:
        CostTableError: if it is neither a file nor a card, or the table is for another model, dtype or form.
    """
    if source is None:
        return measured or measure_costs(model, form, progress=progress)
    shapes, costs = linear_shapes(model), find_costs(source)
    dtype = str(model.dtype).removeprefix("torch.")
    if isinstance(costs, Card):
        head = model.get_output_embeddings().weight
        itemsize = model.dtype.itemsize
        costs = from_roofline(costs, shapes, dtype=dtype, form=form, itemsize=itemsize, rest_bytes=head.nbytes)
    costs.require(shapes, dtype, form)
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
    targets = (target for layer in range(len(decoder(model).layers)) for target in layer_targets(model, layer)[0])
    return [shape for target in targets if break_even_rank(shape := dense_shape(target.module), "factored") >= 1]


def measured_ranks(shape: Shape, form: Form) -> tuple[int, ...]:
    """Ranks to time, from one block of a kernel to the break-even rank; multiples of 16 if there are any."""
    most = break_even_rank(shape, form)
    spaced = (most * i // POINTS for i in range(1, POINTS + 1))
    ranks = {max(1, rank // RANK_MULTIPLE * RANK_MULTIPLE or rank) for rank in spaced}
    return tuple(sorted(ranks | {min(RANK_MULTIPLE, most)}))


@torch.inference_mode()
def measure_costs(model: PreTrainedModel, form: Form = "pivoted", *, progress: Progress = no_progress) -> CostTable:
    """Time linears of the model's shapes, dtype and device on one token, and the model's own decoding.

    Calls rotate through copies of a linear, so that no weights are in a cache. The dense linear and its ranks take
    turns; the medians count. The rest of the decoder layers, and of a token, is measured by decoding with the model.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 64, "hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 2}
        >>> table = measure_costs(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)))
        >>> sorted(table.linears), table.source
        ([(512, 512)], 'measured')
    """
    device, dtype, shapes = first_device(model), model.dtype, linear_shapes(model)
    linears: dict[Shape, LinearSeconds] = {}
    for shape in sorted(set(shapes)):
        progress("costs of linears", len(linears), len(set(shapes)) + 1)
        linears[shape] = _time_linear(shape, form, device, dtype)
    progress("costs of linears", len(linears), len(set(shapes)) + 1)
    layers, rest = _time_decoding(model)
    progress("costs of linears", len(linears) + 1, len(set(shapes)) + 1)
    other = layers - sum(linears[shape].dense for shape in shapes)
    return CostTable(
        device=device_name(device),
        source="measured",
        dtype=str(dtype).removeprefix("torch."),
        form=form,
        linears=linears,
        layer=max(0.0, other / len(decoder(model).layers)),
        rest=rest,
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        versions={name: version(name) for name in ("torch", "transformers", "grasp-llm")},
    )


@torch.inference_mode()
def require_product(linear: LowRankLinear, name: str) -> None:
    """Check that a low-rank linear computes the product with its weight, for one token.

    Raises:
        ResultsError: if it does not; the message has its error.
    """
    x = torch.randn(1, 1, linear.in_features).to(linear.U)
    expected = x.double() @ linear.dense_weight().double().mT
    if linear.bias is not None:
        expected += linear.bias.double()
    error = float((linear(x).double() - expected).norm() / expected.norm())
    if not error <= TOLERANCE:
        raise ResultsError(f"{name} is off by {error:.1e}, expected at most {TOLERANCE:.0e}")


def _time_linear(shape: Shape, form: Form, device: torch.device, dtype: torch.dtype) -> LinearSeconds:
    n, k = shape
    x = torch.randn(1, 1, k, device=device).to(dtype)

    def dense() -> nn.Module:
        return nn.Linear(k, n, bias=False, device=device, dtype=dtype)

    def low_rank(rank: int) -> LowRankLinear:
        return LowRankLinear(k, n, rank, bias=False, pivoted=form == "pivoted", device=device, dtype=dtype)

    def timed(make: Callable[[], nn.Module], parameters: int) -> Batch:
        copies = max(2, ROTATE_BYTES // (parameters * dtype.itemsize))
        return batch(device.type, lambda module: module(x), Rotation([make() for _ in range(copies)]))

    batches, ranks = {"dense": timed(dense, n * k)}, measured_ranks(shape, form)
    for rank in ranks:
        require_product(low_rank(rank), f"the low-rank linear {k}x{n}r{rank}")
        batches[str(rank)] = timed(partial(low_rank, rank), parameters_at(shape, rank, form))
    times = {name: sample.median for name, sample in interleave(batches, REPETITIONS).items()}
    return LinearSeconds(times["dense"], ranks, tuple(times[str(rank)] for rank in ranks))


def _time_decoding(model: PreTrainedModel) -> tuple[float, float]:
    """Median seconds of one token in all decoder layers together, and outside them."""
    inside, outside = [], []
    for repetition in range(DECODES + 1):
        with _timed(list(decoder(model).layers), first_device(model)) as seconds:
            generation = time_generation(model, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS)
        if repetition:  # the first repetition warms up
            layers = sum(seconds[-NEW_TOKENS * len(decoder(model).layers) :])  # without the prompt's calls
            inside.append(layers / NEW_TOKENS)
            outside.append((generation.decode_s - layers) / NEW_TOKENS)
    return median(inside), median(outside)


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
