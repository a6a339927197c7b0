"""What to compress and how: one frozen, validated configuration."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from grasp.method.basis import BASES
from grasp.method.metrics import METRICS, in_units_of_loss
from grasp.method.schedules import SCHEDULES


@dataclass(frozen=True)
class GraspConfig:
    """How ``compress_`` chooses layers, ranks and singular groups. ``GraspConfig()`` is the ``"paper"`` preset.

    ``GraspConfig.preset("best")`` is what loses the least perplexity so far (``benchmarks/study/quality.py``).

    Which layers: exactly one of ``layers``, ``num_layers``, ``compression_ratio``, ``target_bytes`` and
    ``target_latency``, or none of them, which means the paper's main setting, a ``compression_ratio`` of 0.2.

    Args:
        layers: decoder layers to compress, 0 being the first.
        num_layers: compress this many layers, those with the lowest block influence.
        compression_ratio: fraction of the whole model's parameters to remove, embeddings counted. ``retain_ratio`` then
            sets the number of layers, and is re-solved so that the fraction is met.
        target_bytes: instead, what all weights may take after, in bytes; ``retain_ratio`` is used as above.
        target_latency: instead, the time that decoding a token may take, one sequence at a time, as a fraction of the
            dense model's; both as ``compress_`` predicts them from its ``costs``. It needs a global ``allocation``.
        retain_ratio: fraction of each matrix's parameters to keep, in (0, 1]; R = int(N·K·retain_ratio / (N + K)).
        threshold_ratio: instead of ``retain_ratio``, keep the fewest groups whose importance adds up to this fraction,
            never more than the break-even rank, above which a matrix would grow.
        basis: what is decomposed: ``"plain"`` the weight; ``"whitened"`` the weight as its inputs see it, so that
            outputs change least; ``"kfac"`` as inputs and output gradients see it, so that the loss changes least.
        metric: importance of a singular group: ``"taylor"`` |σ·∂L/∂σ|, ``"gradient"`` |∂L/∂σ|, ``"magnitude"`` σ², or
            ``"fisher"`` σ²·Σ(∂L/∂σ)², token by token.
        allocation: ``"uniform"`` keeps the same fraction of every matrix; ``"global"`` spends the same parameters
            (bytes, time) where they lower the predicted loss most, a matrix may also stay dense. The metric must then
            be in units of loss: ``"taylor"``, ``"fisher"``, or ``"magnitude"`` in the kfac basis.
        redundancy: what is redundant: layers of least ``"block_influence"``; attention and MLP each by itself, by
            ``"sub_block_influence"``; or the run of layers with the least ``"angular_distance"`` between its ends.
        remove_layers: also remove whole layers where that is predicted to lose less, their part of the KV cache
            included. The last eighth of the calibration batches is held out for that: to measure what each layer's
            removal loses, and which result does best. It needs a global ``allocation``.
        scope: which layers may be compressed: the ``"redundant"`` ones, all of the ``"model"``, or ``"auto"``, which of
            the two does better on the last eighth of the calibration batches, held out for that.
        refit: at the end fit the left factors, by least squares, to the dense model's outputs given the inputs that the
            compressed layers produce.
        schedule: which linears share a sweep over the calibration set. ``"sequential"``, the paper's, replaces block by
            block, each seeing those before; ``"per-layer"`` layer by layer, in half the time; ``"single-sweep"`` takes
            all gradients on the dense model, in one sweep; ``"progressive"`` repeats that on the model with a part of
            the budget spent, which a global ``allocation`` in a basis that sees inputs can do.
        sweep_dtype: run the sweeps, not the decomposition, in this dtype: ``"bfloat16"``, or ``None``, the model's own.
            Sums are in fp32.

    Raises:
        ValueError: if a value is out of range, or options exclude each other.
    """

    layers: tuple[int, ...] | None = None
    num_layers: int | None = None
    compression_ratio: float | None = None
    target_bytes: int | None = None
    target_latency: float | None = None
    retain_ratio: float = 0.1
    threshold_ratio: float | None = None
    basis: str = "plain"
    metric: str = "taylor"
    allocation: str = "uniform"
    redundancy: str = "block_influence"
    remove_layers: bool = False
    scope: str = "redundant"
    refit: bool = False
    schedule: str = "sequential"
    sweep_dtype: str | None = None

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {},
        "best": {
            "basis": "kfac",
            "metric": "magnitude",
            "allocation": "global",
            "scope": "model",
            "refit": True,
            "schedule": "progressive",
        },
    }
    DEFAULT_COMPRESSION_RATIO: ClassVar[float] = 0.2

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", _sorted_layers(self.layers))
        object.__setattr__(self, "num_layers", _plain(self.num_layers))
        object.__setattr__(self, "target_bytes", _plain(self.target_bytes))
        self._check_exclusive("layers", "num_layers", "compression_ratio", "target_bytes", "target_latency")
        if self.threshold_ratio is not None and self.layers is None and self.num_layers is None:
            raise ValueError("threshold_ratio needs layers or num_layers: it does not fix a compression ratio")
        if self.layers is not None and (
            not all(_is_int(layer) and layer >= 0 for layer in self.layers) or len(set(self.layers)) < len(self.layers)
        ):
            raise ValueError(f"layers must be distinct integers from 0 up, got {list(self.layers)}")
        if self.num_layers is not None and not (_is_int(self.num_layers) and self.num_layers >= 0):
            raise ValueError(f"num_layers must be an integer from 0 up, got {self.num_layers!r}")
        _check_ratio("compression_ratio", self.compression_ratio, low_open=False, high_open=True)
        if self.target_bytes is not None and not (_is_int(self.target_bytes) and self.target_bytes > 0):
            raise ValueError(f"target_bytes must be a positive number of bytes, got {self.target_bytes!r}")
        _check_ratio("target_latency", self.target_latency, low_open=True, high_open=False)
        _check_ratio("retain_ratio", self.retain_ratio, low_open=True, high_open=False)
        _check_ratio("threshold_ratio", self.threshold_ratio, low_open=True, high_open=False)
        for name, known in _NAMES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if not isinstance(self.remove_layers, bool):
            raise ValueError(f"remove_layers must be True or False, got {self.remove_layers!r}")
        self._check_redundancy()
        self._check_decided_together()
        if self.sweep_dtype not in (None, "bfloat16", "float32"):
            raise ValueError(f"sweep_dtype must be bfloat16, float32 or None, got {self.sweep_dtype!r}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GraspConfig:
        """A named configuration with some fields changed.

        Where layers, or their number, are given, they are the scope, unless another one is given as well.

        Raises:
            ValueError: if there is no such preset or field, a value is out of range, or one does not go with the
                preset's.
        """
        if name not in cls.PRESETS:
            raise ValueError(f"preset must be one of {', '.join(cls.PRESETS)}, got {name!r}")
        named = any(overrides.get(field) is not None for field in ("layers", "num_layers"))
        kept = {field: value for field, value in cls.PRESETS[name].items() if field not in overrides}
        if named and "scope" in kept:
            kept["scope"] = "redundant"
        try:
            return cls.from_dict({**kept, **overrides})
        except ValueError as error:
            has = ", ".join(f"{field}={value!r}" for field, value in kept.items() if field in str(error))
            if not has:
                raise
            raise ValueError(f"{error} (the preset {name!r} has {has}; 'paper' has not)") from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GraspConfig:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: if a key is no field, or a value is out of range.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise ValueError(f"unknown configuration keys {', '.join(unknown)}; expected some of {', '.join(names)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        values = dataclasses.asdict(self)
        return {**values, "layers": None if self.layers is None else list(self.layers)}

    @property
    def decides_together(self) -> bool:
        """Whether no rank can be chosen before all matrices are scored."""
        return self.allocation == "global" or self.scope == "auto"

    @property
    def holds_out(self) -> bool:
        """Whether several results are compared on calibration batches that are held out for it."""
        return self.scope == "auto" or self.remove_layers

    def _check_decided_together(self) -> None:
        if self.allocation == "global" and not in_units_of_loss(self.basis, self.metric):
            raise ValueError(
                f"a global budget compares scores of different matrices, and metric={self.metric!r} in the "
                f"{self.basis} basis is not in units of loss; take fisher or taylor, or magnitude in the kfac basis"
            )
        if self.decides_together and self.threshold_ratio is not None:
            raise ValueError(
                "threshold_ratio sets ranks matrix by matrix; it excludes allocation='global' and scope='auto'; leave "
                "it out, or take allocation='uniform' with scope='redundant' and schedule='single-sweep'"
            )
        if self.target_latency is not None and self.allocation != "global":
            raise ValueError("target_latency is reached by ranks of different matrices; it needs allocation='global'")
        if self.remove_layers and self.allocation != "global":
            raise ValueError("remove_layers weighs layers against ranks; it needs allocation='global'")
        if self.decides_together and self.schedule not in ("single-sweep", "progressive"):
            raise ValueError(
                "allocation='global' and scope='auto' choose no rank before all matrices are scored; take "
                f"schedule='single-sweep' or 'progressive', got {self.schedule!r}"
            )
        if self.schedule == "progressive":
            self._check_progressive()

    def _check_progressive(self) -> None:
        problems = {
            f"spends a global budget, got allocation={self.allocation!r}": self.allocation != "global",
            f"needs a basis that sees inputs, got basis={self.basis!r}": not BASES[self.basis].inputs,
            "follows one scope, got scope='auto'": self.scope == "auto",
            "spends its first part on ranks alone, got remove_layers=True": self.remove_layers,
        }
        for problem, found in problems.items():
            if found:
                raise ValueError(f"schedule='progressive' {problem}; take schedule='single-sweep'")

    def _check_redundancy(self) -> None:
        if self.redundancy != "block_influence" and self.layers is not None:
            raise ValueError(f"layers are given, so nothing is chosen by redundancy={self.redundancy!r}; leave one out")
        if self.redundancy != "block_influence" and self.scope == "model":
            raise ValueError(
                f"scope='model' compresses all layers, so nothing is chosen by redundancy={self.redundancy!r}; take "
                "scope='redundant', or leave it out"
            )
        if self.redundancy == "sub_block_influence" and self.num_layers is not None:
            raise ValueError("sub_block_influence chooses halves of layers; give a ratio or target, not num_layers")

    def _check_exclusive(self, *names: str) -> None:
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; give one of {', '.join(names)}")


_NAMES: dict[str, Collection[str]] = {
    "basis": BASES,
    "metric": METRICS,
    "allocation": ("uniform", "global"),
    "redundancy": ("block_influence", "sub_block_influence", "angular_distance"),
    "scope": ("redundant", "model", "auto"),
    "schedule": SCHEDULES,
}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """An integer of another library as Python's own; anything else as it is."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


def _sorted_layers(layers: Iterable[Any]) -> tuple[int, ...]:
    try:
        return tuple(sorted(_plain(layer) for layer in layers))
    except TypeError as error:
        raise ValueError(f"layers must be distinct integers from 0 up, got {layers!r}") from error


def _check_ratio(name: str, value: float | None, *, low_open: bool, high_open: bool) -> None:
    if value is None:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not 0 <= value <= 1 or (low_open and value == 0) or (high_open and value == 1):
        raise ValueError(f"{name} must be in {'(' if low_open else '['}0, 1{')' if high_open else ']'}, got {value!r}")
