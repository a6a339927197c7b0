from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel

from grasp.bench import decoding
from grasp.bench import model as bench_model
from grasp.bench import providers as bench_providers
from grasp.bench.decoding import difference, floors
from grasp.bench.percentiles import Percentiles
from grasp.bench.providers import truncate_
from grasp.bench.records import ModelResult, NotMeasured
from grasp.bench.results import read_results
from grasp.bench.tables import comma_separated, markdown
from grasp.calibration import bos_for
from grasp.evaluation.generation import GenerationTime, time_generation
from grasp.evaluation.perplexity import perplexity
from grasp.loading import load_model
from grasp.model.checkpoint_modules import lowrank_layers
from grasp.model.hf_quantizer import mark_compressed
from grasp_kernels import roofline
from grasp_kernels.dispatch import BACKENDS, backend_missing
from tests.command_line import Outcome, RunMain
from tests.tiny_models import tiny_model

REFERENCE = ("--backend", "reference")  # the kernels of Triton are interpreted here
SIZES = ("--prompt-tokens", "8", "--new-tokens", "3", "--repeats", "2", "--device", "cpu", "--threads", "1")
TEXT = "The quick brown fox jumps over the lazy dog, and then it does so once more. " * 3


def no_memory(*_: object, **__: object) -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.fixture
def run(bench: RunMain, tiny: Path, tmp_path: Path) -> RunMain:
    (tmp_path / "text.txt").write_text(TEXT)
    options = (*SIZES, "--text", tmp_path / "text.txt", "--window", "32", "--windows", "2")

    def run(*arguments: object) -> Outcome:
        ratio = () if "--compressed" in arguments else ("--retain-ratio", "0.4")
        return bench("model", tiny, *options, *ratio, *arguments)

    return run


def test_every_provider_is_timed_at_every_batch_size(run: RunMain, tmp_path: Path) -> None:
    outcome = run("--num-layers", "1", "--batch-size", "1,3", "-o", tmp_path / "model.jsonl")
    assert outcome.code == 0, outcome.err
    records = read_results(tmp_path / "model.jsonl")
    timed = {(record.provider, record.batch_size): record for record in records if isinstance(record, ModelResult)}
    backends = [row.name for row in BACKENDS if "lowrank_linear" in row.functions and not backend_missing(row.name)]
    names = ["dense", "removed", "compressed", *(f"compressed/{name}" for name in backends)]
    names += ["unfused"] if backend_missing("cpu") else ["dense/kernel", "compressed/kernel", "unfused"]
    assert list(timed) == [(name, batch) for batch in (1, 3) for name in names]
    for (name, batch), record in timed.items():
        assert record.layers == (1,)
        assert record.prefill_tokens_per_s > 0
        assert record.decode_tokens_per_s > 0
        assert record.prefill_ms.p50 < record.first_token_ms.p50
        assert record.inter_token_ms.p50 <= record.inter_token_ms.p95 <= record.inter_token_ms.p99
        assert record.conditions.threads == 1
        assert sum(record.dtype_bytes.values()) == record.weight_bytes > 0
        assert record.note
        layers = 2 if name == "removed" else 3
        assert record.kv_cache_bytes == batch * (8 + 3) * layers * 2 * 16 * 4  # keys and values of two heads of 8, fp32
        assert (record.logits_difference is None) == (name in ("dense", "removed"))
    assert timed["dense", 1].decode_speedup_over_dense == timed["dense", 3].prefill_speedup_over_dense == 1
    sizes = {name: timed[name, 1].weight_bytes for name in names}
    assert sizes["removed"] < sizes["compressed"] == sizes["unfused"] < sizes["dense"]
    for words in ("tokens/s", "per token", "Perplexity on", "plain SVD"):
        assert words in outcome.text
    left_out = {record.provider for record in records if isinstance(record, NotMeasured)}
    assert left_out.isdisjoint(names)
    assert all(f"Not measured: {name} at batch 1, 3: " in outcome.text for name in left_out)


def test_compiled_steps_are_timed_beside_eager_ones_at_every_length(
    run: RunMain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)  # which takes seconds for each model
    sizes = ("--batch-size", "2", "--mode", "eager,compiled", "--depth", "0,5", "--threads", "1,2", "--windows", "0")
    layers = ("--layers", "1", "--backend", "reference")
    outcome = run(*layers, *sizes, "-o", tmp_path / "model.jsonl")
    assert outcome.code == 0, outcome.err
    records = [record for record in read_results(tmp_path / "model.jsonl") if isinstance(record, ModelResult)]
    names = ["dense", "removed", "compressed", "compressed/reference", "unfused"]
    expected = list(product((1, 2), (0, 5), ("eager", "compiled"), names))
    assert [(r.conditions.threads, r.depth, r.mode, r.provider) for r in records] == expected
    for record in records:
        dense = record.provider == "dense"
        assert record.decode_speedup_over_dense == 1 if dense else record.decode_speedup_over_dense > 0
        checks = record.mode == "compiled" or not record.provider.startswith(("dense", "removed"))
        assert (record.logits_difference is not None) == checks
        assert record.end_to_end_ms.p50 > record.first_token_ms.p50 + 3 * record.output_token_ms.p50 * 0.99
        assert (record.load_s is not None) == dense
        depth = 2 * (record.depth + 8 + 3) * (2 if record.provider == "removed" else 3) * 2 * 16 * 4
        assert record.kv_cache_bytes == depth
    assert "dense, compiled" in outcome.text


def test_a_model_that_cannot_be_compiled_is_timed_eagerly(
    run: RunMain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> object:
        raise TorchDynamoException("it prints")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: refuse)
    sizes = ("--batch-size", "1", "--mode", "eager,compiled", "--windows", "0", "-o", tmp_path / "model.jsonl")
    outcome = run("--layers", "1", "--backend", "reference", *sizes)
    assert outcome.code == 0, outcome.err
    records = [record for record in read_results(tmp_path / "model.jsonl") if isinstance(record, ModelResult)]
    assert {record.mode for record in records} == {"eager"}
    assert "Not measured: dense, compiled at batch 1: torch.compile does not take it: it prints" in outcome.text


def test_perplexity_is_that_of_the_weights(run: RunMain, tiny: Path, tmp_path: Path) -> None:
    assert run("--layers", "1", "--batch-size", "1", *REFERENCE, "-o", tmp_path / "model.jsonl").code == 0
    measured = {
        record.provider: record for record in read_results(tmp_path / "model.jsonl") if isinstance(record, ModelResult)
    }
    model, tokenizer = load_model(str(tiny))
    tokens = tokenizer(TEXT, add_special_tokens=False).input_ids
    bos = bos_for(tokenizer)
    exact = perplexity(model, tokens[: 2 * (32 - (bos is not None))], window=32, bos_token_id=bos)
    assert measured["dense"].perplexity == pytest.approx(exact.perplexity, rel=1e-5)
    assert (measured["dense"].perplexity_text, measured["dense"].perplexity_tokens) == ("text.txt", exact.tokens)
    values = {name: record.perplexity for name, record in measured.items()}
    assert values["compressed"] == values["compressed/reference"] == values["unfused"] != values["dense"]
    assert values["removed"] not in (values["dense"], values["compressed"])


def test_a_compressed_checkpoint_is_measured_as_it_is(
    run: RunMain, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_model(str(tiny))
    truncate_(model, [0, 2], 0.5)
    mark_compressed(model)
    model.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    monkeypatch.chdir(tmp_path / "small")
    outcome = run("--compressed", ".", "--batch-size", "1", *REFERENCE, "-o", tmp_path / "model.jsonl")
    assert outcome.code == 0, outcome.err
    measured = [record for record in read_results(tmp_path / "model.jsonl") if isinstance(record, ModelResult)]
    assert {(record.layers, record.factors, record.note) for record in measured} == {((0, 2), "small", "")}
    assert measured[0].retain_ratio == pytest.approx(0.5, abs=0.05)
    assert measured[2].parameters == sum(parameter.numel() for parameter in model.parameters())


def test_perplexity_can_be_left_out_and_tables_are_written(run: RunMain, tmp_path: Path) -> None:
    outputs = [argument for name in ("m.jsonl", "m.md", "m.csv") for argument in ("-o", tmp_path / name)]
    sizes = ("--layers", "1", "--batch-size", "1,2", "--backend", "reference", "--windows", "0", "--text", "absent")
    outcome = run(*sizes, *outputs)
    assert outcome.code == 0, outcome.err
    records = read_results(tmp_path / "m.jsonl")
    assert {record.perplexity for record in records if isinstance(record, ModelResult)} == {None}
    assert (tmp_path / "m.md").read_text() == markdown(records)
    assert (tmp_path / "m.csv").read_text() == comma_separated(records)


def test_a_provider_with_wrong_logits_is_not_timed(
    run: RunMain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def spoil(model: nn.Module) -> None:
        original(model)
        unfused = next(module for module in model.modules() if isinstance(module, nn.Sequential))
        unfused[1].weight = nn.Parameter(-unfused[1].weight)

    original = bench_providers.unfuse_
    monkeypatch.setattr(bench_providers, "unfuse_", spoil)
    outcome = run("--num-layers", "1", "--batch-size", "1", *REFERENCE, "-o", tmp_path / "model.jsonl")
    assert outcome.code == 1
    assert "WRONG: unfused at batch 1: " in outcome.text
    records = read_results(tmp_path / "model.jsonl")
    assert [record.provider for record in records if isinstance(record, NotMeasured) and record.wrong] == ["unfused"]
    assert "unfused" not in {record.provider for record in records if isinstance(record, ModelResult)}


def test_a_size_that_does_not_fit_into_memory_costs_no_other_size(
    run: RunMain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def generate(model: PreTrainedModel, *, batch_size: int, **sizes: Any) -> GenerationTime:
        if batch_size == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return time_generation(model, batch_size=batch_size, **sizes)

    monkeypatch.setattr(decoding, "time_generation", generate)
    sizes = ("--layers", "1", "--batch-size", "1,2,3", "--backend", "reference", "--windows", "0")
    outcome = run(*sizes, "-o", tmp_path / "model.jsonl")
    assert outcome.code == 0, outcome.err
    records = read_results(tmp_path / "model.jsonl")
    assert {record.batch_size for record in records if isinstance(record, ModelResult)} == {1, 3}
    reason = "Not measured: * at batch 2: the device has too little memory for batches of 2 x 11 tokens"
    assert reason in outcome.text


@pytest.mark.parametrize(
    ("step", "owner", "left_out", "timed"),
    [
        ("truncate_", bench_model, "compressed", {"dense"}),
        ("remove_layers_", bench_providers, "removed", {"dense", "compressed", "compressed/reference", "unfused"}),
        ("unfuse_", bench_providers, "unfused", {"dense", "removed", "compressed", "compressed/reference"}),
    ],
)
def test_a_model_that_does_not_fit_into_memory_costs_no_other_model(
    step: str,
    owner: object,
    left_out: str,
    timed: set[str],
    run: RunMain,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(owner, step, no_memory)
    sizes = ("--layers", "1", "--batch-size", "1,2", *REFERENCE, "-o", tmp_path / "model.jsonl")
    outcome = run(*sizes)
    assert outcome.code == 0, outcome.err
    records = read_results(tmp_path / "model.jsonl")
    assert {record.provider for record in records if isinstance(record, ModelResult)} == timed
    assert f"Not measured: {left_out} at batch 1, 2: the device has too little memory for it beside" in outcome.text


def test_a_perplexity_that_does_not_fit_into_memory_costs_no_other_result(
    run: RunMain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def rate(model: PreTrainedModel, *arguments: Any, **options: Any) -> object:
        return (no_memory if list(lowrank_layers(model)) else perplexity)(model, *arguments, **options)

    monkeypatch.setattr(bench_model, "perplexity", rate)
    outcome = run("--layers", "1", "--batch-size", "1", *REFERENCE, "-o", tmp_path / "model.jsonl")
    assert outcome.code == 0, outcome.err
    records = [record for record in read_results(tmp_path / "model.jsonl") if isinstance(record, ModelResult)]
    rated = {record.provider: record.perplexity is not None for record in records}
    without = dict.fromkeys(["compressed", "compressed/reference", "unfused"], False)
    assert rated == {"dense": True, "removed": True, **without}
    reason = "perplexity: the device has too little memory for windows of 32 tokens; give a smaller --window"
    assert all(f"Not measured: {name} at batch 1: {reason}" in outcome.text for name in without)


def test_a_perplexity_that_is_no_number_is_said(run: RunMain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*arguments: object, **options: object) -> object:
        result = perplexity(*arguments, **options)  # type: ignore[arg-type]
        return bench_model.PerplexityResult(float("nan"), float("nan"), result.tokens, 2, 5, 32, 32)

    monkeypatch.setattr(bench_model, "perplexity", broken)
    outcome = run("--num-layers", "1", "--batch-size", "1", *REFERENCE, "-o", tmp_path / "model.jsonl")
    assert outcome.code == 0, outcome.err
    assert re.search(r"Not measured: dense at batch 1: perplexity: 5 of \d+ tokens", outcome.text)
    assert {
        record.perplexity for record in read_results(tmp_path / "model.jsonl") if isinstance(record, ModelResult)
    } == {None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-layers", "4"), "the model has 3 decoder layers, got --num-layers 4"),
        (("--layers", "1,3"), "the model has decoder layers 0..2, got layers [1, 3]"),
        (("--layers", "one"), "layers must be numbers and ranges such as 3,12-17, got 'one'"),
        (("--num-layers", "1", "--retain-ratio", "0"), "--retain-ratio must be above 0 and at most 1, got 0.0"),
        (("--num-layers", "1", "--new-tokens", "500"), "more than the model's 128 positions"),
        (("--num-layers", "1", "--backend", "warp"), "unknown backend 'warp'"),
        (("--batch-size", "0"), "--batch-size must be positive numbers such as 1,4,16"),
        (("--depth", "-1"), "depth must be numbers such as"),
        (("--depth", "500"), "a depth of 500, 8 prompt tokens and 3 new tokens are more than the model's 128"),
        (
            ("--min-seconds", "9", "--precision", "0.1", "--max-seconds", "3"),
            "--max-seconds must be at least --min-seconds, got 3 and 9",
        ),
        (("--precision", "2"), "precision must be between 0 and 1"),
        (("--max-seconds", "9"), "--max-seconds ends turns that wait for a precision, got 9 and no precision"),
        (("--mode", "eager,fast"), "unknown mode 'fast'; expected one of eager, compiled"),
        (("--compressed", "absent"), "absent"),
        (
            ("--compressed", "absent", "--layers", "1", "--retain-ratio", "0.4"),
            "a compressed checkpoint has its own layers and ranks; leave out --layers and --retain-ratio",
        ),
        (("--compressed", "absent", "--num-layers", "6"), "leave out --num-layers"),
        (("--text", "absent.txt"), "absent.txt"),
    ],
)
def test_bad_arguments_are_one_clear_line(run: RunMain, arguments: tuple[str, ...], message: str) -> None:
    outcome = run(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.splitlines()[-1].startswith("error: ")
    assert message in outcome.err


def test_the_dense_model_is_no_compressed_checkpoint(run: RunMain, tiny: Path) -> None:
    outcome = run("--compressed", tiny)
    assert outcome.code == 2
    assert "has no low-rank layers" in outcome.err


def test_logits_differ_as_much_as_the_worst_step() -> None:
    expected = torch.ones(2, 3, 4)
    got = expected.clone()
    got[1, 0, 0] += 1
    assert difference(got, expected) == pytest.approx(12**-0.5)
    assert difference(expected, expected) == 0


def test_percentiles_are_interpolated_milliseconds() -> None:
    found = Percentiles.of([0.001 * value for value in range(101)])
    assert (found.p50, found.p90, found.p95, found.p99) == pytest.approx((50, 90, 95, 99))
    assert Percentiles.of([0.002]) == Percentiles(2, 2, 2, 2)


def test_turns_go_on_until_medians_are_known_to_the_precision(run: RunMain, tmp_path: Path) -> None:
    sizes = ("--layers", "1", "--backend", "reference", "--batch-size", "1", "--windows", "0")
    outcome = run(*sizes, "--precision", "0.9", "-o", tmp_path / "model.jsonl")
    assert outcome.code == 0, outcome.err
    records = [record for record in read_results(tmp_path / "model.jsonl") if isinstance(record, ModelResult)]
    (turns,) = {record.repeats for record in records}
    assert turns >= 6  # two are asked, and fewer than six have no interval
    assert {record.stopped for record in records} == {"precision"}
    for record in records:
        assert record.first_token_ms.precision <= 0.9
        assert record.output_token_ms.precision <= 0.9
    assert f"Turns ended after {turns}: precision." in outcome.text


def test_floors_are_what_the_linears_read_and_compute() -> None:
    model = tiny_model("llama")
    slow_memory = roofline.Card("a card", flops=1e30, bandwidth=1e6)
    slow_multiplier = roofline.Card("a card", flops=1e6, bandwidth=1e30)
    body = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    head = 97 * 32
    assert floors(model, slow_memory, 2, 8, 1000) == pytest.approx(
        [(body + head) * 4 / 1e6, ((body + head) * 4 + 1000) / 1e6]
    )
    assert floors(model, slow_multiplier, 2, 8, 1000) == pytest.approx(
        [2 * 2 * (8 * body + head) / 1e6, 2 * 2 * (body + head) / 1e6]
    )
    assert floors(tiny_model("mixtral"), slow_memory, 1, 8, 0) == ()
