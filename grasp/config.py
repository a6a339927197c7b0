"""The configuration of a compression: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from grasp.method.basis import BASES
from grasp.method.metrics import METRICS, in_units_of_loss
from grasp.method.ranks import FORMS, Form
from grasp.method.schedules import SCHEDULES
from grasp.method.storage import FP8, Storage, choose_storage

# Of these fields at most one is given.
TARGETS = ("layers", "num_layers", "compression_ratio", "target_bytes", "target_latency")
AUTO = "auto"
_FP8 = str(FP8)
# Fields of earlier versions, with the values that they may have.
_RETIRED: dict[str, tuple[object, ...]] = {"redundancy": ("block_influence",), "remove_layers": (False, True)}


@dataclass(frozen=True)
class GraspConfig:
    """How ``compress_`` chooses layers, ranks and singular groups.

    Two constructors take only the options that mean something for their method: ``GraspConfig.paper`` is GRASP as
    published (arXiv 2501.00339), ``GraspConfig.best`` loses the least perplexity of everything measured so far
    (docs/study.md). The fields below are the full set, for studies that combine them freely; ``GraspConfig()`` equals
    ``GraspConfig.paper()``.

    At most one of ``layers``, ``num_layers``, ``compression_ratio``, ``target_bytes`` and ``target_latency`` is given.
    Without any, ``compression_ratio`` is 0.2.

    Args:
        layers: decoder layers to compress; the first is 0.
        num_layers: compress this many layers, those with the lowest block influence.
        compression_ratio: fraction of the whole model's parameters to remove; embeddings count. ``retain_ratio`` sets
            the number of layers, and is then adjusted so that the fraction is met.
        target_bytes: size of all weights after compression, in bytes. ``retain_ratio`` is used as above.
        target_latency: time per decoded token at batch size 1, as a fraction of the dense model's. ``compress_``
            predicts both times from its ``costs``. With ``bits`` the dense model is the floating one. Needs
            ``allocation="global"``.
        retain_ratio: fraction of each matrix's parameters to keep, in (0, 1]: R = int(N·K·retain_ratio / (N + K)) if
            factored. With a global allocation, the fraction of all matrices of ``layers`` or ``num_layers`` together.
        threshold_ratio: replaces ``retain_ratio``: keep the fewest groups whose importance adds up to this fraction,
            at most the break-even rank. Needs ``layers`` or ``num_layers``.
        basis: the matrix that is decomposed. ``"plain"``: the weight. ``"whitened"``: the weight times a root of its
            input covariance, which keeps outputs. ``"kfac"``: also times a root of its output-gradient covariance,
            which keeps the loss.
        metric: importance of a singular group: ``"taylor"`` ``|σ·∂L/∂σ|``, ``"gradient"`` ``|∂L/∂σ|``, ``"magnitude"``
            σ², or ``"fisher"`` σ²·Σ(∂L/∂σ)² with one term per token. ``"gradient"`` needs the plain basis and uniform
            allocation.
        allocation: ``"uniform"`` keeps the same fraction of every matrix. ``"global"`` spends one budget where it
            lowers the predicted loss most; a matrix may stay dense. It needs a metric in units of loss: ``"taylor"``,
            ``"fisher"``, or ``"magnitude"`` in the kfac basis.
        scope: layers that may be compressed: the ``"redundant"`` ones, or all of the ``"model"``.
        refit: after the last replacement, fit the left factors by least squares to the dense model's outputs, given
            the inputs that the compressed layers produce. With a global budget and held-out sequences only if that
            loses less on them.
        schedule: which linears share a sweep over the calibration set. ``"sequential"`` (paper) replaces block by
            block, and each block sees those replaced before. ``"per-layer"`` replaces layer by layer, in half the
            time. ``"single-sweep"`` takes all gradients on the dense model. ``"progressive"`` is two single sweeps,
            the second on the model with a part of the budget spent; needs ``allocation="global"`` and a basis with
            input covariances.
        sweep_dtype: dtype of the sweeps, not of the decomposition: ``"bfloat16"``, ``"float32"``, or ``None`` for the
            model's. Sums are in fp32.
        form: how low-rank weights are stored: ``"factored"``, as U (N, R) and Vh (R, K), or ``"pivoted"``, as R rows of
            the weight and the coefficients of the others in them, which takes R² parameters fewer.
        bits: of all linears at the end: 8, 4 or ``"fp8"``; ``None`` leaves them floating. The output layer and
            embeddings have int8, or int4 where linears have and the two share no weight. ``target_bytes`` is the size
            with these bits, and needs ``allocation="global"``.
            ``"auto"``: a linear is low-rank in 8 bits, or dense in 8 or 4, whatever reaches ``target_bytes`` or
            ``target_latency`` with the least loss; needs the kfac basis and its magnitudes. Where 4 bits for all
            linears would reach it, one sweep decides, and neither candidates are compared nor factors fitted.
        bits_dense: of the linears that stay dense, if others than ``bits``.

    Raises:
        ValueError: if values are out of range or exclude each other; the message has all problems with their remedies.

    Example:
        >>> config = GraspConfig.best(compression_ratio=0.1)
        >>> config.basis, config.allocation, config.schedule
        ('kfac', 'global', 'progressive')
        >>> GraspConfig.from_dict(config.to_dict()) == config
        True
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
    scope: str = "redundant"
    refit: bool = False
    schedule: str = "sequential"
    sweep_dtype: str | None = None
    form: Form = "factored"
    bits: int | str | None = None
    bits_dense: int | str | None = None

    DEFAULT_COMPRESSION_RATIO: ClassVar[float] = 0.2

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _as_layers(self.layers))
        for name in ("num_layers", "target_bytes", "bits", "bits_dense"):
            object.__setattr__(self, name, _as_int(getattr(self, name)))
        bad_names = list(self._bad_names())
        conflicts = [] if bad_names else self._conflicts_of_method()
        _refuse([*bad_names, *self._bad_values(), *self._conflicts_of_targets(), *conflicts])

    @classmethod
    def paper(
        cls,
        *,
        layers: tuple[int, ...] | None = None,
        num_layers: int | None = None,
        compression_ratio: float | None = None,
        target_bytes: int | None = None,
        retain_ratio: float | None = None,
        threshold_ratio: float | None = None,
        metric: str = "taylor",
        schedule: str = "sequential",
        sweep_dtype: str | None = None,
    ) -> GraspConfig:
        """Build the configuration of GRASP as published (arXiv 2501.00339).

        The weight itself is decomposed, and every matrix of the redundant layers keeps the same fraction. Arguments
        are the fields of ``GraspConfig``; the defaults are the paper's. ``retain_ratio`` and ``threshold_ratio``
        exclude each other.

        Args:
            metric: ``"taylor"`` or ``"gradient"``.
            schedule: ``"sequential"``, ``"per-layer"`` or ``"single-sweep"``.

        Raises:
            ValueError: as ``GraspConfig`` does.

        Example:
            >>> GraspConfig.paper(num_layers=4, retain_ratio=0.2).schedule
            'sequential'
        """
        problems = []
        if retain_ratio is not None and threshold_ratio is not None:
            problems.append("retain_ratio and threshold_ratio exclude each other: give one")
        return cls._preset(
            "paper",
            problems,
            {"metric": ("taylor", "gradient"), "schedule": ("sequential", "per-layer", "single-sweep")},
            layers=layers,
            num_layers=num_layers,
            compression_ratio=compression_ratio,
            target_bytes=target_bytes,
            retain_ratio=cls.retain_ratio if retain_ratio is None else retain_ratio,
            threshold_ratio=threshold_ratio,
            metric=metric,
            schedule=schedule,
            sweep_dtype=sweep_dtype,
        )

    @classmethod
    def best(
        cls,
        *,
        layers: tuple[int, ...] | None = None,
        num_layers: int | None = None,
        compression_ratio: float | None = None,
        target_bytes: int | None = None,
        target_latency: float | None = None,
        retain_ratio: float | None = None,
        refit: bool = True,
        schedule: str = "progressive",
        sweep_dtype: str | None = None,
        form: Form = "pivoted",
        bits: int | str | None = None,
        bits_dense: int | str | None = None,
    ) -> GraspConfig:
        """Build the configuration with the lowest perplexity so far (docs/study.md).

        Weights are decomposed in the kfac basis, one budget is spent over all matrices of the model, or of the layers
        that ``layers`` or ``num_layers`` selects, and factors are pivoted. Arguments are the fields of ``GraspConfig``.

        Args:
            retain_ratio: fraction of the selected layers' parameters to keep; needs ``layers`` or ``num_layers``.
            schedule: ``"progressive"`` or ``"single-sweep"``.

        Raises:
            ValueError: as ``GraspConfig`` does.

        Example:
            >>> GraspConfig.best(target_bytes=200_000_000).schedule
            'progressive'
        """
        selected = layers is not None or num_layers is not None
        problems = []
        if retain_ratio is not None and not selected:
            problems.append("retain_ratio needs layers or num_layers in best: elsewhere leave it out, or take paper")
        return cls._preset(
            "best",
            problems,
            {"schedule": ("progressive", "single-sweep")},
            layers=layers,
            num_layers=num_layers,
            compression_ratio=compression_ratio,
            target_bytes=target_bytes,
            target_latency=target_latency,
            retain_ratio=cls.retain_ratio if retain_ratio is None else retain_ratio,
            basis="kfac",
            metric="magnitude",
            allocation="global",
            scope="redundant" if selected else "model",
            refit=refit,
            schedule=schedule,
            sweep_dtype=sweep_dtype,
            form=form,
            bits=bits,
            bits_dense=bits_dense,
        )

    @classmethod
    def _preset(
        cls, preset: str, problems: list[str], names: Mapping[str, Collection[str]], **values: Any
    ) -> GraspConfig:
        """Build a configuration; report the problems of a constructor together with those of its values."""
        for name, known in names.items():
            if values[name] not in known:
                problems.append(f"{name} must be one of {', '.join(known)} in {preset}, got {values.pop(name)!r}")
        try:
            config = cls(**values)
        except ValueError as error:
            problems.append(str(error))
        _refuse(problems)
        return config

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GraspConfig:
        """Build a configuration from the result of ``to_dict``, also from that of an earlier version.

        Raises:
            ValueError: if a key is not a field, or as the constructor does.
        """
        values = {key: value for key, value in values.items() if value not in _RETIRED.get(key, ())}
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise ValueError(f"unknown configuration keys {', '.join(unknown)}; expected some of {', '.join(names)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values that JSON can hold."""
        values = dataclasses.asdict(self)
        return {**values, "layers": None if self.layers is None else list(self.layers)}

    @property
    def decides_together(self) -> bool:
        """Whether all matrices must be scored before any rank is chosen."""
        return self.allocation == "global"

    @property
    def narrows(self) -> bool:
        """Whether MLPs may lose channels: covariances say what they are worth, and bits are not chosen."""
        by_covariances = BASES[self.basis].outputs and METRICS[self.metric].moment == "none"
        return self.schedule == "progressive" and self.fewest_bits is None and by_covariances

    @property
    def storage(self) -> Storage | None:
        """How the factors are stored; ``None`` if they stay floating."""
        return None if self.bits is None else choose_storage(8 if self.bits == AUTO else self.bits)

    @property
    def dense_storage(self) -> Storage | None:
        """How the linears that stay dense are stored; with ``bits="auto"``, those that get no fewer bits."""
        return self.storage if self.bits_dense is None else choose_storage(self.bits_dense)

    @property
    def fewest_bits(self) -> Storage | None:
        """How linears that stay dense may be stored instead, with ``bits="auto"``."""
        return choose_storage(4) if self.bits == AUTO else None

    @property
    def embedding_storage(self) -> Storage | None:
        """How an embedding is stored that is not the output layer's too: in the fewest bits of dense linears."""
        return self.fewest_bits or self.dense_storage

    @property
    def storages(self) -> tuple[Storage, ...]:
        """The storages that linears of the decoder layers may get; none without ``bits``."""
        storages = (self.storage, self.dense_storage, self.fewest_bits)
        return tuple(dict.fromkeys(storage for storage in storages if storage is not None))

    def _bad_names(self) -> Iterator[str]:
        for name, known in _NAMES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                yield f"{name} must be one of {', '.join(known)}, got {value!r}"

    def _bad_values(self) -> Iterator[str]:
        layers = self.layers
        if layers is not None and not _distinct_from_0(layers):
            got = list(layers) if isinstance(layers, tuple) else layers
            yield f"layers must be distinct integers from 0 up, got {got!r}"
        if self.num_layers is not None and not (_is_int(self.num_layers) and self.num_layers >= 0):
            yield f"num_layers must be an integer from 0 up, got {self.num_layers!r}"
        if self.target_bytes is not None and not (_is_int(self.target_bytes) and self.target_bytes > 0):
            yield f"target_bytes must be a positive number of bytes, got {self.target_bytes!r}"
        for name, (interval, is_inside) in _RATIOS.items():
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and is_inside(value)):
                yield f"{name} must be in {interval}, got {value!r}"
        for name, known in (("bits", (8, 4, _FP8, AUTO)), ("bits_dense", (8, 4, _FP8))):
            if isinstance(bits := getattr(self, name), float) or bits not in (*known, None):
                yield f"{name} must be one of {', '.join(map(str, known))}, got {bits!r}"
        if not _is_bool(self.refit):
            yield f"refit must be True or False, got {self.refit!r}"
        if self.sweep_dtype not in (None, "bfloat16", "float32"):
            yield f"sweep_dtype must be bfloat16, float32 or None, got {self.sweep_dtype!r}"

    def _conflicts_of_targets(self) -> Iterator[str]:
        given = [name for name in TARGETS if getattr(self, name) is not None]
        if len(given) > 1:
            yield f"{' and '.join(given)} exclude each other: give one of {', '.join(TARGETS)}"
        if self.threshold_ratio is not None and self.layers is None and self.num_layers is None:
            yield "threshold_ratio needs layers or num_layers, because it does not set a compression ratio: give one"
        if self.bits == AUTO and self.target_bytes is None and self.target_latency is None:
            yield "bits='auto' needs target_bytes or target_latency, the size or the time to reach: give one"
        if self.bits_dense is not None and self.bits not in (8, 4, _FP8):
            yield f"bits_dense={self.bits_dense} needs bits=8, bits=4 or bits={_FP8!r}, got {self.bits}: give both"
        if self.bits is not None and self.target_bytes is not None and self.allocation == "uniform":
            yield "target_bytes with bits needs allocation='global': take GraspConfig.best"

    def _conflicts_of_method(self) -> Iterator[str]:
        """Yield the conflicts between options whose names are known."""
        if self.metric == "gradient" and (self.basis, self.allocation) != ("plain", "uniform"):
            yield "metric='gradient' needs basis='plain' and allocation='uniform': take metric='taylor' elsewhere"
        if self.allocation == "global":
            yield from self._conflicts_of_global()
            return
        if self.target_latency is not None:
            yield f"target_latency needs allocation='global', got {self.allocation!r}: take GraspConfig.best"
        if self.schedule == "progressive":
            yield f"schedule='progressive' needs allocation='global', got {self.allocation!r}: take 'single-sweep'"

    def _conflicts_of_global(self) -> Iterator[str]:
        if self.metric != "gradient" and not in_units_of_loss(self.basis, self.metric):
            yield (
                f"allocation='global' needs a metric in units of loss, and {self.metric!r} in the {self.basis} basis "
                "is not: take 'fisher' or 'taylor', or 'magnitude' with basis='kfac'"
            )
        if self.bits == AUTO and (self.basis, self.metric) != ("kfac", "magnitude"):
            yield "bits='auto' needs basis='kfac' and metric='magnitude': take GraspConfig.best"
        if self.threshold_ratio is not None:
            yield "threshold_ratio sets ranks matrix by matrix: leave it out, or take allocation='uniform'"
        if self.schedule in ("sequential", "per-layer"):
            yield f"allocation='global' needs schedule='single-sweep' or 'progressive', got {self.schedule!r}"
        if self.schedule == "progressive" and not BASES[self.basis].inputs:
            yield f"schedule='progressive' needs a basis with input covariances, got {self.basis!r}: take 'kfac'"


PRESETS: dict[str, Callable[..., GraspConfig]] = {"best": GraspConfig.best, "paper": GraspConfig.paper}

_NAMES: dict[str, Collection[str]] = {
    "basis": BASES,
    "metric": METRICS,
    "allocation": ("uniform", "global"),
    "scope": ("redundant", "model"),
    "schedule": SCHEDULES,
    "form": FORMS,
}
_RATIOS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "compression_ratio": ("[0, 1)", lambda value: 0 <= value < 1),
    "target_latency": ("(0, 1]", lambda value: 0 < value <= 1),
    "retain_ratio": ("(0, 1]", lambda value: 0 < value <= 1),
    "threshold_ratio": ("(0, 1]", lambda value: 0 < value <= 1),
}


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError("; ".join(problems))


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _distinct_from_0(layers: Any) -> bool:
    if not isinstance(layers, tuple) or not all(_is_int(layer) and layer >= 0 for layer in layers):
        return False
    return len(set(layers)) == len(layers)


def _as_int(value: Any) -> Any:
    """Return an integer of another library as Python's, any other value unchanged."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


def _as_layers(layers: Any) -> Any:
    """Return layers as a sorted tuple of Python's integers, a value that is no such collection unchanged."""
    try:
        return tuple(sorted(_as_int(layer) for layer in layers))
    except TypeError:
        return layers
