"""GRASP: replace the linears of redundant decoder layers by the singular groups on which the loss depends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.checkpoint.compression_report import CompressionReport, ModuleReport
from grasp.checkpoint.run_state import Decision, NoState
from grasp.compression.budget import Plan, choose_plan, predicted_seconds
from grasp.compression.held_out import compare_with_removal, result_loss
from grasp.compression.linear_replacement import merge_
from grasp.compression.narrow import narrow_, remaining_channels, widen_
from grasp.compression.quantize import quantize_
from grasp.compression.refit import refit_
from grasp.compression.rounds import (
    carry_out_decision_,
    decide_globally,
    decide_in_order_,
    prepare_,
    settle_,
)
from grasp.compression.run import Run, find_block_influence, start_run
from grasp.compression.selection import stored_reports
from grasp.config import GraspConfig
from grasp.method.cost_table import CostTable
from grasp.method.knapsack import ROUNDED
from grasp.method.storage import Storage
from grasp.model.batch import CalibrationBatch, as_batches, batches_digest
from grasp.model.grouping import group_linears_
from grasp.model.hf_quantizer import mark_compressed
from grasp.model.layer_removal import remove_layers_
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.size import model_size
from grasp.progress import Progress, no_progress
from grasp.statistics.processes import ALONE, Processes


def compress_(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch | Tensor],
    config: GraspConfig | None = None,
    *,
    held_out: Sequence[CalibrationBatch | Tensor] = (),
    costs: CostTable | None = None,
    progress: Progress = no_progress,
    state: NoState | None = None,
    processes: Processes = ALONE,
    memory: int | None = None,
    host_memory: int | None = None,
) -> CompressionReport:
    """Compress a causal language model in place (arXiv 2501.00339).

    Block influence tells which layers are redundant. Their linears are replaced from the deepest layer up, first the
    MLP, then the attention, with gradients taken on the model so far. Other schedules replace more linears at once; a
    global budget decides all together. ``grasp/compression/naive.py`` is the plain definition of the method. An
    interrupted call leaves the model usable, with the linears that were replaced so far. The weights of replaced
    linears are freed.

    Args:
        model: a decoder-only model of the transformers library, in any floating-point dtype.
        batches: calibration token batches: ``CalibrationBatch`` or int64 (B, L) tensors.
        config: what to compress and how; ``None`` for ``GraspConfig()``.
        held_out: other batches, on which losses are measured. With a global budget they decide between candidates that
            keep to it: low-rank linears, layers removed, and layers replaced by a linear map. Otherwise they decide
            nothing. The report has all losses.
        costs: of decoding, see ``grasp.method.cost_table``; a ``target_latency`` needs them.
        progress: called as ``progress(step, done, total)``.
        state: a ``grasp.checkpoint.run_state.RunState``, from which the same call resumes after an interruption.
        processes: the processes that share the work, all given the same arguments; all get the result.
        memory: bytes that may be taken on the device of the model, above the loaded model. What does not fit is done
            in parts, at the cost of one forward pass more per sweep; a layer that does not fit alone runs several
            times. The result is the same. ``None``: 0.9 of what is free.
        host_memory: likewise, of CPU memory beside a GPU. Hidden states that do not fit go to files.

    Returns:
        For every module of the redundant layers, its replacement or the reason why it was left; sizes before and after.

    Raises:
        ValueError: if the configuration asks for layers, a ratio or a target that the model does not have.
        CalibrationError: if there are no batches, no token to predict, or a sequence longer than the model's context.
        NonFiniteError: if weights, hidden states, the loss or gradients are NaN or infinite.
        OutOfMemoryError: if ``memory`` is too small; the message has the least that would do.
        UnsupportedModelError: if the decoder layers cannot be found or have nothing to compress.
        CostTableError, ResumeError, DistributedError: as ``costs``, ``state`` and ``processes`` raise them.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> llama = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=3)
        >>> model, config = LlamaForCausalLM(llama), GraspConfig(num_layers=1, retain_ratio=0.3)
        >>> len(compress_(model, [torch.arange(64)[None]], config).compressed)
        7
    """
    config = GraspConfig() if config is None else config
    with NoState() if state is None else nullcontext(state) as state:
        run = start_run(
            *(model, as_batches(batches), config, costs, progress, state, processes),
            held_out=as_batches(held_out) if held_out else (),
            memory=memory,
            host_memory=host_memory,
        )
        return carry_out_(run)


@torch.inference_mode(mode=False)
@torch.enable_grad()
def carry_out_(run: Run) -> CompressionReport:
    """The method, step by step. ``compress_`` starts the run; a study may give one that reuses statistics."""
    scores = find_block_influence(run)
    plan = choose_plan(run.config, scores, run.targets, run.before.parameters, run.prices)
    decision = Decision((), {}, {}, {}, {})
    if not run.config.decides_together:
        decision = compare_with_removal(run, plan, scores)
    try:
        work = prepare_(run, plan)
        if run.config.decides_together:
            run, plan, work = narrow_(run, plan, work, scores)
            decision = decide_globally(run, plan, work)
            work.prefix.hidden.clear()
            if decision.whole:
                run = widen_(run)
            carry_out_decision_(run, plan, work, decision)
        else:
            decide_in_order_(run, plan, work)
            work.prefix.hidden.clear()
            if run.config.refit:
                _refit_in_order_(run, plan)
        merged = merge_(run, decision, work.reports)
        remove_layers_(run.model, decision.removed)
        if run.config.storage is not None:
            _quantize_(run, run.config.storage, decision)
        reports = stored_reports(merged, run.model, len(scores), decision.removed)
    finally:
        group_linears_(run.model)
        mark_compressed(run.model)
    return _report(run, scores, plan, decision, result_loss(run), reports)


def _refit_in_order_(run: Run, plan: Plan) -> None:
    run.clock.enter("refit")
    refit_(
        *(run.model, run.batches, plan.ranks),
        dtype=run.config.sweep_dtype,
        scratch=run.scratch,
        processes=run.processes,
        progress=run.progress,
    )
    settle_(run, plan.ranks)


def _quantize_(run: Run, storage: Storage, decision: Decision) -> None:
    run.clock.enter("quantising")
    linears = chain.from_iterable(run.targets.values())
    rounded = {target.module for target in linears if decision.ranks.get(target.name) == ROUNDED}

    def stored(module: nn.Module) -> Storage:
        fewest = module in rounded or isinstance(module, nn.Embedding)
        others = run.config.embedding_storage if fewest else run.config.dense_storage
        return storage if others is None or isinstance(module, LowRankLinear) else others

    quantize_(run.model, stored, run.batches, scratch=run.scratch, progress=run.progress)


def _report(
    run: Run,
    scores: Sequence[float],
    plan: Plan,
    decision: Decision,
    loss: Mapping[str, float],
    reports: Sequence[ModuleReport],
) -> CompressionReport:
    ranks = {name: rank for name, rank in decision.ranks.items() if rank == ROUNDED}
    ranks |= {report.name: report.rank for report in reports if report.rank}
    left = [report for layer in plan.layers for report in run.left[layer]]
    after = model_size(run.model)
    seconds: dict[str, float] = {}
    if run.costs is not None:
        after_seconds = predicted_seconds(run.config, run.costs, run.targets, ranks, decision.removed)
        seconds = {"dense": run.dense_seconds, "after": after_seconds}
    return CompressionReport(
        config=run.config.to_dict(),
        block_influence=tuple(scores),
        redundant_layers=plan.layers,
        removed_layers=decision.removed,
        channels=remaining_channels(run, decision),
        retain_ratio=plan.retain_ratio if run.config.threshold_ratio is None else None,
        scope=run.config.scope,
        held_out_loss={**decision.losses, **loss},
        candidate_bytes={**decision.bytes, **dict.fromkeys(loss, after.bytes)},
        candidate_seconds={**decision.seconds, **{name: seconds["after"] for name in loss if seconds}},
        modules=(*reports, *left),
        before=run.before,
        after=after,
        calibration={
            "sequences": sum(len(batch.input_ids) for batch in run.batches),
            "tokens": sum(batch.num_tokens for batch in run.batches),
            "sha256": batches_digest(run.batches),
        },
        seconds=run.clock.seconds,
        versions={name: version(name) for name in ("torch", "transformers")},
        decode_seconds=seconds,
        costs=run.costs.device if run.costs else None,
    )
