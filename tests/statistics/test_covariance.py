from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.errors import NonFiniteError, UnsupportedModelError
from grasp.method.svd import SVD, Projected
from grasp.model.batch import CalibrationBatch
from grasp.model.dense import dense_weight
from grasp.model.targets import Target, decoder, layer_targets
from grasp.statistics import covariance
from grasp.statistics.covariance import Covariance, covariance_bytes, gather_covariances
from grasp.statistics.moments import basis_moments
from grasp.statistics.processes import ALONE, Processes
from grasp.statistics.sweep import Call, capture_prefix
from grasp_kernels.products import accumulate_gram_
from tests.many_processes import run
from tests.tiny_models import DENSE_FAMILIES, tiny_batches, tiny_model

LAYER = 1


def targets_of(model: PreTrainedModel, *layers: int) -> list[Target]:
    return [target for layer in layers for target in layer_targets(model, layer)[0]]


def gather(
    model: PreTrainedModel, batches: Sequence[Tensor | CalibrationBatch], targets: list[Target], **options: object
) -> dict[str, Covariance]:
    wrapped = [batch if isinstance(batch, CalibrationBatch) else CalibrationBatch(batch) for batch in batches]
    prefix = capture_prefix(model, wrapped, {min(target.layer for target in targets)})
    found = gather_covariances(prefix, targets, **options)  # type: ignore[arg-type]
    return {target.name: each for target, each in found.items()}


class Seen(NamedTuple):
    x: Tensor  # (B, L, K)
    d: Tensor  # (B, L, N)


def naive(model: PreTrainedModel, batch: Tensor, mask: Tensor | None, names: Sequence[str]) -> dict[str, list[Seen]]:
    """Every call of the named linears, by hooks, in a full forward and backward pass of the summed loss."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    handles = []
    for name in names:

        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            output.retain_grad()
            calls[name].append((args[0].detach(), output))

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    logits = model(batch, attention_mask=None if mask is None else mask.long()).logits[:, :-1]
    nll = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
    if mask is not None:
        nll = nll[(mask[:, 1:] & mask[:, :-1]).flatten()]
    nll.sum().backward()
    for handle in handles:
        handle.remove()
    return {name: [Seen(x, output.grad) for x, output in made] for name, made in calls.items()}


def outer(rows: Tensor) -> Tensor:
    """Σ r rᵀ over all rows, one at a time."""
    flat = rows.flatten(0, -2)
    return torch.stack([torch.outer(row, row) for row in flat]).sum(0)


def assert_close(got: Tensor | None, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert got is not None
    assert got.dtype == expected.dtype
    assert expected.norm() > 0
    assert (got - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_sums_of_outer_products_are_those_of_every_token_of_every_batch(family: str) -> None:
    model, batches = tiny_model(family, torch.float64), tiny_batches(2)
    targets = targets_of(model, 1, 2)
    got = gather(model, batches, targets)
    seen = [naive(model, batch, None, [target.name for target in targets]) for batch in batches]
    assert got.keys() == {target.name for target in targets}
    for name, (A, B, tokens) in got.items():
        assert tokens == sum(batch.numel() for batch in batches)
        assert_close(A, sum(outer(call.x) for each in seen for call in each[name]), 1e-6)  # rotary angles are fp32
        assert_close(B, sum(outer(call.d) for each in seen for call in each[name]), 1e-6)
        assert torch.equal(A, A.mT)
        assert torch.equal(B, B.mT)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_projected_sums_are_those_of_the_products_with_the_weight(family: str) -> None:
    model, batches = tiny_model(family, torch.float64), tiny_batches(2)
    targets = targets_of(model, 1, 2)
    expected, projected = gather(model, batches, targets), targets[::2]
    got = gather(model, batches, targets, projected=projected)
    for target in targets:
        (A, B, tokens), whole = got[target.name], expected[target.name]
        assert_close(A, whole.A)
        assert tokens == whole.tokens
        assert isinstance(B, Projected) == (target in projected)
        if isinstance(B, Projected):
            W = dense_weight(target.module)
            assert_close(B.gram, W.mT @ whole.B @ W)
            assert torch.equal(B.gram, B.gram.mT)
            assert_close(B.squares, whole.B.diagonal())


def test_an_input_that_several_linears_share_is_gathered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, int]] = []

    def counting(gram: Tensor, x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return accumulate_gram_(gram, x)

    monkeypatch.setattr(covariance, "accumulate_gram_", counting)
    model, batches = tiny_model("llama"), tiny_batches(3)
    found = gather(model, batches, targets_of(model, LAYER), outputs=False)
    assert len(shapes) == 3 * 4  # for each batch: before q/k/v, before o, before gate/up, before down
    sums = {name.rpartition(".")[2]: each.A for name, each in found.items()}
    assert sums["q_proj"] is sums["k_proj"] is sums["v_proj"]
    assert sums["gate_proj"] is sums["up_proj"]
    assert len({id(A) for A in sums.values()}) == 4


def test_only_what_is_asked_for_is_gathered() -> None:
    model, batches = tiny_model("llama"), tiny_batches(1)
    assert all(B is None for _, B, _ in gather(model, batches, targets_of(model, LAYER), outputs=False).values())


@pytest.mark.parametrize("side", ["left", "right", "ragged"])
def test_padding_counts_nothing(side: str) -> None:
    model = tiny_model("llama", torch.float64)
    batch, position = tiny_batches(1, batch_size=2, length=12)[0], torch.arange(12)
    masks = {"left": (position >= 4).expand(2, 12), "right": (position < 8).expand(2, 12)}
    mask = masks.get(side, torch.stack([position >= 5, position < 9]))
    targets = targets_of(model, LAYER)
    got = gather(model, [CalibrationBatch(batch, mask)], targets)
    seen = naive(model, batch, mask, [target.name for target in targets])
    for name, (A, B, tokens) in got.items():
        (call,) = seen[name]
        assert tokens == mask.sum()
        assert_close(A, outer(call.x[mask]), 1e-6)
        assert_close(B, outer(call.d[mask]), 1e-6)


class Twice(nn.Module):
    """Its first linear is called twice; one of the two inputs may be the second linear's too."""

    def __init__(self, size: int, shares: str | None) -> None:
        super().__init__()
        self.linear, self.other, self.shares = nn.Linear(size, size), nn.Linear(size, size), shares

    def forward(self, x: Tensor) -> Tensor:
        inputs = (x, x.tanh())
        hidden = [self.linear(each) for each in inputs]
        third = {"first": inputs[0], "last": inputs[1], None: hidden[0]}[self.shares]
        return hidden[0] * hidden[1] + self.other(third)


def model_calling_twice(shares: str | None = None) -> tuple[PreTrainedModel, list[Target]]:
    model = tiny_model("llama", torch.float64)
    decoder(model).layers[LAYER].mlp = Twice(32, shares).double()
    return model, [target for target in targets_of(model, LAYER) if target.block == "mlp"]


@pytest.mark.parametrize("shares", [None, "first", "last"])
def test_every_call_of_a_linear_counts(shares: str | None) -> None:
    model, targets = model_calling_twice(shares)
    batches = tiny_batches(2)
    got = gather(model, batches, targets)
    seen = [naive(model, batch, None, [target.name for target in targets]) for batch in batches]
    for name, (A, B, tokens) in got.items():
        calls = [call for each in seen for call in each[name]]
        assert tokens == sum(call.x.shape[:2].numel() for call in calls)
        assert_close(A, sum(outer(call.x) for call in calls))
        assert_close(B, sum(outer(call.d) for call in calls))


def test_linears_that_stop_sharing_their_input_are_refused() -> None:
    sums = covariance.CovarianceSums(outputs=False)
    q, k, *_ = targets_of(tiny_model("llama"), LAYER)
    shared = torch.ones(2, 32)
    for target in (q, k):
        sums.add(Call(target, shared, torch.ones(2, 1)))
    sums.end_batch()
    for target in (q, k):
        sums.add(Call(target, torch.ones(2, 32), torch.ones(2, 1)))
    with pytest.raises(UnsupportedModelError, match="in one batch and not in a later one"):
        sums.end_batch()


def test_a_linear_that_does_not_reach_the_loss_has_no_entry() -> None:
    model = tiny_model("llama")
    unused = targets_of(model, LAYER)[0]
    model.set_submodule(unused.name.rpartition(".")[0], Idle(decoder(model).layers[LAYER].self_attn))
    targets = targets_of(model, LAYER)
    names = {target.name.rpartition(".")[2] for target in targets}
    got = {name.rpartition(".")[2] for name in gather(model, tiny_batches(1), targets)}
    assert names - got == {"idle"}


class Idle(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.idle = attention, nn.Linear(32, 32)

    def forward(self, hidden_states: Tensor, **options: object) -> tuple[Tensor, Tensor | None]:
        self.idle(hidden_states)
        output: tuple[Tensor, Tensor | None] = self.attention(hidden_states, **options)
        return output


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-5), ("bfloat16", 0.1)])
def test_sums_are_fp32_and_close_to_fp64(dtype: str | None, tolerance: float) -> None:
    exact, batches = tiny_model("llama", torch.float64), tiny_batches(4)
    single = copy.deepcopy(exact).float()
    expected, got = gather(exact, batches, targets_of(exact, LAYER)), gather_in(single, batches, dtype)
    for name, (A, B, _) in got.items():
        for sum_, other in ((A, expected[name].A), (B, expected[name].B)):
            assert sum_.dtype == torch.float32
            assert 0 < (sum_ - other).norm() <= tolerance * other.norm(), name


def gather_in(model: PreTrainedModel, batches: Sequence[Tensor], dtype: str | None) -> dict[str, Covariance]:
    wrapped, targets = [CalibrationBatch(batch) for batch in batches], targets_of(model, LAYER)
    prefix = capture_prefix(model, wrapped, {LAYER}, dtype=dtype)
    found = gather_covariances(prefix, targets)
    return {target.name: each for target, each in found.items()}


def test_progress_and_hooks_end_with_the_sweep() -> None:
    model, steps = tiny_model("llama"), []
    gather(model, tiny_batches(2), targets_of(model, LAYER), progress=lambda *step: steps.append(step))
    assert steps == [("covariances, layer 1", 1, 2), ("covariances, layer 1", 2, 2)]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_non_finite_sum_is_reported_with_its_linear() -> None:
    sums = covariance.CovarianceSums()
    target = targets_of(tiny_model("llama"), LAYER)[0]
    rows = torch.ones(2, 32)
    sums.add(Call(target, rows, rows * 1e30))
    sums.end_batch()
    with pytest.raises(NonFiniteError, match=r"covariance of model\.layers\.1\.self_attn\.q_proj"):
        sums.result()


def random_basis(target: Target, rank: int) -> SVD:
    """Factors that are neither orthogonal nor of full rank."""
    n, k = dense_weight(target.module).shape
    generator = torch.Generator().manual_seed(n + k)
    U, Vh = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((n, rank), (rank, k)))
    return SVD(U, torch.ones(rank, dtype=torch.float64), Vh)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("twice", [False, True])
def test_moments_in_any_basis_are_those_of_each_unit(second: bool, twice: bool) -> None:
    model, targets = model_calling_twice() if twice else (tiny_model("qwen2", torch.float64), None)
    targets = targets or targets_of(model, LAYER)
    batch, mask = tiny_batches(1, batch_size=3)[0], torch.ones(3, 12, dtype=torch.bool)
    mask[1, 9:] = False
    batches = [CalibrationBatch(tiny_batches(1)[0]), CalibrationBatch(batch, mask)]
    bases = {target: random_basis(target, 5) for target in targets}
    prefix = capture_prefix(model, batches, {LAYER})
    got = basis_moments(prefix, bases, second=second)
    seen = [naive(model, each.input_ids, each.attention_mask, [t.name for t in targets]) for each in batches]
    assert got.keys() == bases.keys()
    for target, (first, squares) in got.items():
        U, _, Vh = bases[target]
        tokens: list[Tensor] = []
        for calls, each in zip(seen, batches, strict=True):
            per_call = []  # (B, L, R) each
            for x, d in calls[target.name]:
                token = torch.einsum("blk,rk->blr", x, Vh) * torch.einsum("bln,nr->blr", d, U)
                per_call.append(token if each.attention_mask is None else token * each.attention_mask[..., None])
            tokens += [token.flatten(0, 1) for token in per_call]
        assert_close(first, torch.cat(tokens).sum(0), 1e-6)
        assert (squares is None) == (not second)
        if squares is not None:
            assert_close(squares, torch.cat(tokens).square().sum(0), 1e-6)


def test_moments_that_overflow_are_reported_with_their_linear() -> None:
    model = tiny_model("llama")
    target = targets_of(model, LAYER)[0]
    U, S, Vh = (tensor.float() for tensor in random_basis(target, 2))
    batches = [CalibrationBatch(batch) for batch in tiny_batches(1)]
    prefix = capture_prefix(model, batches, {LAYER})
    with pytest.raises(NonFiniteError, match=r"gradient of model\.layers\.1\.self_attn\.q_proj"):
        basis_moments(prefix, {target: SVD(U * 1e30, S, Vh)}, second=True)


def test_the_bytes_of_covariances_are_those_of_the_distinct_tensors() -> None:
    for family, dtype in (("llama", torch.float32), ("gpt2", torch.bfloat16), ("opt", torch.float64)):
        model = tiny_model(family, dtype)
        targets = targets_of(model, 0, 2)
        for outputs in (True, False):
            found = gather(model, tiny_batches(1), targets, outputs=outputs)
            tensors = {id(sum_): sum_ for A, B, _ in found.values() for sum_ in (A, B) if sum_ is not None}
            taken = sum(sum_.numel() * sum_.element_size() for sum_ in tensors.values())
            assert covariance_bytes(targets, outputs=outputs) == taken
        projected = {name: each.B for name, each in gather(model, tiny_batches(1), targets, projected=targets).items()}
        taken = covariance_bytes(targets, projected=targets)
        more = taken - covariance_bytes(targets, outputs=False)
        assert more == sum(gram.nbytes + squares.nbytes for gram, squares in projected.values())
        weights = covariance_bytes(targets, projected=targets, fetched=True) - taken
        assert weights == sum(target.module.weight.nbytes for target in targets)


def gather_all(processes: Processes, count: int) -> dict[str, list[Tensor]]:
    model, batches = tiny_model("llama", torch.float64), [CalibrationBatch(batch) for batch in tiny_batches(count)]
    targets, own = targets_of(model, LAYER), processes.local_batches(batches)
    prefix = capture_prefix(model, own, {LAYER})
    found = gather_covariances(prefix, targets, processes=processes)
    bases = {target: random_basis(target, 5) for target in targets}
    moments = basis_moments(prefix, bases, second=True, processes=processes)
    counts = {target: torch.tensor(float(each.tokens)) for target, each in found.items()}
    return {target.name: [*found[target][:2], counts[target], *moments[target]] for target in targets}


@pytest.mark.parametrize("count", [1, 3])
def test_two_processes_add_up_to_one(count: int) -> None:
    expected = gather_all(ALONE, count)
    for outcome in run(gather_all, count):
        assert outcome.value.keys() == expected.keys()
        for name, sums in outcome.value.items():
            for got, alone in zip(sums, expected[name], strict=True):
                assert_close(got, alone)


def gather_owned(processes: Processes) -> dict[str, list[Tensor]]:
    model, batches = tiny_model("llama", torch.float64), [CalibrationBatch(batch) for batch in tiny_batches(3)]
    prefix = capture_prefix(model, processes.local_batches(batches), {LAYER})
    targets = targets_of(model, LAYER)
    found = gather_covariances(prefix, targets, projected=targets[-3:], processes=processes, owned=True)
    sums = {target.name: [each.A, torch.tensor(float(each.tokens))] for target, each in found.items()}
    for target, each in found.items():
        sums[target.name] += each.B if isinstance(each.B, Projected) else [each.B]
    return sums


def test_each_process_can_get_the_sums_of_its_own_targets_alone() -> None:
    expected, names = gather_owned(ALONE), [target.name for target in targets_of(tiny_model("llama"), LAYER)]
    for rank, outcome in enumerate(run(gather_owned)):
        assert set(outcome.value) == set(names[rank::2])
        for name, sums in outcome.value.items():
            for got, alone in zip(sums, expected[name], strict=True):
                assert_close(got, alone)
