"""GRASP: replace the linears of redundant decoder layers by the singular groups that the loss depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from grasp.architecture import Target, decoder, layer_targets, replace_module_
from grasp.attribution import plan_sweeps
from grasp.calibration import CalibrationBatch, as_batches, batches_digest
from grasp.checkpoint import GraspHfQuantizer, mark_compressed
from grasp.config import GraspConfig
from grasp.distributed import ALONE, Processes
from grasp.errors import CalibrationError, UnsupportedModelError
from grasp.evaluate import max_positions
from grasp.latency import CostTable
from grasp.loss import sum_nll
from grasp.modules import SVD, LowRankLinear, dense_shape, group_linears_, standing_in
from grasp.planning import (
    LEFT,
    Candidate,
    Choice,
    Plan,
    candidates,
    ceilings,
    choose_plans,
    cut,
    find_prices,
    hold_out,
    nats_per_score,
    partway,
    predicted_seconds,
)
from grasp.progress import Clock, Progress, silent
from grasp.redundancy import measure_redundancy
from grasp.refit import refit_
from grasp.removal import removable_layers, removal_losses, remove_layers_, skipping
from grasp.report import CompressionReport, ModuleReport, model_size, spectrum_indices
from grasp.resume import Decision, NoState
from grasp.scoring import Scores, gather_scores
from grasp.selection import break_even_rank, rank_for_threshold, retained_indices
from grasp.sweep import capture_prefix


@torch.inference_mode(mode=False)
@torch.enable_grad()
def compress_(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch | Tensor],
    config: GraspConfig | None = None,
    *,
    costs: CostTable | None = None,
    progress: Progress = silent,
    state: NoState | None = None,
    processes: Processes = ALONE,
    gather: Callable[..., Scores] = gather_scores,
) -> CompressionReport:
    """Compress a causal language model in place (arXiv 2501.00339).

    The redundant layers are found by block influence. From the deepest up, first the MLP and then the attention of each
    is replaced: the gradients in its singular values are taken over all batches on the model as it is by then. Other
    values of ``schedule`` replace more at once. If this is interrupted, the model is left whole and usable, with the
    blocks replaced so far. New low-rank linears that share an input are computed together;
    ``grasp.modules.group_linears_(model, False)`` takes them apart.

    Args:
        model: a decoder-only model of the transformers library, in any floating-point dtype.
        batches: calibration token batches: ``CalibrationBatch`` or int64 (B, L) tensors.
        config: what to compress and how; ``GraspConfig()`` where it is ``None``.
        costs: of decoding, see ``grasp.latency``; ``target_latency`` needs them.
        progress: called as ``progress(step, done, total)`` throughout.
        state: a ``grasp.resume.RunState`` that keeps what is done, so that the same call continues after a kill.
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
    with processes.together():
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
        with processes.together():
            kept = state.restore_(model, sweeps)
        done = list(kept.values())
        sweeps = [rest for members in sweeps if (rest := [target for target in members if target not in kept])]
        if state.decision:
            sweeps = []  # those not kept were left out
        entries = {min(target.layer for target in members) for members in sweeps}
        own = processes.share(calibration)
        with processes.together():
            prefix = capture_prefix(model, own, entries, dtype=config.sweep_dtype, progress=progress)

        def choose(
            gather: Callable[..., Scores], members: Sequence[Target], **how: Any
        ) -> Iterator[tuple[Target, Choice]]:
            clock.enter("attribution")
            how |= {"basis": config.basis, "metric": config.metric, "dtype": config.sweep_dtype}
            scores = gather(model, own, members, prefix, progress=progress, processes=processes, **how)
            clock.enter("svd and selection")
            ranks = ceilings(config, plans)
            return processes.divide(members, partial(choose_groups, scores=scores, ranks=ranks, config=config))

        for members in sweeps:
            if config.schedule == "progressive":
                with processes.together():
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
            with processes.together():
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


def check_layers(config: GraspConfig, depth: int) -> None:
    """Refuse, before anything long is done, layers that the model does not have."""
    if config.layers and config.layers[-1] >= depth:
        raise ValueError(f"the model has decoder layers 0..{depth - 1}, got layers={list(config.layers)}")
    if config.num_layers is not None and config.num_layers > depth:
        raise ValueError(f"the model has {depth} decoder layers, got num_layers={config.num_layers}")


def require_in_memory(targets: Iterable[Target]) -> None:
    """Refuse weights that nothing can stand in for, before anything long is done."""
    if any(target.module.weight.is_meta or isinstance(target.module.weight, DTensor) for target in targets):
        raise UnsupportedModelError(
            "schedule='progressive', which the preset 'best' has, needs all weights in memory, but some are offloaded "
            "or sharded; take schedule='single-sweep'"
        )


def require_positions(model: PreTrainedModel, batches: Sequence[CalibrationBatch]) -> None:
    """Refuse sequences that are longer than what the model was made for."""
    limit, longest = max_positions(model), max(batch.input_ids.shape[1] for batch in batches)
    if limit is not None and longest > limit:
        raise CalibrationError(
            f"calibration sequences have {longest} tokens, the model has {limit} positions; take shorter sequences"
        )


def eligible_targets(model: PreTrainedModel) -> tuple[dict[int, list[Target]], dict[int, list[ModuleReport]]]:
    """For each layer, the linears that low-rank factors can make smaller, and the modules that are left."""
    targets: dict[int, list[Target]] = {}
    left: dict[int, list[ModuleReport]] = {}
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, GraspHfQuantizer):
        raise UnsupportedModelError(
            f"the model is quantised ({type(quantizer).__name__}); expected a dense one. Load it unquantised."
        )
    for layer in range(len(decoder(model).layers)):
        found, reasons = layer_targets(model, layer)
        shapes = {target.name: dense_shape(target.module) for target in found}
        targets[layer] = [target for target in found if break_even_rank(shapes[target.name]) >= 1]
        small = {
            t.name: f"too small: rank 1 does not shrink {shapes[t.name]}" for t in found if t not in targets[layer]
        }
        left[layer] = [ModuleReport(name, layer, "", reason) for name, reason in (reasons | small).items()]
    if not any(targets.values()):
        raise UnsupportedModelError(
            f"no decoder layer of {type(model).__name__} has a dense nn.Linear or Conv1D to compress; expected some. "
            "A model that is quantised must be loaded unquantised."
        )
    return targets, left


def choose_groups(target: Target, scores: Scores, ranks: Mapping[Target, int], config: GraspConfig) -> Choice:
    """The singular groups of one linear that are kept, and the importance of all; nothing where it has no gradient."""
    if target not in scores:
        return {"no loss": torch.ones(())}
    svd, importance = scores[target]()
    rank = min(ranks[target], len(svd.S))
    if config.threshold_ratio is not None:
        rank = rank_for_threshold(importance, config.threshold_ratio, dense_shape(target.module))
    indices = retained_indices(importance, rank)
    kept = SVD(svd.U[:, indices], svd.S[indices], svd.Vh[indices])
    spectrum = svd.S[spectrum_indices(len(svd.S))]
    return {"indices": indices, "importance": importance, "spectrum": spectrum, **kept._asdict()}


def held_out_losses(
    model: PreTrainedModel,
    found: Sequence[tuple[Target, Choice]],
    plans: Mapping[str, Plan],
    ways: Mapping[str, Candidate],
    held_out: Sequence[CalibrationBatch],
    processes: Processes,
) -> dict[str, float]:
    """The mean loss of each candidate on the held-out batches, in nats per token; the model is left as it was."""
    own = processes.share(held_out)
    sums = torch.zeros(len(ways), dtype=torch.float64)
    for index, way in enumerate(ways.values()):
        try:
            for target, choice in cut(found, plans[way.scope], way):
                _replace_(model, target, choice)
            with processes.together(), skipping(model, way.removed, held_out[0]):
                sums[index] = sum_nll(model, own)
        finally:
            for target, _ in found:
                replace_module_(model, target.name, target.module)
    processes.sum_([sums])
    tokens = sum(batch.num_targets for batch in held_out)
    return dict(zip(ways, (sums / tokens).tolist(), strict=True))


def _replace_(model: PreTrainedModel, target: Target, choice: Choice) -> ModuleReport:
    """Put the low-rank form of one linear in its place."""
    for why in choice.keys() & LEFT.keys():
        return ModuleReport(target.name, target.layer, "", LEFT[why])
    kept = SVD(choice["U"], choice["S"], choice["Vh"])
    module = LowRankLinear.from_dense(target.module, torch.arange(len(kept.S)), kept)
    replace_module_(model, target.name, module)
    return _report(target, module, choice)


def _report(target: Target, module: LowRankLinear, choice: Choice) -> ModuleReport:
    indices, importance = choice["indices"], choice["importance"]
    n, k = dense_shape(target.module)
    before, after = list(target.module.parameters()), list(module.parameters())
    total = float(importance.double().sum())
    return ModuleReport(
        name=target.name,
        layer=target.layer,
        block=target.block,
        reason="",
        out_features=n,
        in_features=k,
        rank=module.rank,
        parameters_before=sum(p.numel() for p in before),
        parameters_after=sum(p.numel() for p in after),
        bytes_before=sum(p.numel() * p.element_size() for p in before),
        bytes_after=sum(p.numel() * p.element_size() for p in after),
        importance_kept=float(importance[indices].double().sum()) / total if total > 0 else 1.0,
        indices=tuple(indices.tolist()),
        spectrum=tuple(float(f"{value:.4g}") for value in choice["spectrum"].tolist()),
    )
