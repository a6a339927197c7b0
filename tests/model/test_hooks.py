from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from grasp.model.hooks import forwarding, hooked


def test_hooks_see_every_call_of_their_modules_until_the_block_ends() -> None:
    first, second, x = nn.Linear(2, 3), nn.Linear(3, 2), torch.ones(1, 2)
    calls: list[tuple[str, nn.Module, tuple[int, ...]]] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(("before", module, tuple((args[0] if args else kwargs["input"]).shape)))

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
        calls.append(("after", module, tuple(output.shape)))

    with hooked(first, second, before=before, after=after):
        second(input=first(x))
    second(first(x))
    assert calls == [
        ("before", first, (1, 2)),
        ("after", first, (1, 3)),
        ("before", second, (1, 3)),
        ("after", second, (1, 2)),
    ]


def test_hooks_may_change_arguments_and_output_and_are_gone_after_an_error() -> None:
    linear, x = nn.Linear(2, 2), torch.ones(1, 2)
    expected = linear(2 * x) + 1

    def run() -> None:
        with hooked(
            linear,
            before=lambda module, args, kwargs: ((2 * args[0],), kwargs),
            after=lambda module, args, kwargs, output: output + 1,
        ):
            assert torch.equal(linear(x), expected)
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert not linear._forward_pre_hooks
    assert not linear._forward_hooks


def test_another_forward_function_is_undone_whatever_was_there() -> None:
    plain, patched, x = nn.Linear(2, 2), nn.Linear(2, 2), torch.ones(1, 2)
    before = plain(x)
    patched.forward = lambda x: x - 1

    def run() -> None:
        with forwarding([plain, patched], lambda x: x + 1):
            assert torch.equal(plain(x), x + 1)
            assert torch.equal(patched(x), x + 1)
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert torch.equal(plain(x), before)
    assert "forward" not in plain.__dict__
    assert torch.equal(patched(x), x - 1)
