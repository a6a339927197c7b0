"""Scores are corrected by what each block of linears alone loses, measured here with whole models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from grasp.compress import compress_
from grasp.compression import held_out as choice
from grasp.compression import measured_blocks
from grasp.compression.candidates import low_ranks
from grasp.compression.measured_blocks import _rounded_otherwise, correction_factors
from grasp.compression.selection import replacement
from grasp.config import GraspConfig
from grasp.model.batch import CalibrationBatch
from tests.tiny_models import FAMILIES, tiny_batches, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_follow_the_divergence_that_each_block_alone_has(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grasp.model.batch.CONTEXT", 0)
    model = tiny_model(family, torch.float64)
    tokens = tiny_batches(2, seed=5)
    mask = torch.ones_like(tokens[1], dtype=torch.bool)
    mask[0, 5:] = False
    held_out = [CalibrationBatch(tokens[0]), CalibrationBatch(tokens[1], mask)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    corrections, seen = choice.corrections, []

    @torch.no_grad()
    def log_probabilities() -> list[Tensor]:
        """Of the tokens that are counted, (T, vocab), batch by batch."""
        rows = [model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1] for batch in held_out]
        return [row[batch.is_target].log_softmax(-1) for row, batch in zip(rows, held_out, strict=True)]

    def checked(run: Any, plan: Any, selections: Any, reference: Any, nats: float) -> Any:
        found = corrections(run, plan, selections, reference, nats)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        ranks, dense = low_ranks(selections, plan, run.prices, 1.0), log_probabilities()
        predicted, measured = dict[Any, float](), dict[Any, float]()
        for block in {(target.layer, target.block) for target in ranks}:
            members = [target for target in ranks if (target.layer, target.block) == block]
            scores = [selections[t].importance[selections[t].indices].sort(descending=True).values for t in members]
            rest = [selections[t].importance.sum() - s[: ranks[t]].sum() for t, s in zip(members, scores, strict=True)]
            predicted[block] = nats * float(sum(rest))
            for target in members:
                model.set_submodule(target.name, replacement(run.state, target, selections[target], ranks[target])[0])
            pairs = zip(dense, log_probabilities(), strict=True)
            total = sum(float((p.exp() * (p - q)).sum()) for p, q in pairs)
            measured[block] = total / sum(batch.num_targets for batch in held_out)
            for target in members:
                model.set_submodule(target.name, target.module)
        factors = correction_factors(predicted, measured)
        assert len(factors) > 2
        expected = {t.name: factors[t.layer, t.block] for t in selections if (t.layer, t.block) in factors}
        assert found == pytest.approx(expected, rel=1e-5)
        for target, selection in choice.corrected(selections, found).items():
            expected_scores = selections[target].importance * found.get(target.name, 1.0)
            assert torch.equal(selection.importance, expected_scores)
        seen.append(factors)
        return found

    monkeypatch.setattr(choice, "corrections", checked)
    config = GraspConfig.best(compression_ratio=0.15, schedule="single-sweep", sweep_dtype=None)
    compress_(model, tiny_batches(4), config, held_out=held_out)
    [factors] = seen
    assert max(factors.values()) > 1 > min(factors.values())


def test_factors_are_roots_of_measured_over_predicted_relative_to_all() -> None:
    first, second, third = ((layer, "mlp") for layer in range(3))
    factors = correction_factors({first: 2.0, second: 2.0, third: 0.0}, {first: 1.0, second: 7.0, third: 0.0})
    assert factors == pytest.approx({first: math.sqrt(1 / 4), second: math.sqrt(7 / 4)})
    for nothing in (0.0, math.nan, math.inf):
        assert correction_factors({first: 1.0, second: 1.0}, {first: nothing, second: nothing}) == {}
    assert correction_factors({first: 1.0, second: 1.0}, {first: 0.0, second: 1.0})[first] == 0.1


def test_few_tokens_of_all_held_out_sequences_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[list[int]]] = []
    run = choice.Reference.of

    def noted(model: Any, batches: list[CalibrationBatch], **options: Any) -> Any:
        seen.append([row.tolist() for batch in batches for row in batch.input_ids])
        return run(model, batches, **options)

    monkeypatch.setattr(choice.Reference, "of", noted)
    monkeypatch.setattr(choice, "MEASURED_TOKENS", 12)
    held_out = tiny_batches(5, 2, 8, seed=5)
    config = GraspConfig.best(compression_ratio=0.15, schedule="single-sweep")
    compress_(tiny_model("llama"), tiny_batches(4), config, held_out=held_out)
    rows = torch.cat(held_out)
    assert seen == [rows[[0, 1, 3, 4, 5, 6, 8, 9], :2].tolist()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hidden_states_rounded_otherwise_differ_by_a_unit_in_the_last_place(dtype: torch.dtype) -> None:
    hidden = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    other = _rounded_otherwise(hidden)
    assert torch.equal(_rounded_otherwise(hidden[1:]), other[1:])
    assert other.dtype == dtype
    changed = (other != hidden).float().mean()
    assert 0.1 < changed < 0.9
    assert ((other - hidden).abs() <= hidden.abs() * torch.finfo(dtype).eps).all()


def test_divergences_that_rounding_explains_correct_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    measure, corrections, seen = measured_blocks._divergences, choice.corrections, list[float]()

    def all_rounding(*args: Any) -> Any:
        divergences, rounding = measure(*args)
        seen.append(rounding)
        return {block: 1e6 * (1 + 0.1 * (block[0] == 0)) for block in divergences}, 1e6

    def checked(*args: Any) -> Any:
        factors = corrections(*args)
        assert factors.keys() == {target.name for target in args[2]}
        assert all(factor == pytest.approx(1.0, rel=0.1) for factor in factors.values())
        return factors

    monkeypatch.setattr(measured_blocks, "_divergences", all_rounding)
    monkeypatch.setattr(choice, "corrections", checked)
    config = GraspConfig.best(compression_ratio=0.15, schedule="single-sweep", sweep_dtype=None)
    for dtype in (torch.float64, torch.bfloat16):
        compress_(tiny_model("llama", dtype), tiny_batches(4), config, held_out=tiny_batches(2, seed=5))
    exact, rounded = seen
    assert abs(exact) < 1e-12 < 1e-7 < rounded
