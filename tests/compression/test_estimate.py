from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from grasp.compress import compress_
from grasp.compression.device_speed import Rates
from grasp.compression.eligible import eligible_targets
from grasp.compression.estimate import estimate
from grasp.compression.job import CompressionJob
from grasp.compression.layer_cost import FLOP_FORMULAS
from grasp.compression.memory import projected_outputs
from grasp.compression.memory_budget import MemoryBudget
from grasp.compression.quantize import quantize_
from grasp.config import GraspConfig
from grasp.errors import CalibrationError, OutOfMemoryError, UnsupportedModelError
from grasp.method.channels import widths_of
from grasp.method.storage import Storage
from grasp.model.size import model_size
from grasp.statistics.covariance import covariance_bytes
from grasp_kernels import products
from tests import command_line
from tests.tiny_models import tiny_batches, tiny_model

CPU = torch.device("cpu")
COUNTED = {  # what PyTorch's counter does not know of the statistics
    **FLOP_FORMULAS,
    torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1],
    torch.ops.grasp.singular_value_grad: lambda x, d, U, Vh, *_, **__: 2 * math.prod(x[:-1]) * U[1] * (U[0] + Vh[1]),
}
EIGHT_B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
)


def job(model_config: Any, config: GraspConfig, dtype: torch.dtype = torch.float32, **sizes: int) -> CompressionJob:
    return CompressionJob(model_config, config, dtype, CPU, **{"num_samples": 4, "seq_len": 64, **sizes})


@pytest.fixture
def without_planning(monkeypatch: pytest.MonkeyPatch) -> None:
    """One span for each sweep: planning runs layers without data, whose FLOPs would be counted."""

    def budget(model: Any, batches: Any, config: GraspConfig, targets: Any, **options: Any) -> MemoryBudget:
        return MemoryBudget(None, 0, None)

    monkeypatch.setattr(MemoryBudget, "of", budget)


@pytest.mark.usefixtures("without_planning")
@pytest.mark.parametrize(
    ("family", "attention", "batches", "schedule", "metric"),
    [
        ("llama", "sdpa", 2, "sequential", "taylor"),
        ("llama", "eager", 4, "single-sweep", "taylor"),
        ("llama", "sdpa", 4, "single-sweep", "fisher"),  # never sums gradients of weights
        ("gpt2", "sdpa", 4, "sequential", "taylor"),
        ("gpt2", "sdpa", 4, "per-layer", "taylor"),
    ],
)
def test_flops_equal_the_counted_flops_of_a_compression(
    family: str, attention: str, batches: int, schedule: str, metric: str
) -> None:
    model = tiny_model(family, attn_implementation=attention)
    config = GraspConfig(layers=(0, 2), retain_ratio=0.3, schedule=schedule, metric=metric)
    flops = estimate(job(model.config, config, num_samples=2 * batches), 2).flops
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        compress_(model, tiny_batches(batches, 2, 64), config)
    assert flops.total - flops.decompositions == pytest.approx(counter.get_total_flops(), rel=0.005)


@pytest.mark.usefixtures("without_planning")
@pytest.mark.parametrize(("family", "metric", "sweeps"), [("llama", "magnitude", 2), ("gpt2", "fisher", 4)])
def test_data_dependent_bases_add_covariances_and_a_metric_may_add_sweeps(
    family: str, metric: str, sweeps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "PANEL", {"cpu": 8})  # these matrices are smaller than a panel
    model = tiny_model(family)
    config = replace(GraspConfig.best(compression_ratio=0.1), metric=metric, refit=False)
    made = estimate(job(model.config, config, num_samples=16), 2)
    targets = [target for linears in eligible_targets(model)[0].values() for target in linears]
    assert made.memory.sums >= covariance_bytes(targets, projected=projected_outputs(targets, config))
    assert made.flops.sweeps == sweeps * sum(plan.flops for plan in made.sweeps)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        compress_(model, tiny_batches(8, 2, 64), config, held_out=tiny_batches(1, 2, 64, seed=2))
    assert made.flops.total - made.flops.decompositions == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_refit_adds_a_few_forward_passes() -> None:
    config = GraspConfig.best(compression_ratio=0.1)
    made = estimate(job(tiny_model("llama").config, config))
    without = estimate(job(tiny_model("llama").config, replace(config, refit=False)))
    refit = made.flops.refit + made.flops.refit_sums + made.flops.refit_solutions
    assert made.flops.total - refit == without.flops.total
    assert 3 * made.flops.block_influence < made.flops.refit < 6 * made.flops.block_influence


def test_quantising_adds_as_many_forward_passes_as_a_refit() -> None:
    config = GraspConfig.best(compression_ratio=0.1)
    made = estimate(job(tiny_model("llama").config, replace(config, bits=8)))
    without = estimate(job(tiny_model("llama").config, config))
    assert made.flops.total - made.flops.quantizing - made.flops.rounding == without.flops.total
    assert 3 * made.flops.block_influence < made.flops.quantizing < 9 * made.flops.block_influence
    assert made.flops.rounding > 0
    nothing = estimate(job(tiny_model("llama").config, GraspConfig(compression_ratio=0.0, bits=8)))
    assert (nothing.flops.quantizing, nothing.flops.rounding) == (made.flops.quantizing, made.flops.rounding)
    assert nothing.memory.refit_states > 0


@pytest.mark.parametrize(
    ("schedule", "layers_run"), [("sequential", [1, 1, 3, 3]), ("per-layer", [1, 3]), ("single-sweep", [3])]
)
def test_a_sweep_runs_from_its_lowest_layer_up(schedule: str, layers_run: list[int]) -> None:
    result = estimate(job(tiny_model("llama").config, GraspConfig(layers=(0, 2), schedule=schedule)))
    assert [sweep.layers for sweep in result.sweeps] == layers_run
    assert sum(sweep.linears for sweep in result.sweeps) == 14
    assert (result.layers, result.assumed, result.fewest, result.most) == ((0, 2), False, *[result.flops.total] * 2)


def test_unknown_layers_are_assumed_in_the_middle_and_bounded() -> None:
    result = estimate(job(tiny_model("llama", num_hidden_layers=5).config, GraspConfig(num_layers=1)))
    assert (result.layers, result.assumed) == ((2,), True)
    assert result.fewest < result.flops.total < result.most
    dearest = estimate(job(tiny_model("llama", num_hidden_layers=5).config, GraspConfig(layers=(0,))))
    assert (result.most, result.memory) == (dearest.flops.total, dearest.memory)


@pytest.mark.parametrize("config", [GraspConfig(num_layers=0), GraspConfig.best(num_layers=0)])
def test_nothing_to_compress_takes_a_forward_pass(config: GraspConfig) -> None:
    result = estimate(job(tiny_model("llama").config, config))
    assert result.sweeps == ()
    assert result.flops.total == result.flops.block_influence > 0
    assert result.memory.peak > 0


def test_a_model_larger_than_memory_is_estimated_by_its_configuration() -> None:
    result = estimate(job(EIGHT_B, GraspConfig(), torch.bfloat16, num_samples=512, seq_len=512))
    assert result.model_bytes == 2 * 8_030_261_248
    plain = 2 * 6.98e9 * 512 * 512  # a multiply and an add for each weight of the layers and each token
    assert result.flops.block_influence == pytest.approx(plain, rel=0.05)
    assert result.largest_matrix == (14336, 4096)


def test_bytes_follow_the_method() -> None:
    config = GraspConfig(layers=(1, 2), schedule="per-layer", retain_ratio=0.3)
    one, two = (estimate(job(EIGHT_B, config, num_samples=64, seq_len=512), size).memory for size in (1, 2))
    attention, mlp = 2 * 4096 * 4096 + 2 * 4096 * 1024, 3 * 4096 * 14336
    assert one.sums == two.sums == 4 * (attention + mlp)  # the gradient of each weight, in fp32
    assert one.hidden_states == two.hidden_states == 2 * 64 * 512 * 4096 * 4  # of two layers, for all tokens
    assert two.batch == pytest.approx(2 * one.batch, rel=0.05)
    assert one.factors == pytest.approx(2 * 0.3 * 4 * (attention + mlp), rel=0.01)
    narrow = estimate(job(EIGHT_B, GraspConfig(layers=(1, 2), sweep_dtype="bfloat16"), seq_len=512)).memory
    outside = 2 * (2 * 128256 + 1) * 4096  # of the copies in bf16: embeddings, norm and head
    states = 512 * 4096 * (4 - 2)  # of one batch
    assert outside - 10 * states < narrow.fixed - one.fixed < outside
    layer = 2 * (attention + mlp + 2 * 4096)
    assert narrow.batch > 30 * layer  # the layers that run are copied too
    assert (one.on_cpu, one.host) == (True, 0)


def best_job(**changes: Any) -> CompressionJob:
    config = GraspConfig.best(compression_ratio=0.2)
    return replace(job(EIGHT_B, config, torch.bfloat16, num_samples=16, seq_len=512), **changes)


def test_a_budget_divides_the_layers_into_spans() -> None:
    whole = estimate(best_job())
    assert [(sweep.spans, sweep.runs, sweep.layers) for sweep in whole.sweeps] == [(1, 1, 32)]
    # Refit: three streams of hidden states, and the inputs of qkv, o, gate and up, and down of one layer.
    assert whole.memory.hidden_states == 16 * 512 * 2 * 4096
    assert whole.memory.refit_states == 16 * 512 * 2 * ((3 + 3) * 4096 + 14336)
    config = replace(best_job().config, bits=8, refit=False)  # quantising keeps as much, in each process
    assert estimate(best_job(config=config, processes=2)).memory.refit_states == whole.memory.refit_states
    budget = whole.memory.peak // 4
    divided = estimate(best_job(), memory=budget)
    (sweep,) = divided.sweeps
    assert 4 <= sweep.spans == sweep.runs < 8
    assert divided.memory.peak <= budget
    assert 0.15 * whole.memory.sums < divided.memory.sums < 0.3 * whole.memory.sums
    # From the lowest span up, all layers below a span are run once more in each round.
    assert divided.flops.sweeps == pytest.approx(whole.flops.sweeps, rel=0.02)
    assert 0 == whole.flops.prefix < divided.flops.prefix < 2 * divided.flops.block_influence
    assert divided.flops.total - divided.flops.prefix == pytest.approx(whole.flops.total, rel=0.02)


def test_the_least_budget_runs_layers_several_times_and_less_is_refused() -> None:
    least = estimate(best_job()).least_memory
    made = estimate(best_job(), memory=least)
    (sweep,) = made.sweeps
    assert sweep.runs > sweep.spans == 32
    assert made.least_memory == least >= made.memory.peak
    with pytest.raises(OutOfMemoryError, match=rf"at least {-(-least // 10**6)}MB"):
        estimate(best_job(), memory=least - 1)


def test_methods_that_replace_in_order_are_refused_a_budget_below_their_peak() -> None:
    small = replace(best_job(), config=GraspConfig(layers=(30,)))
    least = estimate(small).least_memory
    assert estimate(small, memory=least).memory.peak == least  # no hidden states in memory
    with pytest.raises(OutOfMemoryError, match="at least"):
        estimate(small, memory=least - 1)


def test_hidden_states_go_to_disk_where_the_budget_ends() -> None:
    beside = estimate(best_job(on_card=True))
    states = beside.memory.host
    assert states == beside.memory.refit_states > beside.memory.hidden_states > 0
    less = estimate(best_job(on_card=True), host_memory=states // 3)
    assert less.memory.host == states // 3
    assert less.memory.disk - beside.memory.disk == states - states // 3
    assert less.memory.peak == beside.memory.peak
    assert estimate(best_job()).memory.peak == beside.memory.peak + beside.memory.hidden_states


def test_disk_holds_the_factors_of_both_rounds() -> None:
    weights = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    single = replace(best_job().config, schedule="single-sweep")
    groups = 32 * (4096 * (2 * 8192 + 3 * 18432) + 2 * 1024 * 5120)
    # Groups in fp32, up to full rank; the first round's are cut, pivoted and in bf16; fitted ones are in bf16. MLPs at
    # five widths, at the chosen one and whole take more than the cut.
    mlps = 32 * 4096 * (sum(widths_of(14336)) + 4 * 14336)
    assert mlps > weights
    assert estimate(best_job()).memory.disk == pytest.approx(4 * groups + 2 * mlps + 2 * groups, rel=0.01)
    few = replace(best_job().config, compression_ratio=None, target_bytes=3 * 10**9, bits="auto")  # channels stay
    assert estimate(best_job(config=few)).memory.disk == pytest.approx(6 * groups + 2 * weights, rel=0.01)
    assert estimate(best_job(config=single)).memory.disk == pytest.approx(4 * groups + 2 * groups, rel=0.01)
    unfitted = replace(single, refit=False)
    assert estimate(best_job(config=unfitted)).memory.disk == pytest.approx(4 * groups, rel=0.01)


def test_processes_divide_the_work_and_the_hidden_states() -> None:
    one, four = (estimate(best_job(processes=count, sharded=count > 1)) for count in (1, 4))
    assert four.flops == one.flops
    assert four.memory.hidden_states == one.memory.hidden_states // 4
    gates_and_ups = 2 * 32 * 2 * 4096 * 14336  # gathered while their layers are swept
    assert four.memory.sums == one.memory.sums + gates_and_ups
    linears = 2 * 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert four.model_bytes == one.model_bytes - linears + linears // 4
    assert four.memory.fixed - one.memory.fixed == 2 * 2 * 4096 * 14336  # a gathered weight, twice
    rates = Rates(sweeps=2e12, statistics=2e12, svd=1e11)
    assert four.seconds(rates) == {kind: seconds / 4 for kind, seconds in one.seconds(rates).items()}
    rounded = GraspConfig.best(target_bytes=8 * 10**9, bits=8)
    alone, shared = (estimate(best_job(config=rounded, processes=count)).seconds(rates) for count in (1, 4))
    assert shared["quantising"] == alone["quantising"] > 0  # each process rounds with all batches
    assert shared["decompositions"] == alone["decompositions"] / 4


@pytest.mark.parametrize(("samples", "few"), [(8, 1), (16, 2), (64, 2)])
def test_candidates_are_measured_on_an_eighth_as_many_sequences(samples: int, few: int) -> None:
    made = estimate(best_job(num_samples=samples))
    body, head = made.flops.block_influence / samples, 2 * 511 * 128256 * 4096
    maps = 2 * made.flops.block_influence  # to choose the layers, and to fit the map
    # Blocks and layers, on 1024 tokens at most; eight share the dense model's head. For a latency layers are twice.
    alone, compared = few * (2 * 2 * 32 * (body / 2 + head + head / 8)), samples // 8 * 8 * (body + head)
    assert made.flops.held_out - maps == pytest.approx(alone + compared, rel=0.001)
    fast = estimate(best_job(num_samples=samples, config=GraspConfig.best(target_latency=0.5)))
    assert fast.flops.held_out - made.flops.held_out == pytest.approx(alone / 2, rel=0.001)


def test_the_time_left_knows_all_steps_of_comparing_candidates() -> None:
    model, config, steps = tiny_model("llama"), GraspConfig.best(compression_ratio=0.2), set[str]()
    left = estimate(job(model.config, config)).time_left(Rates(1.0, 1.0, 1.0))
    compress_(
        *(model, tiny_batches(4), config),
        held_out=tiny_batches(2, seed=5),
        progress=lambda step, *_: steps.add(step),
    )
    assert left._repeats["candidates"] == len({step for step in steps if step.startswith("candidates")})


def test_where_bits_suffice_one_sweep_decides() -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=128)
    quantize_(model, Storage(8))
    configs = [GraspConfig.best(target_bytes=int(part * model_size(model).bytes), bits="auto") for part in (0.9, 0.4)]
    dense = tiny_model("llama", hidden_size=64, intermediate_size=128).config
    few, fewer = (estimate(job(dense, config)) for config in configs)
    assert (few.rounds, few.passes, fewer.rounds, fewer.passes) == (1, 1, 2, 2)
    assert few.flops.held_out == few.flops.refit == 0
    assert 0 < few.flops.decompositions == fewer.flops.decompositions / 2
    assert few.flops.rounding == fewer.flops.rounding


def test_low_rank_layers_of_a_compressed_model_are_counted() -> None:
    model = tiny_model("llama")
    before = estimate(job(model.config, GraspConfig(layers=(2,))))
    compress_(model, tiny_batches(), GraspConfig(layers=(0,), retain_ratio=0.3))
    after = estimate(job(model.config, GraspConfig(layers=(2,))))
    assert after.model_bytes == sum(4 * p.numel() for p in model.parameters()) < before.model_bytes
    assert after.flops.block_influence < before.flops.block_influence


def test_time_is_flops_over_rates() -> None:
    result = estimate(job(tiny_model("llama").config, GraspConfig(layers=(2,))))
    flops = result.flops
    passes = flops.block_influence + flops.prefix + flops.sweeps
    expected = passes / 2e9 + flops.statistics / 4e9 + flops.decompositions / 1e9
    assert sum(result.seconds(Rates(sweeps=2e9, statistics=4e9, svd=1e9)).values()) == pytest.approx(expected)


def test_the_estimate_fits_json() -> None:
    result = estimate(job(tiny_model("llama").config, GraspConfig(layers=(2,))))
    document = json.loads(json.dumps(result.to_dict()))
    assert document["totals"] == {"flops": result.flops.total, "peak_bytes": result.memory.peak, "host_bytes": 0}
    assert document["layers"] == [2]


@pytest.mark.parametrize(
    ("config", "sizes", "error", "message"),
    [
        (GraspConfig(layers=(3,)), {}, ValueError, r"layers 0\.\.2, got layers=\[3\]"),
        (GraspConfig(), {"seq_len": 129}, CalibrationError, "129 tokens, the model has 128 positions"),
        (GraspConfig(), {"num_samples": 0}, ValueError, "num_samples must be at least 1"),
        (GraspConfig(compression_ratio=0.99), {}, ValueError, "largest possible ratio"),
    ],
)
def test_impossible_compressions_are_refused_as_by_compress(
    config: GraspConfig, sizes: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        estimate(job(tiny_model("llama").config, config, **sizes))


def test_a_quantised_model_is_refused() -> None:
    config = tiny_model("llama").config
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(UnsupportedModelError, match="quantised \\(gptq\\)"):
        estimate(job(config, GraspConfig()))


MEASURE = """
import copy, json, re, sys, torch
from grasp import GraspConfig, compress_
from grasp.calibration import builtin_text, token_batches
from grasp.compression.estimate import estimate
from grasp.compression.job import CompressionJob
from grasp.environment import return_freed_memory
from grasp.loading import load_model

def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

loaded, tokenizer = load_model("builtin")
del loaded.model.layers[8:]
loaded.config.num_hidden_layers = 8
for settings, samples, length, size in json.loads(sys.argv[1]):
    model = copy.deepcopy(loaded)
    text = builtin_text("calibration")[:20_000]
    batches = token_batches(tokenizer, text, num_samples=samples, seq_len=length, batch_size=size)
    config = GraspConfig(**settings)
    job = CompressionJob(model.config, config, model.dtype, torch.device("cpu"), samples, length)
    expected = estimate(job, size).memory.peak
    return_freed_memory()
    before = kilobytes("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
    compress_(model, batches, config)
    print(json.dumps([1024 * (kilobytes("VmHWM") - before), expected]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_of_a_real_model_is_within_the_estimate() -> None:
    cases = [
        ({"layers": [6], "retain_ratio": 0.3}, 2, 512, 1),
        # Without AVX-512 a processor multiplies bf16 ten times slower than fp32: few tokens.
        ({"layers": [4], "schedule": "single-sweep", "sweep_dtype": "bfloat16"}, 2, 64, 2),
    ]
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(cases)],
        env=command_line.environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()[-len(cases) :]
    for case, (measured, expected) in zip(cases, map(json.loads, lines), strict=True):
        assert measured <= expected <= 2.5 * measured, case


@pytest.mark.parametrize(
    "target", [{"target_latency": 0.5, "bits": "auto"}, {"compression_ratio": 0.1, "scope": "model"}]
)
def test_all_layers_are_counted_for_a_latency_and_for_the_whole_model(target: dict[str, Any]) -> None:
    everything: dict[str, Any] = {"basis": "kfac", "metric": "magnitude", "allocation": "global"}
    config = GraspConfig(**everything, schedule="single-sweep", **target)
    made = estimate(job(tiny_model("llama").config, config))
    assert made.layers == (0, 1, 2)
    assert made.assumed == ("target_latency" in target)
    assert [sweep.linears for sweep in made.sweeps] == [21]
