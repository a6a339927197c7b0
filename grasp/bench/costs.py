"""Measure what each linear of a model costs when one token is decoded, dense and at some ranks, and what is beside."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from grasp.bench.conditions import device_name
from grasp.bench.timing import Rotation, batch, interleave
from grasp.errors import ResultsError
from grasp.evaluation.generation import now, time_generation
from grasp.method.cost_table import CostTable, LinearSeconds, find_card, from_roofline
from grasp.method.ranks import Shape, break_even_rank
from grasp.model.dense import dense_shape
from grasp.model.hooks import hooked
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.running import first_device
from grasp.model.targets import decoder, layer_targets
from grasp.progress import Progress, no_progress
from grasp_kernels.packing import RANK_MULTIPLE

ROTATE_BYTES = 64 << 20  # of distinct weights that calls go through: in a model others have been read in between
POINTS = 4  # ranks that are timed up to the break-even one, beside the lowest
REPETITIONS = 9
TOLERANCE = 0.02  # relative and norm-wise; bf16 rounds the product of the input with Vh, and the result
PROMPT_TOKENS, NEW_TOKENS, DECODES = 32, 16, 5


def costs_for(
    model: PreTrainedModel, source: str | None, measured: CostTable | None = None, *, progress: Progress = no_progress
) -> CostTable:
    """The costs that ``source`` names: a file, a card, or ``None`` for this machine, measured now if not before.

    Raises:
        CostTableError: if it is neither a file nor a card, or the table is for another model or dtype.
    """
    if source is None:
        return measured or measure_costs(model, progress=progress)
    shapes, path = linear_shapes(model), Path(source)
    dtype = str(model.dtype).removeprefix("torch.")
    if path.is_file():
        table = CostTable.load(path)
    else:
        head = model.get_output_embeddings().weight
        table = from_roofline(
            *(find_card(source), shapes), dtype=dtype, itemsize=model.dtype.itemsize, rest_bytes=head.nbytes
        )
    table.require(shapes, dtype)
    return table


def linear_shapes(model: PreTrainedModel) -> list[Shape]:
    """(N, K) of every linear of the decoder layers that low-rank factors make smaller."""
    targets = (target for layer in range(len(decoder(model).layers)) for target in layer_targets(model, layer)[0])
    return [shape for target in targets if break_even_rank(shape := dense_shape(target.module)) >= 1]


def measured_ranks(shape: Shape) -> tuple[int, ...]:
    """Ranks from the lowest worth a kernel's block to the break-even one, in multiples of 16 where there are any."""
    most = break_even_rank(shape)
    spaced = (most * i // POINTS for i in range(1, POINTS + 1))
    ranks = {max(1, rank // RANK_MULTIPLE * RANK_MULTIPLE or rank) for rank in spaced}
    return tuple(sorted(ranks | {min(RANK_MULTIPLE, most)}))


@torch.inference_mode()
def measure_costs(model: PreTrainedModel, *, progress: Progress = no_progress) -> CostTable:
    """Time linears of the model's shapes, dtype and device on one token, and the model's own decoding.

    A linear's calls go through copies of it in turn, so that no weights are in a cache; its ranks and the dense one are
    timed in turn as well; medians are taken. What the decoder layers take beyond their linears, and what else a token
    takes, come from decoding with the model itself.

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
        linears[shape] = _time_linear(shape, device, dtype)
    progress("costs of linears", len(linears), len(set(shapes)) + 1)
    layers, rest = _time_decoding(model)
    progress("costs of linears", len(linears) + 1, len(set(shapes)) + 1)
    beside = layers - sum(linears[shape].dense for shape in shapes)
    return CostTable(
        device=device_name(device),
        source="measured",
        dtype=str(dtype).removeprefix("torch."),
        linears=linears,
        layer=max(0.0, beside / len(decoder(model).layers)),
        rest=rest,
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        versions={name: version(name) for name in ("torch", "transformers", "grasp-llm")},
    )


@torch.inference_mode()
def require_product(linear: LowRankLinear, name: str) -> None:
    """Raise unless a low-rank linear computes the product of its factors, for one token.

    Raises:
        ResultsError: with how far it is off.
    """
    x = torch.randn(1, 1, linear.in_features).to(linear.U)
    expected = x.double() @ linear.Vh.double().mT @ linear.U.double().mT
    if linear.bias is not None:
        expected += linear.bias.double()
    off = float((linear(x).double() - expected).norm() / expected.norm())
    if not off <= TOLERANCE:
        raise ResultsError(f"{name} is off by {off:.1e}, at most {TOLERANCE:.0e} is allowed")


def _time_linear(shape: Shape, device: torch.device, dtype: torch.dtype) -> LinearSeconds:
    n, k = shape
    x = torch.randn(1, 1, k, device=device).to(dtype)

    def dense() -> nn.Module:
        return nn.Linear(k, n, bias=False, device=device, dtype=dtype)

    batches = {"dense": batch(device, lambda module: module(x), _rotation(dense, n * k * dtype.itemsize))}
    ranks = measured_ranks(shape)
    for rank in ranks:

        def low(rank: int = rank) -> LowRankLinear:
            return LowRankLinear(k, n, rank, bias=False, device=device, dtype=dtype)

        require_product(low(), f"the low-rank linear {k}x{n}r{rank}")
        batches[str(rank)] = batch(device, lambda module: module(x), _rotation(low, rank * (n + k) * dtype.itemsize))
    times = {name: sample.median for name, sample in interleave(batches, REPETITIONS).items()}
    return LinearSeconds(times["dense"], ranks, tuple(times[str(rank)] for rank in ranks))


def _rotation(make: Any, nbytes: int) -> Rotation[nn.Module]:
    return Rotation([make() for _ in range(max(2, ROTATE_BYTES // nbytes))])


def _time_decoding(model: PreTrainedModel) -> tuple[float, float]:
    """Seconds of one token in all decoder layers together, and outside of them; medians."""
    inside, outside = [], []
    for repetition in range(DECODES + 1):
        with _timed(list(decoder(model).layers), first_device(model)) as seconds:
            took = time_generation(model, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS)
        if repetition:  # the first warms up
            layers = sum(seconds[-NEW_TOKENS * len(decoder(model).layers) :])  # those before are the prompt's
            inside.append(layers / NEW_TOKENS)
            outside.append((took.decode_s - layers) / NEW_TOKENS)
    return median(inside), median(outside)


@contextmanager
def _timed(layers: Collection[nn.Module], device: torch.device) -> Iterator[list[float]]:
    """The seconds of each call of any of the layers, in their order."""
    seconds: list[float] = []
    starts: list[float] = []
    with hooked(
        *layers,
        before=lambda *_: starts.append(now(device)),
        after=lambda *_: seconds.append(now(device) - starts.pop()),
    ):
        yield seconds
