"""The time to decode one token, part by part, by shape, storage and rank: measured, or from the rates of a card."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from grasp.errors import CostTableError
from grasp.files import write_whole
from grasp.formatting import one_line
from grasp.method.ranks import FORMS, Form, Shape, break_even_rank, factor_shapes
from grasp.method.storage import OUTPUTS, STORAGES, Storage, matrix_bytes
from grasp.reading import read_json
from grasp_kernels import roofline

FORMAT_VERSION = 2
_BESIDE = ("layer", "rest", "layer_quantized", "rest_quantized")
_FIELDS = ("device", "source", "dtype", "form", *_BESIDE, "threads", "versions")
# Seconds from one kernel to the next inside a CUDA graph. The rates of a card do not include it; 1 to 4 us are usual.
LAUNCH = 2e-6
LAYER_LAUNCHES = 2  # kernels of a layer besides its linears: attention and norms, fused as servers fuse them
POINTS = 16  # ranks of a table from the rates of a card: the time of pivoted factors is no straight line


@dataclass(frozen=True)
class LinearSeconds:
    """The time of one call of a linear on one token: dense, and low-rank at some ranks."""

    dense: float
    ranks: tuple[int, ...]  # ascending
    seconds: tuple[float, ...]  # of each of the ranks

    def at(self, rank: int) -> float:
        """Seconds at any rank: interpolated linearly between the neighbours in the table, constant beyond its ends."""
        i = bisect_left(self.ranks, rank)
        if i == 0 or i == len(self.ranks):
            return self.seconds[min(i, len(self.ranks) - 1)]
        share = (rank - self.ranks[i - 1]) / (self.ranks[i] - self.ranks[i - 1])
        return (1 - share) * self.seconds[i - 1] + share * self.seconds[i]


@dataclass(frozen=True)
class CostTable:
    """The costs of decoding one token, one sequence at a time: of the linears, and of the rest.

    The predicted time of a model is ``rest + Σ_layers (layer + Σ_linears seconds)`` per token.

    Args:
        device: name of the processor or card.
        source: ``"measured"`` or ``"roofline"``.
        dtype: of floating weights, such as ``"bfloat16"``.
        linears: by (out_features, in_features) and storage; ``None`` for floating weights.
        layer: seconds of a decoder layer without its linears: attention, norms, host.
        rest: seconds outside the decoder layers: embedding, output layer.
        layer_quantized: ``layer`` of a quantised model; ``None`` without quantised linears.
        rest_quantized: ``rest`` of one, whose embedding and output layer have 8 bits.
        threads: on a CPU.
        versions: of the packages that it was measured with.
        form: of the low-rank linears.

    Example:
        >>> linear = LinearSeconds(dense=8e-6, ranks=(16, 64), seconds=(2e-6, 6e-6))
        >>> table = CostTable("a card", "measured", "bfloat16", {((96, 64), None): linear}, layer=1e-6, rest=5e-6)
        >>> f"{table.predict([((96, 64), None), ((96, 64), 40)], layers=2):.1e} s"
        '1.9e-05 s'
    """

    device: str
    source: str
    dtype: str
    linears: Mapping[tuple[Shape, Storage | None], LinearSeconds]
    layer: float
    rest: float
    threads: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    form: Form = "factored"
    layer_quantized: float | None = None
    rest_quantized: float | None = None

    def linear(self, shape: Shape, rank: int | None = None, storage: Storage | None = None) -> float:
        """Seconds of one linear of ``shape`` (N, K), low-rank, or dense if ``rank`` is ``None``.

        A shape between two others with as many inputs, or outputs, is interpolated linearly: that of an MLP which lost
        channels is between the whole one's and the narrowest.

        Raises:
            CostTableError: if the table has no such shape or storage.
        """
        if (shape, storage) in self.linears:
            seconds = self.linears[shape, storage]
            return seconds.dense if rank is None else seconds.at(rank)
        for varies in (0, 1):
            equal = 1 - varies
            same = [(n, k) for (n, k), kind in self.linears if kind == storage and (n, k)[equal] == shape[equal]]
            below = max((known for known in same if known[varies] < shape[varies]), default=None)
            above = min((known for known in same if known[varies] > shape[varies]), default=None)
            if below and above:
                share = (shape[varies] - below[varies]) / (above[varies] - below[varies])
                return (1 - share) * self.linear(below, rank, storage) + share * self.linear(above, rank, storage)
        raise CostTableError(self._missing(shape, storage))

    def _missing(self, shape: Shape, storage: Storage | None) -> str:
        start = f"the costs of {self.device} have no"
        if storage is not None and all(known != storage for _, known in self.linears):
            kinds = ", ".join(sorted({str(known or self.dtype) for _, known in self.linears}))
            return (
                f"{start} {storage} linears, only {kinds}. Measure them: "
                f"grasp bench costs MODEL --bits {storage.option} -o costs.json"
            )
        known = ", ".join(f"{n}x{k}" for n, k in sorted({shape for shape, _ in self.linears}))
        return (
            f"{start} linear of {shape[1]} inputs and {shape[0]} outputs, only {known} (outputs x inputs): they were "
            "measured for another model. Measure this one: grasp bench costs MODEL -o costs.json"
        )

    def predict(
        self,
        linears: Iterable[tuple[Shape, int | None] | tuple[Shape, int | None, Storage | None]],
        layers: int,
        *,
        quantized: bool = False,
    ) -> float:
        """Seconds per token of a model.

        Args:
            linears: shape, rank (``None``: dense) and storage of each, as ``linear`` takes them.
            layers: number of decoder layers.
            quantized: whether the model is.
        """
        layer, rest = self.beside_linears(quantized=quantized)
        return rest + layers * layer + math.fsum(self.linear(*linear) for linear in linears)

    def beside_linears(self, *, quantized: bool) -> tuple[float, float]:
        """``layer`` and ``rest``, of a floating model or a quantised one."""
        if not quantized:
            return self.layer, self.rest
        assert self.layer_quantized is not None
        assert self.rest_quantized is not None
        return self.layer_quantized, self.rest_quantized

    def require(self, shapes: Collection[Shape], dtype: str, form: Form, storages: Collection[Storage] = ()) -> None:
        """Check that the table covers linears of these shapes, in this dtype and form, floating and quantised.

        Raises:
            CostTableError: if it is not.
        """
        if dtype != self.dtype:
            raise CostTableError(
                f"the costs of {self.device} are for {self.dtype} weights, the model has {dtype} ones; measure them in "
                f"that dtype, or load the model in {self.dtype}"
            )
        if form != self.form:
            raise CostTableError(
                f"the costs of {self.device} are for {self.form} linears, the configuration asks for {form} ones; "
                f"measure those with grasp bench costs MODEL --form {form}, or compress with form={self.form!r}"
            )
        for shape, storage in product(shapes, (None, *storages)):
            if (shape, storage) not in self.linears:
                raise CostTableError(self._missing(shape, storage))

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON values."""
        rows = [
            {"out_features": n, "in_features": k, "storage": storage and str(storage), **asdict(linear)}
            for ((n, k), storage), linear in self.linears.items()
        ]
        return {**{name: getattr(self, name) for name in _FIELDS}, "linears": rows}

    def save(self, path: Path) -> None:
        """Write the table as JSON, atomically.

        Raises:
            GraspError: if it cannot be written.
        """
        write_whole(path, json.dumps({"format_version": FORMAT_VERSION, **self.to_dict()}, indent=2))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CostTable:
        """The inverse of ``to_dict``; a ``ValueError``, ``KeyError`` or ``TypeError`` if the values are no table."""
        table = cls(**{**values, "linears": dict(map(_row, values["linears"]))})
        _require_times(table)
        return table

    @classmethod
    def load(cls, path: Path) -> CostTable:
        """Read a table that ``save`` wrote.

        Raises:
            CostTableError: if there is no such file, it is not a table, or a time in it is not a positive number.
        """
        expected = f"a table of costs; make one with grasp bench costs MODEL -o {path.name}"
        values = read_json(path, expected, CostTableError)
        if (found := values.pop("format_version", None)) != FORMAT_VERSION:
            raise CostTableError(f"{path} has format_version {found!r}, not {FORMAT_VERSION}; expected {expected}")
        try:
            return cls.from_dict(values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CostTableError(f"{path} is damaged ({one_line(error)}); expected {expected}") from error


def from_roofline(
    card: roofline.Card,
    shapes: Collection[Shape],
    *,
    dtype: str,
    form: Form,
    itemsize: int,
    head: Shape,
    storages: Collection[Storage] = (),
) -> CostTable:
    """The costs by the rates of a card: weights are read once at its bandwidth, and every kernel takes ``LAUNCH``.

    Quantised weights are read as they are stored, by one kernel for each linear.

    Args:
        card: see ``grasp_kernels.roofline.CARDS``.
        shapes: (N, K) of the linears.
        dtype: of the weights.
        form: of the low-rank linears.
        itemsize: bytes of a floating weight.
        head: (N, K) of the output layer.
        storages: quantised ones, beside floating weights.

    Example:
        >>> weights = {"dtype": "bfloat16", "form": "pivoted", "itemsize": 2, "head": (128256, 4096)}
        >>> table = from_roofline(find_card("H100"), [(4096, 4096)], **weights)
        >>> table.linear((4096, 4096), rank=64) < table.linear((4096, 4096))
        True
    """

    def seconds(shape: Shape, matrices: Sequence[Shape], storage: Storage | None) -> float:
        moved = matrix_bytes(matrices, storage, itemsize) + sum(shape) * itemsize
        return roofline.floor(card, roofline.Cost(moved, 2 * sum(map(math.prod, matrices)))) + LAUNCH

    def linear(shape: Shape, storage: Storage | None) -> LinearSeconds:
        most = max(1, break_even_rank(shape, form))
        ranks = tuple(sorted({1, *(max(1, most * i // POINTS) for i in range(1, POINTS + 1))}))
        low = (seconds(shape, factor_shapes(shape, rank, form), storage) for rank in ranks)
        return LinearSeconds(seconds(shape, (shape,), storage), ranks, tuple(low))

    return CostTable(
        device=card.name,
        source="roofline",
        dtype=dtype,
        form=form,
        linears={key: linear(*key) for key in product(sorted(set(shapes)), (None, *storages))},
        layer=LAYER_LAUNCHES * LAUNCH,
        rest=seconds(head, (head,), None),
        layer_quantized=LAYER_LAUNCHES * LAUNCH if storages else None,
        rest_quantized=seconds(head, (head,), OUTPUTS) if storages else None,
    )


def find_card(name: str) -> roofline.Card:
    """A card by its name, upper or lower case.

    Raises:
        CostTableError: if there is none; the message has all names.
    """
    cards = {known.lower(): card for known, card in roofline.CARDS.items()}
    if name.lower() not in cards:
        raise CostTableError(
            f"costs must be a file that grasp bench costs wrote, or a card ({', '.join(roofline.CARDS)}), got {name!r}"
        )
    return cards[name.lower()]


def _row(row: Mapping[str, Any]) -> tuple[tuple[Shape, Storage | None], LinearSeconds]:
    ranks, seconds = tuple(row["ranks"]), tuple(row["seconds"])
    if not ranks or len(ranks) != len(seconds) or list(ranks) != sorted(set(ranks)):
        raise ValueError(f"ranks must ascend, each with its seconds, got {ranks} and {seconds}")
    if not all(type(size) is int and size > 0 for size in (row["out_features"], row["in_features"], *ranks)):
        raise ValueError(f"sizes and ranks must be positive integers, got {dict(row)}")
    if (name := row["storage"]) is not None and name not in STORAGES:
        raise ValueError(f"storage must be one of {', '.join(STORAGES)}, got {name!r}")
    key = (row["out_features"], row["in_features"]), name and STORAGES[name]
    return key, LinearSeconds(row["dense"], ranks, seconds)


def _require_times(table: CostTable) -> None:
    times = [time for linear in table.linears.values() for time in (linear.dense, *linear.seconds)]
    quantized = (table.layer_quantized, table.rest_quantized)
    rests = [table.layer, table.rest, *(rest for rest in quantized if rest is not None)]
    for time, least in (*((time, 1e-12) for time in times), *((rest, 0.0) for rest in rests)):
        if type(time) not in (int, float) or not math.isfinite(time) or time < least:
            raise ValueError(f"times must be positive numbers of seconds, got {time!r}")
    if not times:
        raise ValueError("it has no linears")
    if None in quantized and any(storage for _, storage in table.linears):
        raise ValueError(f"layer_quantized and rest_quantized belong to quantised linears, got {quantized}")
    if table.form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {table.form!r}")
