"""The records of the study, and the figure of its perplexities."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from grasp.bench.conditions import Conditions
from grasp.bench.percentiles import Percentiles
from grasp.bench.schema import Record, grouped
from grasp.formatting import Column, count, share, size

if TYPE_CHECKING:
    from grasp.reporting.pictures import Picture


@dataclass(frozen=True)
class StudySetting:
    """The setting that the cells of one study share.

    Attributes:
        model: name as it was given.
        calibration: text of the calibration sequences.
        text: text of the perplexity.
        num_samples: number of calibration sequences.
        seq_len: tokens in each.
        batch_size: sequences in one forward pass.
        window: number of tokens that the model sees at once.
        windows: number of windows that are evaluated; ``None`` for the whole text.
        dtype: dtype of the model during calibration and evaluation.
        tasks: tasks of lm-eval.
        limit: number of documents of each task; ``None`` for all.
        weights: dtype of the weights that are compressed, and of the result before evaluation.
    """

    model: str
    calibration: str
    text: str
    num_samples: int
    seq_len: int
    batch_size: int
    window: int
    windows: int | None
    dtype: str
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    weights: str = "float32"


@dataclass(frozen=True)
class StudyResult(Record):
    """A cell of ``benchmarks.study.quality``: one method at one ratio with one seed.

    Attributes:
        method: a row of ``METHODS``, or ``dense``.
        ratio: share of the decoder's parameters that should be removed; 0 is the dense model.
        seed: seed of the calibration set.
        setting: the setting of the study.
        removed: share of the decoder's parameters that was removed.
        parameters: number of parameters of the whole model.
        perplexity: perplexity of the text.
        excess: nats per token over the dense model.
        cpu_seconds: CPU time of the compression over all threads, with its statistics, s. Other processes do not add
            to it. If it was interrupted, the work that was lost is counted too.
        removed_layers: layers that were removed whole.
        ranks: rank of each low-rank linear.
        scope: layers that could be compressed; ``None`` if the method has no scope.
        conditions: when and where.
        accuracy: lm-eval's ``acc`` of each task, without normalisation.
        peak_bytes: most memory of a process during the compression, above the loaded model; ``None`` if unknown.
        memory: bytes that the compression was allowed above the loaded model; ``None`` for 0.9 of what was free.
        pivoted: whether the low-rank linears have pivoted form.
        kind_losses: loss on each kind of built-in text, of passages that no calibration reads, in nats per token.
        channels: channels of each MLP that has lost some, by path, numbered as before layers were removed.
        held_out_loss: of each candidate that the method chose between, of the dense model and of the result, before any
            recovery, by name, in nats per token.
    """

    method: str
    ratio: float
    seed: int
    setting: StudySetting
    removed: float
    parameters: int
    perplexity: float
    excess: float
    cpu_seconds: float
    removed_layers: tuple[int, ...]
    ranks: Mapping[str, int]
    scope: str | None
    conditions: Conditions
    accuracy: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    memory: int | None = None
    pivoted: bool = False
    kind_losses: Mapping[str, float] = field(default_factory=dict)
    channels: Mapping[str, int] = field(default_factory=dict)
    held_out_loss: Mapping[str, float] = field(default_factory=dict)

    kind: ClassVar[str] = "study"
    title: ClassVar[str] = "Methods and sizes"
    case: ClassVar[tuple[Column, ...]] = (
        Column("model", "setting.model"),
        Column("calibration", "setting.calibration"),
        Column("text", "setting.text"),
    )
    columns: ClassVar[tuple[Column, ...]] = (
        Column("method", "method"),
        Column("ratio", "ratio", share),
        Column("removed", "removed", share),
        Column("seed", "seed"),
        Column("parameters", "parameters", count),
        Column("perplexity", "perplexity", "{:.4g}".format),
        Column("nats over dense", "excess", "{:.3f}".format),
        Column("CPU seconds", "cpu_seconds", "{:.0f}".format),
        Column("memory above the model", "peak_bytes", size),
    )
    figures: ClassVar[tuple[str, ...]] = ("benchmarks.study.records:perplexity_by_size",)


@dataclass(frozen=True)
class StudyLatency(Record):
    """Decoding speed of the model of a study's cell, built from its ranks with random factors.

    Attributes:
        model: the model of the study.
        method: a row of ``METHODS``, or ``dense``.
        ratio: share of the decoder's parameters that should be removed; 0 is the dense model.
        seed: seed of the study's cell.
        dtype: dtype of the model.
        new_tokens: decoding steps of each turn.
        inter_token_ms: from one token on the host to the next, over all turns, ms.
        spread: distance between the quartiles of the turns' decoding times over their median.
        of_dense: time over the time of the dense model in PyTorch, in the same mode, turn by turn; the median.
        conditions: when and where.
        kernel: whether the dense linears ran in the CPU kernel of grasp as well.
        mode: ``"eager"`` or ``"compiled"``.
    """

    model: str
    method: str
    ratio: float
    seed: int
    dtype: str
    new_tokens: int
    inter_token_ms: Percentiles
    spread: float
    of_dense: float
    conditions: Conditions
    kernel: bool = False
    mode: str = "eager"

    kind: ClassVar[str] = "study_latency"
    title: ClassVar[str] = "Decoding speed of methods and sizes"
    case: ClassVar[tuple[Column, ...]] = (Column("model", "model"), Column("dtype", "dtype"))
    columns: ClassVar[tuple[Column, ...]] = (
        Column("method", "method"),
        Column("removed", "ratio", share),
        Column("seed", "seed"),
        Column("mode", "mode"),
        Column("dense linears in", lambda result: "the kernel" if result.kernel else "PyTorch"),
        Column("ms per token", "inter_token_ms"),
        Column("of dense", "of_dense", "{:.3f}".format),
        Column("spread", "spread", share),
    )


@dataclass(frozen=True)
class StudyQuantized(Record):
    """A cell of ``benchmarks.study.quantization``: a dense or compressed model in one way of storing its weights.

    Attributes:
        dense: the dense model, as it was given.
        model: the model that was quantised, the last part of its name.
        way: a key of ``WAYS`` of the study, or ``AS_SAVED``.
        text: text of the perplexity.
        windows: number of windows that are evaluated; ``None`` for the whole text.
        window: number of tokens that the model sees at once.
        bytes: of all weights; what is not quantised counts as bfloat16, but in a GGUF file.
        of_dense: these bytes over those of the dense model in bfloat16.
        perplexity: perplexity of the text.
        excess: nats per token over the dense model in float32.
        cpu_seconds: CPU time of the quantisation over all threads, s.
        conditions: when and where.
    """

    dense: str
    model: str
    way: str
    text: str
    windows: int | None
    window: int
    bytes: int
    of_dense: float
    perplexity: float
    excess: float
    cpu_seconds: float
    conditions: Conditions

    kind: ClassVar[str] = "study_quantized"
    title: ClassVar[str] = "Perplexity by bytes"
    case: ClassVar[tuple[Column, ...]] = (Column("dense model", "dense"), Column("text", "text"))
    columns: ClassVar[tuple[Column, ...]] = (
        Column("model", "model"),
        Column("weights", "way"),
        Column("size", "bytes", size),
        Column("of dense bf16", "of_dense", share),
        Column("perplexity", "perplexity", "{:.4g}".format),
        Column("nats over dense", "excess", "{:.3f}".format),
        Column("CPU seconds", "cpu_seconds", "{:.0f}".format),
    )
    figures: ClassVar[tuple[str, ...]] = ("benchmarks.study.records:excess_by_bytes",)


@dataclass(frozen=True)
class StudyDraft(Record):
    """A server of ``benchmarks.speculative``: a target alone, a target with a draft, or a draft alone.

    Attributes:
        target: the model that answers, the last part of its name.
        draft: the model that proposes tokens; ``None`` without one.
        proposed: tokens that the draft proposes in a step, k; 0 without one.
        steps: steps with a draft.
        accepted: share of the steps in which the target accepts the first i + 1 tokens.
        answered: tokens of all answers.
        equal: share of the answers that the target gives alone too.
        ms_per_token: mean time per token after the first, ms.
        speed_up: over the target alone.
        predicted: the speed-up by the acceptance and by the draft's time alone; ``None`` without a draft.
        dtype: of the server.
        vllm: its version.
        conditions: when and where.
    """

    target: str
    draft: str | None
    proposed: int
    steps: int
    accepted: tuple[float, ...]
    answered: int
    equal: float
    ms_per_token: float
    speed_up: float
    predicted: float | None
    dtype: str
    vllm: str | None
    conditions: Conditions

    kind: ClassVar[str] = "study_draft"
    title: ClassVar[str] = "Speculative decoding"
    case: ClassVar[tuple[Column, ...]] = (Column("dtype", "dtype"), Column("vLLM", "vllm"))
    columns: ClassVar[tuple[Column, ...]] = (
        Column("model", "target"),
        Column("draft", lambda server: server.draft or "-"),
        Column("k", "proposed"),
        Column("accepted", lambda server: " ".join(f"{part:.3f}" for part in server.accepted) or "-"),
        Column("equal answers", "equal", share),
        Column("ms per token", "ms_per_token", "{:.1f}".format),
        Column("speed-up", "speed_up", "{:.2f}".format),
        Column("predicted", lambda server: "-" if server.predicted is None else f"{server.predicted:.2f}"),
    )


STUDY_RECORDS: tuple[type[Record], ...] = (StudyResult, StudyLatency, StudyQuantized, StudyDraft)


def perplexity_by_size(cells: Sequence[StudyResult]) -> list[Picture]:
    """Perplexity against parameters, one figure for each setting; the seeds of a method and ratio are one point."""
    from grasp.reporting import figures
    from grasp.reporting.figure_data import Comparison, Quality
    from grasp.reporting.pictures import of_comparisons

    data: dict[Comparison, list[Quality]] = {}
    for setting, of_setting in grouped(cells, lambda cell: cell.setting).items():
        windows = "all windows" if setting.windows is None else f"{setting.windows} windows"
        calibration = f"{setting.num_samples} sequences of {setting.seq_len} tokens of {setting.calibration}"
        comparison = Comparison(
            f"{setting.model}, {windows} of {setting.window} tokens of {setting.text}",
            f"Calibrated on {calibration}; {setting.dtype}; {of_setting[-1].conditions}",
        )
        points = data[comparison] = []
        for (method, _), seeds in grouped(of_setting, lambda cell: (cell.method, cell.ratio)).items():
            values = [cell.perplexity for cell in seeds]
            size = statistics.mean(cell.parameters for cell in seeds)
            points.append(Quality(method, size, statistics.mean(values), min(values), max(values)))
    return of_comparisons("size", "Perplexity by size", data, figures.perplexity_by_size)


def excess_by_bytes(cells: Sequence[StudyQuantized]) -> list[Picture]:
    """Nats over the dense model against bytes, a panel for each dense model; one figure for each text."""
    from grasp.reporting import figures
    from grasp.reporting.figure_data import Comparison, Stored
    from grasp.reporting.pictures import of_comparisons

    def label(cell: StudyQuantized) -> str:
        return cell.way if cell.model == Path(cell.dense).name else f"compressed, {cell.way}"

    data = {
        Comparison(text, f"Bytes of all weights; {group[-1].conditions}"): {
            dense: [Stored(label(cell), cell.of_dense, cell.excess) for cell in of_model]
            for dense, of_model in grouped(group, lambda cell: cell.dense).items()
        }
        for text, group in grouped(cells, lambda cell: cell.text).items()
    }
    return of_comparisons("bytes", "Nats over the dense model by bytes", data, figures.excess_by_bytes)
