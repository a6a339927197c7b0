"""The report of a compression, module by module: ``compress_`` returns it, and checkpoints contain it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from grasp.errors import CheckpointError
from grasp.formatting import Column, one_line, share, size
from grasp.method.ranks import FORMS
from grasp.model.size import Size
from grasp.reading import parse_json, read_text_file

FILE_NAME = "report.json"
DENSE, COMPRESSED = "dense", "compressed"  # the model before and after, among the candidates
_EXPECTED = "the report.json that `grasp compress` wrote"
_SPECTRUM_VALUES = 256  # singular values stored of a module, at most
_NUMBERS = re.compile(r"\[\n\s+([^\[\]{}\"]+?)\n\s+\]")  # a string in JSON has no newline, so this is a list of numbers


@dataclass(frozen=True)
class ModuleReport:
    """One module of a redundant layer: its sizes before and after, or the reason why it was left."""

    name: str
    layer: int
    block: str  # "attention" or "mlp"; "" if the module was left
    reason: str  # why it was left; "" if it was compressed
    out_features: int = 0
    in_features: int = 0
    rank: int = 0
    parameters_before: int = 0
    parameters_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    importance_kept: float = 0.0  # fraction of the summed importance that the retained groups have
    indices: tuple[int, ...] = ()  # the retained singular groups; 0 has the largest singular value
    spectrum: tuple[float, ...] = ()  # the singular values at ``spectrum_indices``, to four digits
    form: str = "factored"  # or "pivoted"

    @property
    def within_layer(self) -> str:
        """The path after that of the layer, such as ``"self_attn.q_proj"``."""
        return self.name.partition(f".{self.layer}.")[2] or self.name

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModuleReport:
        """The inverse of ``dataclasses.asdict``; lists may stand for tuples, as in JSON."""
        return cls(**{**values, **{key: tuple(values.get(key, ())) for key in ("indices", "spectrum")}})


class MeasuredCandidate(NamedTuple):
    """One way to keep to the budget, or the dense model, or the result."""

    name: str
    loss: float  # on held-out text, in nats per token
    bytes: int | None  # of all weights
    seconds: float | None  # predicted time per token


_CANDIDATE_COLUMNS = (
    Column("candidate", "name"),
    Column("held-out loss", "loss", "{:.4f}".format),
    Column("bytes", "bytes", size),
    Column("ms per token, predicted", "seconds", lambda seconds: f"{1e3 * seconds:.2f}"),
)


class KindLoss(NamedTuple):
    """The losses on one kind of text, in nats per token."""

    kind: str
    dense: float
    compressed: float

    @property
    def added(self) -> float:
        """What the compression adds."""
        return self.compressed - self.dense


KIND_COLUMNS = (
    Column("kind of text", "kind"),
    Column("dense", "dense", "{:.3f}".format),
    Column("compressed", "compressed", "{:.3f}".format),
    Column("added", "added", "{:+.3f}".format),
)


def kinds_of(losses: Mapping[str, Sequence[float]]) -> tuple[KindLoss, ...]:
    """Kind of text → nats per token before and after, as rows, the one that lost most first."""
    return tuple(sorted((KindLoss(kind, *pair) for kind, pair in losses.items()), key=lambda row: -row.added))


def kinds_text(kinds: Sequence[KindLoss]) -> str:
    """What is added to the loss on kinds of text, in the mean and at worst; "" for none."""
    if not kinds:
        return ""
    mean, worst = fmean(row.added for row in kinds), kinds[0]
    return f"{mean:+.3f} nats per token in the mean of {len(kinds)}, {worst.added:+.3f} on {worst.kind}"


@dataclass(frozen=True)
class CompressionReport:
    """The report that ``compress_`` returns. Ratios are of the whole model unless the name says otherwise.

    Example:
        >>> from grasp.model.size import Size
        >>> size = Size(parameters=100, bytes=400, decoder_parameters=80)
        >>> report = CompressionReport({}, (0.5,), (), None, (), size, size, {})
        >>> report.compression_ratio, CompressionReport.from_json(report.to_json()) == report
        (0.0, True)
    """

    config: Mapping[str, Any]
    block_influence: tuple[float, ...]
    redundant_layers: tuple[int, ...]  # the layers that could be compressed, ascending
    retain_ratio: float | None  # as applied; ``None`` with a threshold
    modules: tuple[ModuleReport, ...]
    before: Size
    after: Size
    calibration: Mapping[str, int | str]  # sequences, tokens, sha256 of the token ids
    seconds: Mapping[str, float] = field(default_factory=dict)
    scope: str = "redundant"  # of the configuration
    removed_layers: tuple[int, ...] = ()  # ascending; the report numbers layers as before removal
    channels: Mapping[str, Sequence[int]] = field(default_factory=dict)  # MLP that lost some → how many before, after
    # ``DENSE``, each candidate and ``COMPRESSED``, the result → nats per token on held-out text, bytes of all weights,
    # predicted time per token; {} if nothing was held out, or there were no costs.
    held_out_loss: Mapping[str, float] = field(default_factory=dict)
    candidate_bytes: Mapping[str, int] = field(default_factory=dict)
    candidate_seconds: Mapping[str, float] = field(default_factory=dict)
    # Kind of text → nats per token before and after, on text that nothing was calibrated on; {} if not measured.
    kind_losses: Mapping[str, Sequence[float]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)  # the request of ``grasp compress``; empty from Python
    decode_seconds: Mapping[str, float] = field(default_factory=dict)  # predicted time per token, dense and after
    costs: str | None = None  # the device of these costs; ``None`` without a latency target
    run: str = ""  # digest of everything that the result depends on; "" from Python

    @property
    def compression_ratio(self) -> float:
        """Fraction of the parameters of the whole model that was removed."""
        return 1 - self.after.parameters / self.before.parameters

    @property
    def decoder_compression_ratio(self) -> float:
        """Fraction of the parameters of the decoder layers that was removed."""
        return 1 - self.after.decoder_parameters / self.before.decoder_parameters

    @property
    def channels_text(self) -> str:
        """How many MLPs have lost channels, and how many of theirs; "" if none has."""
        if not self.channels:
            return ""
        before, after = (sum(numbers) for numbers in zip(*self.channels.values(), strict=True))
        return f"{share(1 - after / before)} of the channels of {len(self.channels)} MLPs removed"

    @property
    def compressed(self) -> tuple[ModuleReport, ...]:
        """The modules that were replaced."""
        return tuple(module for module in self.modules if not module.reason)

    @property
    def left(self) -> tuple[ModuleReport, ...]:
        """The modules of redundant layers that were not replaced, each with its reason."""
        return tuple(module for module in self.modules if module.reason)

    @property
    def candidates(self) -> tuple[MeasuredCandidate, ...]:
        """The dense model, each candidate and the result, as they were measured on held-out text."""
        return tuple(
            MeasuredCandidate(name, loss, self.candidate_bytes.get(name), self.candidate_seconds.get(name))
            for name, loss in self.held_out_loss.items()
        )

    @property
    def held_out_text(self) -> str:
        """What the compression adds to the loss on held-out text, and the candidate chosen; "" if not measured."""
        losses = dict(self.held_out_loss)
        if not {DENSE, COMPRESSED} <= losses.keys():
            return ""
        added = f"{losses.pop(COMPRESSED) - losses.pop(DENSE):+.3f} nats per token"
        if self.config.get("allocation") != "global" or not losses:
            return added
        return f"{added}, {min(losses, key=losses.__getitem__)}"

    @property
    def kinds(self) -> tuple[KindLoss, ...]:
        """The losses by kind of text, the one that lost most first."""
        return kinds_of(self.kind_losses)

    def to_dict(self) -> dict[str, Any]:
        """All fields and the two ratios, as JSON values."""
        return {
            "compression_ratio": self.compression_ratio,
            "decoder_compression_ratio": self.decoder_compression_ratio,
            **json.loads(json.dumps(dataclasses.asdict(self))),
        }

    def to_json(self) -> str:
        """``to_dict`` as text; a list of numbers takes one line."""
        return _NUMBERS.sub(lambda m: f"[{' '.join(m[1].split())}]", json.dumps(self.to_dict(), indent=2))

    @classmethod
    def from_json(cls, text: str) -> CompressionReport:
        """The inverse of ``to_json``.

        Raises:
            CheckpointError: if the text is not a report.
        """
        values = parse_json(text, "not a compression report: it", _EXPECTED, CheckpointError)
        try:
            names = {f.name for f in dataclasses.fields(cls)}
            values = {key: value for key, value in values.items() if key in names}
            values["modules"] = tuple(map(ModuleReport.from_dict, values["modules"]))
            for key in ("before", "after"):
                values[key] = Size(**values[key])
            for key in ("block_influence", "redundant_layers"):
                values[key] = tuple(values[key])
            values["kind_losses"] = {kind: tuple(pair) for kind, pair in values.get("kind_losses", {}).items()}
            values["removed_layers"] = tuple(values.get("removed_layers", ()))  # reports before 0.3 have none
            values["channels"] = {path: tuple(pair) for path, pair in values.get("channels", {}).items()}
            report = cls(**values)
            _require_sound(report)
            return report
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"not a compression report ({one_line(error)}); expected {_EXPECTED}") from error

    @classmethod
    def load(cls, directory: str | Path) -> CompressionReport:
        """Read the report of a checkpoint folder.

        Raises:
            CheckpointError: if there is none, or it cannot be read.
        """
        path = Path(directory) / FILE_NAME
        text = read_text_file(path, _EXPECTED, CheckpointError)
        try:
            return cls.from_json(text)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error


def candidate_columns(candidates: Sequence[MeasuredCandidate]) -> list[Column]:
    """The columns of a table of candidates; those without a value are left out."""
    return [column for column in _CANDIDATE_COLUMNS if any(column.value_of(row) is not None for row in candidates)]


def spectrum_indices(groups: int) -> list[int]:
    """The indices of the singular values that are stored, ascending: all, or half evenly spaced and half dense at 0."""
    if groups <= _SPECTRUM_VALUES:
        return list(range(groups))
    steps = _SPECTRUM_VALUES // 2
    even = (round(i * (groups - 1) / (steps - 1)) for i in range(steps))
    dense = (round(groups ** (i / steps)) - 1 for i in range(steps))
    return sorted({*even, *dense})


def _require_sound(report: CompressionReport) -> None:
    """Check that sizes and influences are numbers, and each redundant layer has an influence.

    Raises:
        ValueError: if not; the message has the value.
    """
    for sizes in (report.before, report.after):
        for name, value in vars(sizes).items():
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} must be an integer from 0 up, got {value!r}")
    if not report.before.parameters or not report.before.decoder_parameters:
        raise ValueError("the model before has no parameters")
    for entry in dataclasses.fields(report):
        value = getattr(report, entry.name)
        if str(entry.type).startswith("Mapping") and not isinstance(value, Mapping):
            raise ValueError(f"{entry.name} must be an object, got {value!r}")
    numbers = [*report.seconds.values(), *report.decode_seconds.values(), *report.held_out_loss.values()]
    numbers += [*report.candidate_bytes.values(), *report.candidate_seconds.values()]
    numbers += [number for row in report.kinds for number in (row.dense, row.compressed)]
    numbers += [] if report.retain_ratio is None else [report.retain_ratio]
    texts = [report.scope, report.run, report.costs or "", report.request.get("model") or ""]
    for module in report.modules:
        numbers += [module.bytes_before, module.bytes_after, module.importance_kept]
        texts += [module.name, module.block, module.reason]
    if wrong := [value for value in numbers if type(value) not in (int, float)]:
        raise ValueError(f"sizes, times and fractions must be numbers, got {wrong[0]!r:.80}")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"names and reasons must be texts, got {texts!r:.200}")
    for path, pair in report.channels.items():
        if len(pair) != 2 or not all(type(number) is int and number > 0 for number in pair):
            raise ValueError(f"channels of {path!r} must be two integers from 1 up, got {pair!r:.80}")
    for module in report.compressed:
        _require_sound_module(module)
    if not all(type(value) in (int, float) for value in report.block_influence):
        raise ValueError(f"block_influence must be numbers, got {list(report.block_influence)}")
    layers = {*report.redundant_layers, *report.removed_layers, *(module.layer for module in report.modules)}
    if not all(type(layer) is int and 0 <= layer < len(report.block_influence) for layer in layers):
        raise ValueError(f"block_influence has {len(report.block_influence)} layers, others are named: {layers}")


def _require_sound_module(module: ModuleReport) -> None:
    sizes = (module.out_features, module.in_features, module.parameters_before, module.parameters_after)
    if not all(type(value) is int and value > 0 for value in sizes):
        raise ValueError(f"sizes of {module.name!r} must be integers from 1 up, got {sizes}")
    groups = min(module.out_features, module.in_features)
    if type(module.rank) is not int or not 0 <= module.rank <= groups:
        raise ValueError(f"rank of {module.name!r} must be an integer from 0 to {groups}, got {module.rank!r:.80}")
    if module.form not in FORMS:
        raise ValueError(f"form of {module.name!r} must be {' or '.join(FORMS)}, got {module.form!r:.80}")
    if not all(type(index) is int and 0 <= index < groups for index in module.indices):
        raise ValueError(f"indices of {module.name!r} must be of its {groups} singular groups")
    if not all(type(value) in (int, float) for value in module.spectrum):
        raise ValueError(f"spectrum of {module.name!r} must be numbers")
    if module.spectrum and len(module.spectrum) != len(spectrum_indices(groups)):
        raise ValueError(f"spectrum of {module.name!r} has {len(module.spectrum)} values, not those of {groups} groups")
