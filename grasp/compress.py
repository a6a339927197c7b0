"""GRASP: replace the linears of redundant decoder layers by the singular groups that the loss depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.checkpoint.compression_report import CompressionReport
from grasp.checkpoint.run_state import Decision, NoState
from grasp.compression.budget import ceilings, choose_plans, find_prices, predicted_seconds
from grasp.compression.candidates import (
    Choice,
    _replace_,
    candidates,
    choose_groups,
    cut,
    held_out_losses,
    hold_out,
    nats_per_score,
    partway,
)
from grasp.compression.eligible import check_layers, eligible_targets, require_in_memory, require_positions
from grasp.compression.refit import refit_
from grasp.config import GraspConfig
from grasp.method.cost_table import CostTable
from grasp.method.schedules import plan_sweeps
from grasp.model.batch import CalibrationBatch, as_batches, batches_digest
from grasp.model.dense import standing_in
from grasp.model.hf_quantizer import mark_compressed
from grasp.model.layer_removal import removable_layers, remove_layers_
from grasp.model.lowrank_linear import group_linears_
from grasp.model.size import model_size
from grasp.model.targets import Target, decoder
from grasp.progress import Clock, Progress, no_progress
from grasp.statistics.layer_losses import removal_losses
from grasp.statistics.processes import ALONE, Processes
from grasp.statistics.redundancy import measure_redundancy
from grasp.statistics.scores import Scores, gather_scores
from grasp.statistics.sweep import capture_prefix


@torch.inference_mode(mode=False)
@torch.enable_grad()
def compress_(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch | Tensor],
    config: GraspConfig | None = None,
    *,
    costs: CostTable | None = None,
    progress: Progress = no_progress,
    state: NoState | None = None,
    processes: Processes = ALONE,
    gather: Callable[..., Scores] = gather_scores,
) -> CompressionReport:
    """Compress a causal language model in place (arXiv 2501.00339).

    The redundant layers are found by block influence. From the deepest up, first the MLP and then the attention of each
    is replaced: the gradients in its singular values are taken over all batches on the model as it is by then. Other
    values of ``schedule`` replace more at once. If this is interrupted, the model is left whole and usable, with the
    blocks replaced so far. New low-rank linears that share an input are computed together;
    ``grasp.model.lowrank_linear.group_linears_(model, False)`` takes them apart.

    Args:
        model: a decoder-only model of the transformers library, in any floating-point dtype.
        batches: calibration token batches: ``CalibrationBatch`` or int64 (B, L) tensors.
        config: what to compress and how; ``GraspConfig()`` where it is ``None``.
        costs: of decoding, see ``grasp.method.cost_table``; ``target_latency`` needs them.
        progress: called as ``progress(step, done, total)`` throughout.
        state: a ``grasp.checkpoint.run_state.RunState`` that keeps what is done, so that the same call
            continues after a kill.
        processes: those that do this together, all given the same; they share the batches, and all get the result.
        gather: called as ``gather_scores`` is, on the dense model; a study gives one that remembers what an earlier
            call gathered.

    Returns:
        What was done to every module of the redundant layers, what was left and why, sizes before and after.

    Raises:
        ValueError: if the configuration asks for layers, a ratio or a target that the model does not have.
        CostTableError: if ``costs`` are another model's.
        CalibrationError: if there are no batches, they hold no token to predict, or a sequence is longer than the model
            has positions.
        NonFiniteError: if weights, hidden states, the loss or gradients are NaN or infinite.
        UnsupportedModelError: if the decoder layers cannot be found or hold nothing to compress.
        ResumeError: if ``state`` was begun with another request, is damaged, or cannot be written.
        DistributedError: if another process fails, is gone, or was given something else.
    """
    state = NoState() if state is None else state
    config = GraspConfig() if config is None else config
    batches = as_batches(batches)
    require_positions(model, batches)
    clock = Clock()
    layers = decoder(model).layers
    before = model_size(model, layers)
    check_layers(config, len(layers))
    targets, left = eligible_targets(model)
    prices = find_prices(config, model, targets, costs)
    removable = removable_layers(model) if config.remove_layers else []
    if removable and processes.sharded:
        raise ValueError("remove_layers needs whole layers, but the model is sharded; leave one of the two out")
    if config.schedule == "progressive":
        require_in_memory(target for found in targets.values() for target in found)

    tokens = [batch.num_tokens for batch in batches]
    processes.require_same("the request", f"{config} {before} {tokens} {batches_digest(batches)}")
    with processes.fail_together():
        state.begin(model, batches, config, costs, clock)
    clock.enter("block_influence")
    redundancy = state.redundancy
    if redundancy is None:
        redundancy = measure_redundancy(model, batches, progress=progress, processes=processes)
        state.keep_redundancy(redundancy)
    plans = choose_plans(config, redundancy, targets, before.parameters, prices)
    sweeps = plan_sweeps(ceilings(config, plans), config.schedule)
    calibration, held_out = hold_out(batches) if config.holds_out else (batches, [])
    scope, removed, losses = state.decision or Decision(next(iter(plans)), (), {})
    try:
        clock.enter("prefix")
        with processes.fail_together():
            kept = state.restore_(model, sweeps)
        done = list(kept.values())
        sweeps = [rest for members in sweeps if (rest := [target for target in members if target not in kept])]
        if state.decision:
            sweeps = []  # those not kept were left out
        entries = {min(target.layer for target in members) for members in sweeps}
        own = processes.local_batches(calibration)
        with processes.fail_together():
            prefix = capture_prefix(model, own, entries, dtype=config.sweep_dtype, progress=progress)

        def choose(
            gather: Callable[..., Scores], members: Sequence[Target], **how: Any
        ) -> Iterator[tuple[Target, Choice]]:
            clock.enter("attribution")
            how |= {"basis": config.basis, "metric": config.metric, "dtype": config.sweep_dtype}
            scores = gather(model, own, members, prefix, progress=progress, processes=processes, **how)
            clock.enter("svd and selection")
            ranks = ceilings(config, plans)
            return processes.map_divided(members, partial(choose_groups, scores=scores, ranks=ranks, config=config))

        for members in sweeps:
            if config.schedule == "progressive":
                with processes.fail_together():
                    first = state.restore_cut(members)
                if first is None:
                    first = partway(list(choose(gather, members, state=state)), plans[scope], prices)
                    state.keep_cut(first)
                standing = [(target.module, svd) for target, svd in first.items()]
                choices = choose(gather_scores, members, running=partial(standing_in, standing))
                del first, standing
            else:
                choices = choose(gather, members, state=state)
            if config.decides_together:
                found = list(choices)
                removal = {}
                if removable:
                    removal = removal_losses(model, removable, held_out, progress=progress, processes=processes)
                    del removal[max(removal, key=removal.__getitem__)]  # one layer stays
                nats = nats_per_score(config, sum(batch.num_tokens for batch in calibration))
                ways = candidates(found, plans, config, prices, removal, nats)
                if held_out:
                    losses = held_out_losses(model, found, plans, ways, held_out, processes)
                best = ways[min(losses, key=losses.__getitem__, default=next(iter(ways)))]
                scope, removed, choices = best.scope, best.removed, cut(found, plans[best.scope], best)
            for target, choice in choices:
                done.append(_replace_(model, target, choice))
                if not config.decides_together:
                    state.keep_module(model, done[-1])
            if config.decides_together:
                state.keep_decision(model, Decision(scope, removed, losses), done)
        if config.refit:
            clock.enter("refit")
            with processes.fail_together():
                refit_(
                    *(model, calibration, ceilings(config, plans)),
                    removed=removed,
                    dtype=config.sweep_dtype,
                    progress=progress,
                )
        remove_layers_(model, removed)
    finally:
        group_linears_(model)
        mark_compressed(model)
    redundant = plans[scope].layers
    done += [report for layer in redundant for report in left[layer]]
    return CompressionReport(
        config=config.to_dict(),
        block_influence=tuple(redundancy.layers),
        redundant_layers=redundant,
        removed_layers=removed,
        retain_ratio=plans[scope].retain_ratio if config.threshold_ratio is None else None,
        scope=scope,
        held_out_loss=losses,
        modules=tuple(done),
        before=before,
        after=model_size(model, layers),
        calibration={
            "sequences": sum(len(batch.input_ids) for batch in batches),
            "tokens": sum(tokens),
            "sha256": batches_digest(batches),
        },
        seconds=clock.seconds,
        versions={name: version(name) for name in ("torch", "transformers")},
        decode_seconds={} if costs is None else predicted_seconds(costs, targets, done, removed),
        costs=None if costs is None else costs.device,
    )
