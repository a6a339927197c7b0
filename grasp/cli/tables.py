"""Results of the commands as tables and lines on stdout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from grasp.bench.schema import grouped
from grasp.checkpoint.compression_report import KIND_COLUMNS, candidate_columns, kinds_text
from grasp.checkpoint.inspection import Inspection, short_name
from grasp.cli.console import print_facts, print_table, print_text
from grasp.formatting import count, counts, duration, layer_ranges, score_rows, share, size

if TYPE_CHECKING:
    from pathlib import Path

    from grasp.checkpoint.compression_report import CompressionReport
    from grasp.method.cost_table import CostTable
    from grasp.workflows.compress import Compression
    from grasp.workflows.convert import Conversion
    from grasp.workflows.demo import Demo
    from grasp.workflows.dry_run import DryRun
    from grasp.workflows.evaluate import Evaluation
    from grasp.workflows.export import Export
    from grasp.workflows.quantize import Quantization
    from grasp.workflows.recover import Recovery


# The order in which a token passes the linears of a Llama layer. Linears with other names follow, sorted by name.
_COLUMNS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def show_compression(result: Compression) -> None:
    """Show sizes before and after, the modules that were left and why, and the checkpoint folder."""
    report = result.report
    print_facts(
        [
            ("layers", layer_ranges(report.redundant_layers) or "none"),
            ("removed", f"layers {layer_ranges(report.removed_layers)}" if report.removed_layers else ""),
            ("channels", report.channels_text),
            ("linears", f"{len(report.compressed)} replaced, {len(report.left)} left"),
            ("form", counts(module.form for module in report.compressed)),
            (
                "parameters",
                f"{count(report.before.parameters)} -> {count(report.after.parameters)}: "
                f"{share(report.compression_ratio)} removed, {share(report.decoder_compression_ratio)} of the decoder",
            ),
            ("bytes", f"{size(report.before.bytes)} -> {size(report.after.bytes)}"),
            ("kept", _retained(report)),
            ("decoding", _latency(report)),
            ("held-out loss", report.held_out_text),
            ("kinds of text", kinds_text(report.kinds)),
            ("time", f"{sum(report.seconds.values()):.1f} s"),
            ("checkpoint", result.output),
        ]
    )
    for title, columns, rows in (
        ("Candidates, in nats per token", candidate_columns(report.candidates), report.candidates),
        ("Kinds of text, in nats per token", KIND_COLUMNS, report.kinds),
    ):
        if rows:
            cells = [[column.text_of(row) for column in columns] for row in rows]
            print_table([column.heading for column in columns], cells, title=title)
    for reason, modules in grouped(report.left, lambda module: module.reason).items():
        print_text(f"left: {len(modules)} modules such as {modules[0].name}: {reason}")


def show_dry_run(result: DryRun) -> None:
    """Show what a compression takes: time, memory and disk, then FLOPs by sweep, FLOPs and bytes by purpose."""
    cost, memory = result.estimate, result.estimate.memory
    guess = ", assumed: block influence decides" if cost.assumed else ""
    bounds = f"; {cost.fewest:.2e} to {cost.most:.2e} for other layers" if cost.assumed else ""
    print_facts(
        [
            ("model", f"{result.model}, {result.dtype} on {result.device}, {size(cost.model_bytes)}{_sharing(result)}"),
            ("layers", (layer_ranges(cost.layers) or "none") + guess),
            (
                "batches",
                f"{cost.batch_size} x {result.samples.seq_len} tokens, {result.samples.num_samples} sequences",
            ),
            ("sweeps", f"{cost.passes * len(cost.sweeps)} over the calibration set, {_spans(result)}"),
            ("FLOPs", f"{cost.flops.total:.2e}{bounds}"),
            ("time", f"about {duration(result.seconds)} {_rates(result)}"),
            ("memory", _device_memory(result)),
            ("CPU memory", "" if memory.on_cpu else size(memory.host)),
            ("disk", size(memory.disk)),
            ("checkpoint", f"{result.output}, not written"),
        ]
    )
    print_table(
        ("sweep", "linears", "layers", "spans", "FLOPs"),
        [
            (sweep.name, str(sweep.linears), str(sweep.layers), str(sweep.spans), f"{sweep.flops:.2e}")
            for sweep in cost.sweeps
        ],
    )
    work = [(name.replace("_", " "), f"{flops:.2e}") for name, flops in vars(cost.flops).items()]
    use = [(name.replace("_", " "), size(stored)) for name, stored in vars(memory).items() if name != "on_cpu"]
    rows = [(*left, *right) for left, right in zip_longest(work, use, fillvalue=("", ""))]
    print_table(("FLOPs for", "", "bytes of", ""), rows)


def _sharing(result: DryRun) -> str:
    if result.estimate.processes == 1:
        return ""
    return f" in each of {result.estimate.processes} processes{', sharded' if result.sharded else ''}"


def _spans(result: DryRun) -> str:
    spans = max((sweep.spans for sweep in result.estimate.sweeps), default=0)
    again = sum(sweep.runs - sweep.spans for sweep in result.estimate.sweeps)
    text = "each in one run" if spans <= 1 else f"each in {spans} spans of layers"
    return text + (f"; layers whose sums do not fit together run {again} times more" if again else "")


def _rates(result: DryRun) -> str:
    if result.on_card:
        return f"at {result.rates.sweeps:.1e} FLOP/s, the peak rate of {result.device}: no program reaches it"
    return f"at {result.rates.sweeps:.1e} FLOP/s, measured just now"


def _device_memory(result: DryRun) -> str:
    least = f"at least {size(result.estimate.least_memory)}"
    budget = "" if result.memory is None else f", budget {size(result.memory)}"
    free = "" if result.free_bytes is None else f"; {size(result.free_bytes)} are free"
    return f"{size(result.estimate.memory.peak)} above the model's ({least}{budget}){free}"


def show_evaluation(result: Evaluation) -> None:
    """Show perplexity and size, then the scores of tasks."""
    print_facts(
        [
            ("model", result.model),
            *_perplexity_facts(result),
            ("parameters", count(result.size.parameters)),
            ("bytes", size(result.size.bytes)),
        ]
    )
    if result.scores is not None:
        columns = ("task", "documents", "shots", "metric", "value", "stderr")
        print_table(columns, score_rows(result.scores), title="Tasks, by lm-eval")


def _perplexity_facts(result: Evaluation) -> list[tuple[str, str]]:
    if (measured := result.result) is None:
        return []
    windows = f"{measured.windows} windows of {measured.window}, {measured.stride} new in each"
    if measured.windows == 1:
        windows = f"one window of {measured.window}"
    return [
        ("text", f"{result.text}: {measured.tokens} tokens in {windows}"),
        ("perplexity", f"{measured.perplexity:.3f}"),
        ("nll", f"{measured.nll:.5f} nats per token"),
    ]


def show_recovery(result: Recovery) -> None:
    """Show the training, the held-out loss before and after, and the checkpoint folder."""
    report = result.report
    trained = f"in {report.factors} low-rank linears" if report.factors else "scales and norms of a quantised model"
    print_facts(
        [
            ("parameters", f"{count(report.trained_parameters)} {trained}"),
            ("trained on", f"{count(report.tokens)} tokens in {report.steps} steps"),
            (
                "held-out loss",
                f"{report.loss_before:.4f} -> {report.loss_after:.4f} nats per token, after step {report.best_step}",
            ),
            ("kinds of text", kinds_text(report.kinds)),
            ("time", f"{sum(report.seconds.values()):.1f} s"),
            ("checkpoint", result.output),
        ]
    )


def show_conversion(result: Conversion) -> None:
    """Show the converted layers, sizes before and after, and what was left and why."""
    before, after, linears = result.before, result.after, len(result.after.modules)
    had_it = linears - len(result.converted) - len(result.left)
    if not result.converted:
        print_text(
            f"Nothing was converted: {had_it} of {linears} linears were {result.form}. The new folder is a copy."
        )
    print_facts(
        [
            ("converted", f"{len(result.converted)} of {linears} linears, {result.form} now"),
            ("parameters", f"{count(before.parameters)} -> {count(after.parameters)}"),
            (
                "removed",
                f"{share(before.compression_ratio)} -> {share(after.compression_ratio)} of the dense model's "
                f"{count(after.parameters_before)}",
            ),
            ("bytes", f"{size(before.bytes)} -> {size(after.bytes)}"),
            ("checkpoint", after.directory),
        ]
    )
    for reason, names in grouped(result.left, result.left.__getitem__).items():
        print_text(f"left: {len(names)} linears such as {names[0]}: {reason}")
    if result.omitted:
        print_text(f"not copied: {', '.join(result.omitted)}")


def show_export(result: Export) -> None:
    """Show the folder, bytes before and after, and what became of the low-rank linears."""
    print_facts(
        [
            ("checkpoint", result.model),
            ("files", result.output),
            ("bytes", f"{size(result.before)} -> {size(result.after)}"),
        ]
    )
    print_text(result.note)


def show_quantization(result: Quantization) -> None:
    """Show bytes before and after, and bytes by part."""
    before, after = result.before, result.after
    print_facts(
        [
            ("model", result.model),
            ("linears", f"{result.storage}, {result.rounding}"),
            ("quantised", counts(after.quantized.values())),
            ("bytes", f"{size(before.bytes)} -> {size(after.bytes)}: {share(after.bytes / before.bytes)}"),
            ("kinds of text", kinds_text(result.kinds)),
            ("time", f"{result.seconds:.1f} s"),
            ("checkpoint", after.directory),
        ]
    )
    _print_parts(after)


def show_inspection(inspection: Inspection) -> None:
    """Show bytes by part, and the ranks of each compressed layer."""
    print_facts(
        [
            ("checkpoint", inspection.directory),
            ("model", f"{inspection.model_type}, {inspection.num_layers} layers"),
            (
                "parameters",
                f"{count(inspection.parameters)}: {share(inspection.compression_ratio)} of "
                f"{count(inspection.parameters_before)} removed",
            ),
            ("bytes", size(inspection.bytes)),
            ("low-rank", counts(module.form for module in inspection.modules)),
            ("quantised", counts(inspection.quantized.values())),
        ]
    )
    _print_parts(inspection)
    if not inspection.modules:
        print_text(f"No low-rank layers: this checkpoint is dense{' and quantised' * bool(inspection.quantized)}.")
        return
    _print_rank_table(inspection)


def _print_parts(inspection: Inspection) -> None:
    """Show the size of each part of a model."""
    total = inspection.bytes
    print_table(
        ("part", "tensors", "parameters", "bytes", "share"),
        [
            (part.name, str(part.tensors), count(part.parameters), size(part.bytes), share(part.bytes / total))
            for part in inspection.parts
        ],
    )


def _print_rank_table(inspection: Inspection) -> None:
    """Show one row per compressed layer: the rank of each linear, and the share of parameters that is left."""
    present = {short_name(module.name) for module in inspection.modules}
    names = [*(name for name in _COLUMNS if name in present), *sorted(present - {*_COLUMNS})]
    columns = ["layer", *(name.removesuffix("_proj") for name in names), "kept"]
    influence = None
    if (report := inspection.report) is not None:
        influence = [score for layer, score in enumerate(report.block_influence) if layer not in report.removed_layers]
        columns.append("BI")
    rows = []
    for layer, modules in grouped(inspection.modules, lambda module: module.layer).items():
        kept = sum(module.parameters for module in modules) / sum(module.dense_parameters for module in modules)
        ranks: dict[str, list[str]] = defaultdict(list)  # the two c_proj of a layer of GPT-2 share a column
        for module in modules:
            ranks[short_name(module.name)].append(f"{module.rank}{'p' * (module.form == 'pivoted')}")
        row = [str(layer), *(", ".join(ranks[name]) or "-" for name in names), share(kept)]
        rows.append(row if influence is None else [*row, f"{influence[layer]:.3f}"])
    is_pivoted = any(module.form == "pivoted" for module in inspection.modules)
    print_table(columns, rows, title="Ranks; p: pivoted" if is_pivoted else "Ranks")


def show_costs(table: CostTable, output: Path) -> None:
    """Show microseconds per token of each linear and of the rest of the model."""
    print_facts(
        [
            ("device", table.device if table.threads is None else f"{table.device}, threads: {table.threads}"),
            ("dtype", table.dtype),
            ("form", table.form),
            ("per layer", f"{_microseconds(table.layer, table.layer_quantized)} beside its linears"),
            ("the rest", _microseconds(table.rest, table.rest_quantized)),
            ("output", str(output)),
        ]
    )
    print_table(
        ("outputs x inputs", "dense us", "rank: us"),
        [
            (
                f"{n} x {k} {storage or ''}",
                f"{each.dense * 1e6:.1f}",
                ", ".join(f"{rank}: {1e6 * s:.1f}" for rank, s in zip(each.ranks, each.seconds, strict=True)),
            )
            for ((n, k), storage), each in table.linears.items()
        ],
    )


def _microseconds(seconds: float, quantized: float | None) -> str:
    return f"{seconds * 1e6:.0f} us" + ("" if quantized is None else f", quantised {quantized * 1e6:.0f} us")


def show_environment(facts: Mapping[str, Any]) -> None:
    """Show versions and processors, then the backends in the order of the dispatch table."""
    cpu = facts["cpu"]
    print_facts(
        [
            *((name, version or "not installed") for name, version in facts["versions"].items()),
            ("platform", facts["platform"]),
            ("cpu", f"{cpu['logical_cores']} logical cores, {cpu['torch_threads']} torch threads, {cpu['capability']}"),
            *((f"gpu {index}", _gpu(gpu)) for index, gpu in enumerate(facts["gpus"])),
            ("gpu", "" if facts["gpus"] else "none"),
            ("plain reload", facts["transformers_reload"]),
        ]
    )
    print_facts(list(facts["backends"].items()), title="Backends, in the order in which they are tried")


def show_demo(result: Demo) -> None:
    """Show the table and the findings."""
    conditions = result.conditions
    print_table(
        ("", "parameters", "bytes", "perplexity", "prefill\ntokens/s", "decode\ntokens/s"),
        [
            (
                row.name,
                count(row.parameters),
                size(row.bytes),
                f"{row.perplexity:.2f}",
                f"{row.prefill_tokens_per_s:.0f}",
                f"{row.decode_tokens_per_s:.1f}",
            )
            for row in result.rows
        ],
        title=f"{conditions['model']}, {conditions['dtype']} on {conditions['device']}, layers "
        f"{layer_ranges(conditions['layers'])}",
    )
    print_text()
    for finding in result.findings:
        print_text(f"- {finding}")
    print_text()
    print_text(
        f"{result.output} has the best checkpoint, report.json and demo.json; took {conditions['seconds']:.0f} s."
    )


def _retained(report: CompressionReport) -> str:
    if report.config["allocation"] == "global":
        return "one budget over all matrices"
    if report.retain_ratio is None:
        return "a share of the importance of each matrix"
    return f"{share(report.retain_ratio)} of the parameters of each matrix"


def _latency(report: CompressionReport) -> str:
    if report.costs is None:
        return ""
    dense, after = (report.decode_seconds[key] for key in ("dense", "after"))
    times = f"{dense * 1e3:.2f} -> {after * 1e3:.2f} ms per token, {share(after / dense)}"
    return f"{times}, as predicted for {report.costs}"


def _gpu(gpu: Mapping[str, Any]) -> str:
    return f"{gpu['name']}, compute capability {gpu['compute_capability']}, {size(gpu['memory_bytes'])}"
